"""The forward side of a wrapped model: which modules get a tap, and how what they are called on comes to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from opacus.layers.dp_rnn import DPRNNBase
from torch import Tensor, nn

from opacus_fgc._compat.compiler import is_compiled
from opacus_fgc._compat.modules import every_module
from opacus_fgc.argument_checks import describe, refuse_hidden_parameters
from opacus_fgc.certificates.buffers import Buffers
from opacus_fgc.certificates.entrances import Entrance
from opacus_fgc.certificates.model_state import ModelState
from opacus_fgc.certificates.observations import Observations
from opacus_fgc.certificates.samples import batch_size, tensors_of
from opacus_fgc.certificates.schedule import Certification
from opacus_fgc.distributed.agreement import fingerprint
from opacus_fgc.distributed.shards import Unsharded
from opacus_fgc.distributed.topology import Layout
from opacus_fgc.step.phase import Phase
from opacus_fgc.step.record import Record
from opacus_fgc.taps.assignment import Facts
from opacus_fgc.taps.compiled import KeptBuffers
from opacus_fgc.taps.constants import constants_of
from opacus_fgc.taps.graph import brought_by, made_by
from opacus_fgc.taps.hooks import GradientHook, Handles, Hook, clear_copied
from opacus_fgc.taps.lookup import (
    ByOperation,
    with_batch_second,
)
from opacus_fgc.taps.operations import OpTaps
from opacus_fgc.taps.shared import NoData
from opacus_fgc.taps.tapping import Running, Tapped, Tapping, Taps

TRIAL = nn.Module()
"""What is outermost in a forward that is not the user's own."""


