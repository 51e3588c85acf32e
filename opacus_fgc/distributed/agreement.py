"""Ranks go by the same arguments, have the same copies, and work on the same samples: checked, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from opacus_fgc.distributed.mesh import is_sharded, local
from opacus_fgc.distributed.topology import Layout
from opacus_fgc.errors import PrivacyValueError
from opacus_fgc.taps.tap import tensors_in


def check_agreement(layout: Layout, values: Mapping[str, float]) -> None:
    """Raises a ValueError unless all ranks go by the same numbers.

    Args:
        layout: the layout of the model.
        values: what to compare, by what to call it.
    """
    own = torch.tensor(list(values.values()), dtype=torch.float64, device=layout.device)
    for axis in layout.axes:
        for name, numbers in zip(values, axis.gathered(own).T.tolist(), strict=True):
            if len(set(numbers)) > 1:
                raise ValueError(
                    f"ranks disagree about {name}: {', '.join(f'{number:g}' for number in numbers)}. Every rank "
                    "has to take the same steps, with the same arguments"
                )


def check_copies(layout: Layout) -> None:
    """Raises a ValueError unless ranks of a tensor-parallel group have the same parameters where they have copies."""
    for place, axis in enumerate(layout.axes):
        copied = [] if axis.data else [param for param in layout.params if not is_sharded(param, place)]
        if copied:
            prints = axis.gathered(torch.stack([numbers_of([local(param)], layout.device) for param in copied]))
            for param, of_param in zip(copied, prints.unbind(1), strict=True):
                if not _all_alike(of_param):
                    raise ValueError(
                        f"{layout.names[param]} is copied, and has other values on other ranks of its tensor-parallel "
                        "group. "
                        "Make the model with the same random numbers on all of them (torch.manual_seed)"
                    )


def fingerprint(layout: Layout, inputs: Any) -> Tensor | None:
    """Two numbers that tell what a model is called on from anything else; None where no ranks work on the same samples.

    Args:
        layout: the layout of the model.
        inputs: any nesting of tensors.
    """
    if not layout.shares_samples:
        return None
    return numbers_of([tensor for tensor in tensors_in(inputs) if not isinstance(tensor, DTensor)], layout.device)


def check_samples(layout: Layout, losses: Tensor, inputs: Tensor | None) -> None:
    """Raises a ValueError unless ranks that work on the same samples have the same ones.

    Args:
        layout: the layout of the model.
        losses: one loss a sample, shape ``(N,)``.
        inputs: the `fingerprint` of what the model was called on.
    """
    for axis in layout.axes:
        if axis.data:
            continue
        own = torch.tensor([len(losses)], dtype=torch.float64, device=losses.device)
        same = _all_alike(axis.gathered(own if inputs is None else torch.cat([own, inputs.to(own)])))
        if same:
            every = axis.gathered(losses.detach())
            # They come of the same sums. In half precision nothing smaller than its step shows.
            eps = torch.finfo(every.dtype).eps
            tolerance = eps if eps > 1e-4 else 100 * eps
            same = torch.allclose(every, every[:1].expand_as(every), rtol=tolerance, atol=tolerance, equal_nan=True)
        if not same:
            raise PrivacyValueError(
                "ranks of one tensor-parallel group have different losses, so that their parts of a gradient would be of "
                "different samples. Give them the same batches (make_private does so under Poisson sampling) and the same "
                "random numbers in augmentation and dropout (torch.manual_seed)"
            )


def numbers_of(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Two numbers that tell tensors from others, for comparison with other ranks'."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for place, tensor in enumerate(tensors, start=1):
        flat = tensor.detach().flatten().to(device, torch.float64).nan_to_num()
        ramp = torch.linspace(0.5, 1.5, len(flat), dtype=torch.float64, device=device)
        total += place * torch.stack([flat.sum(), flat @ ramp])
    return total


def _all_alike(values: Tensor) -> bool:
    """Whether all ranks have the same, but for rounding."""
    return torch.allclose(values, values[:1].expand_as(values), rtol=1e-9, atol=1e-9)
