"""From per-sample norms to clipping coefficients; the one owner of the clipping norm ``C``, and of how it moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opacus_fgc._compat.autograd import version_of
from opacus_fgc.argument_checks import is_finite_number

NoisyMean = Callable[[Tensor, float], Tensor]

# From here on squares of what matters for a norm of that size do not vanish in float32. (Norms that overflow are inf.)
_SMALLEST, _LARGEST = 1e-12, 1e38


def check_max_grad_norm(value: object) -> float:
    """Returns the clipping norm as a float.

    Raises:
        ValueError: if it is not one positive, finite number, or out of the range in which float32 resolves norms.
    """
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if not is_finite_number(value) or value <= 0:
        raise ValueError(
            f"max_grad_norm is {value!r}; flat clipping needs one positive, finite number: the largest L2 norm "
            "that the gradient of one sample may have"
        )
    if not _SMALLEST <= float(value) <= _LARGEST:
        raise ValueError(
            f"max_grad_norm is {value!r}; norms of that size cannot be told in float32, take one from {_SMALLEST} to {_LARGEST}"
        )
    return float(value)


def note_finite(norms: Tensor) -> None:
    """Notes that norms have neither inf nor NaN in them, as long as nothing is written to them."""
    norms._finite_version = version_of(norms)  # type: ignore[attr-defined]


def count_not_finite(norms: Tensor) -> int:
    """How many norms are inf or NaN; not looked at where it is noted that none is, since a GPU would have to be waited for."""
    if getattr(norms, "_finite_version", -1) == version_of(norms):
        return 0
    return int((~torch.isfinite(norms)).sum())


class FlatClipping:
    """Clips the gradient of a whole model to one norm (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).

    The wrapped model and its optimizer hold the same object, so that the clip and the noise,
    ``std = noise_multiplier * max_grad_norm``, cannot go by different norms.

    Args:
        max_grad_norm: the clipping norm ``C``.

    Formal guarantees:
        ``coefficients(norms)[n] * norms[n] <= C`` for every sample, up to one rounding.

    ============  ===========================================
    a norm of     coefficient
    ============  ===========================================
    0             1
    up to C       1
    above C       C / norm
    inf or NaN    none: ``ValueError`` with the count of them
    ============  ===========================================
    """

    def __init__(self, max_grad_norm: float) -> None:
        self.max_grad_norm = max_grad_norm

    @property
    def max_grad_norm(self) -> float:
        """The clipping norm ``C``; setting it to anything but a positive, finite number is a ``ValueError``."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._max_grad_norm = self._checked(value)

    def _checked(self, value: object) -> float:
        return check_max_grad_norm(value)

    def coefficients(self, norms: Tensor) -> Tensor:
        """The factor ``min(1, C / norm)`` for each sample.

        Args:
            norms: per-sample gradient norms, shape ``(N,)``.

        Returns:
            Clipping coefficients, shape ``(N,)``, of the dtype of ``norms``.

        Raises:
            ValueError: if a norm is inf or NaN.
        """
        bad = count_not_finite(norms)
        if bad:
            raise ValueError(
                f"the gradients of {bad} of {len(norms)} samples have inf or NaN in them, which no factor can clip; "
                "remove these samples from the data, or lower the learning rate if the weights have diverged"
            )
        return self.max_grad_norm / norms.clamp(min=self.max_grad_norm)

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """Standard deviation of the gradient's noise as a multiple of ``C``.

        Args:
            noise_multiplier: the noise multiplier ``z`` of all that a step releases, which is what the accountant counts.

        Returns:
            ``z``: nothing but the gradient is released.
        """
        return noise_multiplier

    def update(self, norms: Sequence[Tensor], noisy_mean: NoisyMean) -> None:
        """Moves ``C`` after a step; here it stays.

        Args:
            norms: the norms of the step's samples, in parts of shape ``(N,)``.
            noisy_mean: the one way by which what depends on the samples may come out; see the optimizer's `noisy_mean`.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on that its arguments do not say; here nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave."""


