"""Operations in which something shared meets the data: it gets a batch axis, or the operation a tap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from opacus_fgc._compat.overrides import GROUPED_MM
from opacus_fgc._compat.pytree import tree_flatten, tree_map_only, tree_unflatten
from opacus_fgc.taps.attention import multi_head_attention
from opacus_fgc.taps.functorch import norms_by_sample
from opacus_fgc.taps.grouped import BY_EXPERT, BY_MATRIX, experts_of_rows
from opacus_fgc.taps.operation_samplers import BATCH_AXIS, REPEATED, Op, OpSampler, sampler_of
from opacus_fgc.taps.shared import size_of, tensors_of_call
from opacus_fgc.taps.watch import ForwardWatch

# Operations are known by name, since each goes by several functions (torch.add, Tensor.add, Tensor.__radd__).
_POINTWISE = frozenset(
    f"{before}{name}{after}"
    for name in ("add", "sub", "mul", "div", "truediv", "pow")
    for before, after in (("", ""), ("", "_"), ("__", "__"), ("__r", "__"), ("__i", "__"))
) | {
    *("addcdiv", "addcmul", "atan2", "copysign", "divide", "fmax", "fmin", "hypot", "lerp", "logaddexp", "maximum"),
    *("minimum", "multiply", "rsub", "subtract", "true_divide", "where", "xlogy"),
}
JOINING = frozenset(("cat", "concat", "concatenate", "stack"))
PRODUCTS = frozenset(("__matmul__", "matmul", "mm"))


class NotCaughtError(Exception):
    """An operation on a parameter that cannot be tapped; its module is then served as a whole."""


class TapOp(Protocol):
    """What puts a tap on the output of an operation."""

    def __call__(
        self, output: Tensor, op: Op, sampler: OpSampler, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int
    ) -> Tensor:
        """Returns the output with a tap on it.

        Args:
            output: what the operation returned.
            op: the operation, with what is shared in it.
            sampler: what computes its per-sample gradients.
            args: its positional arguments, None in the place of what is shared.
            kwargs: its keyword arguments, likewise.
            axis: the batch axis of the output.
        """


class Meeting(ForwardWatch):
    """Taps operations on something shared and the data, so that its gradient comes by sample."""

    _tap_op: TapOp

    def _expanded(self, shared: Tensor, size: int, dims: int, axis: int, positions: int | None = None) -> Tensor:
        """One row a sample of something shared, or for each of so many positions of one; constants need no tap."""
        aligned = shared[(None,) * (dims - shared.dim())]
        if aligned.dim() <= axis or aligned.shape[axis] != 1:
            raise NotCaughtError
        rows = aligned.expand(*aligned.shape[:axis], size, *aligned.shape[axis + 1 :])
        if positions is not None and rows.dim() > 2 and rows.shape[1] == 1:
            rows = rows.expand(-1, positions, *[-1] * (rows.dim() - 2))
        if not self._is_caught(shared):
            return rows
        return self._tap_op(rows, Op(torch.Tensor.expand, {0: shared}), BATCH_AXIS, (), {}, axis)

    def _replaced(self, tree: Any, size: int, dims: int, axis: int, positions: int | None = None) -> Any:
        """Arguments in which everything that is caught has a batch axis."""

        def replace(tensor: Tensor) -> Tensor:
            return self._expanded(tensor, size, dims, axis, positions) if self._is_caught(tensor) else tensor

        return tree_map_only(Tensor, replace, tree)

    def _meet(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.__name__
        if name in _POINTWISE:
            return self._pointwise(func, args, kwargs)
        if name in JOINING:
            return self._join(func, args, kwargs)
        if name == "__setitem__":
            return self._set(func, *args)
        if name in GROUPED_MM and not self.is_shared(args[0]) and self._is_caught(args[1]):
            return self._grouped(func, args, kwargs)
        if name == "baddbmm" and not kwargs and args[0].dim() == 3 and args[0].shape[1] == 1:
            with self:
                return (torch.bmm(*args[1:]).transpose(0, 1) + args[0].transpose(0, 1)).transpose(0, 1)
        if not kwargs and (name == "bmm" or (name in PRODUCTS and len(args[1]) > 1)) and self._is_by_matrix(*args):
            return self._by_matrix(func, *args)
        return self._general(func, args, kwargs)

    def _pointwise(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = list(tensors_of_call(args, kwargs))
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        dims, axis = len(shape), self._axis(len(shape))
        in_place = func.__name__.endswith("_") and not func.__name__.startswith("__r")
        if dims <= axis or (in_place and self.is_shared(args[0])):
            raise NotCaughtError
        if not any(size_of(tensor, axis - dims) == shape[axis] for tensor in tensors if not self.is_shared(tensor)):
            raise NotCaughtError
        # In a single row several samples may follow each other, so that each position gets a row of its own.
        positions = shape[1] if axis == 0 and shape[0] == 1 and dims > 2 else None
        args, kwargs = self._replaced((args, kwargs), shape[axis], dims, axis, positions)
        return func(*args, **kwargs)

    def _join(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        data = next(tensor for tensor in tensors_of_call(args, kwargs) if not self.is_shared(tensor))
        dims, axis = data.dim(), self._axis(data.dim())
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if func.__name__ != "stack" and dim % dims == axis:
            raise NotCaughtError
        args, kwargs = self._replaced((args, kwargs), data.shape[axis], dims, axis)
        return func(*args, **kwargs)

    def _set(self, func: Callable, target: Tensor, index: Any, value: Tensor) -> Any:
        axis = self._axis(target.dim())
        if self.is_shared(target):
            raise NotCaughtError
        if isinstance(index, Tensor) and index.dtype == torch.bool and index.dim() > axis:
            if value.dim() > target.dim() - index.dim():
                raise NotCaughtError
            mask = index[(...,) + (None,) * (target.dim() - index.dim())]
            target.copy_(torch.where(mask, self._expanded(value, target.shape[axis], target.dim(), axis), target))
            return None
        index = index if isinstance(index, tuple) else (index,)
        # Only where the axes up to the batch are taken whole is it sure which axis is the batch's.
        if any(not isinstance(i, slice) or i != slice(None) for i in index[: axis + 1]):
            raise NotCaughtError
        with torch.no_grad():
            dims = target[index].dim()
        return func(target, index, self._expanded(value, target.shape[axis], dims, axis))

    def _has_samples_last(self, first: Tensor, second: Tensor) -> bool:
        """Whether the columns of a matrix of data are samples: ``weight @ x.T``."""
        size = self._batch_sizes[-1]
        matrices = first.dim() < 3 and second.dim() == 2
        # Of a square one that is transposed the columns are taken for samples; backward proves it.
        return matrices and second.shape[1] == size and (second.shape[0] != size or second.T.is_contiguous())

    def _product_of_columns(self, first: Tensor, second: Tensor) -> Tensor:
        if first.dim() == 1:
            return self._general(torch.matmul, (second.T, first), {})
        return self._general(F.linear, (second.T, first), {}).T

    def _grouped(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        experts = experts_of_rows(*args, **kwargs)
        if experts is None:
            return self._general(func, args, kwargs)
        op = Op(func, {1: args[1]})
        return self._tap_op(func(*args, **kwargs), op, BY_EXPERT, (args[0], experts), {}, 0)

    def _is_by_matrix(self, first: Tensor, second: Tensor) -> bool:
        """Whether the first axis of a product counts matrices that the batch shares, and the second rows."""
        return first.dim() == second.dim() == 3 and self._is_caught(second) and not self.is_shared(first)

    def _by_matrix(self, func: Callable, first: Tensor, second: Tensor) -> Tensor:
        rows = first.expand(len(second), -1, -1).transpose(0, 1)
        output = func(first, second).transpose(0, 1)
        return self._tap_op(output, Op(func, {1: second}), BY_MATRIX, (rows,), {}, 0).transpose(0, 1)

    def _general(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor) or not output.requires_grad:
            return output
        leaves, spec = tree_flatten((args, kwargs))
        shared = {place: leaf for place, leaf in enumerate(leaves) if self._is_caught(leaf)}
        axis = self._axis(output.dim())
        if output.dim() <= axis or any(output is leaf for leaf in leaves):
            return output
        if func.__name__ in PRODUCTS and output.dim() > axis + 3:
            # Where the first axis counts matrices, samples are counted by the next.
            axis += any(size_of(leaf, axis - output.dim()) not in (None, 1) for leaf in shared.values())
        sampler = sampler_of(func, args, kwargs, {id(leaf) for leaf in shared.values()})
        norms = norms_by_sample([output], axis) if sampler is REPEATED else None
        constants = [
            place
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and place not in shared and self.is_shared(leaf)
        ]
        args, kwargs = tree_unflatten([None if place in shared else leaf for place, leaf in enumerate(leaves)], spec)
        return self._tap_op(output, Op(func, shared, norms, constants), sampler, args, kwargs, axis)

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query = args[0]
        if query.dim() != 3:
            raise NotCaughtError
        batch_first, self._batch_first = self._batch_first, True
        self._batch_sizes.append(query.shape[1])
        try:
            with self:
                return multi_head_attention(*args, **kwargs)
        finally:
            self._batch_sizes.pop()
            self._batch_first = batch_first
