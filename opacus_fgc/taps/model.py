"""The forward side of a wrapped model: which modules get a tap, and how what they are called on comes to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooksFastGradientClipping as OpacusHooks
from opacus.layers.dp_rnn import DPRNNBase
from opacus.utils.module_utils import has_trainable_params
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map_only

from opacus_fgc.argument_checks import describe, refuse_hidden_parameters, refuse_overlap
from opacus_fgc.certificates.buffers import Buffers
from opacus_fgc.certificates.entrances import Entrance
from opacus_fgc.certificates.model_state import ModelState, restored
from opacus_fgc.certificates.observations import Observations
from opacus_fgc.certificates.samples import batch_size, some_samples, tensors_of
from opacus_fgc.certificates.schedule import Schedule
from opacus_fgc.certificates.sketch import OUT_OF_MEMORY
from opacus_fgc.distributed.agreement import fingerprint
from opacus_fgc.distributed.shards import Unsharded
from opacus_fgc.distributed.topology import Layout
from opacus_fgc.errors import PrivacyNotImplementedError, located
from opacus_fgc.step.record import Record
from opacus_fgc.taps.compiled import KeptBuffers
from opacus_fgc.taps.constants import constants_of
from opacus_fgc.taps.expansion import Expansion
from opacus_fgc.taps.functorch import Functorch, is_repeating
from opacus_fgc.taps.graph import brought_by, leaves_of, reached_by
from opacus_fgc.taps.hooks import GradientHook, Handles, Hook, clear_copied
from opacus_fgc.taps.lookup import (
    ByOperation,
    Registered,
    Sampler,
    batch_axis,
    find_sampler,
    holds_only,
    with_batch_second,
)
from opacus_fgc.taps.operation_samplers import Op, OpSampler
from opacus_fgc.taps.operations import OpTaps
from opacus_fgc.taps.shared import size_of
from opacus_fgc.taps.tap import Call, Receiver, tap, tensors_in


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
    schedule: Schedule

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
        self._anchor = torch.zeros((), device="cpu", requires_grad=True)
        self._outermost: nn.Module | None = None
        self._verified: set[nn.Module] = set()
        self._entrance: Entrance | None = None
        self._shared_inputs: dict[nn.Module, set[str]] = {}
        self._buffers_before = Buffers(model)
        self._expansions: dict[Any, Expansion] = {}
        self._constants = constants_of(model)
        self._batch_second = with_batch_second(model)
        self._seen: Observations | None = None  # in forwards that are only looked at
        self._noted: Observations | None = None  # in the user's own
        self._samples: Tensor | None = None
        self.layout = Layout(model).prepare()
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
            handles.append(KeptBuffers())
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
        self._every_module: Sequence[nn.Module] = tuple(self._module.modules())
        if not compiled:
            # Whatever has layers in it may be called from outside. (Parts of a compiled module are not.)
            entrances.update(self._containers())
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
                handles.append(param.register_hook(GradientHook(self._see_gradient, param)))
        self.enable_hooks()

    def _containers(self) -> Iterator[nn.Module]:
        """The modules with trainable parameters in them that have no tap, and are in nothing that has one for all of it."""
        whole = [layer for layer, tapped in self._layers.items() if tapped.sampler.covers_children]
        inside = {module for layer in whole for module in layer.modules()}
        for module in self._every_module:
            if module not in self._layers and module not in inside and has_trainable_params_within(module):
                yield module

    def _see_gradient(self, param: Any, gradient: Tensor) -> None:
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
            record.batch_size_seen = batch_size((args, kwargs), self._axis)
            is_first = module not in self._verified
            state = ModelState(self._module) if is_first or self.schedule.is_expected else None
            self._verify(record, module, (args, kwargs))
            record.brought.update(brought_by(tensors_of((args, kwargs))))
            inputs = fingerprint(self.layout, (args, kwargs))
            record.inputs = inputs if inputs is None or record.inputs is None else record.inputs + inputs
            self._entrance = Entrance(module, args, kwargs, self._every_module, state)
            self._noted = None if state is None else Observations(record.batch_size_seen or 0)
        self._outermost = module
        if self._buffers_before.changed(self._module):
            self._buffers_before = Buffers(self._module)
        if self._operations or self._ops.params:
            self._ops.enter(record.batch_size_seen)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the same, called also when the forward failed."""
        if self._outermost is module:
            self._ops.leave()
            if self._noted is not None and self._entrance is not None and output is not None:
                self._entrance.forward = self._noted.of(tensors_of(output), self._module)
            self._outermost = self._entrance = self._noted = None
            if self.record is not None:
                self.record.changed_buffers |= self._buffers_before.changed(self._module)

    @property
    def _axis(self) -> int:
        return 0 if self.batch_first else 1

    def _verify(self, record: Record, module: nn.Module, inputs: Any) -> None:
        """Before the first forward: finds what escapes the taps, on two samples."""
        if module in self._verified:
            return
        size = record.batch_size_seen
        # All ranks are to run the same forwards, also those that have fewer samples than it takes.
        most = self.layout.all_reduce_max([size or 0])[0]
        some = some_samples(inputs, size, 0, 2, self._axis) if size is not None and most else inputs
        # A model that has its batch size written into it takes but the whole batch.
        if not self._has_caught_all(module, some, size if some is inputs else 2) and some is not inputs:
            self._has_caught_all(module, inputs, size)
        if most or size is None:
            self._verified.add(module)
        if some is not inputs:
            self._try_other_sizes(module, inputs, size or 0)

    def _try_other_sizes(self, module: nn.Module, inputs: Any, size: int) -> None:
        """Runs other numbers of samples than two while it is not known which rows are samples."""
        # Models often do nothing where there is but one.
        for length in (1, 3):
            if self.layout.on_all_ranks(not self._ops.undecided):
                return
            some = some_samples(inputs, size, 0, length, self._axis)
            with self.undisturbed(module, some), suppress(Exception):
                # What a model cannot do, or has no memory for, only leaves that unknown.
                self._trial(module, some, length)

    @contextmanager
    def undisturbed(self, module: nn.Module, inputs: Any) -> Iterator[None]:
        """A context for forwards of no consequence, after which random states, modes and the model's state are as before."""
        args, kwargs = inputs
        with Entrance(module, args, kwargs, self._every_module).again(keep=True), restored(self._module):
            yield

    def _has_caught_all(self, module: nn.Module, inputs: Any, size: int | None) -> bool:
        """Repeats a forward with other taps until nothing escapes them; says whether the forward works on these inputs."""
        while True:
            works, escaped = True, set[Any]()
            with self.undisturbed(module, inputs):
                try:
                    output = self._trial(module, inputs, size)
                except OUT_OF_MEMORY:
                    raise
                except Exception:
                    works = False
            if works:
                outputs = [tensor for tensor in tensors_of(output) if not self._ops.is_shared(tensor)]
                escaped = self._untapped(outputs, tensors_of(inputs))
            if not self._catch(escaped):
                return self.layout.on_all_ranks(works)

    def _trial(self, module: nn.Module, inputs: Any, size: int | None) -> Any:
        """A forward that is not the user's own, of which the record keeps nothing."""
        # One that is only looked at may run between a first pass and what comes of it.
        record = self._open_record() if self._seen is None or self.record is None else self.record
        kept, record.batch_size_seen = (record.uses.expected, record.batch_size_seen), size
        self._outermost = _TRIAL
        self._ops.enter(size, trying=True)
        args, kwargs = inputs
        try:
            # With all hooks, and not as it is compiled.
            return module._call_impl(*args, **kwargs)
        finally:
            self._ops.leave()
            self._outermost = None
            record.uses.expected, record.batch_size_seen = kept
            # Casts of weights that it made are older than the user's forward, and come too late in backward for FSDP.
            torch.clear_autocast_cache()

    def _catch(self, escaped: set[Any]) -> bool:
        """Has modules whose parameters escaped the taps, on any rank, tapped in another way; says whether there are some."""
        layers = list(self.iterate_submodules(self._module))
        ways = self.layout.all_reduce_max([self._next_way(layer, escaped) for layer in layers])
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
        """The parameters that something depends on past their taps; see `taps.graph.reached_by`."""
        wanted = map(self._unsharded.of, self.trainable_parameters)
        return set(map(self._unsharded.parameter, reached_by(outputs, wanted, inputs).past))

    def _begin_packed(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of Opacus' recurrent layers: on packed sequences, their cells see the first rows of sorted samples."""
        if args and isinstance(args[0], PackedSequence):
            data, sizes, samples, back = args[0]
            if self.record is not None:
                self.record.orders += [order for order in (samples, back) if order is not None]
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
            self._check_shared((forward_input, forward_kwargs), size, axis, layer)
            forward_input, forward_kwargs = _expanded((forward_input, forward_kwargs), size, axis)
            forward_output = module.forward(*forward_input, **forward_kwargs)
        return self._tap(
            module, layer, forward_output, (forward_input, forward_kwargs), axis, layer.sampler.fingerprint
        )

    def _check_shared(self, inputs: Any, size: int, axis: int, layer: Tapped) -> None:
        """Raises an error if a single row is known to be no input that the batch shares."""
        for tensor in tensors_in(inputs):
            base = tensor._base
            is_row = base is not None and not self._ops.is_shared(base) and size_of(base, axis) == size
            if tensor.requires_grad or is_row:
                raise PrivacyNotImplementedError(
                    f"{layer.name}: it was called on a single row in a batch of {size} samples, and this row is one of the "
                    "batch or has a gradient. If it belongs to one sample, as in a loop over the samples, call the layer once, "
                    "on the rows of all samples. If it is a parameter of another layer (embedding.weight), make that a "
                    "parameter of the module that uses it"
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
        if self._seen is not None:
            self._look_at(self._seen, key, layer, output, inputs, axis)
            return output
        entrance = self._entrance
        if not self._recomputing():
            if self._noted is not None:
                self._look_at(self._noted, key, layer, output, inputs, axis)
            self._open_record().uses.expect(key, params)
            if entrance is None and isinstance(key, nn.Module) and self._outermost is None:
                entrance = Entrance(key, *inputs, self._every_module)
        seen = list(map(self._unsharded.of, params))
        try:
            return tap(
                output, *inputs, self._anchor, seen, layer.receive, axis, fingerprint, self._samples, key, entrance
            )
        except NotImplementedError as error:
            raise located(error, layer.name)  # noqa: B904

    def _look_at(
        self, observations: Observations, key: Any, layer: Tapped, output: Any, inputs: Any, axis: int
    ) -> None:
        for value in tensors_in(inputs) or tensors_in(output):
            observations.look_at(key, layer.name, value, [axis], self._samples)

    def _tapped(self, key: Any) -> Tapped:
        return self._layers[key] if isinstance(key, nn.Module) else self._operations[key]


_TRIAL = nn.Module()
"""What is outermost in a forward that is not the user's own."""


_WAYS: tuple[Any, ...] = (None, ByOperation, Functorch)
"""What is tried in turn, after a registered sampler, where a parameter escapes."""


def _params_of(layers: Iterable[nn.Module]) -> set[Tensor]:
    return {param for layer in layers for param in layer.parameters(recurse=False) if param.requires_grad}


def has_trainable_params_within(module: nn.Module) -> bool:
    """Whether something in a module, or in one of its children, is trained."""
    return any(param.requires_grad for param in module.parameters())


def _has_one_row(output: Any, axis: int) -> bool:
    return isinstance(output, Tensor) and size_of(output, axis) == 1


def _expanded(inputs: Any, size: int, axis: int) -> Any:
    def expand(tensor: Tensor) -> Tensor:
        if size_of(tensor, axis) != 1:
            return tensor
        return tensor.expand(*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])

    return tree_map_only(Tensor, expand, inputs)
