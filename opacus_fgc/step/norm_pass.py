"""The norm pass: backward to the taps, from which the norm of each sample's gradient comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opacus_fgc.argument_checks import check_forms, check_loss_reduction
from opacus_fgc.certificates.model import CertifiedModel
from opacus_fgc.distributed.agreement import check_samples
from opacus_fgc.distributed.norms import mark, reduce_norms
from opacus_fgc.distributed.shards import View, view
from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyRuntimeError, PrivacyValueError, located
from opacus_fgc.norm_samplers.registry import Forms
from opacus_fgc.per_sample import Dense, NormOnly, NormsOnlyError, PerSampleGradient
from opacus_fgc.per_sample.precision import full_precision, row_norms
from opacus_fgc.planner import NOTHING, KeepBudget, KeepPolicy
from opacus_fgc.step.clipped_sum import ClippedSum
from opacus_fgc.step.nonfinite import is_finite
from opacus_fgc.step.profile import Unwatched
from opacus_fgc.step.record import Record, Step
from opacus_fgc.step.trained import TrainedParameters
from opacus_fgc.taps.lookup import find_gradient_sampler
from opacus_fgc.taps.model import Tapped
from opacus_fgc.taps.tap import Call, Use


class NormPass(CertifiedModel):
    """A certified model that computes the norm of each sample's gradient from what its taps see."""

    max_grad_norm: float
    use_ghost_clipping: bool
    clipped_sum: ClippedSum
    trained: TrainedParameters
    _profile: Unwatched

    def _receive(self, module: Any, call: Call, backprops: tuple[Tensor, ...]) -> None:
        if self._witness is not None:
            self._witness.see(call, backprops)
        if self._certifying:
            return
        # The private loss of another model may come through this one, such as that of a generator through its discriminator.
        if self.hooks_enabled and _passing in (None, self):
            step = call.shown_to
            if _passing is None and step is not None:
                step.check_plain_pass()
                return
            if self.record is None:
                self._open_record()
            assert self.record is not None
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
        assert self.record is not None
        check_loss_reduction(loss_reduction)
        self.record.loss_reduction = loss_reduction
        uses = self.record.uses(module, Use(_forward_input, forward_output))
        if uses:
            self._measure(module, uses)

    def _measure(self, module: Any, uses: Sequence[Use]) -> None:
        assert self.record is not None
        layer = self._tapped(module)
        if not self.record.wants(layer.params.values()):
            return
        self._profile.lap()
        try:
            with full_precision(uses[0].backprops[0].device):
                seen = view(module, uses, {name: self._unsharded.of(param) for name, param in layer.params.items()})
                uses = seen.uses
                self._mark(layer, uses)
                measured = self.record.receive(self._forms(seen, layer), uses)
        except (ValueError, RuntimeError) as error:
            raise located(error, layer.name)  # noqa: B904
        for param, one in measured.items():
            param._norm_sample = one.norm
        if self.record.looking and not all(is_finite(use.call.activations) for use in uses):
            self.record.first_not_finite = layer.name
        self._profile.measured(layer, uses, measured)

    def _mark(self, layer: Tapped, uses: Sequence[Use]) -> None:
        """Notes what a layer was called on, for `reduce_norms`."""
        assert self.record is not None
        own = mark(self.layout, layer.params.values(), [use.call.activations for use in uses])
        if own is not None:
            for param in layer.params.values():
                self.record.marks[param] = self.record.marks.get(param, 0) + own

    def _forms(self, seen: View, layer: Tapped) -> Forms:
        assert self.record is not None
        try:
            forms = layer.sampler(seen.layer, seen.uses, self.record.interleave)
            check_forms(seen.params, forms)
            if self.record.budget.keep.everything and any(isinstance(form, NormOnly) for form in forms.values()):
                raise NormsOnlyError
        except NormsOnlyError:
            # Functorch answers for the children as well, but they have taps of their own.
            forms = find_gradient_sampler(seen.layer)(seen.layer, seen.uses, self.record.interleave)
        own = {seen.params[name]: param for name, param in layer.params.items()}
        return {
            own[param]: self._as_configured(form)
            for param, form in forms.items()
            if param.requires_grad and param in own
        }

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

    def get_norm_sample(self) -> Tensor:
        """The norm of each sample's gradient over all trainable parameters, after the first backward.

        Returns:
            Norms, shape ``(N,)``, float32 or wider; also kept as ``per_sample_gradient_norms``.

        Raises:
            RuntimeError: if there was no backward through the taps.
        """
        if self.record is not None:
            self._measure_unfinished()
            norms = reduce_norms(self.layout, self.record.norms(self.trainable_parameters), self.record.marks)
            for param, norm in norms.items():
                param._norm_sample = norm
        if any(getattr(param, "_norm_sample", None) is None for param in self.trainable_parameters):
            raise RuntimeError("no per-sample norms: run forward and backward on the wrapped model first")
        norms_of_params = [param._norm_sample for param in self.trainable_parameters]
        device = norms_of_params[0].device if norms_of_params else None
        self.per_sample_gradient_norms = row_norms(torch.stack([norm.to(device) for norm in norms_of_params], 1))
        return self.per_sample_gradient_norms

    def _measure_unfinished(self) -> None:
        assert self.record is not None
        for module, uses in self.record.unfinished():
            if self.layout.reshards:
                self.record = None
                raise PrivacyNotImplementedError(
                    f"{self._tapped(module).name} was called more often than the loss depends on it, and under FSDP its "
                    "parameters are gone when that is known. Run forwards that are not part of the loss under "
                    "torch.no_grad(), and call backward() for each forward before the next"
                )
            self._measure(module, uses)

    def check_accumulation(self) -> None:
        """Raises a ValueError if one more clipped backward pass may not be added to what is there."""
        if self.clipped_sum.passes and not self.grad_accumulation_allowed:
            raise PrivacyValueError(
                "a second backward() before optimizer.step(): under Poisson sampling every batch is one step. Call "
                "optimizer.step() and optimizer.zero_grad() for each batch; add losses of the same samples up, (loss + other)."
                "backward(); to split large batches use opacus.utils.batch_memory_manager.BatchMemoryManager"
            )
        self.clipped_sum.check_norm(self.max_grad_norm)

    def first_pass(
        self,
        loss_per_sample: Tensor,
        keep: KeepPolicy = NOTHING,
        loss_scale: float = 1.0,
        retain_graph: bool = False,
    ) -> Tensor:
        """Backward to the taps alone, without any weight gradient.

        Args:
            loss_per_sample: one loss a sample, shape ``(N,)``.
            keep: what is kept for `clipped_gradients`. Where that is everything, the graph is given up.
            loss_scale: what the losses are multiplied with, and gradients and norms divided by, so that backprops do not vanish
                in float16.
            retain_graph: whether plain losses may go through the graph after `clipped_gradients`.

        Returns:
            The norm of each sample's gradient, shape ``(N,)``.

        Raises:
            RuntimeError: if the loss does not depend on a tapped layer.
            ValueError: if the loss has not one value for each sample that the layers saw, or depends on a trainable
                parameter past its layer.
        """
        reached = self.trained.check(loss_per_sample, self._anchor, {} if self.record is None else self.record.brought)
        self.check_accumulation()
        if self.record is not None and self.record.receiving:
            # Another loss came by the same forward.
            self.record = self.record.again()
        record = self._open_record()
        check_samples(self.layout, loss_per_sample, record.inputs)
        with self._nothing_left_of_errors():
            record.samples_in_loss = len(loss_per_sample)
            due = self._due(len(loss_per_sample), reached, record)
            if due is not None and (due.is_new or keep.everything):
                # Of what is new the certificate tells better what is wrong than the norms' errors; and the pass that all is kept
                # of gives the graph up, which the certificate needs.
                self.certify(due, loss_per_sample, reached, loss_scale)
                due = None
            record.step, record.loss_scale = Step(retain_graph), loss_scale
            if due is None:
                self._pass_to_taps(record, loss_per_sample, keep, retain_graph)
            else:
                with self._witnessed() as backprops:
                    self._pass_to_taps(record, loss_per_sample, keep, retain_graph)
                self.certify(due, loss_per_sample, reached, loss_scale, backprops)
            norms = self.get_norm_sample()
        if norms.shape != loss_per_sample.shape:
            raise ValueError(
                f"the loss has shape {tuple(loss_per_sample.shape)}, one value for each of {len(loss_per_sample)} samples, but "
                f"the layers saw a batch of {len(norms)}. For losses of flattened tokens call the criterion with shape=(batch "
                "size, tokens, ...)"
            )
        return norms

    def _backward_to_taps(self, loss: Tensor, retain_graph: bool) -> None:
        with pass_of(self):
            torch.autograd.grad(loss, self._anchor, retain_graph=retain_graph, allow_unused=True)

    def _pass_to_taps(self, record: Record, loss_per_sample: Tensor, keep: KeepPolicy, retain_graph: bool) -> None:
        record.loss_reduction, record.budget = "sum", KeepBudget(keep)
        record.looking = not is_finite([loss_per_sample])
        self._backward_to_taps(record.loss_scale * loss_per_sample.sum(), retain_graph or not keep.everything)

    @contextmanager
    def _nothing_left_of_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # Half a pass is of no use to any other, and holds activations.
            self.record = None
            raise


_passing: NormPass | None = None  # whose private loss is on its way back


@contextmanager
def pass_of(model: NormPass) -> Iterator[None]:
    """A context for backward passes of a model's private loss; those of other models take no notice."""
    global _passing
    before, _passing = _passing, model
    try:
        yield
    finally:
        _passing = before
