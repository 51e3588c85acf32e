"""Forms that are sums over positions: the norm from Gram matrices or from the gradients, by cost."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from opacus_fgc import planner
from opacus_fgc.per_sample.base import LATER, Dense, Measured, PerSampleGradient
from opacus_fgc.per_sample.squares import Squares
from opacus_fgc.planner import NO_ROOM, Kernels, NormMethod, Room


class SumOverPositions(PerSampleGradient):
    """Gradients that are, in each of ``groups`` groups, a sum of ``T`` outer products of ``p`` and ``d`` elements.

    The norm comes from Gram matrices or from the gradients, whatever is cheaper for the shapes at hand; see `planner`.

    Attributes:
        KERNELS: what the norm methods cost.
    """

    KERNELS: Kernels

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, int, int, int]:
        """``(groups, T, p, d)``."""

    @property
    def summands(self) -> int:
        return self.sizes[1]

    @abstractmethod
    def select(self, samples: slice | Tensor) -> SumOverPositions: ...

    def temporary(self, method: NormMethod) -> int:
        """How many elements one sample's work takes beyond what is there."""
        groups, positions, p, d = self.sizes
        return groups * (positions**2 if method is NormMethod.GRAM else p * d)

    @abstractmethod
    def gram(self) -> Squares:
        """Squared norms from Gram matrices."""

    @abstractmethod
    def formed(self) -> Dense:
        """The gradients, in whatever order they come cheapest."""

    def norm(self) -> Tensor:
        return self.measured().norm

    def measured(self, room: Room = NO_ROOM) -> Measured:
        groups, positions, p, d = self.sizes
        options = planner.costs(self.KERNELS, positions, p, d)
        if self.batch_size * groups * p * d > room.elements:
            del options[NormMethod.KEPT]
        method = planner.cheapest(options) if self.batch_size else NormMethod.KEPT
        if method is NormMethod.KEPT:
            gradients = self.formed()
            return Measured(gradients.norm(), gradients, method)
        temporary = self.temporary(method)
        parts = [self.select(samples) for samples in planner.slices(self.batch_size, temporary)]
        kept = self if self.fits(room) else None
        if method is NormMethod.GRAM and room.later and len(parts) == 1:
            squares = self.gram()
            if squares.left_for_later():
                return Measured(LATER, kept, method, self.batch_size * temporary)
            norms = [squares.norm(self.norm_one_by_one)]
        elif method is NormMethod.GRAM:
            norms = [part.gram().norm(part.norm_one_by_one) for part in parts]
        else:
            norms = [part.above_rounding(part.formed().norm()) for part in parts]
        norm = norms[0] if len(norms) == 1 else torch.cat(norms)
        return Measured(norm, kept, method, parts[0].batch_size * temporary)
