"""From per-sample norms to clipping coefficients; the one owner of the clipping norm ``C``."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

# Between these, squares of what matters for a norm of that size neither vanish nor overflow in float32.
_SMALLEST, _LARGEST = 1e-12, 1e18


def check_max_grad_norm(value: object) -> float:
    """Returns the clipping norm as a float.

    Raises:
        ValueError: if it is not one positive, finite number, or out of the range in which float32 resolves norms.
    """
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
        raise ValueError(
            f"max_grad_norm is {value!r}; flat clipping needs one positive, finite number: the largest L2 norm "
            "that the gradient of one sample may have"
        )
    if not _SMALLEST <= float(value) <= _LARGEST:
        raise ValueError(
            f"max_grad_norm is {value!r}; norms of that size cannot be told in float32, take one from {_SMALLEST} to {_LARGEST}"
        )
    return float(value)


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
        self._max_grad_norm = check_max_grad_norm(value)

    def coefficients(self, norms: Tensor) -> Tensor:
        """The factor ``min(1, C / norm)`` for each sample.

        Args:
            norms: per-sample gradient norms, shape ``(N,)``.

        Returns:
            Clipping coefficients, shape ``(N,)``, of the dtype of ``norms``.

        Raises:
            ValueError: if a norm is inf or NaN.
        """
        bad = int((~torch.isfinite(norms)).sum())
        if bad:
            raise ValueError(
                f"the gradients of {bad} of {len(norms)} samples have inf or NaN in them, which no factor can clip; "
                "remove these samples from the data, or lower the learning rate if the weights have diverged"
            )
        return self.max_grad_norm / norms.clamp(min=self.max_grad_norm)
