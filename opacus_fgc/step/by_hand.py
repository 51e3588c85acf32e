"""A loop with two passes that is written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opacus_fgc._compat.overrides import DisableTorchFunctionSubclass
from opacus_fgc._compat.pytree import tree_leaves
from opacus_fgc.certificates.batch import Batch
from opacus_fgc.clipping import FlatClipping
from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyRuntimeError, PrivacyValueError
from opacus_fgc.planner import NOTHING
from opacus_fgc.step.phase import Phase
from opacus_fgc.step.record import Record
from opacus_fgc.step.weighted_pass import WeightedPass
from opacus_fgc.taps.graph import goes_through

_IN_HALF = (
    "a loop with two passes by hand does not go with half precision and autocast: the second pass would round what "
    "is clipped, so that samples contribute more than max_grad_norm. Use a criterion from make_private, or "
    "DPLossFastGradientClipping; or train in float32"
)

_RECOMPUTED = (
    "a loop with two passes by hand does not go with torch's recurrent layers but in float64: norms are of gates that were "
    "computed again, and the second pass rounds otherwise over time, so that samples may contribute more than max_grad_norm. Use "
    "a criterion from make_private, or DPLossFastGradientClipping; or take DPLSTM, DPGRU or DPRNN of Opacus"
)


class ClippingCoefficients(Tensor):
    """Clipping coefficients, shape ``(N,)``, that tell what losses they are multiplied with.

    So the losses of the second pass are known, and looked at as a criterion's are. What comes of them and losses is a plain
    tensor.

    Attributes:
        check: called with the losses; raises if they are no per-sample losses of the wrapped model.
    """

    check: Callable[[Tensor], None]

    @classmethod
    def of(cls, coef: Tensor, check: Callable[[Tensor], None]) -> ClippingCoefficients:
        """Makes them of a plain tensor.

        Args:
            coef: shape ``(N,)``.
            check: see the class.
        """
        result = coef.as_subclass(cls)
        result.check = check
        return result

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation; on losses after they were checked."""
        every = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        own = next(tensor for tensor in every if isinstance(tensor, cls))
        losses = [tensor for tensor in every if not isinstance(tensor, cls) and tensor.requires_grad]
        for loss in losses:
            own.check(loss)
        with DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if losses or not isinstance(result, Tensor):
                return result.as_subclass(Tensor) if isinstance(result, cls) else result
            return cls.of(result, own.check)


@dataclass
class SecondPass:
    """A second pass that is to come, or came.

    Attributes:
        gradients: what it gave, by parameter.
        losses_checked: whether its losses are known to be those of the first pass.
    """

    gradients: dict[Any, Tensor] = field(default_factory=dict)
    losses_checked: bool = False


class ByHand(WeightedPass):
    """A model whose user makes both passes: `get_clipping_coef` lies between them, `enable_hooks` ends the second."""

    clipping: FlatClipping
    _second_pass: SecondPass | None = None

    def get_clipping_coef(self) -> Tensor:
        """The factor that clips each sample's gradient to ``max_grad_norm``, shape ``(N,)``.

        The next backward pass with hooks disabled is taken for the second pass, of ``(coef * loss).sum()``; `enable_hooks`
        then puts what it gave into the parameters' ``summed_grad``. The losses are checked when they are multiplied with this.

        Raises:
            RuntimeError: if there was no backward through the taps.
            ValueError: if a norm is inf or NaN.
            NotImplementedError: under FSDP and tensor parallel, in half precision and under autocast, with recurrent layers of
                torch but in float64.
        """
        if self.layout.forward_communicates:
            raise NotImplementedError(
                "a loop with two passes by hand does not go with FSDP and tensor parallel; use a criterion from "
                "make_private, or DPLossFastGradientClipping"
            )
        coef = self.clipping.coefficients(self.get_norm_sample())
        if self.record.in_half:
            raise PrivacyNotImplementedError(_IN_HALF)
        if self.record.recomputed:
            raise PrivacyNotImplementedError(_RECOMPUTED)
        self._second_pass = SecondPass()
        return ClippingCoefficients.of(coef, self._check_by_hand)

    def _check_by_hand(self, losses: Tensor) -> None:
        """Does for losses that a loop multiplies with coefficients what `first_pass` does for a criterion's."""
        norms, record = self.per_sample_gradient_norms, self.record
        if losses.shape != norms.shape:
            # They broadcast; `enable_hooks` refuses what comes of that.
            return
        if record.phase is Phase.IDLE or self._second_pass is None:
            raise PrivacyRuntimeError(
                "these coefficients are of an earlier step; call get_clipping_coef() after each first pass"
            )
        if goes_through(losses):
            raise PrivacyNotImplementedError(_IN_HALF)
        reached = self.trained.check(losses, self._facts.anchor, record.brought, record.made)
        batch = Batch(len(losses))
        due = self._due(batch, reached, record)
        if due is not None:
            owned = self.certify(due, losses, reached, 1.0)
            if owned:
                raise PrivacyNotImplementedError(
                    f"{self._tapped(next(iter(owned)).layer).name}: its rows are not the samples in order, and their norms were "
                    "taken before it was known whose they are. Use a criterion from make_private, or "
                    "DPLossFastGradientClipping, in the place of two passes by hand"
                )
            self.record = record.again()
            self.record.batch = batch
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
        self._second_pass.losses_checked = True

    def _see_gradient(self, param: Any, gradient: Tensor) -> None:
        """Hook of each parameter: sees the gradients of a second pass that is written by hand."""
        if self._second_pass is not None and not self.hooks_enabled:
            self._second_pass.gradients[param] = gradient

    def enable_hooks(self) -> None:
        """Turns the taps on, and ends the second pass of a loop that is written by hand; see `get_clipping_coef`."""
        super().enable_hooks()
        second, self._second_pass = self._second_pass, None
        if second is not None and second.gradients:
            if not second.losses_checked:
                raise PrivacyValueError(
                    "a second pass whose losses are not known: multiply the losses with what get_clipping_coef() returned, "
                    "(coef * losses).sum().backward(), where both have the same shape, one value a sample"
                )
            self.check_accumulation()
            self.add_to_clipped_sum((param, second.gradients.get(param)) for param in self.trainable_parameters)
            # What the two passes left; else the step would take it for a gradient that it is to leave out.
            for param in self.trainable_parameters:
                param.grad = None

    def _open_record(self) -> Record:
        before, record = self.record, super()._open_record()
        if record is not before:
            self._second_pass = None
        return record
