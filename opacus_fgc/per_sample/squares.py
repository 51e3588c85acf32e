"""Norms from sums of terms that may cancel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from opacus_fgc.per_sample.doubts import Factors, cancelled, noted, upper_bounds


class Squares(NamedTuple):
    """Squared norms that came of adding up what may cancel.

    Attributes:
        values: shape ``(N,)``.
        scale: the sum of the absolute values of what was added up, or more; shape ``(N,)``.
        small: a mask of the samples with factors so small that squares of them may have vanished, shape ``(N,)``; None for none.
        vanished: says of which samples that matters, by another such mask.
        factors: what tells the same to `Doubts`, in the place of both.
    """

    values: Tensor
    scale: Tensor
    small: Tensor | None = None
    vanished: Callable[[], Tensor] | None = None
    factors: Factors | None = None

    def norm(self, exact: Callable[[Tensor], Tensor]) -> Tensor:
        """The norms: what they are, or more by as much as they may have been rounded down.

        Args:
            exact: computes those of the masked samples in another way, in which nothing is squared before it cancels.
        """
        norm = upper_bounds(self.values, self.scale)
        doubts = noted(norm.device)
        if doubts is not None:
            if self.small is None or self.vanished is None:
                doubts.add(self.values, self.scale, self.factors)
            else:
                doubtful = cancelled(self.values, self.scale) & (self.scale != 0)
                doubts.add_mask(doubtful | (self.small & self.vanished()))
            return norm
        doubtful = cancelled(self.values, self.scale)
        seen = doubtful if self.small is None else doubtful | self.small
        if seen.any():
            doubtful &= self.scale != 0
            if self.small is not None and self.vanished is not None:
                doubtful |= self.small & self.vanished()
            if doubtful.any():
                norm[doubtful] = exact(doubtful)
        return norm

    def left_for_later(self) -> bool:
        """Leaves the norms to the end of the pass, if it notes what is doubtful."""
        doubts = noted(self.values.device)
        if doubts is None or self.small is not None:
            return False
        doubts.add(self.values, self.scale, self.factors, later=True)
        return True
