"""The wrapped model: puts a tap on every trainable layer, asks for norms, gives clipping coefficients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from opacus_fgc._compat.compiler import disable_dynamo
from opacus_fgc._compat.opacus import set_norm_sample
from opacus_fgc.argument_checks import check_loss_reduction, refuse_running_statistics
from opacus_fgc.certificates.schedule import Certification, Schedule
from opacus_fgc.clipping import FlatClipping
from opacus_fgc.norm_samplers.registry import NORM_SAMPLERS
from opacus_fgc.per_sample import Dense
from opacus_fgc.step.by_hand import ByHand
from opacus_fgc.step.clipped_sum import ClippedSum
from opacus_fgc.step.copies import Copies
from opacus_fgc.step.nonfinite import NonFinitePolicy
from opacus_fgc.step.profile import UNWATCHED, StepProfile, Unwatched
from opacus_fgc.step.record import Record
from opacus_fgc.step.trained import TrainedParameters
from opacus_fgc.taps.tap import tensors_in


def create_norm_sample(*, param: Any, grad_sample: Tensor, max_batch_len: int) -> None:
    """Sets ``param._norm_sample`` to the norms of given per-sample gradients.

    Args:
        param: a parameter; nothing happens unless it is trainable.
        grad_sample: its per-sample gradients, shape ``(N, *param.shape)``.
        max_batch_len: number of samples; 0 for an empty batch, of whatever shape its ``grad_sample`` is.
    """
    if param.requires_grad:
        set_norm_sample(param, Dense(grad_sample[:max_batch_len]).norm())


class GradSampleHooksFastGradientClipping(Copies, ByHand):
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
        self._nonfinite = NonFinitePolicy(nonfinite)
        self.certification = Certification(Schedule(certify))
        self.clipping = FlatClipping(max_grad_norm)
        if strict:
            refuse_running_statistics(m)
        self._prepare(m, force_functorch)
        self.trained = TrainedParameters(m, self._facts.unsharded)
        self.clipped_sum = ClippedSum()
        self.record = Record(loss_reduction)
        self._profile: Unwatched = UNWATCHED
        super().__init__(
            m,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            strict=False,  # checked above
            force_functorch=force_functorch,
            max_grad_norm=max_grad_norm,
            use_ghost_clipping=use_ghost_clipping,
        )

    def configure(self, clipping: FlatClipping, nonfinite: str, certify: Schedule) -> None:
        """Sets what a wrapped model goes by from its next step on.

        Args:
            clipping: the clipping rule; its optimizer has to have the same.
            nonfinite: see the class.
            certify: likewise.

        Raises:
            ValueError: if ``nonfinite`` has no meaning.
        """
        self.nonfinite = nonfinite
        self.clipping = clipping
        self.certification.schedule = certify

    @property
    def max_grad_norm(self) -> float:
        """The clipping norm ``C``, as the clipping rule has it."""
        return self.clipping.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self.clipping.max_grad_norm = value

    @property
    def nonfinite(self) -> str:
        """What is done about samples with inf or NaN in their gradients, "error" or "drop"."""
        return self._nonfinite.how

    @nonfinite.setter
    def nonfinite(self, value: str) -> None:
        self._nonfinite = NonFinitePolicy(value)

    @property
    def dropped(self) -> int:
        """How many such samples were dropped so far; not private, since it is a count of the data."""
        return self._nonfinite.dropped

    def coefficients(self, norms: Tensor) -> Tensor:
        """The clipping coefficients of the samples, after `first_pass`; 0 for one that is dropped.

        Args:
            norms: the norms of their gradients, shape ``(N,)``.

        Returns:
            Coefficients, shape ``(N,)``.

        Raises:
            ValueError: if a norm is inf or NaN, unless such samples are to be dropped.
        """
        return self._nonfinite.coefficients(norms, self.clipping, self.record, self.trained.names)

    @contextmanager
    def plan(self) -> Iterator[StepProfile]:
        """A context that watches the steps in it, and says layer by layer what they are made of and why they cost what they do.

        Example:
            >>> with model.plan() as plan:
            ...     criterion(model(x), y).backward()
            >>> print(plan)
        """
        self._profile = plan = StepProfile()
        try:
            with plan.watching(next(self._module.parameters()).device):
                yield plan
        finally:
            self._profile = UNWATCHED

    def cleanup(self) -> None:
        """Takes everything off the model and its parameters that was put there."""
        super().cleanup()
        self._give_up_record()
        for param in self._module.parameters():
            if hasattr(param, "summed_grad"):
                del param.summed_grad


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

    @disable_dynamo
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model. With `torch.compile` around it, it runs as it is: compile the model before it is wrapped.

        Raises:
            NotImplementedError: if an empty batch meets what tensor parallel, or a model of packed samples, cannot do with it.
        """
        try:
            return super().forward(*args, **kwargs)
        except (RuntimeError, IndexError) as error:  # the latter of torch before 2.10
            if self.record.batch_size_seen == 1 and all(tensor.numel() == 0 for tensor in tensors_in((args, kwargs))):
                raise NotImplementedError(
                    "this batch has no samples, and the model cannot be called on a row of no tokens. Poisson sampling draws "
                    "such a batch once in exp(batch_size) steps, batch_size being what is expected: take larger batches, or pad "
                    "sequences instead of packing them"
                ) from error
            if self.record.batch_size_seen == 0 and self.layout.shares_samples:
                raise NotImplementedError(
                    "this batch has no samples, and torch's distributed tensors cannot do without. Poisson sampling draws "
                    "such a "
                    "batch, or such a part for one rank, now and then: take larger batches, or fewer ranks along data axes"
                ) from error
            raise
