"""Sums over ranks of many tensors: bucket by bucket, one on its way while the next is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opacus_fgc.distributed.mesh import Axis, shard_rows

BUCKET = 2**23
"""Tensors are summed together until they have so many elements or more, 32 MiB in float32."""

AddNoise = Callable[[Tensor], Tensor]
"""Values plus noise; called on every value once, on one rank."""

# Torch has renamed it.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Key = TypeVar("Key")
Item = TypeVar("Item")


def buckets(tensors: Iterable[tuple[Key, Tensor]]) -> Iterator[tuple[list[Key], list[Tensor]]]:
    """Several tensors at a time, of one dtype and device: as few as have `BUCKET` elements.

    Args:
        tensors: pairs of anything and a tensor.

    Yields:
        The things, and their tensors, in a list that is emptied when the next one is asked for: these may be all of a model's.
    """
    keys: list[Key] = []
    bucket: list[Tensor] = []
    size = 0
    for key, tensor in tensors:
        if bucket and (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device):
            yield keys, bucket
            bucket.clear()
            keys, size = [], 0
        keys.append(key)
        bucket.append(tensor)
        size += tensor.numel()
        if size >= BUCKET:
            yield keys, bucket
            bucket.clear()
            keys, size = [], 0
    if bucket:
        yield keys, bucket


def prefetch(items: Iterable[Item]) -> Iterator[Item]:
    """Yields each item when the next one has been made."""
    before: list[Item] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


class ScatteredSum:
    """The sums over data ranks of some tensors, of which each rank gets its part, on their way.

    Args:
        tensors: what this rank has of each, of one dtype and device.
        dims: along which dimension each is sharded.
        axis: the ranks that get different parts.
        copies: axes whose ranks get the same part.
    """

    def __init__(self, tensors: Sequence[Tensor], dims: Sequence[int], axis: Axis, copies: Sequence[Axis]) -> None:
        shards = [tensor.chunk(axis.size, dim) for tensor, dim in zip(tensors, dims, strict=True)]
        # Parts are as long as the first, so that all ranks get as much.
        self._lengths = [pieces[0].numel() for pieces in shards]
        self._shapes = []
        parts = tensors[0].new_zeros(axis.size, sum(self._lengths))
        for pieces, places in zip(shards, parts.split(self._lengths, 1), strict=True):
            for piece, place in zip(pieces, places, strict=False):
                place[: piece.numel()] = piece.flatten()
        for tensor, dim in zip(tensors, dims, strict=True):
            shape = list(tensor.shape)
            shape[dim] = len(shard_rows(shape[dim], axis))
            self._shapes.append(shape)
        self._copies = copies
        self._sum = parts.new_empty(parts.shape[1])
        self._work: Any = _reduce_scatter(self._sum, parts.flatten(), group=axis.group, async_op=True)

    def parts(self) -> list[Tensor]:
        """This rank's parts."""
        self._work.wait()
        for axis in self._copies:
            dist.all_reduce(self._sum, group=axis.group)
        parts = zip(self._sum.split(self._lengths), self._shapes, strict=True)
        return [part[: math.prod(shape)].view(shape) for part, shape in parts]


class NoisySum:
    """The sums of some tensors over some axes plus noise, on their way: each rank adds the noise to its share of them.

    Args:
        tensors: what this rank has of each, of one dtype and device.
        axes: those over which they are summed, where they are data axes; along the others all have the same.
    """

    def __init__(self, tensors: Sequence[Tensor], axes: Sequence[Axis]) -> None:
        self._shapes = [tensor.shape for tensor in tensors]
        self._axes = axes
        self._lengths: list[int] = []
        self._work: Any = None
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        for axis in axes:
            self._wait()
            self._lengths.append(len(flat))
            padded = nn.functional.pad(flat, (0, -len(flat) % axis.size))
            if axis.data:
                flat = padded.new_empty(len(padded) // axis.size)
                self._work = _reduce_scatter(flat, padded, group=axis.group, async_op=True)
            else:
                flat = padded.chunk(axis.size)[axis.rank]
        self._flat = flat

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    def whole(self, add_noise: AddNoise) -> list[Tensor]:
        """All of the sums plus noise, the same bits on all ranks."""
        self._wait()
        flat = add_noise(self._flat)
        for axis, length in zip(reversed(self._axes), reversed(self._lengths), strict=True):
            flat = axis.gathered(flat).flatten()[:length]
        parts = flat.split([math.prod(shape) for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
