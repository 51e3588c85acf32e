"""How clipped sums and noise of several ranks come together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from opacus_fgc.distributed.mesh import Axis, is_sharded, like, local, shard_rows
from opacus_fgc.distributed.reductions import AddNoise, NoisySum, ScatteredSum, buckets, prefetch
from opacus_fgc.distributed.topology import Layout
from opacus_fgc.per_sample.precision import widened


def as_parameters(layout: Layout, totals: Iterable[tuple[Any, Tensor | None]]) -> Iterator[tuple[Any, Tensor | None]]:
    """What belongs into ``summed_grad`` of parameters: under FSDP summed over ranks, and sharded as the parameter is.

    While some are on their way, the next ones are computed.

    Args:
        layout: the layout of the model.
        totals: parameters, and the clipped sums over this rank's samples, of the shapes that layers see of the
            parameters; None for 0.

    Yields:
        A parameter, and what belongs there.
    """
    if not layout.fsdp:
        for param, total in totals:
            yield param, None if total is None else like(param, total)
        return
    *copies, shard = (axis for axis in layout.axes if axis.data)
    # All ranks have to take part, with 0 too.
    present = ((param, _zeros(layout, param) if total is None else total) for param, total in totals)
    sums = (
        (params, ScatteredSum(several, [param.placements[len(copies)].dim for param in params], shard, copies))
        for params, several in buckets(present)
    )
    for params, scattered in prefetch(sums):
        for param, part in zip(params, scattered.parts(), strict=True):
            yield param, like(param, part.to(param.device))


def _zeros(layout: Layout, param: Any) -> Tensor:
    """Zeros of the shape that layers see of a parameter under FSDP."""
    shape = list(param.shape)
    for axis, placement in zip(layout.axes, param.placements, strict=False):
        if not axis.data and not placement.is_replicate():
            shape[placement.dim] = len(shard_rows(shape[placement.dim], axis))
    return torch.zeros(shape, dtype=widened(param.dtype), device=layout.device)


def gradients_of(
    layout: Layout, loss: Tensor, params: Sequence[Any], seen: Callable[[Any], Tensor], retain_graph: bool = False
) -> Sequence[Tensor | None]:
    """The gradients of a weighted loss by some parameters, as they belong into ``summed_grad``; None for 0.

    Args:
        layout: the layout of the model.
        loss: a scalar.
        params: the parameters.
        seen: gives the tensor that layers see in the place of a parameter.
        retain_graph: as for `torch.autograd.grad`.
    """
    if not layout.fsdp:
        gradients = torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True)
        return [
            gradient.redistribute(param.device_mesh, param.placements) if isinstance(gradient, DTensor) else gradient
            for param, gradient in zip(params, gradients, strict=True)
        ]
    return layout.fsdp.gradients_of(loss, params, seen, retain_graph, layout.data_ranks)


def privatized_gradients(layout: Layout, params: Sequence[Any], add_noise: AddNoise) -> Iterator[tuple[Any, Tensor]]:
    """What a step may use: the clipped sums over all ranks plus noise, each parameter's once.

    What is replicated along an axis is summed into shares, one a rank; each rank adds the noise to its share; and all get all of
    it. While a bucket is on its way, the noise of the one before is drawn.

    Args:
        layout: the layout of the model.
        params: parameters with a ``summed_grad``.
        add_noise: values plus noise.

    Yields:
        A parameter, and its gradient.
    """
    layout.fsdp.reshard()  # or the next forward would run on what is whole of before this step
    replicated: dict[tuple[Axis, ...], list[tuple[Any, Tensor]]] = {}
    for param in params:
        summed = local(param.summed_grad)
        axes = _replicated_axes(layout, param)
        if axes:
            replicated.setdefault(axes, []).append((param, summed))
        else:
            yield param, like(param, add_noise(summed))
    for axes, several in replicated.items():
        sums = ((bucket, NoisySum(tensors, axes)) for bucket, tensors in buckets(several))
        for bucket, noisy in prefetch(sums):
            yield from zip(bucket, map(like, bucket, noisy.whole(add_noise)), strict=True)


def noisy_total(layout: Layout, value: Tensor, add_noise: AddNoise) -> Tensor:
    """The total of a number over all samples, plus noise, the same on all ranks.

    Args:
        layout: the layout of the model.
        value: its total over this rank's samples, a scalar.
        add_noise: values plus noise.
    """
    if not layout.axes:
        return add_noise(value)
    (noisy,) = NoisySum([value], layout.axes).whole(add_noise)
    return noisy


def _replicated_axes(layout: Layout, param: Any) -> tuple[Axis, ...]:
    """The axes along which a parameter is replicated; as data axes those whose sum is still to be taken."""
    return tuple(
        # FSDP sums along both of its axes in every backward pass.
        axis._replace(data=axis.data and not layout.fsdp)
        for place, axis in enumerate(layout.axes)
        if not is_sharded(param, place)
    )
