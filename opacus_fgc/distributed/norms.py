"""Norms of whole parameters' gradients, from those of what each rank has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from opacus_fgc.distributed.mesh import is_sharded
from opacus_fgc.distributed.topology import Layout
from opacus_fgc.errors import PrivacyValueError
from opacus_fgc.taps.tap import tensors_in


def mark(layout: Layout, params: Collection[Any], activations: Any) -> Tensor | None:
    """A norm and another number of what a layer is called on, for comparison with its copies; None if it has none.

    Args:
        layout: the layout of the model.
        params: the layer's.
        activations: what this rank has of those, any nesting of tensors.
    """
    places = [place for place, axis in enumerate(layout.axes) if not axis.data]
    if not places or any(is_sharded(param, place) for param in params for place in places):
        return None
    total = torch.zeros(2, dtype=torch.float64, device=layout.device)
    for tensor in tensors_in(activations):
        flat = tensor.detach().flatten().float().nan_to_num(posinf=0.0, neginf=0.0)
        ramp = torch.linspace(0.5, 1.5, len(flat), dtype=flat.dtype, device=flat.device)
        total += torch.stack([torch.linalg.vector_norm(flat), flat @ ramp])
    return total


def reduce_norms(layout: Layout, norms: Mapping[Any, Tensor], marks: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """The norms of whole parameters' gradients, from those of what this rank has of them.

    Squares add up along axes that have the same samples and shard the parameter. Where they replicate it, the first rank's norm
    counts, so that all go by the same bits.

    Args:
        layout: the layout of the model.
        norms: by parameter, shape ``(N,)`` each.
        marks: by parameter, the `mark` of its layer; nothing where there is none.

    Raises:
        ValueError: if a copied parameter is used on other activations than its copies, or has gradients of other norms.
    """
    result = dict(norms)
    for place, axis in enumerate(layout.axes):
        if axis.data:
            continue
        every = axis.gathered(torch.stack([result[param] for param in layout.params]))
        nothing = torch.zeros(2, dtype=torch.float64, device=layout.device)
        every_mark = axis.gathered(torch.stack([marks.get(param, nothing) for param in layout.params]))
        for param, norms_of_param, mark in zip(layout.params, every.unbind(1), every_mark.unbind(1), strict=True):
            if is_sharded(param, place):
                result[param] = torch.linalg.vector_norm(norms_of_param, dim=0)
                continue
            result[param] = norms_of_param[0]
            same = torch.allclose(norms_of_param, result[param].expand_as(norms_of_param), 1e-2, equal_nan=True)
            # The second number may have cancelled; the first is its scale.
            if not same or ((mark - mark[0]).abs() > 1e-3 * mark[0, 0]).any():
                raise PrivacyValueError(
                    f"{layout.names[param]} has gradients of other norms, or of other activations, on other ranks of its "
                    "tensor-parallel group, though it is copied: each rank seems to use it on a part of a sample (by "
                    "sequence parallel). Put its layer into the plan for parallelize_module, so that its inputs are "
                    "distributed tensors"
                )
    return result
