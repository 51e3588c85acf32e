"""Trials: forwards on a few samples that show, before the first step, which parameters are used outside of their layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from opacus_fgc._compat.compiler import call_uncompiled
from opacus_fgc.certificates.entrances import Entrance
from opacus_fgc.certificates.model_state import restored
from opacus_fgc.certificates.samples import some_samples, tensors_of
from opacus_fgc.certificates.sketch import OUT_OF_MEMORY
from opacus_fgc.step.phase import Phase
from opacus_fgc.step.record import Record
from opacus_fgc.taps.functorch import Functorch
from opacus_fgc.taps.graph import reached_by
from opacus_fgc.taps.lookup import (
    ByOperation,
    Registered,
)
from opacus_fgc.taps.model import TRIAL, TappedModel
from opacus_fgc.taps.shared import size_of

_KINDS: tuple[Any, ...] = (None, ByOperation, Functorch)
"""What is tried in turn, after a registered sampler, where a parameter is used outside of its layer."""


class TriedModel(TappedModel):
    """A tapped model that has tried its taps before its first forward.

    A forward of two samples shows which parameters are used outside of their layers, or in operations that cannot be tapped.
    Their modules are then tapped by another sampler.
    """

    def _verify(self, record: Record, module: nn.Module, inputs: Any) -> None:
        """Before the first forward: finds parameters that are used outside of their layers, on two samples."""
        if module in self._facts.verified:
            return
        size = record.batch_size_seen
        # All ranks are to run the same forwards, also those that have fewer samples than it takes.
        most = self.layout.all_reduce_max([size or 0])[0]
        some = some_samples(inputs, size, 0, 2, self._axis) if size is not None and most else inputs
        # A model that has its batch size written into it takes but the whole batch.
        if not self._has_caught_all(module, some, size if some is inputs else 2) and some is not inputs:
            self._has_caught_all(module, inputs, size)
        if most or size is None:
            self._facts.verified.add(module)
        if some is not inputs:
            self._find_batch_second(module, inputs, size or 0)
            self._try_other_sizes(module, inputs, size or 0)

    def _find_batch_second(self, module: nn.Module, inputs: Any, size: int) -> None:
        """Finds layers that have the batch on their second axis, ``(T, N, ...)``: it alone goes with the number of samples."""
        if not self.batch_first:
            return
        of_two = self._shapes(module, inputs, size, 2)
        candidates = [layer for layer, shapes in of_two.items() if _count_second(shapes, 2)]
        if self.layout.on_all_ranks(not candidates):
            return
        of_three = self._shapes(module, inputs, size, 3)
        found = {
            layer
            for layer in candidates
            if _count_second(of_three.get(layer, []), 3)
            and [shape[0] for shape in of_two[layer]] == [shape[0] for shape in of_three[layer]]
        }
        layers = list(self.iterate_submodules(self._module))
        flags = self.layout.all_reduce_max([layer in found for layer in layers])
        self._facts.batch_second.update(layer for layer, flag in zip(layers, flags, strict=True) if flag)

    def _shapes(self, module: nn.Module, inputs: Any, size: int, length: int) -> dict[nn.Module, list[torch.Size]]:
        """Of what shapes layers return tensors, on so many of the samples; nothing if the forward fails."""
        some = some_samples(inputs, size, 0, length, self._axis)
        self._running.shapes = shapes = dict[nn.Module, list[torch.Size]]()
        try:
            with self.undisturbed(module, some):
                self._trial(module, some, length)
        except OUT_OF_MEMORY:
            raise
        except Exception:
            # What a model cannot do on other numbers of samples only leaves that unknown.
            return {}
        finally:
            self._running.shapes = None
        return shapes

    def _try_other_sizes(self, module: nn.Module, inputs: Any, size: int) -> None:
        """Runs other numbers of samples than two while it is not known which rows are samples."""
        # Models often do nothing where there is but one.
        for length in (1, 3):
            if self.layout.on_all_ranks(not self._taps.ops.undecided):
                return
            some = some_samples(inputs, size, 0, length, self._axis)
            with self.undisturbed(module, some), suppress(Exception):
                # What a model cannot do, or has no memory for, only leaves that unknown.
                self._trial(module, some, length)

    @contextmanager
    def undisturbed(self, module: nn.Module, inputs: Any) -> Iterator[None]:
        """A context for forwards of no consequence, after which random states, modes and the model's state are as before."""
        args, kwargs = inputs
        with Entrance(module, args, kwargs, self._taps.every_module).again(keep=True), restored(self._module):
            yield

    def _has_caught_all(self, module: nn.Module, inputs: Any, size: int | None) -> bool:
        """Repeats a forward until its taps reach all parameters; says whether the forward works on these inputs."""
        expanded, before = set[nn.Module](), list[Tensor]()
        while True:
            works, outputs, outside = True, list[Tensor](), set[Any]()
            self._running.single = []
            with self.undisturbed(module, inputs):
                try:
                    outputs = tensors_of(self._trial(module, inputs, size))
                except OUT_OF_MEMORY:
                    raise
                except Exception:
                    works = False
                finally:
                    single, self._running.single = self._running.single, None
            if expanded and not self.layout.on_all_ranks(works and _same(before, outputs)):
                self._facts.shares_row -= expanded
                self._facts.has_own_rows |= expanded
                expanded = set()
                continue
            if works:
                known = [tensor for tensor in outputs if not self._taps.ops.is_shared(tensor)]
                outside = self._untapped(known, tensors_of(inputs))
            expanded = self._sharing(single if works else [], outputs, size)
            before = outputs
            self._facts.shares_row |= expanded
            if not (self._catch(outside) or expanded):
                return self.layout.on_all_ranks(works)

    def _sharing(
        self, single: list[tuple[nn.Module, Tensor]], outputs: list[Tensor], size: int | None
    ) -> set[nn.Module]:
        """Layers that were called on a single row on which several samples seem to depend."""
        candidates = {layer for layer, _ in single} - self._facts.has_own_rows
        several = [tensor for tensor in outputs if tensor.requires_grad and size_of(tensor, self._axis) == size]
        # FSDP expects one backward a forward; what the model does on copies of the row is then all that is known.
        if candidates and several and size and not self.layout.forward_communicates:
            rows = [row for _, row in single]
            enabled, self.hooks_enabled = self.hooks_enabled, False
            try:
                halves = [
                    _depending(rows, [tensor.narrow(self._axis, *half) for tensor in several])
                    for half in ((0, size // 2), (size // 2, size - size // 2))
                ]
            finally:
                self.hooks_enabled = enabled
            candidates &= {layer for (layer, _), *both in zip(single, *halves, strict=True) if all(both)}
        layers = list(self.iterate_submodules(self._module))
        flags = self.layout.all_reduce_max([layer in candidates for layer in layers])
        return {layer for layer, flag in zip(layers, flags, strict=True) if flag}

    def _trial(self, module: nn.Module, inputs: Any, size: int | None) -> Any:
        """A forward that is not the user's own, of which the record keeps nothing."""
        # One that is only looked at may run between a first pass and what comes of it.
        looking = self._running.seen is not None and self.record.phase is not Phase.IDLE
        record = self.record if looking else self._open_record()
        kept, record.batch_size_seen = (record.uses.expected, record.batch_size_seen), size
        self._running.outermost = TRIAL
        self._taps.ops.enter(size, trying=True)
        args, kwargs = inputs
        try:
            # With all hooks, and not as it is compiled.
            return call_uncompiled(module, *args, **kwargs)
        finally:
            self._taps.ops.leave()
            self._running.outermost = None
            record.uses.expected, record.batch_size_seen = kept
            # Casts of weights that it made are older than the user's forward, and come too late in backward for FSDP.
            torch.clear_autocast_cache()

    def _catch(self, outside: set[Any]) -> bool:
        """Taps modules otherwise whose parameters are used outside, on any rank; says whether there are some."""
        layers = list(self.iterate_submodules(self._module))
        kinds = self.layout.all_reduce_max([self._next_kind(layer, outside) for layer in layers])
        changes = {layer: _KINDS[kind] for layer, kind in zip(layers, kinds, strict=True) if kind}
        changes = {layer: kind for layer, kind in changes.items() if not isinstance(self._sampler(layer), kind)}
        if changes:
            self._facts.overruled.update((layer, kind()) for layer, kind in changes.items())
            self._agree(self._module)
            self.remove_hooks()
            self.add_hooks()
        return bool(changes)

    def _next_kind(self, layer: nn.Module, outside: set[Any]) -> int:
        """The place in `_KINDS` of what a layer is to be tapped by; 0 if it is to stay as it is."""
        if not outside.intersection(self._facts.unsharded.named_parameters(layer, recurse=False).values()):
            return 0
        return 1 if isinstance(self._sampler(layer), Registered) else 2

    def _untapped(self, outputs: Iterable[Tensor], inputs: Iterable[Tensor] = ()) -> set[Any]:
        """The parameters that something depends on past their taps; see `taps.graph.reached_by`."""
        wanted = map(self._facts.unsharded.of, self.trainable_parameters)
        return set(map(self._facts.unsharded.parameter, reached_by(outputs, wanted, inputs).past))


def _depending(rows: list[Tensor], outputs: list[Tensor]) -> list[bool]:
    """On which rows some outputs depend."""
    # Sums of all outputs, as those of probabilities, may be constant.
    total = torch.stack([(output * torch.rand_like(output)).sum().abs() for output in outputs]).sum()
    gradients = torch.autograd.grad(total, rows, allow_unused=True, retain_graph=True)
    return [gradient is not None and bool((gradient != 0).any()) for gradient in gradients]


def _count_second(shapes: list[torch.Size], size: int) -> bool:
    """Whether all tensors that a layer returned have so many places on their second axis, and features behind it."""
    return bool(shapes) and all(len(shape) > 2 and shape[1] == size for shape in shapes)


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether outputs are the same but for rounding."""
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return False
    for a, b in zip(first, second, strict=True):
        if not (a.is_floating_point() or a.is_complex()):
            same = torch.equal(a, b)
        else:
            difference, size = (a - b).abs().nan_to_num(), a.abs().nan_to_num()
            same = not a.numel() or bool(difference.amax() <= torch.finfo(a.dtype).eps ** 0.5 * size.amax())
        if not same:
            return False
    return True
