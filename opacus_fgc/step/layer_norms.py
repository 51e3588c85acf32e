"""The norms of per-sample gradients of one layer, when its backprops come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opacus_fgc._compat.opacus import set_norm_sample
from opacus_fgc.argument_checks import check_forms, check_loss_reduction
from opacus_fgc.certificates.batch import Batch
from opacus_fgc.certificates.model import CertifiedModel
from opacus_fgc.distributed.norms import mark
from opacus_fgc.distributed.shards import View, view
from opacus_fgc.errors import PrivacyRuntimeError, located
from opacus_fgc.norm_samplers.registry import Forms
from opacus_fgc.per_sample import Dense, Grouped, NormOnly, NormsOnlyError, PerSampleGradient
from opacus_fgc.per_sample.precision import full_precision
from opacus_fgc.step.nonfinite import is_finite
from opacus_fgc.step.phase import Phase
from opacus_fgc.step.profile import Unwatched
from opacus_fgc.step.rows_by_sample import dealt_out
from opacus_fgc.taps.lookup import Registered, find_gradient_sampler
from opacus_fgc.taps.operation_samplers import Op
from opacus_fgc.taps.tap import Call, Use
from opacus_fgc.taps.tapping import Tapped


class LayerNorms(CertifiedModel):
    """A certified model that measures the parameters of a layer as soon as all of its uses came by in backward."""

    use_ghost_clipping: bool
    _profile: Unwatched

    def _receive(self, module: Any, call: Call, backprops: tuple[Tensor, ...]) -> None:
        if self.certification.witness is not None:
            self.certification.witness.see(call, backprops)
        if self.certification.certifying:
            return
        # The private loss of another model may come through this one, such as that of a generator through its discriminator.
        if self.hooks_enabled and _passing in (None, self):
            step = call.shown_to
            if _passing is None and step is not None:
                step.check_plain_pass()
                return
            if self.record.phase is Phase.IDLE:
                self._open_record()
            if self.record.step is not None and not call.is_first_shown_to(self.record.step):
                raise PrivacyRuntimeError(
                    f"{self._tapped(module).name}: a second backward() through one forward, in which each sample would be "
                    "clipped, and count, twice. Add the losses and call backward() once, or call the model again"
                )
            self.capture_backprops_hook(module, call, backprops, self.record.loss_reduction, self.batch_first)

    def capture_backprops_hook(
        self,
        module: Any,
        _forward_input: Call,
        forward_output: tuple[Tensor, ...],
        loss_reduction: str,
        batch_first: bool,
    ) -> None:
        """Backward hook of each layer: computes the per-sample gradient norms of its parameters, in ``_norm_sample``.

        Args:
            module: the layer, or what stands for a tapped operation.
            _forward_input: the call whose backprops these are.
            forward_output: the gradients of the loss by the layer's outputs.
            loss_reduction: how that loss was reduced over the batch; with "mean" the norms are scaled back.
            batch_first: whether the batch is the first axis; not used, the call says which axis it is.

        Raises:
            NotImplementedError: if the layer's per-sample gradients have no meaning or no known form.
            ValueError: if the layer was not called on one row a sample.
        """
        check_loss_reduction(loss_reduction)
        uses = self.record.take(module, Use(_forward_input, forward_output), loss_reduction)
        if uses:
            self._measure(module, uses)

    def _measure(self, module: Any, uses: Sequence[Use]) -> None:
        layer = self._tapped(module)
        if not self.record.wants(layer.params.values()):
            return
        self._profile.lap()
        try:
            with full_precision(uses[0].backprops[0].device):
                seen = view(module, uses, self._facts.unsharded.of_named(layer.params))
                uses = seen.uses
                self._mark(layer, uses)
                batch = self.record.batch
                if batch is not None and batch.size and self._are_dealt_out(uses, batch):
                    forms = self._forms_by_owner(seen, layer, batch)
                else:
                    forms = self._forms(seen, layer)
                measured = self.record.receive(forms, uses)
                self.record.recomputed |= _recomputes(layer, uses)
        except (ValueError, RuntimeError) as error:
            raise located(error, layer.name)  # noqa: B904
        for param, one in measured.items():
            set_norm_sample(param, one.norm)
        if self.record.looking and not all(is_finite(use.call.activations) for use in uses):
            self.record.first_not_finite = layer.name
        self._profile.measured(layer, uses, measured)

    def _mark(self, layer: Tapped, uses: Sequence[Use]) -> None:
        """Notes what a layer was called on, for `reduce_norms`."""
        own = mark(self.layout, layer.params.values(), [use.call.activations for use in uses])
        if own is not None:
            for param in layer.params.values():
                self.record.marks[param] = self.record.marks.get(param, 0) + own

    def _forms(self, seen: View, layer: Tapped) -> Forms:
        try:
            forms = layer.sampler(seen.layer, seen.uses, self.record.interleave)
            check_forms(seen.params, forms)
            if self.record.budget.keep.everything and any(isinstance(form, NormOnly) for form in forms.values()):
                raise NormsOnlyError
        except NormsOnlyError:
            # Functorch answers for the children as well, but they have taps of their own.
            forms = find_gradient_sampler(seen.layer)(seen.layer, seen.uses, self.record.interleave)
        else:
            if seen.params is layer.params:  # so that the forms are of just these
                return {param: self._as_configured(form) for param, form in forms.items() if param.requires_grad}
        own = {seen.params[name]: param for name, param in layer.params.items()}
        return {
            own[param]: self._as_configured(form)
            for param, form in forms.items()
            if param.requires_grad and param in own
        }

    def _forms_by_owner(self, seen: View, layer: Tapped, batch: Batch) -> Forms:
        """The forms where rows are not the samples in order."""
        by_row = isinstance(layer.sampler, Registered) and layer.sampler.traits.by_row and self.use_ghost_clipping
        groups = dealt_out(seen.uses, self.record.owned, batch, by_row)
        several = [
            {param: group.form_of(form) for param, form in self._forms(seen._replace(uses=group.uses), layer).items()}
            for group in groups
        ]
        if len(several) == 1:
            return several[0]
        places = [group.samples for group in groups]
        return {param: Grouped([forms[param] for forms in several], places) for param in several[0]}

    def _are_dealt_out(self, uses: Sequence[Use], batch: Batch) -> bool:
        """Whether rows are not the samples in order, or not as many for each use of an operation; none are of an idle expert."""
        if len(uses) == 1:
            key = uses[0].call.key
            return not key.rows or not batch.is_regular or key in self.record.owned
        rows = {use.call.key.rows for use in uses}
        several = len(rows) > 1 and isinstance(uses[0].call.fingerprint, Op)
        return several or 0 in rows or not batch.is_regular or any(use.call.key in self.record.owned for use in uses)

    def _as_configured(self, form: PerSampleGradient) -> PerSampleGradient:
        materialize = not self.use_ghost_clipping and not isinstance(form, NormOnly)
        return Dense(form.materialize()) if materialize else form

    @contextmanager
    def hooks_set(self, enabled: bool) -> Iterator[None]:
        """A context in which taps do something, or nothing."""
        before, self.hooks_enabled = self.hooks_enabled, enabled
        try:
            yield
        finally:
            self.hooks_enabled = before


def _recomputes(layer: Tapped, uses: Sequence[Use]) -> bool:
    if not isinstance(layer.sampler, Registered) or not layer.sampler.traits.recomputes:
        return False
    return any(backprop.dtype is not torch.float64 for use in uses for backprop in use.backprops)


_passing: LayerNorms | None = None  # whose private loss is on its way back


@contextmanager
def pass_of(model: LayerNorms) -> Iterator[None]:
    """A context for backward passes of a model's private loss; those of other models take no notice."""
    global _passing
    before, _passing = _passing, model
    try:
        yield
    finally:
        _passing = before
