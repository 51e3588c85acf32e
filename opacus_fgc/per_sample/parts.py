"""Gradients of a parameter of which each use sees a part: the matrices of experts that lie in one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opacus_fgc.per_sample.base import Dense, PerSampleGradient
from opacus_fgc.per_sample.sum import add
from opacus_fgc.planner import NormMethod


class Parts(PerSampleGradient):
    """Gradients that are zero but in some parts of a parameter, by their places along its first axis.

    Parts do not overlap, so that ``|g|^2`` is the sum of theirs.

    Args:
        parts: forms of the parts, each of shape ``shape[1:]``; at least one.
        shape: shape of the parameter.
    """

    method = NormMethod.SUM

    def __init__(self, parts: Mapping[int, PerSampleGradient], shape: torch.Size) -> None:
        self.parts = parts
        self.shape = shape
        self.batch_size = next(iter(parts.values())).batch_size

    @property
    def elements(self) -> int:
        return sum(part.elements for part in self.parts.values())

    def norm(self) -> Tensor:
        return torch.stack([part.norm() for part in self.parts.values()]).square().sum(0).sqrt()

    @property
    def summands(self) -> int:
        return max(part.summands for part in self.parts.values())

    def norm_of_terms(self) -> Tensor:
        return torch.stack([part.norm_of_terms() for part in self.parts.values()]).square().sum(0).sqrt()

    def weighted_sum(self, coef: Tensor) -> Tensor:
        sums = {place: part.weighted_sum(coef) for place, part in self.parts.items()}
        first = next(iter(sums.values()))
        total = first.new_zeros(self.shape)
        for place, part in sums.items():
            total[place] = part
        return total

    def materialize(self) -> Tensor:
        parts = {place: part.materialize() for place, part in self.parts.items()}
        first = next(iter(parts.values()))
        gradients = first.new_zeros(len(first), *self.shape)
        for place, part in parts.items():
            gradients[:, place] = part
        return gradients

    def inner(self, other: PerSampleGradient) -> Tensor:
        if not isinstance(other, Parts):
            return Dense(self.materialize()).inner(other)
        common = [part.inner(other.parts[place]) for place, part in self.parts.items() if place in other.parts]
        return torch.stack(common).sum(0) if common else torch.zeros_like(self.norm())

    @classmethod
    def joined(cls, forms: Sequence[Parts]) -> Parts:
        several: dict[int, list[PerSampleGradient]] = {}
        for form in forms:
            for place, part in form.parts.items():
                several.setdefault(place, []).append(part)
        return cls({place: add(parts) for place, parts in several.items()}, forms[0].shape)

    def select(self, samples: slice | Tensor) -> Parts:
        return Parts({place: part.select(samples) for place, part in self.parts.items()}, self.shape)

    def sum_over_uses(self, uses: int) -> Parts:
        return Parts({place: part.sum_over_uses(uses) for place, part in self.parts.items()}, self.shape)
