"""What a parameter gets from all its uses, in whatever forms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opacus_fgc.per_sample.base import PerSampleGradient
from opacus_fgc.per_sample.squares import Squares
from opacus_fgc.planner import NormMethod


def add(forms: Sequence[PerSampleGradient]) -> PerSampleGradient:
    """The sum of the forms that a parameter got from all its uses in a step.

    Args:
        forms: at least one form, all of the same parameter and batch.

    Returns:
        One form. Its norm is the norm of the sum, not the sum of the norms.
    """
    by_type: dict[type[PerSampleGradient], list[PerSampleGradient]] = {}
    for form in forms:
        by_type.setdefault(type(form), []).append(form)
    terms = [group[0] if len(group) == 1 else kind.joined(group) for kind, group in by_type.items()]
    return terms[0] if len(terms) == 1 else Sum(terms)


class Sum(PerSampleGradient):
    """Forms of several types that add up: ``|sum_i g_i|^2 = sum_ij <g_i, g_j>``.

    Args:
        terms: the forms, of one parameter and of different types.
    """

    method = NormMethod.SUM

    def __init__(self, terms: Sequence[PerSampleGradient]) -> None:
        self.terms = terms
        self.shape = terms[0].shape
        self.batch_size = terms[0].batch_size

    @property
    def elements(self) -> int:
        return sum(term.elements for term in self.terms)

    def norm(self) -> Tensor:
        total = torch.stack([term.norm() for term in self.terms]).square().sum(0)
        for i, term in enumerate(self.terms):
            for other in self.terms[:i]:
                total = total + 2 * term.inner(other)
        return Squares(total, self.norm_of_terms().square()).norm(self.norm_one_by_one)

    @property
    def summands(self) -> int:
        return sum(term.summands for term in self.terms)

    def norm_of_terms(self) -> Tensor:
        return torch.stack([term.norm_of_terms() for term in self.terms]).sum(0)

    def weighted_sum(self, coef: Tensor) -> Tensor:
        return torch.stack([term.weighted_sum(coef) for term in self.terms]).sum(0)

    def materialize(self) -> Tensor:
        return torch.stack([term.materialize() for term in self.terms]).sum(0)

    def inner(self, other: PerSampleGradient) -> Tensor:
        return torch.stack([term.inner(other) for term in self.terms]).sum(0)

    @classmethod
    def joined(cls, forms: Sequence[Sum]) -> PerSampleGradient:
        return add([term for form in forms for term in form.terms])

    def select(self, samples: slice | Tensor) -> Sum:
        return Sum([term.select(samples) for term in self.terms])

    def sum_over_uses(self, uses: int) -> Sum:
        return Sum([term.sum_over_uses(uses) for term in self.terms])
