"""Norms without gradients, as norm samplers in Opacus' own form return them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opacus_fgc.per_sample.base import PerSampleGradient
from opacus_fgc.per_sample.precision import at_least_float32
from opacus_fgc.planner import NormMethod, Room


class NormsOnlyError(NotImplementedError):
    """Something is asked of plain norms that only gradients can give."""

    def __init__(
        self,
        message: str = "the norm sampler of this layer returns norms only, which cannot be added up over several uses of a "
        "parameter; let it return a form of opacus_fgc.per_sample (Outer, Rows, Dense) instead",
    ) -> None:
        super().__init__(message)


class NormOnly(PerSampleGradient):
    """What a norm sampler in Opacus' own form gives: norms, and no gradients behind them.

    Args:
        norms: shape ``(N,)``.
        shape: shape of the parameter.
    """

    method = NormMethod.GIVEN

    def __init__(self, norms: Tensor, shape: torch.Size) -> None:
        self.norms = at_least_float32(norms)
        self.shape = shape
        self.batch_size = len(norms)

    @property
    def elements(self) -> int:
        return 0

    def norm(self) -> Tensor:
        return self.norms

    def fits(self, room: Room) -> bool:
        return False

    def weighted_sum(self, coef: Tensor) -> Tensor:
        raise NormsOnlyError

    def materialize(self) -> Tensor:
        raise NormsOnlyError

    def inner(self, other: PerSampleGradient) -> Tensor:
        raise NormsOnlyError

    @classmethod
    def joined(cls, forms: Sequence[NormOnly]) -> NormOnly:
        raise NormsOnlyError

    def select(self, samples: slice | Tensor) -> NormOnly:
        return NormOnly(self.norms[samples], self.shape)

    def sum_over_uses(self, uses: int) -> NormOnly:
        raise NormsOnlyError
