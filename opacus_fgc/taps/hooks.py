"""Hooks that stay where they are put: copies and files of a model come without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opacus_fgc._compat.modules import remove_forward_hooks


class Hook:
    """A hook on a module. In a copy of the module, or in what is loaded from a file, there is one that does nothing.

    What it notes belongs to the module that it was put on; a copy that is to be trained gets hooks of its own.

    Args:
        function: what is called.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        # It notes what happens in each forward; compiled, it would do so in the first one alone.
        self._function = torch.compiler.disable(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """What it is in a copy."""
        return _nothing, ()


class GradientHook:
    """A gradient hook on a parameter of a wrapped model, which sees gradients and leaves them as they are.

    Args:
        function: what is called with the parameter and its gradient.
        param: the parameter.
    """

    __slots__ = ("_function", "_param")

    def __init__(self, function: Callable[[Any, Tensor], None], param: Any) -> None:
        self._function, self._param = function, param

    def __call__(self, gradient: Tensor) -> None:
        """Calls the function."""
        self._function(self._param, gradient)


class Handles(list):
    """The handles of the hooks on a module; a copy of the module has none of them."""

    def __reduce__(self) -> tuple[Any, ...]:
        """What it is in a copy."""
        return list, ()


def does_nothing(*args: Any, **kwargs: Any) -> None:
    """In a copy, in the place of a `Hook`."""


def _nothing() -> Callable[..., None]:
    return does_nothing


def clear_copied(model: nn.Module) -> None:
    """Takes off a model what it has in the place of another one's hooks, and what another one's step left in its parameters.

    Args:
        model: the model, a copy perhaps.
    """
    for param in model.parameters():
        vars(param).pop("summed_grad", None)
    for module in model.modules():
        remove_forward_hooks(module, does_nothing)