class TappedModel(Tapping):
    """Hooks that tap what a model does with its trainable parameters.

    Layers with a norm sampler are tapped as a whole. In all other modules the operations on their parameters are; see `OpTaps`.
    """

    certification: Certification

    def _prepare(self, model: nn.Module, force_functorch: bool) -> None:
        """Sets what `add_hooks` needs; raises if the model cannot be tapped."""
        clear_copied(model)
        refuse_hidden_parameters(model)
        self.force_functorch = force_functorch
        self._running = Running()
        layout = Layout(model).prepare()
        self._facts = Facts(
            layout=layout,
            unsharded=Unsharded(model),
            constants=constants_of(model),
            batch_second=with_batch_second(model),
            buffers_before=Buffers(model),
            anchor=torch.zeros((), device=layout.device if layout.params else "cpu", requires_grad=True),
        )
        self._agree(model)

    def _is_compiled(self) -> bool:
        return any(map(is_compiled, every_module(self._module)))

    def _look_for_compiled(self) -> None:
        """Puts the hooks on anew if a part of the model was compiled since."""
        if not self._taps.compiled and self._is_compiled():
            self.remove_hooks()
            self.add_hooks()

    def add_hooks(
        self, *, loss_reduction: str = "mean", batch_first: bool = True, force_functorch: bool = False
    ) -> None:
        """Puts the hooks on the model; `remove_hooks` takes them off. The arguments are Opacus' and not used here."""
        handles: list[Any] = Handles()
        compiled, modules = self._is_compiled(), tuple(self._module.modules())
        if compiled:
            handles.append(KeptBuffers())
        self.autograd_grad_sample_hooks = self._module.autograd_grad_sample_hooks = handles
        layers: dict[nn.Module, Tapped] = {}
        paths = {layer: path for path, layer in self._module.named_modules()}
        entrances: set[nn.Module] = {self._module}
        watched: set[Tensor] = set()
        for layer in self.iterate_submodules(self._module):
            sampler = self._sampler(layer)
            params = self._facts.unsharded.named_parameters(layer, recurse=sampler.covers_children)
            if isinstance(sampler, ByOperation):
                entrances.add(layer)
                watched.update(param for param in params.values() if param.requires_grad)
                continue
            name = describe(paths[layer], layer)
            receive = partial(self._receive, layer)
            layers[layer] = Tapped(paths[layer], name, type(layer).__name__, sampler, params, receive)
        if not compiled:
            # Whatever has layers in it may be called from outside. (Parts of a compiled module are not.)
            entrances.update(_containers(layers, modules))
        # Torch's attention uses a child's weight, which a checkpoint that starts in between has to find watched.
        entrances.update(module for module in modules if isinstance(module, nn.MultiheadAttention))
        named = self._facts.unsharded.named_parameters(self._module)
        # As they are between two forwards.
        names = {param: path for path, param in named.items()}
        others = {*names, *self._module.buffers()} - watched
        covered = {
            param
            for layer in layers.values()
            if layer.sampler.covers_children
            for param in layer.params.values()
            if param.requires_grad
        }
        ops = OpTaps(
            NoData(watched, others, covered, self._facts.constants),
            self.batch_first,
            self._tap_operation,
            self._facts.expansions,
            compiled,
        )
        self._taps = Taps(ops, layers, names, modules, compiled)
        # Before `_enter` in this list, so after it in a call: it may run the model on its own.
        handles += self._facts.unsharded.watch(ops)
        for module in entrances:
            handles.append(module.register_forward_pre_hook(Hook(self._enter), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(Hook(self._leave), with_kwargs=True, always_call=True))
        for layer in layers:
            # First of all hooks, so that the tap sees what the layer itself returned.
            handles.append(
                layer.register_forward_hook(Hook(self.capture_activations_hook), prepend=True, with_kwargs=True)
            )
        for module in modules:
            if isinstance(module, DPRNNBase):
                handles.append(module.register_forward_pre_hook(Hook(self._begin_packed)))
                handles.append(module.register_forward_hook(Hook(self._end_packed), always_call=True))
        for param in names:
            ops.add(param, self._facts.unsharded.of(param))
            if param.requires_grad:
                handles.append(param.register_hook(GradientHook(self._see_gradient, param)))
        self.enable_hooks()

    def _verify(self, record: Record, module: nn.Module, inputs: Any) -> None:
        raise NotImplementedError

    def _see_gradient(self, param: Any, gradient: Tensor) -> None:
        raise NotImplementedError

    # Forward

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model, and of modules whose operations are caught; the outermost of them counts."""
        if self._running.outermost is TRIAL:
            return
        if module is self._module:
            self._look_for_compiled()
            # After an interrupt nobody has come to `_leave`.
            self._taps.ops.leave()
            self._running.outermost = None
        if self._running.outermost is not None or not self._tapping():
            return
        record = self.record if self._recomputing() and self.record.phase is not Phase.IDLE else self._open_record()
        if not self._recomputing():
            record.batch_size_seen = batch_size((args, kwargs), self._axis)
            is_first = module not in self._facts.verified
            state = ModelState(self._module) if is_first or self.certification.schedule.is_expected else None
            self._verify(record, module, (args, kwargs))
            record.brought.update(brought_by(tensors_of((args, kwargs))))
            inputs = fingerprint(self.layout, (args, kwargs))
            record.inputs = inputs if inputs is None or record.inputs is None else record.inputs + inputs
            self._running.entrance = Entrance(module, args, kwargs, self._taps.every_module, state)
            self._running.noted = None if state is None else Observations(record.batch_size_seen or 0)
        self._running.outermost = module
        if self._facts.buffers_before.changed(self._module):
            self._facts.buffers_before = Buffers(self._module)
        if self._facts.operations or self._taps.ops.params:
            self._taps.ops.enter(record.batch_size_seen)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the same, called also when the forward failed."""
        if self._running.outermost is module:
            self._taps.ops.leave()
            if self._running.entrance is not None:
                self.record.made.update(made_by(tensors_of(output)))
            if self._running.noted is not None and self._running.entrance is not None and output is not None:
                self._running.entrance.forward = self._running.noted.of(tensors_of(output), self._module)
            self._running.outermost = self._running.entrance = self._running.noted = None
            self.record.changed_buffers |= self._facts.buffers_before.changed(self._module)

    @property
    def _axis(self) -> int:
        return 0 if self.batch_first else 1


def has_trainable_params_within(module: nn.Module) -> bool:
    """Whether something in a module, or in one of its children, is trained."""
    return any(param.requires_grad for param in module.parameters())


def _containers(layers: Mapping[nn.Module, Tapped], modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules with trainable parameters in them that have no tap, and are in nothing that has one for all of it."""
    whole = [layer for layer, tapped in layers.items() if tapped.sampler.covers_children]
    inside = {module for layer in whole for module in layer.modules()}
    for module in modules:
        if module not in layers and module not in inside and has_trainable_params_within(module):
            yield module
