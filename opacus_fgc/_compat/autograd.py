"""What tensors and nodes of autograd's graph know of themselves."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

_current_graph_task_id = torch._C._current_graph_task_id

version_of: Callable[[Tensor], int] = attrgetter("_version")
"""How often a tensor, or a view of it, was written to. Private: ``Tensor._version``, torch 2.6 to 2.15."""

base_of: Callable[[Tensor], Tensor | None] = attrgetter("_base")
"""The tensor that a tensor is a view of; None if of none. Private: ``Tensor._base``, torch 2.6 to 2.15."""

preserve_version_counter = torch.autograd._unsafe_preserve_version_counter
"""A context after which a tensor has the version that it had, though it was written to.

Private: ``torch.autograd._unsafe_preserve_version_counter``, torch 2.6 to 2.15.
"""


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread.

    Private: ``torch._C._current_graph_task_id``, -1 outside of backward, torch 2.6 to 2.15.
    """
    return _current_graph_task_id() != -1


def node_type(function: type[torch.autograd.Function]) -> Any:
    """The type of the nodes that an autograd function puts into the graph.

    Private: ``Function._backward_cls``, torch 2.6 to 2.15.

    Args:
        function: the autograd function.
    """
    return function._backward_cls


def saved(node: Any, name: str) -> Any:
    """What a node of the graph keeps under a name: a tensor, a size, a dimension.

    Private: ``node._saved_<name>``, torch 2.6 to 2.15.

    Args:
        node: the node of an operation of torch.
        name: as torch calls it, such as "indices" or "dim"; a dimension below 0 is shown as an unsigned number.
    """
    return getattr(node, f"_saved_{name}")


def is_kept(node: Any, name: str) -> bool:
    """Whether a node has what it keeps under a name, so that `saved` runs no checkpoint's forward again.

    Private: ``node._raw_saved_<name>`` (torch 2.6 to 2.15), whose ``unpack_hook`` torch 2.8 and newer show, and the name of the
    hooks of activation checkpointing, ``torch.utils.checkpoint._checkpoint_hook``.

    Args:
        node: as for `saved`.
        name: as for `saved`.

    Returns:
        False for every tensor with torch before 2.8, which does not tell; True for what is no tensor.
    """
    raw = getattr(node, f"_raw_saved_{name}", None)
    several = raw if isinstance(raw, (tuple, list)) else (raw,)
    return all(one is None or _is_no_checkpoints(one) for one in several)


def _is_no_checkpoints(variable: Any) -> bool:
    hook = getattr(variable, "unpack_hook", _NOT_TOLD)
    return hook is not _NOT_TOLD and "_checkpoint_hook" not in getattr(hook, "__qualname__", "")


_NOT_TOLD = object()


def gradient_dtypes(node: Any) -> list[torch.dtype]:
    """The dtypes of the gradients that a node of the graph is called on, which are those of what its operation returned.

    Private: ``node._input_metadata``, torch 2.6 to 2.15.

    Args:
        node: any node of a graph that something still holds; torch 2.6 crashes on those of autograd functions that are left.
    """
    return [one.dtype for one in node._input_metadata]


def gradient_hooks(tensor: Tensor) -> list[Callable]:
    """The hooks that a tensor got from ``register_hook``.

    Private: ``Tensor._backward_hooks``, torch 2.6 to 2.15.

    Args:
        tensor: any leaf.
    """
    return list((tensor._backward_hooks or {}).values())


def post_accumulate_grad_hooks(tensor: Tensor) -> list[Callable]:
    """The hooks that a tensor got from ``register_post_accumulate_grad_hook``.

    Private: ``Tensor._post_accumulate_grad_hooks``, torch 2.6 to 2.15.

    Args:
        tensor: any leaf.
    """
    return list((getattr(tensor, "_post_accumulate_grad_hooks", None) or {}).values())
