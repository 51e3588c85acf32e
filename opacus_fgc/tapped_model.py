"""The forward side of a wrapped model: which modules get a tap, and how what they are called on comes to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooksFastGradientClipping as OpacusHooks
from opacus.layers.dp_rnn import DPRNNBase
from opacus.utils.module_utils import has_trainable_params
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only

from opacus_fgc.buffers import Buffers
from opacus_fgc.checks import describe, refuse_hidden_parameters, refuse_overlap
from opacus_fgc.constants import constants_of
from opacus_fgc.hooks import Handles, Hook, clear_copied
from opacus_fgc.independence import (
    OUT_OF_MEMORY,
    Seen,
    check_independence,
    look_at,
    refuse_data_in_buffers,
    some_samples,
    undisturbed,
)
from opacus_fgc.layout import Layout
from opacus_fgc.norm_samplers.functorch import Functorch, is_repeating
from opacus_fgc.norm_samplers.lookup import (
    ByOperation,
    Registered,
    Sampler,
    batch_axis,
    find_sampler,
    holds_only,
    with_batch_second,
)
from opacus_fgc.norm_samplers.ops import Op, OpSampler
from opacus_fgc.op_taps import Expansion, OpTaps
from opacus_fgc.record import Record
from opacus_fgc.shards import Unsharded
from opacus_fgc.taps import Call, Receiver, leaves_of, tap, tensors_in, untapped


@dataclass(frozen=True, eq=False)
class Tapped:
    """A layer, or an operation, with a tap.

    Attributes:
        path: the layer's name in the model.
        name: what to call it in errors.
        type: what to call its type.
        sampler: what computes its per-sample gradients.
        params: the parameters that the sampler answers for, by name.
        receive: what its taps hand their backprops to.
    """

    path: str
    name: str
    type: str
    sampler: Sampler
    params: Mapping[str, Any]
    receive: Receiver


class TappedModel(OpacusHooks):
    """Hooks that tap what a model does with its trainable parameters.

    Layers with a norm sampler are tapped as a whole. In all other modules the operations on their parameters are; see `OpTaps`.
    Before the first forward of all, one of two samples shows whether something escapes that: a parameter that is used past its
    layer, or in a way that cannot be caught. Then its module is tapped in another way.
    """

    batch_first: bool
    hooks_enabled: bool
    loss_reduction: str
    record: Record | None = None

    def iterate_submodules(self, module: nn.Module) -> Iterator[nn.Module]:
        """The modules that are tapped: all with trainable parameters of their own, but for those inside a functorch layer."""
        seen, todo = set(), [module]
        while todo:
            layer = todo.pop()
            if layer in seen:
                continue
            seen.add(layer)
            # Opacus' recurrent layers show their cells' parameters as their own.
            if has_trainable_params(layer) and not isinstance(layer, DPRNNBase):
                yield layer
                if self._sampler(layer).covers_children:
                    continue
            todo.extend(layer.children())

    def _sampler(self, layer: nn.Module) -> Sampler | ByOperation:
        return Functorch() if self.force_functorch else self._overruled.get(layer) or find_sampler(layer)

    def _prepare(self, model: nn.Module, force_functorch: bool) -> None:
        """Sets what `add_hooks` needs; raises if the model cannot be tapped."""
        clear_copied(model)
        refuse_hidden_parameters(model)
        self.force_functorch = force_functorch
        self._overruled: dict[nn.Module, Sampler | ByOperation] = {}
        self._operations: dict[Any, Tapped] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        self._outermost: nn.Module | None = None
        self._verified: set[nn.Module] = set()
        self._rows_known: bool | None = None
        self._buffers_before = Buffers(model)
        self._harmless: set[str] = set()
        self._expansions: dict[Any, Expansion] = {}
        self._constants = constants_of(model)
        self._batch_second = with_batch_second(model)
        self._seen: list[Seen] | None = None
        self._samples: Tensor | None = None
        self.layout = Layout(model)
        self._unsharded = Unsharded(
            model, lambda param, seen: self._ops.add(param, seen), lambda tensor: self._ops.is_shared(tensor)
        )
        self._agree(model)

    def _is_compiled(self) -> bool:
        return any(
            hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in self._module.modules()
        )

    def _look_for_compiled(self) -> None:
        """Puts the hooks on anew if a part of the model was compiled since."""
        if not self._compiled and self._is_compiled():
            self.remove_hooks()
            self.add_hooks()

    def _agree(self, model: nn.Module) -> None:
        """Has all layers of a parameter tapped in ways that do not see each other's uses."""
        before = None
        while before != len(self._overruled):
            before = len(self._overruled)
            layers = list(self.iterate_submodules(model))
            by_operation = _params_of(layer for layer in layers if isinstance(self._sampler(layer), ByOperation))
            as_a_whole = _params_of(layer for layer in layers if isinstance(self._sampler(layer), Functorch))
            for layer in layers:
                own, sampler = _params_of([layer]), self._sampler(layer)
                if isinstance(sampler, ByOperation) and own & as_a_whole:
                    self._overruled[layer] = Functorch()
                elif isinstance(sampler, Registered) and own & by_operation and not own & as_a_whole:
                    self._overruled[layer] = ByOperation()
        refuse_overlap(model, set(layers), {layer for layer in layers if self._sampler(layer).covers_children})

    def add_hooks(
        self, *, loss_reduction: str = "mean", batch_first: bool = True, force_functorch: bool = False
    ) -> None:
        """Puts the hooks on the model; `remove_hooks` takes them off. The arguments are Opacus' and not used here."""
        handles: list[Any] = Handles()
        compiled = self._compiled = self._is_compiled()
        if compiled:
            # What torch asks for where a graph is to go through backward twice.
            torch._functorch.config.donated_buffer = False
        self.autograd_grad_sample_hooks = self._module.autograd_grad_sample_hooks = handles
        self._layers: dict[nn.Module, Tapped] = {}
        paths = {layer: path for path, layer in self._module.named_modules()}
        entrances: set[nn.Module] = {self._module}
        watched: set[Tensor] = set()
        for layer in self.iterate_submodules(self._module):
            sampler = self._sampler(layer)
            params = self._unsharded.named_parameters(layer, recurse=sampler.covers_children)
            if isinstance(sampler, ByOperation):
                entrances.add(layer)
                watched.update(param for param in params.values() if param.requires_grad)
                continue
            name = describe(paths[layer], layer)
            receive = partial(self._receive, layer)
            self._layers[layer] = Tapped(paths[layer], name, type(layer).__name__, sampler, params, receive)
        # Torch's attention uses a child's weight, which a checkpoint that starts in between has to find watched.
        entrances.update(module for module in self._module.modules() if isinstance(module, nn.MultiheadAttention))
        # Before `_enter` in this list, so after it in a call: it may run the model on its own.
        handles += self._unsharded.watch()
        for module in entrances:
            handles.append(module.register_forward_pre_hook(Hook(self._enter), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(Hook(self._leave), with_kwargs=True, always_call=True))
        for layer in self._layers:
            # First of all hooks, so that the tap sees what the layer itself returned.
            handles.append(
                layer.register_forward_hook(Hook(self.capture_activations_hook), prepend=True, with_kwargs=True)
            )
        named = self._unsharded.named_parameters(self._module)
        # As they are between two forwards.
        every, self._paths = named.values(), {param: path for path, param in named.items()}
        others = {*every, *self._module.buffers()} - watched
        covered = [
            param
            for layer in self._layers.values()
            if layer.sampler.covers_children
            for param in layer.params.values()
            if param.requires_grad
        ]
        self._ops = OpTaps(
            watched,
            others,
            self._constants,
            covered,
            self._tap_operation,
            self._observe,
            self.batch_first,
            self._expansions,
            compiled,
        )
        for module in self._module.modules():
            if isinstance(module, DPRNNBase):
                handles.append(module.register_forward_pre_hook(Hook(self._begin_packed)))
                handles.append(module.register_forward_hook(Hook(self._end_packed), always_call=True))
        for param in every:
            self._ops.add(param, self._unsharded.of(param))
            if param.requires_grad:
                handles.append(param.register_hook(partial(self._collect_second_pass, param)))
        self.enable_hooks()

    def _collect_second_pass(self, param: Any, gradient: Tensor) -> None:
        raise NotImplementedError

    def _receive(self, module: Any, call: Call, backprops: tuple[Tensor, ...]) -> None:
        raise NotImplementedError

    # Forward

    @staticmethod
    def _recomputing() -> bool:
        # A forward that runs inside of a backward is activation checkpointing at work: a second look at the same use, which
        # has to save what the first one saved, whichever pass it is.
        return torch._C._current_graph_task_id() != -1

    def _tapping(self) -> bool:
        return torch.is_grad_enabled() and not is_repeating() and (self.hooks_enabled or self._recomputing())

    def _open_record(self) -> Record:
        """The record of the step whose forward runs; a new one if backward has been there."""
        if self.record is None or self.record.receiving:
            self.record = Record(self.loss_reduction)
            self._second_pass: dict[Any, Tensor] | None = None
            for param in self.trainable_parameters:
                param._norm_sample = None
        return self.record

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model, and of modules whose operations are caught; the outermost of them counts."""
        if self._outermost is _TRIAL:
            return
        if module is self._module:
            self._look_for_compiled()
            # After an interrupt nobody has come to `_leave`.
            self._ops.leave()
            self._outermost = None
        if self._outermost is not None or not self._tapping():
            return
        record = self._open_record() if self.record is None or not self._recomputing() else self.record
        if not self._recomputing():
            record.batch_size_seen = _batch_size((args, kwargs), self.batch_first)
            self._verify(record, module, (args, kwargs))
            inputs = self.layout.fingerprint((args, kwargs))
            record.inputs = inputs if inputs is None or record.inputs is None else record.inputs + inputs
        self._outermost = module
        if self._buffers_before.changed(self._module):
            self._buffers_before = Buffers(self._module)
        if self._operations or self._ops.params:
            self._ops.enter(record.batch_size_seen)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the same, called also when the forward failed."""
        if self._outermost is module:
            self._ops.leave()
            self._outermost = None
            if output is not None and not self._recomputing():
                self._refuse_data_in_buffers(module, (args, kwargs))

    def _refuse_data_in_buffers(self, module: nn.Module, inputs: Any) -> None:
        changed = self._buffers_before.changed(self._module) - self._harmless
        if changed:
            size = (self.record.batch_size_seen if self.record is not None else None) or 0
            run = partial(self._trial_of_some, module, inputs, size) if self.layout.most([size])[0] > 1 else None
            refuse_data_in_buffers(describe("", self._module), self._module, inputs, self._buffers_before, changed, run)
            self._harmless |= changed

    def _verify(self, record: Record, module: nn.Module, inputs: Any) -> None:
        """Before the first forward: finds what escapes the taps, and whether rows are samples; on two samples."""
        record.rows_known = bool(self._rows_known)
        if module in self._verified and (self._rows_known is not None or module is not self._module):
            return
        size, axis = record.batch_size_seen, 0 if self.batch_first else 1
        # All ranks are to run the same forwards, also those that have fewer samples than it takes.
        most = self.layout.most([size or 0])[0]
        if module not in self._verified:
            some = some_samples(inputs, size, 0, 2, axis) if size is not None and most else inputs
            # A model that has its batch size written into it takes but the whole batch.
            if not self._has_caught_all(module, some, size if some is inputs else 2) and some is not inputs:
                self._has_caught_all(module, inputs, size)
            if most or size is None:
                self._verified.add(module)
            if some is not inputs:
                self._try_other_sizes(module, inputs, size or 0)
        if self._rows_known is None and module is self._module and size is not None and most > 1:

            def run(start: int, length: int) -> list[Seen]:
                seen: list[Seen] = []
                self._seen = seen
                try:
                    outputs = tensors_in(self._trial_of_some(module, inputs, size, start, length))
                finally:
                    self._seen = None
                return seen + [look_at("", output, axis, tapped=False) for output in outputs]

            name, second_first = describe("", self._module), self.layout.data_rank % 2 == 1
            self._rows_known = check_independence(
                name, self._module, inputs, run, self.layout.on_all_ranks, second_first
            )
        record.rows_known = bool(self._rows_known)

    def _try_other_sizes(self, module: nn.Module, inputs: Any, size: int) -> None:
        """Runs other numbers of samples than two while it is not known which rows are samples."""
        # Models often do nothing where there is but one.
        for length in (1, 3):
            if self.layout.on_all_ranks(not self._ops.undecided):
                return
            with undisturbed(self._module, inputs), suppress(Exception):
                # What a model cannot do, or has no memory for, only leaves that unknown.
                self._trial_of_some(module, inputs, size, 0, length)

    def _has_caught_all(self, module: nn.Module, inputs: Any, size: int | None) -> bool:
        """Repeats a forward with other taps until nothing escapes them; says whether the forward works on these inputs."""
        while True:
            works, escaped = True, set[Any]()
            with undisturbed(self._module, inputs):
                try:
                    output = self._trial(module, inputs, size)
                except OUT_OF_MEMORY:
                    raise
                except Exception:
                    works = False
            if works:
                outputs = [tensor for tensor in tensors_in(output) if not self._ops.is_shared(tensor)]
                escaped = self._untapped(outputs, tensors_in(inputs))
            if not self._catch(escaped):
                return self.layout.on_all_ranks(works)

    def _trial(self, module: nn.Module, inputs: Any, size: int | None) -> Any:
        """A forward that is not the user's own, of which the record keeps nothing."""
        record = self._open_record()
        kept, record.batch_size_seen = (record.expectations, record.batch_size_seen), size
        self._outermost = _TRIAL
        self._ops.enter(size, trying=True)
        args, kwargs = inputs
        try:
            # With all hooks, and not as it is compiled.
            return module._call_impl(*args, **kwargs)
        finally:
            self._ops.leave()
            self._outermost = None
            record.expectations, record.batch_size_seen = kept
            # Casts of weights that it made are older than the user's forward, and come too late in backward for FSDP.
            torch.clear_autocast_cache()

    def _trial_of_some(self, module: nn.Module, inputs: Any, size: int, start: int, length: int) -> Any:
        """A trial on some of ``size`` samples."""
        some = some_samples(inputs, size, start, length, 0 if self.batch_first else 1)
        return self._trial(module, some, length)

    def _catch(self, escaped: set[Any]) -> bool:
        """Has modules whose parameters escaped the taps, on any rank, tapped in another way; says whether there are some."""
        layers = list(self.iterate_submodules(self._module))
        ways = self.layout.most([self._next_way(layer, escaped) for layer in layers])
        changes = {layer: _WAYS[way] for layer, way in zip(layers, ways, strict=True) if way}
        changes = {layer: way for layer, way in changes.items() if not isinstance(self._sampler(layer), way)}
        if changes:
            self._overruled.update((layer, way()) for layer, way in changes.items())
            self._agree(self._module)
            self.remove_hooks()
            self.add_hooks()
        return bool(changes)

    def _next_way(self, layer: nn.Module, escaped: set[Any]) -> int:
        """The place in `_WAYS` of the way in which a layer is to be tapped; 0 if it is to stay as it is."""
        if not escaped.intersection(self._unsharded.named_parameters(layer, recurse=False).values()):
            return 0
        return 1 if isinstance(self._sampler(layer), Registered) else 2

    def _untapped(self, outputs: Iterable[Tensor], inputs: Iterable[Tensor] = ()) -> set[Any]:
        """The parameters that something depends on past their taps; see `taps.untapped`."""
        wanted = map(self._unsharded.of, self.trainable_parameters)
        return set(map(self._unsharded.parameter, untapped(outputs, wanted, inputs)))

    def _begin_packed(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of Opacus' recurrent layers: on packed sequences, their cells see the first rows of sorted samples."""
        if args and isinstance(args[0], PackedSequence):
            data, sizes, samples, _ = args[0]
            self._samples = torch.arange(int(sizes[0]), device=data.device) if samples is None else samples

    def _end_packed(self, module: nn.Module, args: Any, output: Any) -> None:
        self._samples = None

    def capture_activations_hook(
        self, module: nn.Module, forward_input: tuple[Any, ...], forward_kwargs: dict[str, Any], forward_output: Any
    ) -> Any:
        """Forward hook of each layer: returns its output with a tap on it.

        Args:
            module: the layer.
            forward_input: its positional arguments.
            forward_kwargs: its keyword arguments.
            forward_output: what it returned.
        """
        if not self._tapping():
            return forward_output
        layer = self._layers[module]
        # What was computed from its parameters, and is in their place, is no use of them that its sampler knows.
        if not self._holds_its_own(module, layer):
            return forward_output
        if self._ops.active and layer.sampler.covers_children:
            self._ops.leave_covered((forward_input, forward_kwargs), forward_output)
        # What comes of parameters and constants alone is caught where it meets the data.
        if self._ops.active and any(map(self._ops.is_shared, tensors_in(forward_output))):
            return forward_output
        batch_first = self.batch_first and module not in self._batch_second
        axis = batch_axis(module, (forward_input, forward_kwargs), batch_first)
        inside = self.record is not None and (self._outermost is not None or self._recomputing())
        size = self.record.batch_size_seen if self.record is not None and inside else None
        if size not in (None, 1) and self._samples is None and _has_one_row(forward_output, axis):
            # An input that the batch shares, such as position ids: the layer has to see it once a sample.
            forward_input, forward_kwargs = _expanded((forward_input, forward_kwargs), size, axis)
            forward_output = module.forward(*forward_input, **forward_kwargs)
        return self._tap(
            module, layer, forward_output, (forward_input, forward_kwargs), axis, layer.sampler.fingerprint
        )

    def _holds_its_own(self, module: nn.Module, layer: Tapped) -> bool:
        if not layer.sampler.covers_children:
            return holds_only(module, {name: self._unsharded.of(param) for name, param in layer.params.items()})
        there = dict(module.named_parameters())
        return all(there.get(name) is self._unsharded.of(param) for name, param in layer.params.items())

    def _tap_operation(
        self, output: Tensor, op: Op, sampler: OpSampler, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int
    ) -> Tensor:
        params = [self._unsharded.parameter(leaf) for leaf in leaves_of(op.shared.values())]
        key = (op.function.__name__, sampler.name, *map(id, params))
        if key not in self._operations:
            path, function = ", ".join(self._paths[param] for param in params), op.function.__name__
            own = {self._paths[param]: param for param in params}
            receive = partial(self._receive, key)
            self._operations[key] = Tapped(
                path, f"operation '{function}' on {path}", f"({function})", sampler, own, receive
            )
        return self._tap(key, self._operations[key], output, (args, kwargs), axis, lambda outputs, axis: op)

    def _observe(self, name: str, output: Tensor, axis: int) -> None:
        if self._seen is not None:
            self._seen.append(look_at(f"operation '{name}'", output, axis, tapped=False))

    def _tap(
        self,
        key: Any,
        layer: Tapped,
        output: Any,
        inputs: tuple[tuple[Any, ...], dict[str, Any]],
        axis: int,
        fingerprint: Callable[[list[Tensor], int], Any],
    ) -> Any:
        params = [param for param in layer.params.values() if param.requires_grad]
        if not params:
            return output
        if self._seen is not None and self._samples is None:
            self._seen += [look_at(layer.name, value, axis) for value in tensors_in(output)[:1]]
        if self._seen is not None:
            return output
        if not self._recomputing():
            self._open_record().expect(key, params)
        seen = list(map(self._unsharded.of, params))
        try:
            return tap(output, *inputs, self._anchor, seen, layer.receive, axis, fingerprint, self._samples)
        except NotImplementedError as error:
            raise NotImplementedError(f"{layer.name}: {error}") from error

    def _tapped(self, key: Any) -> Tapped:
        return self._layers[key] if isinstance(key, nn.Module) else self._operations[key]


_TRIAL = nn.Module()
"""What is outermost in a forward that is not the user's own."""


_WAYS: tuple[Any, ...] = (None, ByOperation, Functorch)
"""What is tried in turn, after a registered sampler, where a parameter escapes."""


def _params_of(layers: Iterable[nn.Module]) -> set[Tensor]:
    return {param for layer in layers for param in layer.parameters(recurse=False) if param.requires_grad}


def _batch_size(inputs: Any, batch_first: bool) -> int | None:
    """The number of samples that a model is called on, None if it does not show; inputs of one row may be shared."""
    for leaf in tree_leaves(inputs, is_leaf=lambda leaf: isinstance(leaf, PackedSequence)):
        if isinstance(leaf, PackedSequence):
            return None
    # Of (T, N) and (N, features) nobody can tell which it is.
    axis, least = (0, 1) if batch_first else (1, 3)
    sizes = [tensor.shape[axis] for tensor in tensors_in(inputs) if tensor.dim() >= least]
    return next((size for size in sizes if size != 1), 1) if sizes else None


def _has_one_row(output: Any, axis: int) -> bool:
    return isinstance(output, Tensor) and output.dim() > axis and output.shape[axis] == 1


def _expanded(inputs: Any, size: int, axis: int) -> Any:
    def expand(tensor: Tensor) -> Tensor:
        one = tensor.dim() > axis and tensor.shape[axis] == 1
        return tensor.expand(*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]) if one else tensor

    return tree_map_only(Tensor, expand, inputs)
