"""Taps on single operations, for parameters that belong to no layer: class tokens, position parameters, own norm layers.

While a module with such parameters runs its forward, operations on them are caught. What is computed from parameters and
constants alone is shared by the whole batch, and left as it is. Where something shared meets the data it gets a batch axis,
one row a sample, so that autograd itself delivers the per-sample gradients; operations whose gradients have a better form
(linear maps, lookups, convolutions) are tapped as the layers are that do the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.checkpoint import _CheckpointFrame

from opacus_fgc.taps.attention import multi_head_attention
from opacus_fgc.taps.functorch import norms_by_sample
from opacus_fgc.taps.graph import leaves_of
from opacus_fgc.taps.operation_samplers import BATCH_AXIS, REPEATED, Op, OpSampler, sampler_of
from opacus_fgc.taps.tap import tensors_in

# Operations are known by name, since each goes by several functions (torch.add, Tensor.add, Tensor.__radd__).
_POINTWISE = frozenset(
    f"{before}{name}{after}"
    for name in ("add", "sub", "mul", "div", "truediv", "pow")
    for before, after in (("", ""), ("", "_"), ("__", "__"), ("__r", "__"), ("__i", "__"))
) | {
    *("addcdiv", "addcmul", "atan2", "copysign", "divide", "fmax", "fmin", "hypot", "lerp", "logaddexp", "maximum"),
    *("minimum", "multiply", "rsub", "subtract", "true_divide", "where", "xlogy"),
}
_JOINING = frozenset(("cat", "concat", "concatenate", "stack"))
_EXPANDING = frozenset(("broadcast_to", "expand", "expand_as", "repeat", "repeat_interleave", "tile"))
# The second tensor is but a pattern for dtype, device or shape.
_LIKE = frozenset(("to", "type_as", "view_as", "reshape_as"))
# What is made of no tensors: of these nobody makes one row a sample, of the others one may (an initial state).
_RANGES = frozenset(("arange", "eye", "linspace", "logspace", "tril_indices", "triu_indices"))
_FILLED = frozenset(("as_tensor", "full", "ones", "tensor", "zeros"))
_PRODUCTS = frozenset(("__matmul__", "matmul", "mm"))


TOP_SAVED_TENSORS_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
"""Gives the innermost hooks on saved tensors, by which checkpoints are known; None in older torch, which does not tell."""


class NotCaughtError(Exception):
    """An operation on a parameter that cannot be tapped; its module is then served as a whole."""


TapOp = Callable[[Tensor, Op, OpSampler, tuple[Any, ...], dict[str, Any], int], Tensor]
"""Taps the output of an operation: called with the output, the `Op`, its sampler, arguments, and the batch axis."""


class Expansion:
    """Whether what is expanded at one place in a model gets one row a sample, or so many for another reason, as for positions.

    In one forward the two may be as many. They are not for two numbers of samples.
    """

    def __init__(self) -> None:
        self.by_samples: bool | None = None
        self._samples = 0

    def see(self, rows: int, samples: int) -> None:
        """Notes how many rows it got in a forward on so many samples."""
        if rows != samples:
            self.by_samples = False
        elif self.by_samples is None and self._samples not in (0, samples):
            self.by_samples = True
        self._samples = samples


class OpTaps(TorchFunctionMode):
    """Active from the outermost `enter` to its `leave`.

    Args:
        params: the parameters whose operations are caught.
        others: what else is no data: the other parameters of the model, and its buffers.
        constants: tensors that are no data for as long as they have the version that goes with them here.
        covered: those of the others whose tap is on a module around their layer. What is computed from them stays in there.
        tap_op: taps the output of an operation.
        batch_first: whether the batch is the first axis of activations, or the second of those with three and more.
        expansions: what is known of the places where something shared is expanded; it is added to.
        compiled: whether parts of the model are compiled, in which no operation shows; they are run as they are while active.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        others: Iterable[Tensor],
        constants: Mapping[Tensor, int],
        covered: Iterable[Tensor],
        tap_op: TapOp,
        batch_first: bool,
        expansions: dict[Any, Expansion],
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.params = set(params)
        self._others = set(others)
        self._constants = constants
        self._covered = set(covered)
        self._tap_op = tap_op
        self._batch_first = batch_first
        self._compiled = compiled
        self._stance: Any = None
        self._batch_sizes: list[int | None] = []
        self._trying = False
        self._again = False
        self._expansions = expansions

    @property
    def undecided(self) -> bool:
        """Whether it is not known of some rows whether they are samples, since there was but one number of samples yet."""
        return any(expansion.by_samples is None for expansion in self._expansions.values())

    @property
    def active(self) -> bool:
        """Whether a forward runs of which operations are caught."""
        return bool(self._batch_sizes)

    def enter(self, batch_size: int | None, trying: bool = False) -> None:
        """Begins a forward.

        Args:
            batch_size: number of samples, None if it is not known.
            trying: whether it is of no consequence, so that what is not known yet may be guessed.
        """
        if self._again:
            return
        self._batch_sizes.append(batch_size)
        self._trying = trying
        if self._compiled:
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
        self.__enter__()

    def leave(self) -> None:
        """Ends it, if it began."""
        if self.active and not self._again:
            self._batch_sizes.clear()
            # A copy of a model that was interrupted has been entered by none.
            if _get_current_function_mode() is self:
                self.__exit__(None, None, None)
                if self._compiled:
                    self._stance.__exit__(None, None, None)

    def _catch_again(self) -> None:
        """Has operations caught also where activation checkpointing runs again what runs now: it need not be a module."""
        frame = _checkpointing()
        if frame is None or isinstance(frame.recompute_fn, _Again):
            return
        frame.recompute_fn = _Again(self, self._batch_sizes[0], frame.recompute_fn)

    @contextmanager
    def again(self, batch_size: int | None) -> Iterator[None]:
        """A context in which a part of a forward runs again; see `enter`."""
        if self.active:
            yield
            return
        self.enter(batch_size)
        self._again = True
        try:
            yield
        finally:
            self._again = False
            self.leave()

    def add(self, param: Tensor, seen: Tensor) -> None:
        """Treats a tensor as it treats a parameter, in whose place it is."""
        for known in (self.params, self._others, self._covered):
            if param in known:
                known.add(seen)

    def leave_covered(self, inputs: Any, output: Any) -> None:
        """Told of a module with a tap of its own and all that is in it: on nothing but shared inputs, its output is shared."""
        if all(map(self.is_shared, tensors_in(inputs))):
            self._mark(output)

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether a tensor is known to be computed from parameters and constants alone."""
        # Whatever is written into a tensor, also through a view of it, changes its version.
        marked = getattr(tensor, "_shared_version", None)
        marked = self._constants.get(tensor) if marked is None else marked
        return (marked is not None and marked == tensor._version) or tensor in self.params or tensor in self._others

    @torch._disable_dynamo
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation, and taps it if something shared meets the data in it."""
        kwargs = kwargs or {}
        tensors = list(_tensors(args, kwargs))
        shared = [tensor for tensor in tensors if self.is_shared(tensor)]
        if not shared:
            output = func(*args, **kwargs)
            if tensors:
                return self._mark_constant(output) if all(map(_is_copied, tensors)) else output
            if func.__name__ in _RANGES:
                return self._mark(output)
            filled = func.__name__ in _FILLED and not output.requires_grad
            return self._mark(output) if filled and self._batch_sizes[-1] not in (None, *output.shape) else output
        self._catch_again()
        if len(shared) < len(tensors) and not any(tensor.requires_grad for tensor in shared):
            output = func(*args, **kwargs)
            constant = all(_is_copied(tensor) or self.is_shared(tensor) for tensor in tensors)
            return self._mark_constant(output) if constant else output
        try:
            if func.__name__ in _EXPANDING:
                return self._expand(func, args, kwargs)
            if func.__name__ in _JOINING and _is_one(tensors):
                return self._join_copies(func, args, kwargs)
            if len(shared) == len(tensors) or (func.__name__ in _LIKE and self.is_shared(args[0])):
                bases = [base for tensor in shared if (base := tensor._base) is not None and self.is_shared(base)]
                before = [(tensor, tensor._version) for tensor in (*shared, *bases)]
                output = func(*args, **kwargs)
                # Something shared that was written into something shared, or into a view of it.
                self._mark([tensor for tensor, version in before if tensor._version != version])
                # What a layer computes from nothing but its own parameters stays between it and its tap.
                own = all(tensor.requires_grad and tensor in self._others for tensor in shared)
                return output if own or self._covered.intersection(shared) else self._mark(output)
            caught = any(map(self._is_caught, shared)) and func.__name__ not in _LIKE
            if not caught:
                return func(*args, **kwargs)
            if func is F.multi_head_attention_forward:
                return self._attention(args, kwargs)
            if func.__name__ in _PRODUCTS and self._is_caught(args[0]) and self._has_samples_last(*args, **kwargs):
                return self._product_of_columns(*args, **kwargs)
            return self._meet(func, args, kwargs)
        except NotCaughtError:
            return func(*args, **kwargs)

    def _is_caught(self, tensor: Any) -> bool:
        """Whether a tensor is shared, and its gradient has to come by sample."""
        # Parameters with a layer of their own are caught by the layer's tap, unless the layer's output is shared itself.
        caught = isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled()
        return caught and tensor not in self._others and self.is_shared(tensor)

    def _meet(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.__name__
        if name in _POINTWISE:
            return self._pointwise(func, args, kwargs)
        if name in _JOINING:
            return self._join(func, args, kwargs)
        if name == "__setitem__":
            return self._set(func, *args)
        return self._general(func, args, kwargs)

    def _axis(self, dims: int) -> int:
        return 0 if self._batch_first or dims < 3 else 1

    def _mark(self, output: Any) -> Any:
        for tensor in tensors_in(output):
            tensor._shared_version = tensor._version  # type: ignore[attr-defined]
        return output

    def _mark_constant(self, output: Any) -> Any:
        """Marks what comes of constants, of which some were copied for each sample: as copied too, or as shared by them."""
        size = self._batch_sizes[-1]
        for tensor in tensors_in(output):
            axis = self._axis(tensor.dim())
            if size != 1 and tensor.dim() > axis and tensor.shape[axis] == size:
                tensor._copied_version = tensor._version  # type: ignore[attr-defined]
            else:
                self._mark(tensor)
        return output

    def _expanded(self, shared: Tensor, size: int, dims: int, axis: int) -> Tensor:
        """One row a sample of something shared; constants need no tap."""
        aligned = shared[(None,) * (dims - shared.dim())]
        if aligned.dim() <= axis or aligned.shape[axis] != 1:
            raise NotCaughtError
        rows = aligned.expand(*aligned.shape[:axis], size, *aligned.shape[axis + 1 :])
        if not self._is_caught(shared):
            return rows
        return self._tap_op(rows, Op(torch.Tensor.expand, {0: shared}), BATCH_AXIS, (), {}, axis)

    def _replaced(self, tree: Any, size: int, dims: int, axis: int) -> Any:
        """Arguments in which everything that is caught has a batch axis."""

        def replace(tensor: Tensor) -> Tensor:
            return self._expanded(tensor, size, dims, axis) if self._is_caught(tensor) else tensor

        return tree_map_only(Tensor, replace, tree)

    def _pointwise(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = list(_tensors(args, kwargs))
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        dims, axis = len(shape), self._axis(len(shape))
        in_place = func.__name__.endswith("_") and not func.__name__.startswith("__r")
        if dims <= axis or (in_place and self.is_shared(args[0])):
            raise NotCaughtError
        if not any(size_of(tensor, axis - dims) == shape[axis] for tensor in tensors if not self.is_shared(tensor)):
            raise NotCaughtError
        args, kwargs = self._replaced((args, kwargs), shape[axis], dims, axis)
        return func(*args, **kwargs)

    def _join(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        data = next(tensor for tensor in _tensors(args, kwargs) if not self.is_shared(tensor))
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

    def _expand(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Where the batch axis is the model's own doing: ``token.expand(len(x), -1, -1)``."""
        tensor = args[0]
        if not self.is_shared(tensor) or (tensor.requires_grad and tensor in self._others):
            return func(*args, **kwargs)
        sizes = _expansion(func.__name__, *args, **kwargs)
        if sizes is None:
            return self._mark(func(*args, **kwargs))
        copies = func.__name__ in ("repeat", "repeat_interleave", "tile")
        return self._expand_to(tensor, sizes, copies)

    def _expand_to(self, tensor: Tensor, sizes: list[int], copies: bool) -> Tensor:
        """Expands, or copies, something shared: to these sizes, or so many times along each axis."""
        size, dims = self._batch_sizes[-1], len(sizes)

        def expanded(tensor: Tensor) -> Tensor:
            return self._mark(tensor.repeat(*sizes) if copies else tensor.expand(*sizes))

        first = self._axis(dims)
        # Torch's own attention has samples second.
        for axis in (first, 1 - first) if dims > 2 else (first,):
            new = dims > axis and size_of(tensor, axis - dims) in (None, 1) and sizes[axis] != -1
            if size is not None and new and self._by_samples(tensor, sizes[axis], size, axis):
                sizes[axis] = 1
                rows = self._expanded(expanded(tensor), size, dims, axis)
                if not rows.requires_grad:
                    rows._copied_version = rows._version  # type: ignore[attr-defined]
                # A copy may be written into.
                return rows.clone() if copies else rows
        return expanded(tensor)

    def _join_copies(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Where the batch axis comes of a list: ``torch.stack([token] * len(x))``."""
        several = args[0] if args else kwargs["tensors"]
        tensor, dim = several[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if func.__name__ == "stack":
            dim = dim % (tensor.dim() + 1)
            tensor = self._mark(tensor.unsqueeze(dim))
        sizes = [1] * tensor.dim()
        sizes[dim] = len(several)
        if tensor.requires_grad and tensor in self._others:
            raise NotCaughtError
        return self._expand_to(tensor, sizes, copies=True)

    def _by_samples(self, tensor: Tensor, rows: int, samples: int, axis: int) -> bool:
        """Whether so many rows that something shared is expanded to are one a sample."""
        params = [id(leaf) for leaf in leaves_of([tensor]) if leaf in self.params or leaf in self._others]
        expansion = self._expansions.setdefault((*_place(), axis, *params), Expansion())
        if samples:
            expansion.see(rows, samples)
        if rows != samples:
            return False
        if samples == 1:
            # What is shared by one sample is that one's, in whichever way it is caught.
            return expansion.by_samples is True
        if expansion.by_samples is None and samples and not self._trying:
            raise NotImplementedError(
                f"a tensor of shape {tuple(tensor.shape)}, computed from parameters or constants, is expanded to {rows} rows, as "
                "many as there are samples. Whether they are samples cannot be told, since the model runs on no other number of "
                "them, or in another way when it is compiled. Let it take batches of any size, or leave the expanding to "
                "broadcasting, and call torch.compile(model) before make_private"
            )
        return expansion.by_samples is not False

    def _general(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor) or not output.requires_grad:
            return output
        leaves, spec = tree_flatten((args, kwargs))
        shared = {place: leaf for place, leaf in enumerate(leaves) if self._is_caught(leaf)}
        axis = self._axis(output.dim())
        if output.dim() <= axis or any(output is leaf for leaf in leaves):
            return output
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


class _Again:
    """What a checkpoint is to run again, with operations caught."""

    def __init__(self, ops: OpTaps, batch_size: int | None, function: Callable[..., Any]) -> None:
        self._ops, self._batch_size, self._function = ops, batch_size, function

    def __call__(self, *args: Any) -> None:
        with self._ops.again(self._batch_size):
            self._function(*args)


def _checkpointing() -> _CheckpointFrame | None:
    """What the innermost checkpoint knows of itself, in a part of a forward that is to run again."""
    hooks = TOP_SAVED_TENSORS_HOOKS and TOP_SAVED_TENSORS_HOOKS(False)
    cells = getattr(hooks[1], "__closure__", None) or () if hooks else ()
    frames = (cell.cell_contents for cell in cells)
    return next((frame for frame in frames if isinstance(frame, _CheckpointFrame)), None)


def _place() -> tuple[Any, ...]:
    """The place in the model's code from which an operation was called."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "opacus_fgc"):
        frame = frame.f_back
    return () if frame is None else (frame.f_code, frame.f_lasti)


def _expansion(
    name: str, tensor: Tensor, *sizes: Any, dim: int | None = None, output_size: int | None = None, **named: Any
) -> list[int] | None:
    """The sizes that a tensor is expanded to, or how often it is repeated along each axis; None if it is in another way."""
    if name == "repeat_interleave":
        (times, dim) = (*sizes, *named.values(), dim)[:2]
        if not isinstance(times, int) or dim is None or tensor.shape[dim] != 1:
            return None
        repeats = [1] * tensor.dim()
        repeats[dim] = times
        return repeats
    pattern = sizes[0] if sizes else next(iter(named.values()))
    several = list(sizes) if isinstance(pattern, int) else pattern.shape if isinstance(pattern, Tensor) else pattern
    return list(several)


def _is_copied(tensor: Tensor) -> bool:
    """Whether a tensor is known to hold no data, though it has one row a sample."""
    marked = getattr(tensor, "_copied_version", None)
    return marked is not None and marked == tensor._version and not tensor.requires_grad


def _is_one(tensors: list[Tensor]) -> bool:
    return len(tensors) > 1 and all(tensor is tensors[0] for tensor in tensors)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (item for item in value if isinstance(item, Tensor))


def size_of(tensor: Tensor, axis: int) -> int | None:
    """The size of an axis, counted from the first or (below 0) from the last; None if there is none."""
    return tensor.shape[axis] if -tensor.dim() <= axis < tensor.dim() else None
