"""The state of one step: which uses of which layers were seen, the norms that came of them, and what is kept for the sum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opacus_fgc.certificates.batch import Batch
from opacus_fgc.certificates.ownership import Owned
from opacus_fgc.certificates.ownership_errors import PADDING, TOKENS
from opacus_fgc.distributed.mesh import local
from opacus_fgc.errors import PrivacyRuntimeError, PrivacyValueError
from opacus_fgc.per_sample import Measured, PerSampleGradient, add
from opacus_fgc.per_sample.base import LATER
from opacus_fgc.per_sample.doubts import Doubts
from opacus_fgc.per_sample.precision import full_precision, is_half, widened
from opacus_fgc.planner import KeepBudget, Room
from opacus_fgc.step.phase import Phase
from opacus_fgc.step.small_gradients import SmallGradients
from opacus_fgc.step.sums import WeightedSums
from opacus_fgc.step.uses import Step, Uses
from opacus_fgc.taps.tap import Interleave, Use


class Record:
    """One step's, from its first forward to the next step's; an idle one where no forward ran.

    A layer's uses are held until all of this step's forward have come back in backward, since the norm of a sum is not the
    sum of norms. Uses that the loss does not depend on never come; `unfinished` gives what is there.

    Args:
        loss_reduction: how the loss of the pass that brings the backprops is reduced over the batch, "mean" or "sum".
        phase: how far the step is.

    Attributes:
        loss_scale: what the losses were multiplied with for this pass.
        budget: what may be kept for `sums`.
        batch_size: number of samples, None before the first backprop.
        batch_size_seen: number of samples that the model was called on, as its inputs show it; None where they do not.
        batch: which samples its rows are of; None where the losses are not known.
        inputs: what `distributed.agreement.fingerprint` gave for what the model was called on, added up over its calls.
        marks: by parameter, numbers that tell what its layer was called on, likewise.
        orders: indices that sort the samples of packed sequences, or put them back.
        changed_buffers: the names of buffers that forward changed.
        interleave: makes one batch of several uses.
        unkept: the parameters that were measured, and of which nothing was kept.
        unused: those that this rank's losses do not use.
        sums: what the clipped sums come from.
        step: what makes backprops that come to this record known as seen; None if they may come any number of times.
        brought: leaves that require a gradient, and that the model's inputs depend on (False) or are (True).
        made: other such leaves, no parameters, that its outputs depend on.
        owned: whose the rows of those calls are that are not the samples in order, by `Call.key`.
        in_half: whether a layer computed in half precision, or under autocast.
        recomputed: whether gradients came of steps that a sampler computed again in less than float64, so that they are not
            those of autograd to a few roundings.
        looking: whether activations are searched for inf and NaN.
        losses: those of the samples, if it was not looked at whether they are finite.
        doubts: where it is noted what makes norms doubtful, if they are looked at after the pass only.
        small: the small ones, which are measured together after the pass.
        first_not_finite: the first layer, in the order of forward, in whose activations there was one.
    """

    def __init__(self, loss_reduction: str, phase: Phase = Phase.IDLE) -> None:
        self.loss_reduction = loss_reduction
        self.phase = phase
        self.loss_scale = 1.0
        self.budget = KeepBudget()
        self.batch_size: int | None = None
        self.batch_size_seen: int | None = None
        self.batch: Batch | None = None
        self.inputs: Tensor | None = None
        self.marks: dict[Any, Tensor] = {}
        self.orders: list[Tensor] = []
        self.changed_buffers: set[str] = set()
        self.interleave = Interleave()
        self.unkept: list[Any] = []
        self.unused: set[Any] = set()
        self.sums = WeightedSums()
        self.step: Step | None = None
        self.brought: dict[Tensor, bool] = {}
        self.made: set[Tensor] = set()
        self.owned: Mapping[Any, Owned] = {}
        self.in_half = False
        self.recomputed = False
        self.looking = False
        self.losses: Tensor | None = None
        self.doubts: Doubts | None = None
        self.small: SmallGradients | None = None
        self.first_not_finite = ""
        self.uses = Uses()
        self._forms: dict[Any, list[PerSampleGradient]] = {}
        self._norms: dict[Any, Tensor] = {}
        self._summed: set[Any] = set()
        self._coef: Tensor | None = None

    def again(self) -> Record:
        """A record of one more backward pass of the same forward."""
        other = Record(self.loss_reduction, Phase.FORWARD)
        other.loss_scale = self.loss_scale
        other.batch_size_seen, other.batch = self.batch_size_seen, self.batch
        other.inputs, other.orders, other.changed_buffers = self.inputs, self.orders, self.changed_buffers
        other.owned = self.owned
        other.uses.expected, other.step = self.uses.expected, self.step
        other.brought, other.made = self.brought, self.made
        return other

    def summing(self, params: Iterable[Any], coef: Tensor | None) -> Record:
        """A record of one more backward pass of the same forward, which gives this one what its `sums` come from.

        Args:
            params: the parameters whose sums are wanted.
            coef: the coefficients, by which gradients are summed as they come, shape ``(N,)``; None to keep their forms.
        """
        other = self.again()
        other.phase = Phase.WEIGHTED_PASS
        other._summed, other._coef = set(params), coef
        other.sums, other.batch_size = self.sums, self.batch_size
        return other

    def wants(self, params: Iterable[Any]) -> bool:
        """Whether anything is to be computed of one of these parameters."""
        return self.phase is not Phase.WEIGHTED_PASS or not self._summed.isdisjoint(params)

    def take(self, layer: Any, use: Use, loss_reduction: str) -> Sequence[Use]:
        """Takes in one use of a layer, whose backprops came.

        Args:
            layer: the layer, or what stands for a tapped operation.
            use: the use.
            loss_reduction: how the loss of this pass is reduced over the batch.

        Returns:
            All uses of the layer if they are complete with this one; else nothing.
        """
        if self.phase is not Phase.WEIGHTED_PASS:
            self.phase = Phase.NORM_PASS
        self.loss_reduction = loss_reduction
        return self.uses.take(layer, use)

    def receive(self, forms: Mapping[Any, PerSampleGradient], uses: Sequence[Use]) -> dict[Any, Measured]:
        """Takes in the per-sample gradients of a layer's uses.

        Args:
            forms: the forms of its parameters.
            uses: the uses that they are of.

        Returns:
            What was measured of those parameters that are complete with it; a tied one waits for its other layers.

        Raises:
            ValueError: if the layer saw another number of samples than the layers before it.
            RuntimeError: if a parameter's norm was taken already.
        """
        complete: dict[Any, Measured | None] = {}
        self.in_half = self.in_half or _in_half(forms, uses)
        layer, spared = uses[0].call.key.layer, not self.unkept
        room = self.budget.room(layer, _elements(forms, uses), len(uses), spared, _itemsize(uses))
        samples = None if self.batch is None else self.batch.size
        for param, form in forms.items():
            form = _by_sample(form, self.batch_size_seen if samples is None else samples)
            if self.batch_size is None:
                self.batch_size = form.batch_size if samples is None else samples
            if form.batch_size != self.batch_size:
                raise _size_error(form.batch_size, self.batch_size)
            if param in self._norms:
                raise PrivacyRuntimeError(
                    "a use of its parameter came back after the parameter's norm was taken. Do not mix the "
                    "graphs of several forwards with a backward between them in one loss"
                )
            owners = self.uses.owners(param)
            if owners == 1:
                complete[param] = self._measure(param, form, room)
                continue
            received = self._forms.setdefault(param, [])
            received.append(form)
            if len(received) == owners:
                complete[param] = self._measure(param, add(self._forms.pop(param)), room)
        return {param: measured for param, measured in complete.items() if measured is not None}

    def norms(self, params: Iterable[Tensor]) -> dict[Any, Tensor]:
        """The norms of the per-sample gradients of these parameters; 0 for a parameter that the loss does not use.

        Returns:
            For each parameter a tensor of shape ``(N,)``, float32 or wider.

        Raises:
            RuntimeError: if no layer has sent anything.
        """
        if self.batch_size is None:
            raise RuntimeError(
                "no per-sample norms: the loss does not depend on any trainable layer of the wrapped model, or hooks were "
                "disabled during forward"
            )
        while self._forms:
            param, forms = self._forms.popitem()
            with full_precision(param.device):
                self._measure(param, add(forms), Room(everything=self.budget.keep.everything))
        self._norms.update(_left_for_later(self))
        missing = [param for param in params if param not in self._norms]
        self._norms.update((param, _zero_norms(self.batch_size, param)) for param in missing)
        self.unused.update(missing)
        return self._norms

    def measured(self) -> Iterable[tuple[Any, Tensor]]:
        """Each parameter and its norms, in the order in which backward came to them."""
        return self._norms.items()

    def _measure(self, param: Any, form: PerSampleGradient, room: Room) -> Measured | None:
        if self.phase is Phase.WEIGHTED_PASS:
            if param in self._summed:
                self.sums.add_up(param, form, self._coef, self.loss_scale)
            return None
        if self.small is not None and self.small.takes(form, room):
            self._norms[param] = self.small.add(param, form)
            self.budget.spend(room, form.elements)
            return None
        measured = _measured(self, param, form, room)
        self._norms[param] = measured.norm
        if measured.kept is None:
            self.unkept.append(param)
        else:
            self.sums.keep(param, measured.kept)
            self.budget.spend(room, measured.kept.elements)
        return None if measured.norm is LATER else measured


def _measured(record: Record, param: Any, form: PerSampleGradient, room: Room) -> Measured:
    if record.doubts is None:
        measured = form.measured(room)
    else:
        with record.doubts.noting(param):
            measured = form.measured(replace(room, later=record.small is not None))
    return measured if measured.norm is LATER else measured._replace(norm=_unscaled(measured.norm, record))


def _left_for_later(record: Record) -> Iterator[tuple[Any, Tensor]]:
    """The parameters whose norms were left to the end of the pass, and these."""
    for together in () if record.small is None else record.small.together():
        norms = dict(together.norms())
        record.sums.keep_together(norms, together)
        yield from ((param, _unscaled(norm, record)) for param, norm in norms.items())
    for param, norm in () if record.doubts is None else record.doubts.finish():
        yield param, _unscaled(norm, record)


def _zero_norms(size: int, param: Any) -> Tensor:
    return torch.zeros(size, dtype=widened(param.dtype).to_real(), device=param.device)


def measure_again(record: Record, params: Iterable[Any]) -> None:
    """Computes norms of parameters, of which a record kept all, once more, and looks at them as they come."""
    for param in params:
        with full_precision(param.device):
            record._norms[param] = _unscaled(record.sums.kept(param).norm(), record)


def _unscaled(norms: Tensor, record: Record) -> Tensor:
    factor = (len(norms) if record.loss_reduction == "mean" else 1) / record.loss_scale
    return norms if factor == 1 else norms * factor


def _elements(params: Iterable[Any], uses: Sequence[Use]) -> int:
    """How many elements the step without privacy holds for a layer."""
    held = sum(tensor.numel() for use in uses for tensor in (*use.call.activations, *use.backprops))
    return held + sum(local(param).numel() for param in params)


def _itemsize(uses: Sequence[Use]) -> int:
    """Bytes of an element of the per-sample gradients that come of uses."""
    return widened(uses[0].backprops[0].dtype).itemsize


def _in_half(params: Iterable[Any], uses: Sequence[Use]) -> bool:
    for use in uses:
        if use.call.autocast[0] or any(map(is_half, use.backprops)):
            return True
    return any(map(is_half, params))


def _by_sample(form: PerSampleGradient, size: int | None) -> PerSampleGradient:
    """Adds up the rows of a sample, where there are several: tokens that were made one axis with the batch, say."""
    if not size or form.batch_size <= size or form.batch_size % size:
        return form
    return form.sum_over_uses(form.batch_size // size)


def _size_error(rows: int, samples: int) -> PrivacyValueError:
    return PrivacyValueError(
        f"it was called on {rows} rows for {samples} samples. Every layer with "
        f"trainable parameters needs one row a sample, or as many for each, sample by sample. {TOKENS}. "
        f"{PADDING}. Inputs that the batch shares, expand (`x.expand(batch_size, ...)`); and check "
        "batch_first"
    )
