"""The operations of a step that move rows along the batch, and whether they moved them as before.

Which sample a row belongs to may depend on the data where rows are selected, sorted or scattered by indices: a mask over
tokens, a router of experts. A certificate for one such arrangement says nothing of the next. So each has a mark, which is the
same only for the same indices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from opacus_fgc._compat.autograd import is_kept, saved


class _Unreadable(Exception):
    """Activation checkpointing has not kept it, and would run the forward again for it."""


def _saved(node: Any, name: str) -> Any:
    """What a node of the graph keeps under a name, read without recomputing anything."""
    if not is_kept(node, name):
        raise _Unreadable
    return saved(node, name)


def _in_order(index: Tensor) -> bool:
    """Whether an index takes each row once, in order."""
    return index.dim() == 1 and torch.equal(index, torch.arange(len(index), device=index.device))


def _mark_of(value: Any) -> Hashable:
    """What tells indices, or sizes, from others."""
    if not isinstance(value, Tensor):
        return tuple(int(size) for size in value)
    content = value.detach().cpu().contiguous().numpy().tobytes()
    return tuple(value.shape), hashlib.blake2b(content, digest_size=16).digest()


def _along(node: Any, axes: Collection[int], dim: str = "dim") -> bool:
    value = saved(node, dim)
    # Autograd shows negative dimensions as unsigned numbers.
    value = value - 2**64 if value >= 2**63 else value
    return value < 0 or value in axes


def _by_index(name: str) -> Callable[[Any, Collection[int]], Iterator[Any]]:
    def values(node: Any, axes: Collection[int]) -> Iterator[Any]:
        if _along(node, axes):
            index = _saved(node, name)
            if not _in_order(index):
                yield index

    return values


def _by_indices(node: Any, axes: Collection[int]) -> Iterator[Any]:
    indices = _saved(node, "indices")
    for axis in axes:
        if axis < len(indices) and indices[axis] is not None and not _in_order(indices[axis]):
            yield indices[axis]


def _kept(name: str) -> Callable[[Any, Collection[int]], Iterator[Any]]:
    def values(node: Any, axes: Collection[int]) -> Iterator[Any]:
        yield _saved(node, name)

    return values


def _by_sizes(node: Any, axes: Collection[int]) -> Iterator[Any]:
    if _along(node, axes) and len(set(saved(node, "split_sizes"))) > 1:
        yield saved(node, "split_sizes")


_MOVING: dict[str, Callable[[Any, Collection[int]], Iterator[Any]]] = {
    "EmbeddingBackward": _kept("indices"),
    "GatherBackward": _by_index("index"),
    "IndexAddBackward": _by_index("index"),
    "IndexBackward": _by_indices,
    "IndexCopyBackward": _by_index("index"),
    "IndexPutBackward": _by_indices,
    "IndexPutImplBackward": _by_indices,
    "IndexReduceBackward": _by_index("index"),
    "IndexSelectBackward": _by_index("index"),
    "MaskedScatterBackward": _kept("mask"),
    "MaskedSelectBackward": _kept("mask"),
    "PutBackward": _kept("index"),
    "ScatterAddBackward": _by_index("index"),
    "ScatterBackward": _by_index("index"),
    "ScatterReduceBackward": _by_index("index"),
    "SegmentReduceBackward": _kept("lengths"),
    "SortBackward": _by_index("indices"),
    "SplitWithSizesBackward": _by_sizes,
    "TakeBackward": _kept("index"),
    "TopkBackward": _by_index("indices"),
}
"""What tells, of the nodes of each name, how they move rows: the indices, masks or sizes that move some along the given axes."""

_BY_TYPE: dict[type, Callable[[Any, Collection[int]], Iterator[Any]] | None] = {}


def moves_rows(node: Any) -> bool:
    """Whether a node of the graph is of a kind that can move rows by indices. Asked of each node of each step."""
    kind = type(node)
    if kind not in _BY_TYPE:
        _BY_TYPE[kind] = _MOVING.get(kind.__name__.rstrip("0123456789"))
    return _BY_TYPE[kind] is not None


def selected(node: Any) -> int | None:
    """The place along the first axis that a node takes a part from; None if it does something else."""
    if not type(node).__name__.startswith("SelectBackward") or saved(node, "dim") != 0:
        return None
    place = saved(node, "index")
    # Autograd shows negative numbers as unsigned ones.
    return place - 2**64 if place >= 2**63 else place


def arrangement(nodes: Iterable[Any], batch_first: bool, known: Collection[int] = ()) -> Hashable:
    """A mark of how some operations move rows along the batch: the same only if they move them in the same way.

    Args:
        nodes: of the graph; those of which `moves_rows` holds.
        batch_first: whether samples are counted by the first axis alone, or by the second too.
        known: addresses of indices whose samples are known.

    Returns:
        The mark; one that equals no other where the indices cannot be read.
    """
    axes = (0,) if batch_first else (0, 1)
    marks = []
    for node in nodes:
        values = _BY_TYPE[type(node)]
        assert values is not None
        try:
            moved = [value for value in values(node, axes) if value is not None]
        except _Unreadable:
            return object()
        marks += [_mark_of(value) for value in moved if not isinstance(value, Tensor) or value.data_ptr() not in known]
    return tuple(marks)
