"""What the hooks of a forward do: put a tap on what layers, and operations on parameters, return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from opacus_fgc._compat.autograd import in_backward
from opacus_fgc._compat.functorch import batched, innermost_transform, outside_of_transforms, physical, runs_in_one_vmap
from opacus_fgc._compat.opacus import set_norm_sample
from opacus_fgc._compat.pytree import tree_map_only
from opacus_fgc.certificates.entrances import Entrance
from opacus_fgc.certificates.observations import Observations
from opacus_fgc.certificates.schedule import Certification
from opacus_fgc.errors import PrivacyNotImplementedError, located
from opacus_fgc.norm_samplers.embedding import are_joined_bags
from opacus_fgc.norm_samplers.registry import Arranged
from opacus_fgc.step.phase import Phase
from opacus_fgc.step.record import Record
from opacus_fgc.taps.assignment import Assignment
from opacus_fgc.taps.functorch import is_repeating
from opacus_fgc.taps.graph import leaves_of
from opacus_fgc.taps.heads import note_head
from opacus_fgc.taps.lookup import (
    Sampler,
    arranged,
    batch_axis,
    holds_only,
    lacks_batch_axis,
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


@dataclass
class Taps:
    """What is tapped of a model, as its hooks were put on last.

    Attributes:
        ops: the taps on operations.
        layers: the layers that have a tap.
        paths: the names of parameters, as they are between two forwards.
        every_module: the modules of the model.
        compiled: whether a part of it is compiled.
    """

    ops: OpTaps
    layers: dict[nn.Module, Tapped]
    paths: dict[Any, str]
    every_module: Sequence[nn.Module]
    compiled: bool


@dataclass
class Running:
    """The forward that runs, if one does.

    Attributes:
        outermost: the module that was called from outside.
        entrance: what it was called on.
        seen: where a forward that is only looked at is noted.
        noted: where the user's own is noted, as well.
        samples: the samples of the first rows, in a cell on a packed sequence.
        single: in a trial the layers that were called on a single row, and what they returned.
        shapes: in a trial of what shapes layers returned tensors.
    """

    outermost: nn.Module | None = None
    entrance: Entrance | None = None
    seen: Observations | None = None
    noted: Observations | None = None
    samples: Tensor | None = None
    single: list[tuple[nn.Module, Tensor]] | None = None
    shapes: dict[nn.Module, list[torch.Size]] | None = None


class Tapping(Assignment):
    """Puts taps on outputs in forward, and notes what it was called on in the step's record."""

    batch_first: bool
    hooks_enabled: bool
    loss_reduction: str
    record: Record
    certification: Certification
    _taps: Taps
    _running: Running

    def _receive(self, module: Any, call: Call, backprops: tuple[Tensor, ...]) -> None:
        raise NotImplementedError

    # A forward that runs inside of a backward is activation checkpointing at work: a second look at the same use, which
    # has to save what the first one saved, whichever pass it is.
    _recomputing = staticmethod(in_backward)

    def _tapping(self) -> bool:
        return torch.is_grad_enabled() and not is_repeating() and (self.hooks_enabled or self._recomputing())

    def _open_record(self) -> Record:
        """The record of the step whose forward runs; a new one if backward has been there."""
        if self.record.phase is not Phase.FORWARD:
            self.record = Record(self.loss_reduction, Phase.FORWARD)
            for param in self.trainable_parameters:
                set_norm_sample(param, None)
        return self.record

    def _give_up_record(self) -> None:
        """Forgets the step: half of one is of no use to any other, and holds activations."""
        self.record = Record(self.loss_reduction)

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
        if innermost_transform() is not None:
            return self._tap_in_vmap(module, forward_input, forward_kwargs, forward_output)
        if isinstance(forward_output, Tensor) and forward_output.is_nested:
            return self._tap_nested(module, forward_input, forward_kwargs, forward_output)
        layer = self._taps.layers[module]
        # What was computed from its parameters, and is in their place, is no use of them that its sampler knows.
        if not self._holds_its_own(module, layer):
            return forward_output
        note_head(module, layer, forward_input, self._running.outermost is None, self._facts, self.batch_first)
        if self._taps.ops.active and layer.sampler.covers_children:
            self._taps.ops.leave_covered((forward_input, forward_kwargs), forward_output)
        # What comes of parameters and constants alone is caught where it meets the data.
        if self._taps.ops.active and any(map(self._taps.ops.is_shared, tensors_in(forward_output))):
            return forward_output
        if (call := _arranged(module, layer, forward_input, forward_kwargs, forward_output)) is not None:
            self.record.orders += call.orders
            return call.restored(
                self._tap(module, layer, call.outputs, (call.inputs, {}), 0, layer.sampler.fingerprint)
            )
        if self._running.shapes is not None and isinstance(forward_output, Tensor):
            self._running.shapes.setdefault(module, []).append(forward_output.shape)
        batch_first = self.batch_first and module not in self._facts.batch_second
        axis = batch_axis(module, (forward_input, forward_kwargs), batch_first)
        inside = self._running.outermost is not None or self._recomputing()
        size = self.record.batch_size_seen if inside else None
        if size not in (None, 1) and self._running.samples is None and isinstance(forward_output, Tensor):
            if module in self._facts.shares_row and size_of(forward_output, axis) == 1:
                # An input that the batch shares, such as position ids: the layer has to see it once a sample.
                forward_input, forward_kwargs = _expanded((forward_input, forward_kwargs), size, axis)
                forward_output = module.forward(*forward_input, **forward_kwargs)
            elif self._running.single is not None and size_of(forward_output, axis) == 1:
                self._running.single.append((module, forward_output))
        if lacks_batch_axis(module, forward_output):
            # One row by itself, as a loop over a batch gives it.
            inputs: Any = (tuple(tensor.unsqueeze(0) for tensor in tensors_in((forward_input, forward_kwargs))), {})
            row = self._tap(module, layer, forward_output.unsqueeze(0), inputs, 0, layer.sampler.fingerprint)
            return row.squeeze(0)
        inputs = (forward_input, forward_kwargs)
        return self._tap(module, layer, forward_output, inputs, axis, layer.sampler.fingerprint)

    def _tap_in_vmap(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Puts a tap on what a layer returned in `torch.func.vmap`, whose rows it sees there one by one."""
        layer, tensors = self._taps.layers[module], tensors_in((args, kwargs))
        if not (
            runs_in_one_vmap()
            and isinstance(output, Tensor)
            and len(tensors) == 1
            and not layer.sampler.covers_children
        ):
            # Without a tap the loss depends on parameters past their layer, and is refused.
            return output
        returned, given = physical(output), physical(tensors[0])
        if returned is None or given is None:
            return output
        with outside_of_transforms():
            rows, features = (tensor.movedim(axis, 0) for tensor, axis, _ in (returned, given))
            tapped = self._tap(module, layer, rows, ((features,), {}), 0, layer.sampler.fingerprint)
        return batched(tapped, returned[2])

    def _tap_nested(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Puts a tap on what a layer returned for samples of different lengths, whose rows are one after another."""
        layer, tensors = self._taps.layers[module], tensors_in((args, kwargs))
        jagged = all(tensor.is_nested and tensor.layout is torch.jagged for tensor in (output, *tensors))
        if not jagged or len(tensors) != 1 or layer.sampler.covers_children:
            raise PrivacyNotImplementedError(
                f"{layer.name}: it was called on nested tensors; a layer with a norm sampler may be, on one of them with "
                "layout=torch.jagged. Pad the samples instead (torch.nested.to_padded_tensor), and use a mask"
            )
        features: Any = ((tensors[0].values(),), {})
        tapped = self._tap(module, layer, output.values(), features, 0, layer.sampler.fingerprint)
        nested: Any = output
        return torch.nested.nested_tensor_from_jagged(tapped, nested.offsets())

    def _holds_its_own(self, module: nn.Module, layer: Tapped) -> bool:
        if not layer.sampler.covers_children:
            return holds_only(module, self._facts.unsharded.of_named(layer.params))
        there = dict(module.named_parameters())
        return all(there.get(name) is self._facts.unsharded.of(param) for name, param in layer.params.items())

    def _tap_operation(
        self, output: Tensor, op: Op, sampler: OpSampler, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int
    ) -> Tensor:
        params = [self._facts.unsharded.parameter(leaf) for leaf in leaves_of(op.shared.values())]
        key = (op.function.__name__, sampler.name, *map(id, params))
        if key not in self._facts.operations:
            path, function = ", ".join(self._taps.paths[param] for param in params), op.function.__name__
            own = {self._taps.paths[param]: param for param in params}
            receive = partial(self._receive, key)
            self._facts.operations[key] = Tapped(
                path, f"operation '{function}' on {path}", f"({function})", sampler, own, receive
            )
        return self._tap(key, self._facts.operations[key], output, (args, kwargs), axis, lambda outputs, axis: op)

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
        if self._running.seen is not None:
            self._look_at(self._running.seen, key, layer.name, _shown(key, inputs, output), axis)
            return output
        with self._taps.ops.paused():
            entrance, number = self._running.entrance, 0
            if not self._recomputing():
                if self._running.noted is not None:
                    self._look_at(self._running.noted, key, layer.name, _shown(key, inputs, output), axis)
                self._open_record().uses.expect(key, params, tensors_in(inputs), tensors_in(output))
                if entrance is None and isinstance(key, nn.Module) and self._running.outermost is None:
                    entrance = Entrance(key, *inputs, self._taps.every_module)
                if entrance is not None:
                    number = entrance.enter(key, *inputs)
            seen = list(map(self._facts.unsharded.of, params))
            anchor, samples = self._facts.anchor, self._running.samples
            try:
                return tap(
                    output, *inputs, anchor, seen, layer.receive, axis, fingerprint, samples, key, entrance, number
                )
            except NotImplementedError as error:
                raise located(error, layer.name)  # noqa: B904

    def _look_at(self, observations: Observations, key: Any, name: str, values: Sequence[Tensor], axis: int) -> None:
        observations.begin_call(key)
        for value in values:
            positions = key in self.certification.by_position and value.dim() > 1
            value, axes = (value.flatten(0, 1), [0]) if positions else (value, [axis])
            observations.look_at(key, name, value, axes, self._running.samples)

    def _tapped(self, key: Any) -> Tapped:
        return self._taps.layers[key] if isinstance(key, nn.Module) else self._facts.operations[key]

    def _begin_packed(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of Opacus' recurrent layers: on packed sequences, their cells see the first rows of sorted samples."""
        if args and isinstance(args[0], PackedSequence):
            data, sizes, samples, back = args[0]
            self.record.orders += [order for order in (samples, back) if order is not None]
            self._running.samples = torch.arange(int(sizes[0]), device=data.device) if samples is None else samples

    def _end_packed(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.samples = None


def _arranged(
    module: nn.Module, layer: Tapped, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Arranged | None:
    try:
        return arranged(module, layer.sampler, args, kwargs, output)
    except (ValueError, NotImplementedError) as error:
        raise located(error, layer.name)  # noqa: B904


def _expanded(inputs: Any, size: int, axis: int) -> Any:
    def expand(tensor: Tensor) -> Tensor:
        if size_of(tensor, axis) != 1:
            return tensor
        return tensor.expand(*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])

    return tree_map_only(Tensor, expand, inputs)


def _shown(key: Any, inputs: Any, output: Any) -> list[Tensor]:
    """What of a call has rows of samples: its inputs; what comes of them, where these are tokens of joined bags."""
    tensors = tensors_in(inputs)
    return tensors_in(output) if not tensors or are_joined_bags(key, tensors) else tensors
