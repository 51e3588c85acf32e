"""Gradients of groups of the samples, each group in a form of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opacus_fgc.per_sample.base import Dense, PerSampleGradient
from opacus_fgc.per_sample.sum import add
from opacus_fgc.planner import NormMethod


class Grouped(PerSampleGradient):
    """Forms of groups of the samples: where these have different numbers of rows, each group is padded by itself.

    Args:
        forms: a form for each group.
        places: which samples are in each group, ascending; together all of them, each once.
    """

    method = NormMethod.SUM

    def __init__(self, forms: Sequence[PerSampleGradient], places: Sequence[Tensor]) -> None:
        self.forms = forms
        self.places = places
        self.shape = forms[0].shape
        self.batch_size = sum(map(len, places))

    @property
    def elements(self) -> int:
        return sum(form.elements for form in self.forms)

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """What the groups have, each a row a sample, in the order of the samples."""
        rows = torch.cat(list(parts))
        return rows[torch.cat(list(self.places)).argsort().to(rows.device)]

    def norm(self) -> Tensor:
        return self._in_order([form.norm() for form in self.forms])

    @property
    def summands(self) -> int:
        return max(form.summands for form in self.forms)

    def norm_of_terms(self) -> Tensor:
        return self._in_order([form.norm_of_terms() for form in self.forms])

    def weighted_sum(self, coef: Tensor) -> Tensor:
        total = None
        for form, places in zip(self.forms, self.places, strict=True):
            part = form.weighted_sum(coef[places.to(coef.device)])
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def materialize(self) -> Tensor:
        return self._in_order([form.materialize() for form in self.forms])

    def inner(self, other: PerSampleGradient) -> Tensor:
        if isinstance(other, Grouped) and self._has_groups_of(other):
            return self._in_order([a.inner(b) for a, b in zip(self.forms, other.forms, strict=True)])
        of_groups = [torch.zeros(self.batch_size, dtype=torch.bool, device="cpu") for _ in self.places]
        for mask, places in zip(of_groups, self.places, strict=True):
            mask[places] = True
        return self._in_order([a.inner(other.select(b)) for a, b in zip(self.forms, of_groups, strict=True)])

    def _has_groups_of(self, other: Grouped) -> bool:
        return len(self.places) == len(other.places) and all(map(torch.equal, self.places, other.places))

    @classmethod
    def joined(cls, forms: Sequence[Grouped]) -> PerSampleGradient:
        if all(form._has_groups_of(forms[0]) for form in forms):
            return cls([add(several) for several in zip(*(form.forms for form in forms), strict=True)], forms[0].places)
        return super().joined(forms)

    def select(self, samples: slice | Tensor) -> Grouped:
        mask = torch.zeros(self.batch_size, dtype=torch.bool, device="cpu")
        mask[samples if isinstance(samples, slice) else samples.cpu()] = True
        renumbered = mask.cumsum(0) - 1
        forms, places = [], []
        for form, own in zip(self.forms, self.places, strict=True):
            chosen = mask[own]
            forms.append(form.select(chosen))
            places.append(renumbered[own[chosen]])
        return Grouped(forms, places)

    def sum_over_uses(self, uses: int) -> PerSampleGradient:
        return Dense(self.materialize()).sum_over_uses(uses)
