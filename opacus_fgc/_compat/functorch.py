"""Whether `torch.func` is at work: ``torch._C._functorch``, as torch 2.6 to 2.15 have it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

innermost_transform = torch._C._functorch.peek_interpreter_stack
"""The innermost transform (vmap, grad) that runs; None if none does. Private: ``peek_interpreter_stack``."""

is_functorch_tensor = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether a tensor is one of a transform, which means nothing outside of it. Private: ``is_functorch_wrapped_tensor``."""

outside_of_transforms = temporarily_pop_interpreter_stack
"""A context in which no transform runs, for tensors that `physical` gave. Private: ``temporarily_pop_interpreter_stack``."""


def runs_in_one_vmap() -> bool:
    """Whether a `torch.func.vmap` runs, and no other transform. Private: ``get_interpreter_stack``."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return len(stack) == 1 and stack[0].key() == torch._C._functorch.TransformType.Vmap


def physical(tensor: Tensor) -> tuple[Tensor, int, int] | None:
    """What stands behind a tensor in a vmap. Private: ``get_unwrapped``, ``maybe_get_bdim``, ``maybe_get_level``.

    Returns:
        The tensor with all rows, the axis that counts them, and the level of the vmap; None if all rows share the tensor.
    """
    inner = torch._C._functorch
    if not inner.is_batchedtensor(tensor):
        return None
    return inner.get_unwrapped(tensor), inner.maybe_get_bdim(tensor), inner.maybe_get_level(tensor)


def batched(tensor: Tensor, level: int) -> Tensor:
    """A tensor as a vmap has it, whose rows lie along its first axis. Private: ``_add_batch_dim``."""
    return torch._C._functorch._add_batch_dim(tensor, 0, level)
