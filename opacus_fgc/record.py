"""The state of one step: which uses of which layers were seen, the norms that came of them, and what is kept for the sum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opacus_fgc.axes import local
from opacus_fgc.per_sample import Measured, PerSampleGradient, add
from opacus_fgc.planner import Budget, Room
from opacus_fgc.precision import at_least_float32, full_precision, without_autocast
from opacus_fgc.taps import Interleave, Use


class Record:
    """Born at a step's first forward, gone at the next one's.

    A layer's uses are held until all of this step's forward have come back in backward, since the norm of a sum is not the
    sum of norms. Uses that the loss does not depend on never come; `unfinished` gives what is there.

    Args:
        loss_reduction: how the loss of the pass that brings the backprops is reduced over the batch, "mean" or "sum".

    Attributes:
        loss_scale: what the losses were multiplied with for this pass.
        budget: what may be kept for `weighted_sum`.
        batch_size: number of samples, None before the first backprop.
        batch_size_seen: number of samples that the model was called on, None where it does not show.
        inputs: what `Layout.fingerprint` gave for what the model was called on, added up over its calls.
        marks: by parameter, numbers that tell what its layer was called on, likewise.
        rows_known: whether all layers are known to have their rows in the order of the samples.
        interleave: makes one batch of several uses.
        unkept: the parameters that were measured, and of which nothing was kept.
        samples: a mask of the samples that take part in `weighted_sum`, shape ``(N,)``; None if all do.
        step: what makes backprops that come to this record known as seen; None if they may come any number of times.
        looking: whether activations are searched for inf and NaN.
        first_not_finite: the first layer, in the order of forward, in whose activations there was one.
    """

    def __init__(self, loss_reduction: str) -> None:
        self.loss_reduction = loss_reduction
        self.loss_scale = 1.0
        self.budget = Budget()
        self.batch_size: int | None = None
        self.batch_size_seen: int | None = None
        self.inputs: Tensor | None = None
        self.marks: dict[Any, Tensor] = {}
        self.rows_known = False
        self.interleave = Interleave()
        self.unkept: list[Any] = []
        self.samples: Tensor | None = None
        self.step: object | None = None
        self.looking = False
        self.first_not_finite = ""
        self._expected: dict[Any, int] = {}
        self._owners: dict[Any, int] = {}
        self._uses: dict[Any, list[Use]] = {}
        self._forms: dict[Any, list[PerSampleGradient]] = {}
        self._norms: dict[Any, Tensor] = {}
        self._kept: dict[Any, PerSampleGradient] = {}

    def again(self) -> Record:
        """A record of one more backward pass of the same forward."""
        other = Record(self.loss_reduction)
        other.loss_scale = self.loss_scale
        other.batch_size_seen, other.rows_known = self.batch_size_seen, self.rows_known
        other.expectations, other.step = self.expectations, self.step
        return other

    @property
    def receiving(self) -> bool:
        """Whether backward has begun."""
        return self.batch_size is not None or bool(self._uses)

    @property
    def expectations(self) -> tuple[dict[Any, int], dict[Any, int]]:
        """A copy of what `expect` noted; set it to forget what came since."""
        return dict(self._expected), dict(self._owners)

    @expectations.setter
    def expectations(self, value: tuple[dict[Any, int], dict[Any, int]]) -> None:
        self._expected, self._owners = map(dict, value)

    def expect(self, layer: Any, params: Iterable[Tensor]) -> None:
        """Notes one more use of a layer, and of its parameters, in forward."""
        calls = self._expected.get(layer, 0)
        if not calls:
            for param in params:
                self._owners[param] = self._owners.get(param, 0) + 1
        self._expected[layer] = calls + 1

    def uses(self, layer: Any, use: Use) -> Sequence[Use]:
        """Takes in one use of a layer.

        Returns:
            All uses of the layer if they are complete with this one; else nothing.
        """
        expected = self._expected.get(layer, 0)
        if expected == 1:
            return [use]
        uses = self._uses.setdefault(layer, [])
        uses.append(use)
        return self._uses.pop(layer) if len(uses) == expected else []

    def unfinished(self) -> Iterator[tuple[Any, Sequence[Use]]]:
        """The layers of which some uses came, and others did not; they are given up."""
        while self._uses:
            yield self._uses.popitem()

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
        complete = {}
        held = sum(tensor.numel() for use in uses for tensor in (*use.call.activations, *use.backprops))
        held += sum(local(param).numel() for param in forms)
        room = self.budget.room(held, len(uses), spared=not self.unkept)
        for param, form in forms.items():
            form = self._by_sample(form)
            if self.batch_size is None:
                self.batch_size = form.batch_size
            if form.batch_size != self.batch_size:
                raise ValueError(
                    f"it was called on a batch of {form.batch_size}, other layers of this step on {self.batch_size}. "
                    "Every layer with trainable parameters needs one row a sample: expand inputs that the batch shares "
                    "(`x.expand(batch_size, ...)`), and check batch_first"
                )
            if param in self._norms:
                raise RuntimeError(
                    "a use of its parameter came back after the parameter's norm was taken. Do not mix the "
                    "graphs of several forwards with a backward between them in one loss"
                )
            owners = self._owners.get(param)
            if owners == 1:
                complete[param] = self._measure(param, form, room)
                continue
            received = self._forms.setdefault(param, [])
            received.append(form)
            if len(received) == owners:
                complete[param] = self._measure(param, add(self._forms.pop(param)), room)
        return complete

    def _by_sample(self, form: PerSampleGradient) -> PerSampleGradient:
        """Adds up the rows of a sample, where there are several: tokens that were made one axis with the batch, say."""
        size = self.batch_size_seen
        # All rows of a batch of one are that one's, in whatever order.
        if not size or not (self.rows_known or size == 1) or form.batch_size <= size or form.batch_size % size:
            return form
        return form.folded(form.batch_size // size)

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
        missing = [param for param in params if param not in self._norms]
        for param in missing:
            zeros = torch.zeros(self.batch_size, dtype=param.dtype, device=param.device).abs()
            self._norms[param] = at_least_float32(zeros)
        return self._norms

    def measured(self) -> Iterable[tuple[Any, Tensor]]:
        """Each parameter and its norms, in the order in which backward came to them."""
        return self._norms.items()

    def _measure(self, param: Any, form: PerSampleGradient, room: Room) -> Measured:
        measured = form.measured(room)
        factor = (len(measured.norm) if self.loss_reduction == "mean" else 1) / self.loss_scale
        if factor != 1:
            measured = measured._replace(norm=measured.norm * factor)
        self._norms[param] = measured.norm
        if measured.kept is None:
            self.unkept.append(param)
        else:
            self._kept[param] = measured.kept
            if not room.everything:
                self.budget.spend(measured.kept.elements)
        return measured

    def weighted_sum(self, param: Any, coef: Tensor) -> Tensor | None:
        """``sum_n coef[n] * gradient[n]`` from the kept form of a parameter, which is given up; None if there is none.

        Args:
            param: the parameter.
            coef: shape ``(N,)``.
        """
        form = self._kept.pop(param, None)
        if form is None:
            return None
        if self.samples is not None:
            coef, form = coef[self.samples], form.select(self.samples.to(param.device))
        with without_autocast(param.device):
            weighted_sum = form.weighted_sum(coef.to(param.device))
        return (weighted_sum if self.loss_scale == 1 else weighted_sum / self.loss_scale).to(param.dtype)
