"""What the clipped sums of a step are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from opacus_fgc.per_sample import PerSampleGradient
from opacus_fgc.per_sample.precision import full_precision, widened
from opacus_fgc.step.small_gradients import Together


class WeightedSums:
    """Per-sample gradients that were kept to be summed, and sums that were made of others as they came.

    Attributes:
        samples: a mask of the samples that take part, shape ``(N,)``; None if all do.
    """

    def __init__(self) -> None:
        self.samples: Tensor | None = None
        self._kept: dict[Any, PerSampleGradient] = {}
        self._together: dict[Any, Together] = {}
        self._sums: dict[Any, Tensor] = {}

    def keep(self, param: Any, form: PerSampleGradient) -> None:
        """Keeps the per-sample gradients of a parameter, for `take`."""
        self._kept[param] = form

    def keep_together(self, params: Iterable[Any], together: Together) -> None:
        """Likewise of several, in one."""
        self._together.update(dict.fromkeys(params, together))

    def kept(self, param: Any) -> PerSampleGradient:
        """What is kept of a parameter."""
        return self._kept[param]

    def add_up(self, param: Any, form: PerSampleGradient, coef: Tensor | None, loss_scale: float) -> None:
        """Sums the per-sample gradients of a parameter at once, so that they need not be kept.

        Args:
            param: the parameter.
            form: its per-sample gradients.
            coef: shape ``(N,)``; None to keep them after all.
            loss_scale: what they are divided by.
        """
        if coef is None:
            self.keep(param, form)
            return
        self._sums[param] = self._total(param, form, coef, loss_scale)

    def _total(self, param: Any, form: PerSampleGradient, coef: Tensor, loss_scale: float) -> Tensor:
        if self.samples is not None:
            coef, form = coef[self.samples], form.select(self.samples.to(param.device))
        with full_precision(param.device):
            total = form.weighted_sum(coef.to(param.device))
        return (total if loss_scale == 1 else total / loss_scale).to(widened(param.dtype))

    def take(self, param: Any, coef: Tensor, loss_scale: float) -> Tensor | None:
        """``sum_n coef[n] * gradient[n] / loss_scale``; what it came of is given up.

        Args:
            param: the parameter.
            coef: shape ``(N,)``.
            loss_scale: what the gradients are divided by.

        Returns:
            The sum, of the parameter's dtype, or float32 where that is half precision; None if nothing was kept.
        """
        form = self._kept.pop(param, None)
        if form is not None:
            self.add_up(param, form, coef, loss_scale)
        together = self._together.get(param)
        if together is not None:
            for one, part in together.parts(self._total(param, together.form, coef, loss_scale)):
                self._sums[one] = part
                del self._together[one]
        return self._sums.pop(param, None)
