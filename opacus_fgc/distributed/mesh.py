"""The axes of a mesh of processes, and how tensors are sharded along them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class Axis(NamedTuple):
    """One axis of the mesh of processes.

    Attributes:
        group: the processes along it.
        data: whether they have different samples.
    """

    group: Any
    data: bool

    @property
    def size(self) -> int:
        """How many processes it has."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return dist.get_rank(self.group)

    def gathered(self, value: Tensor) -> Tensor:
        """A value of all ranks, stacked along a first axis."""
        values = value.new_empty(self.size, *value.shape)
        dist.all_gather(list(values.unbind()), value.contiguous(), group=self.group)
        return values


def groups(param: Any) -> list[Any]:
    """The processes along each axis of a parameter's mesh; none unless it is a DTensor."""
    return param.device_mesh.get_all_groups() if isinstance(param, DTensor) else []


def is_sharded(param: Any, axis: int) -> bool:
    """Whether a parameter is sharded, and not replicated, along an axis of the mesh."""
    placements = param.placements if isinstance(param, DTensor) else ()
    return axis < len(placements) and not placements[axis].is_replicate()


def shard_rows(size: int, axis: Axis) -> range:
    """Which of the rows of a tensor that is sharded along an axis this rank has; as `torch.chunk` does."""
    chunk = -(-size // axis.size)
    return range(size)[axis.rank * chunk : (axis.rank + 1) * chunk]


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(param: Any, values: Tensor) -> Tensor:
    """What this rank has of a tensor, as a tensor that is sharded as the parameter is."""
    if not isinstance(param, DTensor):
        return values
    return DTensor.from_local(
        values, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def sharded_like(param: Any, whole: Tensor) -> Tensor:
    """A tensor that is sharded over ranks as a parameter is.

    Args:
        param: the parameter; nothing is sharded unless it is a DTensor.
        whole: a tensor of the same shape, the same on all ranks.
    """
    if not isinstance(param, DTensor):
        return whole
    part = whole.to(param.device)
    # Tensor parallel has the last axis and shards first; FSDP shards what is left.
    for group, placement in reversed(list(zip(groups(param), param.placements, strict=True))):
        if not placement.is_replicate():
            rows = shard_rows(part.shape[placement.dim], Axis(group, data=False))
            part = part.narrow(placement.dim, rows.start, len(rows))
    return like(param, part.contiguous())