class AdaptiveClipping(FlatClipping):
    """Moves the clipping norm to a quantile of the gradient norms, privately (Andrew et al. 2021, arXiv:1905.03871, algorithm 1).

    After each step ``C`` becomes ``C * exp(-clipbound_learning_rate * (b - target_unclipped_quantile))``, where ``b`` is a noisy
    estimate of the share of samples with a norm up to ``C``.

    Args:
        max_grad_norm: the clipping norm ``C`` of the first step. A value that is set later is where ``C`` goes on from.
        min_clipbound: the smallest ``C``.
        max_clipbound: the largest ``C``.
        unclipped_num_std: standard deviation ``sigma_b`` of the noise on the count of unclipped samples, in samples; the paper
            takes a twentieth of the expected batch size.
        target_unclipped_quantile: the share of samples that is to stay unclipped, from 0 to 1; the paper takes the median.
        clipbound_learning_rate: by how much ``log C`` moves for each unit that the share is off; the paper takes 0.2.

    Raises:
        ValueError: if an argument has no meaning.

    Formal guarantees:
        Neighbours differ by one sample, added or removed. A step releases two sums over its samples, and nothing else that
        depends on them; with ``bit[n] = 1`` where ``norms[n] <= C``, else 0:

        ==========================================  ===========  ==================
        sum over the samples of                     sensitivity  deviation of noise
        ==========================================  ===========  ==================
        ``coefficients(norms)[n] * gradient[n]``    ``C``        ``z_delta * C``
        ``bit[n] - 1/2``                            ``1/2``      ``sigma_b``
        ==========================================  ===========  ==================

        Each divided by its noise, they are one Gaussian mechanism with noise of deviation 1 and sensitivity
        ``sqrt(z_delta^-2 + (2 sigma_b)^-2)``. For the ``z_delta`` of `gradient_noise_multiplier` it is ``1 / z`` (theorem 1): a
        step costs what the accountant counts for the noise multiplier ``z``, under Poisson sampling too, since both sums are
        of the same samples.

        ``b`` is the noisy sum of ``bit[n] - 1/2`` over the *expected* batch size, plus 1/2: the true size of a Poisson batch is
        private. Bits around 1/2 have half the sensitivity of plain ones.

        ``C`` moves after the noise of a step is drawn, so the noise goes by the ``C`` that the samples were clipped to. The next
        ``C`` is a function of what was released, and may be stored and shown.
    """

    def __init__(
        self,
        max_grad_norm: float,
        *,
        min_clipbound: float,
        max_clipbound: float,
        unclipped_num_std: float,
        target_unclipped_quantile: float = 0.5,
        clipbound_learning_rate: float = 0.2,
    ) -> None:
        for name, value, right, meaning in (
            ("min_clipbound", min_clipbound, lambda x: x > 0, "positive"),
            ("max_clipbound", max_clipbound, lambda x: x > min_clipbound, f"above min_clipbound={min_clipbound!r}"),
            ("unclipped_num_std", unclipped_num_std, lambda x: x >= 0, "from 0 on: the deviation of noise, in samples"),
            ("target_unclipped_quantile", target_unclipped_quantile, lambda x: 0 <= x <= 1, "from 0 to 1"),
            ("clipbound_learning_rate", clipbound_learning_rate, lambda x: x > 0, "positive"),
        ):
            if not is_finite_number(value) or not right(value):
                raise ValueError(f"{name} is {value!r}; adaptive clipping needs one finite number {meaning}")
        self.min_clipbound = min_clipbound
        self.max_clipbound = max_clipbound
        self.unclipped_num_std = unclipped_num_std
        self.target_unclipped_quantile = target_unclipped_quantile
        self.clipbound_learning_rate = clipbound_learning_rate
        super().__init__(max_grad_norm)

    def _checked(self, value: object) -> float:
        norm = super()._checked(value)
        if not self.min_clipbound <= norm <= self.max_clipbound:
            raise ValueError(
                f"max_grad_norm is {norm}, and has to be from min_clipbound={self.min_clipbound} to "
                f"max_clipbound={self.max_clipbound}"
            )
        return norm

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """``z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)``, theorem 1 of the paper.

        Args:
            noise_multiplier: the noise multiplier ``z`` of gradient and count together, which is what the accountant counts.

        Returns:
            The noise multiplier of the gradient, above ``z``; 0 for 0, which is without privacy.

        Raises:
            ValueError: if the noise on the count alone does not do for ``z``.
        """
        if noise_multiplier == 0:
            return 0.0
        if noise_multiplier >= 2 * self.unclipped_num_std:
            raise ValueError(
                f"noise_multiplier is {noise_multiplier}, unclipped_num_std {self.unclipped_num_std}: the count of unclipped "
                "samples alone would cost more privacy than the accountant counts. noise_multiplier has to be below "
                "2 * unclipped_num_std (arXiv:1905.03871, theorem 1); the paper takes a twentieth of the expected batch size "
                "for unclipped_num_std"
            )
        return noise_multiplier / math.sqrt(1 - (noise_multiplier / (2 * self.unclipped_num_std)) ** 2)

    def update(self, norms: Sequence[Tensor], noisy_mean: NoisyMean) -> None:
        """Moves ``C`` after a step.

        Args:
            norms: the norms of the step's samples, in parts of shape ``(N,)``.
            noisy_mean: the one way by which what depends on the samples may come out; see the optimizer's `noisy_mean`.
        """
        every = torch.cat(list(norms))
        recentred = (every <= self.max_grad_norm).to(every.dtype) - 0.5
        unclipped = noisy_mean(recentred.sum(), self.unclipped_num_std).item() + 0.5
        log_norm = math.log(self.max_grad_norm) - self.clipbound_learning_rate * (
            unclipped - self.target_unclipped_quantile
        )
        # Bounded twice: exp of anything may overflow, and exp(log(bound)) may lie a rounding beyond the bound.
        norm = math.exp(min(log_norm, math.log(self.max_clipbound)))
        self.max_grad_norm = min(max(norm, self.min_clipbound), self.max_clipbound)

    def state_dict(self) -> dict[str, Any]:
        """The clipping norm of the next step, as ``max_grad_norm``."""
        return {"max_grad_norm": self.max_grad_norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave.

        Raises:
            ValueError: if it lies outside of this run's bounds.
        """
        self.max_grad_norm = state["max_grad_norm"]


RULES: dict[str, type[FlatClipping]] = {"flat": FlatClipping, "adaptive": AdaptiveClipping}
"""The clipping rules by what `make_private` calls them in ``clipping``."""
