"""What a rank sends: a count of collectives, by the formulas of their ring algorithms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Sent = Callable[[float, int], float]
"""Bytes that a rank sends, from the bytes that it puts in and the number of ranks."""


def all_reduce(size: float, ranks: int) -> float:
    """A reduce-scatter and an all-gather."""
    return 2 * size * (ranks - 1) / ranks


def reduce_scatter(size: float, ranks: int) -> float:
    """Each rank puts in all of it and gets one part of the sum."""
    return size * (ranks - 1) / ranks


def all_gather(size: float, ranks: int) -> float:
    """Each rank puts in one part and gets all of them; what it puts in goes all around the ring."""
    return size * (ranks - 1)


def broadcast(size: float, ranks: int) -> float:
    """Down a chain, in which all ranks but the last send everything: the mean over ranks."""
    return size * (ranks - 1) / ranks


def all_to_all(size: float, ranks: int) -> float:
    """Each rank puts in one part for each."""
    return size * (ranks - 1) / ranks


def nothing(size: float, ranks: int) -> float:
    """No data, or none yet."""
    return 0.0


# The name of the operation; which of its arguments is what a rank puts in; what it then sends.
COLLECTIVES: dict[str, tuple[int, Sent]] = {
    "c10d::allreduce_": (0, all_reduce),
    "c10d::allreduce_coalesced_": (0, all_reduce),
    "c10d::_reduce_scatter_base_": (1, reduce_scatter),
    "c10d::reduce_scatter_": (1, reduce_scatter),
    "c10d::reduce_scatter_tensor_coalesced_": (1, reduce_scatter),
    "c10d::_allgather_base_": (1, all_gather),
    "c10d::allgather_": (1, all_gather),
    "c10d::allgather_coalesced_": (1, all_gather),
    "c10d::allgather_into_tensor_coalesced_": (1, all_gather),
    "c10d::broadcast_": (0, broadcast),
    "c10d::alltoall_base_": (1, all_to_all),
    "c10d::barrier": (0, nothing),
    "_c10d_functional::all_reduce": (0, all_reduce),
    "_c10d_functional::all_reduce_": (0, all_reduce),
    "_c10d_functional::all_reduce_coalesced": (0, all_reduce),
    "_c10d_functional::reduce_scatter_tensor": (0, reduce_scatter),
    "_c10d_functional::reduce_scatter_tensor_coalesced": (0, reduce_scatter),
    "_c10d_functional::all_gather_into_tensor": (0, all_gather),
    "_c10d_functional::all_gather_into_tensor_out": (0, all_gather),
    "_c10d_functional::all_gather_into_tensor_coalesced": (0, all_gather),
    "_c10d_functional::broadcast": (0, broadcast),
    "_c10d_functional::broadcast_": (0, broadcast),
    "_c10d_functional::all_to_all_single": (0, all_to_all),
    "_dtensor::shard_dim_alltoall": (0, all_to_all),
}
NO_COLLECTIVES = {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


class Communication(TorchDispatchMode):
    """Counts the collectives that run inside of it, those of autograd's threads and of torch's C++ code too.

    All of torch's collectives are operations of its dispatcher. What a backend then does may be more: gloo makes a
    reduce-scatter by an all-reduce.

    Attributes:
        sent: bytes that this rank sends, by the name of the operation.
        calls: how many there were, likewise.

    Raises:
        NotImplementedError: at a collective that is not in the table, or one of several groups.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts, and runs the operation."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back on what this rank has
        name = func._schema.name
        if name.partition("::")[0] in ("c10d", "_c10d_functional", "_dtensor") and name not in NO_COLLECTIVES:
            if name not in COLLECTIVES:
                raise NotImplementedError(f"{name} is not in the table of collectives; add what a rank sends in it")
            place, formula = COLLECTIVES[name]
            tensors = [leaf for leaf in tree_leaves(args[place]) if isinstance(leaf, Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.sent[name] += formula(size, _ranks(args))
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def _ranks(args: Any) -> int:
    (group,) = [group for arg in args if (group := _group(arg)) is not None]
    return group.size()


def _group(arg: Any) -> Any:
    if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
        return dist.ProcessGroup.unbox(arg)
    if isinstance(arg, str):
        try:
            return torch._C._distributed_c10d._resolve_process_group(arg)
        except (LookupError, RuntimeError, ValueError):
            return None  # "sum"
    return None
