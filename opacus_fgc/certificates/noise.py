"""By how much backward passes that should be the same differ, and what of a difference is more than that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opacus_fgc.certificates.backprops import Backprops, Output
from opacus_fgc.certificates.sketch import rounded

_SMALLEST = 2.0**-100
"""Sums of sizes below which rounding is not that of larger numbers; they are nothing beside any clipping norm."""


def is_beyond(difference: Tensor, scale: Tensor, half: bool, allowed: Tensor) -> Tensor:
    """In which rows a difference is more than what is allowed, and than rounding where numbers are too small, or float16."""
    size = scale[:, 2:].nan_to_num()
    # Much of what float16 has to hold lies below its smallest normal number.
    tolerance = (size * 2.0**-3).clamp(min=2.0**-10) if half else torch.zeros_like(size)
    difference = difference.nan_to_num().abs()
    return (difference > tolerance + _SMALLEST).any(1) & (difference > allowed).any(1)


class Noise(NamedTuple):
    """By how much passes that should be the same differ, a number for each of the columns."""

    of: dict[Output, Tensor]
    deterministic: bool

    def allowed(self, key: Output, rows: Tensor) -> Tensor:
        """By how much sketches of rows may differ from what they should be; shape ``(rows, 1)`` or ``(rows, 3)``."""
        if self.deterministic:
            return torch.zeros_like(rows[:, 2:])
        return 8 * self.of.get(key, 0) + rounded(rows)


def noise_of(first: Backprops, others: Sequence[Backprops]) -> Noise:
    """By how much passes differ from the first of them."""
    of = {
        key: torch.stack(
            [(value - other.sketches.get(key, value)).nan_to_num().abs().amax(0, keepdim=True) for other in others]
        ).amax(0)
        for key, value in first.sketches.items()
        if len(value)
    }
    return Noise(of, not any(bool(value.any()) for value in of.values()))
