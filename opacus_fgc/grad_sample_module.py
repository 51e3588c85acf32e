"""The wrapped model: puts a tap on every trainable layer, asks for norms, gives clipping coefficients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.utils.module_utils import trainable_parameters
from torch import Tensor, nn

from opacus_fgc.argument_checks import check_forms, check_loss_reduction, check_nonfinite, refuse_running_statistics
from opacus_fgc.certificates.model import CertifiedModel
from opacus_fgc.certificates.schedule import Schedule
from opacus_fgc.clipping import FlatClipping
from opacus_fgc.distributed.agreement import check_samples
from opacus_fgc.distributed.clipped_sums import as_parameters, gradients_of
from opacus_fgc.distributed.mesh import local
from opacus_fgc.distributed.norms import mark, reduce_norms
from opacus_fgc.distributed.shards import View, view
from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyRuntimeError, PrivacyValueError, located
from opacus_fgc.norm_samplers.registry import NORM_SAMPLERS, Forms
from opacus_fgc.per_sample import Dense, NormOnly, NormsOnlyError, PerSampleGradient
from opacus_fgc.per_sample.precision import full_precision, is_half, reduced_operations, row_norms
from opacus_fgc.planner import NOTHING, KeepBudget, KeepPolicy
from opacus_fgc.step.by_hand import ClippingCoefficients
from opacus_fgc.step.clipped_sum import ClippedSum
from opacus_fgc.step.norm_pass import Record, Step
from opacus_fgc.step.profile import UNWATCHED, Plan, Unwatched
from opacus_fgc.taps.graph import Reached, reached_by
from opacus_fgc.taps.lookup import find_gradient_sampler
from opacus_fgc.taps.model import Tapped
from opacus_fgc.taps.tap import Call, Use


def create_norm_sample(*, param: Any, grad_sample: Tensor, max_batch_len: int) -> None:
    """Sets ``param._norm_sample`` to the norms of given per-sample gradients.

    Args:
        param: a parameter; nothing happens unless it is trainable.
        grad_sample: its per-sample gradients, shape ``(N, *param.shape)``.
        max_batch_len: number of samples; 0 for an empty batch, of whatever shape its ``grad_sample`` is.
    """
    if param.requires_grad:
        param._norm_sample = Dense(grad_sample[:max_batch_len]).norm()


class GradSampleHooksFastGradientClipping(CertifiedModel):
    """Computes per-sample gradient norms of a model without wrapping it; see `GradSampleModuleFastGradientClipping`.

    Args:
        m: the model, which goes on being used as it is.
        batch_first: whether the batch is the first axis of what the layers get, or the second, ``(K, N, ...)``.
        loss_reduction: how the loss is reduced over the batch, "mean" or "sum".
        strict: refuse models with running statistics in a trainable layer. (Other buffers are watched in every forward.)
        force_functorch: compute all per-sample gradients with `torch.func`, whatever sampler there is.
        max_grad_norm: the norm ``C`` that each sample's gradient is clipped to.
        use_ghost_clipping: norms from activations and backprops where possible. ``False`` is Fast Gradient Clipping: the
            per-sample gradients of one layer at a time are formed, for all layers.
        nonfinite: what is done about samples whose gradient has inf or NaN in it: "error", or "drop", with which they
            contribute exactly zero.
        certify: when it is proven that samples have gradients of their own; see `certificates.schedule.Schedule`.

    Attributes:
        dropped: how many such samples were dropped so far. (Not private: it is a count of the data.)

    Raises:
        NotImplementedError: if ``strict`` and a trainable layer keeps running statistics.
        ValueError: if ``max_grad_norm`` or ``loss_reduction`` has no meaning, or ``m`` has hooks already.
    """

    NORM_SAMPLERS = NORM_SAMPLERS

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
        max_grad_norm: float = 1,
        use_ghost_clipping: bool = True,
        nonfinite: str = "error",
        certify: str = "thinning",
    ) -> None:
        # All checks come before anything is changed.
        check_loss_reduction(loss_reduction)
        if getattr(m, "autograd_grad_sample_hooks", None):
            raise ValueError("this model has hooks of Opacus already; call cleanup() on the object that set them first")
        check_nonfinite(nonfinite)
        self.schedule = Schedule(certify)
        self.clipping = FlatClipping(max_grad_norm)
        self.nonfinite, self.dropped = nonfinite, 0
        if strict:
            refuse_running_statistics(m)
        self._prepare(m, force_functorch)
        self._names = {param: name for name, param in trainable_parameters(m)}  # as they are between two forwards
        self.clipped_sum = ClippedSum()
        self._second_pass: dict[Any, Tensor] | None = None
        self._checked_by_hand = False
        self._plan: Unwatched = UNWATCHED
        super().__init__(
            m,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            strict=False,  # checked above
            force_functorch=force_functorch,
            max_grad_norm=max_grad_norm,
            use_ghost_clipping=use_ghost_clipping,
        )

    @property
    def max_grad_norm(self) -> float:
        """The clipping norm ``C``, as the clipping rule has it."""
        return self.clipping.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self.clipping.max_grad_norm = value

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

    # Norms

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
        self._plan.lap()
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
        if self.record.looking and not all(_is_finite(use.call.activations) for use in uses):
            self.record.first_not_finite = layer.name
        self._plan.measured(layer, uses, measured)

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

    def get_clipping_coef(self) -> Tensor:
        """The factor that clips each sample's gradient to ``max_grad_norm``, shape ``(N,)``.

        The next backward pass with hooks disabled is taken for the second pass, of ``(coef * loss).sum()``; `enable_hooks`
        then puts what it gave into the parameters' ``summed_grad``. The losses are checked when they are multiplied with this.

        Raises:
            RuntimeError: if there was no backward through the taps.
            ValueError: if a norm is inf or NaN.
            NotImplementedError: under FSDP and tensor parallel, in half precision and under autocast.
        """
        if self.layout.forward_communicates:
            raise NotImplementedError(
                "a loop with two passes by hand does not go with FSDP and tensor parallel; use a criterion from "
                "make_private, or DPLossFastGradientClipping"
            )
        coef = self.clipping.coefficients(self.get_norm_sample())
        if self.record is not None and self.record.in_half:
            raise PrivacyNotImplementedError(
                "a loop with two passes by hand does not go with half precision and autocast: the second pass would round what "
                "is clipped, so that samples contribute more than max_grad_norm. Use a criterion from make_private, or "
                "DPLossFastGradientClipping; or train in float32"
            )
        self._second_pass = {}
        return ClippingCoefficients.of(coef, self._check_by_hand)

    def _check_by_hand(self, losses: Tensor) -> None:
        """Does for losses that a loop multiplies with coefficients what `first_pass` does for a criterion's."""
        norms, record = self.per_sample_gradient_norms, self.record
        if losses.shape != norms.shape:
            # They broadcast; `enable_hooks` refuses what comes of that.
            return
        if record is None or self._second_pass is None:
            raise PrivacyRuntimeError(
                "these coefficients are of an earlier step; call get_clipping_coef() after each first pass"
            )
        reached = self._check_trainable(losses)
        due = self._due(len(losses), reached, record)
        if due is not None:
            self.certify(due, losses, reached, 1.0)
            self.record = record.again()
            self.record.samples_in_loss = len(losses)
            with self.hooks_set(True), self._nothing_left_of_errors():
                self._pass_to_taps(self.record, losses, NOTHING, retain_graph=True)
                again = self.get_norm_sample()
            self.record, self.per_sample_gradient_norms = record, norms
            if not torch.allclose(again, norms.to(again), rtol=1e-2):
                raise PrivacyValueError(
                    "the first backward() was of other losses than the second is to be of: its norms are not those of "
                    f"these losses. With loss_reduction={self.loss_reduction!r} call "
                    f"losses.{self.loss_reduction}().backward(retain_graph=True) first, and (coef * "
                    "losses).sum().backward() second"
                )
        self._checked_by_hand = True

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
        reached = self._check_trainable(loss_per_sample)
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
        with _pass_of(self):
            torch.autograd.grad(loss, self._anchor, retain_graph=retain_graph, allow_unused=True)

    def _pass_to_taps(self, record: Record, loss_per_sample: Tensor, keep: KeepPolicy, retain_graph: bool) -> None:
        record.loss_reduction, record.budget = "sum", KeepBudget(keep)
        record.looking = not _is_finite([loss_per_sample])
        self._backward_to_taps(record.loss_scale * loss_per_sample.sum(), retain_graph or not keep.everything)

    @contextmanager
    def _nothing_left_of_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # Half a pass is of no use to any other, and holds activations.
            self.record = None
            raise

    def coefficients(self, norms: Tensor) -> Tensor:
        """The clipping coefficients of the samples, after `first_pass`; 0 for one that is dropped.

        Args:
            norms: the norms of their gradients, shape ``(N,)``.

        Returns:
            Coefficients, shape ``(N,)``.

        Raises:
            ValueError: if a norm is inf or NaN, unless such samples are to be dropped.
        """
        assert self.record is not None
        finite = torch.isfinite(norms)
        bad = int((~finite).sum())
        if not bad:
            return self.clipping.coefficients(norms)
        if self.nonfinite == "error":
            raise PrivacyValueError(
                f"the gradients of {bad} of {len(norms)} samples have inf or NaN in them, which no factor can clip; it shows "
                f"first in {self._where_not_finite()}. Remove these samples from the data, lower the learning rate if the "
                "weights have diverged, or pass nonfinite='drop', with which such samples contribute nothing"
            )
        self.dropped += bad
        self.record.samples = finite
        coef = torch.zeros_like(norms)
        coef[finite] = self.clipping.coefficients(norms[finite])
        return coef

    def _where_not_finite(self) -> str:
        assert self.record is not None
        if self.record.first_not_finite:
            return f"forward, in the input of {self.record.first_not_finite}"
        if self.record.looking:
            return "the loss, while the inputs of all trainable layers are finite"
        first = next(param for param, norm in self.record.measured() if not _is_finite([norm]))
        return f"backward, in the gradient of {self._names[first]}"

    def _check_trainable(self, loss_per_sample: Tensor) -> Reached:
        if not loss_per_sample.requires_grad:
            raise RuntimeError("the loss does not depend on any trainable layer of the wrapped model")
        every = self._unsharded.named_parameters(self._module)
        names = {param: name for name, param in every.items() if param.requires_grad}
        late = names.keys() - self._names.keys()
        if late:
            raise ValueError(
                f"{', '.join(sorted(names[param] for param in late))} did not require gradients, or was not there, when the "
                "model was wrapped; wrap it anew with all parameters that are to be trained"
            )
        gone = self._names.keys() - set(every.values())
        if gone:
            raise ValueError(
                f"{', '.join(sorted(self._names[param] for param in gone))} was replaced or removed since the model was "
                "wrapped, "
                "so that the optimizer would train what the model does not use; wrap model and optimizer anew"
            )
        hooked = [name for param, name in names.items() if _has_hooks(param)]
        if hooked:
            raise PrivacyValueError(
                f"{', '.join(sorted(hooked))} has a gradient hook (register_hook), which would change the clipped sum "
                "after clipping, or not see it at all. Remove it; what it does can be done to the noisy gradient, "
                "before the step: optimizer.original_optimizer.register_step_pre_hook(lambda *_: ...)"
            )
        reached = reached_by([loss_per_sample], map(self._unsharded.of, self.trainable_parameters), anchor=self._anchor)
        if reached.past:
            past = map(self._unsharded.parameter, reached.past)
            raise PrivacyValueError(
                f"the loss depends on {', '.join(sorted(names[param] for param in past))} past the layer that has it, so "
                "the per-sample norms would miss a part of the gradient. Call the layer instead of using its parameter, and "
                "put penalties on weights into the optimizer (weight_decay)"
            )
        self._check_outside(reached)
        return reached

    def _check_outside(self, reached: Reached) -> None:
        """Raises a ValueError if something outside of the model would get no gradient from a private loss of this model."""
        assert self.record is not None
        if not reached.model:
            return  # there is nothing to clip, and the pass to the taps says so
        if reached.other_models:
            raise ValueError(
                "the loss depends on another private model, whose output this one is called on, and would give it no gradient. "
                "If it is not to be trained by this loss, detach its output (output.detach()); if it is, as a generator by its "
                "discriminator, compute that loss with the criterion of the other model's own make_private"
            )
        brought = self.record.brought
        outside = [
            leaf
            for leaf in dict.fromkeys([*reached.before_model, *reached.in_model])
            # What a model makes itself, as checkpointing of adapters does, is nobody's to train.
            if leaf in reached.before_model or isinstance(leaf, nn.Parameter) or leaf in brought
        ]
        given = [leaf for leaf in outside if brought.get(leaf) and not isinstance(leaf, nn.Parameter)]
        if len(given) < len(outside):
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in outside[:5] if leaf not in given)
            raise PrivacyValueError(
                "the loss depends on tensors that require a gradient and are outside of the wrapped model, of shapes "
                f"{shapes}; "
                "a private loss would give them none, since they would be neither clipped nor noised. Make what learns from "
                "the data (a prompt, a criterion's own) a part of the module that make_private gets; train what is "
                "public and learns through the model (a generator through its discriminator) by the plain criterion on "
                "model(...); detach what this loss is not to train (x.detach()), or freeze it (requires_grad_(False))"
            )
        if given:
            warnings.warn(
                f"inputs of shapes {', '.join(str(tuple(leaf.shape)) for leaf in given)} require a gradient, and a private "
                "loss "
                "gives them none; for that take the plain criterion: torch.autograd.grad(plain(model(x), y), x)",
                stacklevel=2,
            )

    @contextmanager
    def plan(self) -> Iterator[Plan]:
        """A context that watches the steps in it, and says layer by layer what they are made of and why they cost what they do.

        Example:
            >>> with model.plan() as plan:
            ...     criterion(model(x), y).backward()
            >>> print(plan)
        """
        self._plan = plan = Plan()
        try:
            with plan.watching(next(self._module.parameters()).device):
                yield plan
        finally:
            self._plan = UNWATCHED

    # Clipped sums

    def check_accumulation(self) -> None:
        """Raises a ValueError if one more clipped backward pass may not be added to what is there."""
        if self.clipped_sum.passes and not self.grad_accumulation_allowed:
            raise PrivacyValueError(
                "a second backward() before optimizer.step(): under Poisson sampling every batch is one step. Call "
                "optimizer.step() and optimizer.zero_grad() for each batch; add losses of the same samples up, (loss + other)."
                "backward(); to split large batches use opacus.utils.batch_memory_manager.BatchMemoryManager"
            )
        self.clipped_sum.check_norm(self.max_grad_norm)

    def add_to_clipped_sum(self, gradients: Iterable[tuple[Any, Tensor | None]]) -> None:
        """Adds the clipped sum of one backward pass to the parameters' ``summed_grad``.

        Args:
            gradients: for each trainable parameter ``sum_n coef[n] * gradient[n]``, None for 0; the samples are those of the
                last `get_norm_sample`.
        """
        try:
            self.clipped_sum.add(gradients, self.per_sample_gradient_norms, self.max_grad_norm)
        except BaseException:
            # Half a sum is of no use to any step.
            for param in self.trainable_parameters:
                param.summed_grad = None
            self.clipped_sum, self.record = ClippedSum(), None
            raise

    def clipped_gradients(self, coef: Tensor, loss_per_sample: Tensor) -> Iterator[tuple[Any, Tensor | None]]:
        """``sum_n coef[n] * gradient[n]`` for each trainable parameter, after `first_pass`.

        It comes from what the first pass kept, and for the other parameters from a second pass: the gradient of
        ``sum_n coef[n] * loss[n]``, since the coefficients are constants. Where that pass would round otherwise than the first
        did, by more than float32 does, there is a second pass to the taps instead, whose backprops are those of the first.

        Args:
            coef: shape ``(N,)``.
            loss_per_sample: the loss of the first pass, shape ``(N,)``.

        Yields:
            The parameter, and the sum in its shape, float32 or wider; None for a parameter that the loss does not use.
        """
        assert self.record is not None
        retain_graph = self.record.step is not None and self.record.step.graph_is_retained
        rest = self.layout.of_any(self.record.unkept)
        self._plan.lap()
        if rest and not self.layout.on_all_ranks(self._weighs_exactly(loss_per_sample)):
            self._sum_in_taps(rest, coef, loss_per_sample, retain_graph)
            self._plan.second_pass(rest)
            rest = []
        later = set(rest)
        yield from as_parameters(self.layout, self._kept_sums(later, coef))
        if rest:
            with self.hooks_set(False), _pass_of(self):
                weighted = self.record.loss_scale * (coef.to(loss_per_sample.device) * loss_per_sample).sum()
                gradients = gradients_of(self.layout, weighted, rest, self._unsharded.of, retain_graph)
            yield from zip(rest, map(self._unscaled, gradients), strict=True)
            self._plan.second_pass(rest)

    def _weighs_exactly(self, loss_per_sample: Tensor) -> bool:
        """Whether the gradient of the weighted loss is, but for roundings of float32, the weighted sum of what was measured."""
        assert self.record is not None
        if self.record.samples is not None or self.record.in_half or is_half(loss_per_sample):
            # Inf and NaN of a sample that is dropped would go through all that coefficients can do.
            return False
        reduced = reduced_operations(loss_per_sample.device)
        convolves = "conv" in reduced and any(param.dim() > 2 for param in self._module.parameters())
        return "matmul" not in reduced and not convolves

    def _sum_in_taps(self, params: Sequence[Any], coef: Tensor, loss_per_sample: Tensor, retain_graph: bool) -> None:
        """One more pass to the taps, in which gradients are summed as they come; see `Record.summing`."""
        assert self.record is not None
        first = self.record
        # Under FSDP, sums of whole parameters take more than what they are made of.
        self.record = again = first.summing(params, None if self.layout.reshards else coef)
        with self._nothing_left_of_errors():
            self._pass_to_taps(again, loss_per_sample, KeepPolicy(everything=True), retain_graph)
            self._measure_unfinished()
            again.norms([])
        self.record = first

    def _kept_sums(self, later: Container[Any], coef: Tensor) -> Iterator[tuple[Any, Tensor | None]]:
        assert self.record is not None
        # In an order that all ranks have.
        for param in self.trainable_parameters:
            if param not in later:
                total = self.record.weighted_sum(param, coef)
                self._plan.summed(param)
                yield param, total

    def _unscaled(self, gradient: Tensor | None) -> Tensor | None:
        assert self.record is not None
        if gradient is None or self.record.loss_scale == 1:
            return gradient
        if not _is_finite([gradient]):
            raise ValueError(
                f"the clipped sum overflows when it is scaled by {self.record.loss_scale:g}; take a smaller init_scale"
            )
        return gradient / self.record.loss_scale

    def _collect_second_pass(self, param: Any, gradient: Tensor) -> None:
        """Hook of each parameter: sees the gradients of a second pass that is written by hand."""
        if self._second_pass is not None and not self.hooks_enabled:
            self._second_pass[param] = gradient

    def enable_hooks(self) -> None:
        """Turns the taps on, and ends the second pass of a loop that is written by hand; see `get_clipping_coef`."""
        super().enable_hooks()
        collected, self._second_pass = self._second_pass, None
        checked, self._checked_by_hand = self._checked_by_hand, False
        if collected:
            if not checked:
                raise PrivacyValueError(
                    "a second pass whose losses are not known: multiply the losses with what get_clipping_coef() returned, "
                    "(coef * losses).sum().backward(), where both have the same shape, one value a sample"
                )
            self.check_accumulation()
            self.add_to_clipped_sum((param, collected.get(param)) for param in self.trainable_parameters)
            # What the two passes left; else the step would take it for a gradient that it is to leave out.
            for param in self.trainable_parameters:
                param.grad = None

    # Copies and files

    def __getstate__(self) -> dict[str, Any]:
        """What a file has of it: the model, and what it was made with; nothing of a step, which is private."""
        model = self._module
        own = {
            id(param): nn.Parameter(param.detach(), param.requires_grad) for param in self._with_private_attributes()
        }
        if own:
            # The same tensors under other parameters.
            tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
            model = copy.deepcopy(model, {**tensors, **own})
        return self._state(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with hooks and state of its own."""
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self._state(self._module), memo))
        return other

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Wraps the model anew."""
        own, arguments = state["own"], state["arguments"]
        self.__init__(state["model"], strict=False, **arguments)  # type: ignore[misc]
        self.__dict__.update(own)

    def _state(self, model: nn.Module) -> dict[str, Any]:
        arguments = (
            "batch_first",
            "loss_reduction",
            "force_functorch",
            "max_grad_norm",
            "use_ghost_clipping",
            "nonfinite",
        )
        own = {
            name: getattr(self, name) for name in ("clipping", "dropped", "hooks_enabled", "grad_accumulation_allowed")
        }
        if isinstance(self, nn.Module):
            own["training"] = self.training
        given = {**{name: getattr(self, name) for name in arguments}, "certify": self.schedule.how}
        return {"model": model, "arguments": given, "own": own}

    def _with_private_attributes(self) -> list[Any]:
        names = ("summed_grad", "_norm_sample")
        params = self._module.parameters()
        return [param for param in params if any(getattr(param, name, None) is not None for name in names)]

    def cleanup(self) -> None:
        """Takes everything off the model and its parameters that was put there."""
        super().cleanup()
        self.record = None
        for param in self._module.parameters():
            if hasattr(param, "summed_grad"):
                del param.summed_grad


_passing: GradSampleHooksFastGradientClipping | None = None  # whose private loss is on its way back


@contextmanager
def _pass_of(model: GradSampleHooksFastGradientClipping) -> Iterator[None]:
    """A context for backward passes of a model's private loss; those of other models take no notice."""
    global _passing
    before, _passing = _passing, model
    try:
        yield
    finally:
        _passing = before


def _has_hooks(param: Any) -> bool:
    """Whether a parameter has gradient hooks besides those of wrapped models."""
    ours = GradSampleHooksFastGradientClipping._collect_second_pass
    others = [
        hook
        for hook in (param._backward_hooks or {}).values()
        if getattr(getattr(hook, "func", None), "__func__", None) is not ours
    ]
    return bool(others) or bool(getattr(param, "_post_accumulate_grad_hooks", None))


def _is_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(local(tensor)).all()) for tensor in tensors)


