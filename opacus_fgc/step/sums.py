"""What the clipped sums of a step are made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opacus_fgc.per_sample import PerSampleGradient
from opacus_fgc.per_sample.precision import full_precision, widened


class WeightedSums:
    """Per-sample gradients that were kept to be summed, and sums that were made of others as they came.

    Attributes:
        samples: a mask of the samples that take part, shape ``(N,)``; None if all do.
    """

    def __init__(self) -> None:
        self.samples: Tensor | None = None
        self._kept: dict[Any, PerSampleGradient] = {}
        self._sums: dict[Any, Tensor] = {}

    def keep(self, param: Any, form: PerSampleGradient) -> None:
        """Keeps the per-sample gradients of a parameter, for `take`."""
        self._kept[param] = form

    def kept(self, param: Any) -> PerSampleGradient:
        """What is kept of a parameter."""
        return self._kept[param]

    def add_up(self, param: Any, form: PerSampleGradient, coef: Tensor, loss_scale: float) -> None:
        """Sums the per-sample gradients of a parameter at once, so that they need not be kept.

        Args:
            param: the parameter.
            form: its per-sample gradients.
            coef: shape ``(N,)``.
            loss_scale: what they are divided by.
        """
        if self.samples is not None:
            coef, form = coef[self.samples], form.select(self.samples.to(param.device))
        with full_precision(param.device):
            total = form.weighted_sum(coef.to(param.device))
        self._sums[param] = (total if loss_scale == 1 else total / loss_scale).to(widened(param.dtype))

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
        return self._sums.pop(param, None)
