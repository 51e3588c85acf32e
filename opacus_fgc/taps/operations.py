"""Taps on single operations, for parameters that belong to no layer: class tokens, position parameters, own norm layers.

While a module with such parameters runs its forward, operations on them are caught. What is computed from parameters and
constants alone is shared by the whole batch, and left as it is. Where something shared meets the data it gets a batch axis,
one row a sample, so that autograd itself delivers the per-sample gradients; operations whose gradients have a better form
(linear maps, lookups, convolutions) are tapped as the layers are that do the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from opacus_fgc._compat.autograd import base_of, version_of
from opacus_fgc._compat.compiler import disable_dynamo
from opacus_fgc.taps.expansion import Expanding, Expansion
from opacus_fgc.taps.meeting import JOINING, PRODUCTS, NotCaughtError, TapOp
from opacus_fgc.taps.shared import NoData, is_copied, is_one, tensors_of_call

_EXPANDING = frozenset(("broadcast_to", "expand", "expand_as", "repeat", "repeat_interleave", "tile"))
# The second tensor is but a pattern for dtype, device or shape.
_LIKE = frozenset(("to", "type_as", "view_as", "reshape_as"))
# What is made of no tensors: of these nobody makes one row a sample, of the others one may (an initial state).
_RANGES = frozenset(("arange", "eye", "linspace", "logspace", "tril_indices", "triu_indices"))
_FILLED = frozenset(("as_tensor", "full", "ones", "tensor", "zeros"))


class OpTaps(Expanding):
    """Taps on operations, active from the outermost `enter` to its `leave`.

    Args:
        no_data: the tensors of the model that are no data.
        batch_first: whether the batch is the first axis of activations, or the second of those with three and more.
        tap_op: puts a tap on the output of an operation.
        expansions: what is known of the places where something shared is expanded; it is added to.
        compiled: whether parts of the model are compiled, in which no operation shows; they are run as they are while active.
    """

    def __init__(
        self,
        no_data: NoData,
        batch_first: bool,
        tap_op: TapOp,
        expansions: dict[Any, Expansion],
        compiled: bool = False,
    ) -> None:
        super().__init__(no_data, batch_first)
        self._tap_op, self._expansions, self._compiled = tap_op, expansions, compiled

    @disable_dynamo
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation, and taps it if something shared meets the data in it."""
        kwargs = kwargs or {}
        tensors = list(tensors_of_call(args, kwargs))
        shared = [tensor for tensor in tensors if self.is_shared(tensor)]
        if not shared:
            output = func(*args, **kwargs)
            if tensors:
                return self._mark_constant(output) if all(map(is_copied, tensors)) else output
            if func.__name__ in _RANGES:
                return self._mark(output)
            filled = func.__name__ in _FILLED and not output.requires_grad
            return self._mark(output) if filled and self._batch_sizes[-1] not in (None, *output.shape) else output
        self._catch_again()
        if len(shared) < len(tensors) and not any(tensor.requires_grad for tensor in shared):
            output = func(*args, **kwargs)
            constant = all(is_copied(tensor) or self.is_shared(tensor) for tensor in tensors)
            return self._mark_constant(output) if constant else output
        try:
            if func.__name__ in _EXPANDING:
                return self._expand(func, args, kwargs)
            if func.__name__ in JOINING and is_one(tensors):
                return self._join_copies(func, args, kwargs)
            of_shared = self.is_shared(args[0]) if args and isinstance(args[0], Tensor) else False
            chosen = of_shared and func.__name__ == "__getitem__" and _is_one_number(tensors[1:])
            if len(shared) == len(tensors) or chosen or (func.__name__ in _LIKE and of_shared):
                bases = [base for tensor in shared if (base := base_of(tensor)) is not None and self.is_shared(base)]
                before = [(tensor, version_of(tensor)) for tensor in (*shared, *bases)]
                output = func(*args, **kwargs)
                # Something shared that was written into something shared, or into a view of it.
                self._mark([tensor for tensor, version in before if version_of(tensor) != version])
                # What a layer computes from nothing but its own parameters stays between it and its tap.
                own = all(tensor.requires_grad and tensor in self._others for tensor in shared)
                return output if own or self._covered.intersection(shared) else self._mark(output)
            caught = any(map(self._is_caught, shared)) and func.__name__ not in _LIKE
            if not caught:
                return func(*args, **kwargs)
            if func is F.multi_head_attention_forward:
                return self._attention(args, kwargs)
            if func.__name__ in PRODUCTS and self._is_caught(args[0]) and self._has_samples_last(*args, **kwargs):
                return self._product_of_columns(*args, **kwargs)
            return self._meet(func, args, kwargs)
        except NotCaughtError:
            return func(*args, **kwargs)


def _is_one_number(tensors: list[Tensor]) -> bool:
    """Whether indices are one number for all samples, such as that of an expert that a loop comes to."""
    return bool(tensors) and all(tensor.dim() == 0 and not tensor.is_floating_point() for tensor in tensors)