class GradSampleModuleFastGradientClipping(GradSampleHooksFastGradientClipping, GradSampleModule):
    """A model that knows the norm of each sample's gradient, without ever storing per-sample gradients.

    Args:
        m: the model to wrap; see `GradSampleHooksFastGradientClipping` for the other arguments and for errors.

    Example:
        Clipping by hand, without a criterion from `PrivacyEngine.make_private`:

        >>> model = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0)
        >>> loss = F.cross_entropy(model(x), y, reduction="none")
        >>> loss.mean().backward(retain_graph=True)  # first pass: norms
        >>> coef = model.get_clipping_coef()
        >>> model.disable_hooks()
        >>> (coef * loss).sum().backward()           # second pass: clipped sum
        >>> model.enable_hooks()                     # now in `summed_grad`
    """

    @torch._disable_dynamo
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model. With `torch.compile` around it, it runs as it is: compile the model before it is wrapped.

        Raises:
            NotImplementedError: if an empty batch meets what tensor parallel cannot do with it.
        """
        try:
            return super().forward(*args, **kwargs)
        except (RuntimeError, IndexError) as error:  # the latter of torch before 2.10
            empty = self.record is not None and self.record.batch_size_seen == 0
            if empty and self.layout.shares_samples:
                raise NotImplementedError(
                    "this batch has no samples, and torch's distributed tensors cannot do without. Poisson sampling draws "
                    "such a "
                    "batch, or such a part for one rank, now and then: take larger batches, or fewer ranks along data axes"
                ) from error
            raise
