"""Clipping coefficients for a loop with two passes that is written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class ClippingCoefficients(Tensor):
    """Clipping coefficients, shape ``(N,)``, that tell what losses they are multiplied with.

    So the losses of the second pass are known, and looked at as a criterion's are. What comes of them and losses is a plain
    tensor.

    Attributes:
        check: called with the losses; raises if they are no per-sample losses of the wrapped model.
    """

    check: Callable[[Tensor], None]

    @classmethod
    def of(cls, coef: Tensor, check: Callable[[Tensor], None]) -> ClippingCoefficients:
        """Makes them of a plain tensor.

        Args:
            coef: shape ``(N,)``.
            check: see the class.
        """
        result = coef.as_subclass(cls)
        result.check = check
        return result

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation; on losses after they were checked."""
        every = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        own = next(tensor for tensor in every if isinstance(tensor, cls))
        losses = [tensor for tensor in every if not isinstance(tensor, cls) and tensor.requires_grad]
        for loss in losses:
            own.check(loss)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if losses or not isinstance(result, Tensor):
                return result.as_subclass(Tensor) if isinstance(result, cls) else result
            return cls.of(result, own.check)
