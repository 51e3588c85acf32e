"""Gradients of samples with different numbers of rows, from forms in which each row counts as a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from opacus_fgc.per_sample.base import Dense, PerSampleGradient
from opacus_fgc.per_sample.precision import widest
from opacus_fgc.per_sample.sum import Sum, add
from opacus_fgc.planner import NormMethod


class Ragged(PerSampleGradient):
    """Sums over runs of rows, one run a sample: nothing is padded.

    The weighted sum is that of the rows, each with the coefficient of its sample, which is one product as in the step without
    privacy.

    Args:
        forms: forms of rows, which add up.
        counts: for each of them how many rows each sample has, one sample's after another's, shape ``(N,)``, on the CPU.
    """

    method = NormMethod.SUM

    def __init__(self, forms: Sequence[PerSampleGradient], counts: Sequence[Tensor]) -> None:
        self.forms = forms
        self.counts = counts
        self.shape = forms[0].shape
        self.batch_size = len(counts[0])

    @property
    def elements(self) -> int:
        return sum(form.elements for form in self.forms)

    def _pairs(self) -> list[tuple[PerSampleGradient, Tensor]]:
        return list(zip(self.forms, self.counts, strict=True))

    def _of_one(self, place: int) -> PerSampleGradient | None:
        """The form of one sample; None if it has no row."""
        runs = ((form, int(counts[:place].sum()), int(counts[place])) for form, counts in self._pairs())
        several = [
            form.select(slice(start, start + count)).sum_over_uses(count) for form, start, count in runs if count
        ]
        return add(several) if several else None

    def _of_each(self, compute: Callable[..., Tensor], *others: Ragged) -> Tensor:
        """What comes of each sample's form, and of those of others, one after another; 0 for samples without a row."""
        several = (self, *others)
        forms = [[one._of_one(place) for one in several] for place in range(self.batch_size)]
        results = [None if None in of_place else compute(*of_place) for of_place in forms]
        like = next((one for one in results if one is not None), None)
        like = compute(*(one.forms[0].select(slice(0, 0)) for one in several)) if like is None else like
        zero = like.new_zeros(1, *like.shape[1:])
        return torch.cat([zero[:0], *(zero if one is None else one for one in results)])

    def norm(self) -> Tensor:
        if len({type(form) for form in self.forms}) < len(self.forms):
            return self._of_each(lambda form: form.norm())
        if len(self.forms) > 1:
            return Sum([Ragged([form], [counts]) for form, counts in self._pairs()]).norm()
        norms = self.forms[0].norm_of_runs(self.counts[0])
        return self._of_each(lambda form: form.norm()) if norms is None else norms

    @property
    def summands(self) -> int:
        most = (int(counts.amax()) if len(counts) else 0 for counts in self.counts)
        return sum(form.summands * count for form, count in zip(self.forms, most, strict=True))

    def norm_of_terms(self) -> Tensor:
        pairs = [(form.norm_of_terms(), counts) for form, counts in self._pairs()]
        return (
            torch.stack([_sums(widest(norms).square(), counts).to(norms.dtype) for norms, counts in pairs])
            .sqrt()
            .sum(0)
        )

    def weighted_sum(self, coef: Tensor) -> Tensor:
        sums = [form.weighted_sum(coef.repeat_interleave(counts.to(coef.device))) for form, counts in self._pairs()]
        return reduce(torch.add, sums)

    def inner(self, other: PerSampleGradient) -> Tensor:
        if not isinstance(other, Ragged):
            other = Ragged([other], [torch.ones(self.batch_size, dtype=torch.int64, device="cpu")])
        return self._of_each(lambda form, of_other: form.inner(of_other), other)

    def materialize(self) -> Tensor:
        return self._of_each(lambda form: form.materialize())

    @classmethod
    def joined(cls, forms: Sequence[Ragged]) -> Ragged:
        return cls([one for form in forms for one in form.forms], [counts for form in forms for counts in form.counts])

    def select(self, samples: slice | Tensor) -> Ragged:
        chosen = torch.zeros(self.batch_size, dtype=torch.bool, device="cpu")
        chosen[samples if isinstance(samples, slice) else samples.cpu()] = True
        forms = [form.select(chosen.repeat_interleave(counts)) for form, counts in self._pairs()]
        return Ragged(forms, [counts[chosen] for counts in self.counts])


def sum_over_runs(form: PerSampleGradient, counts: Tensor) -> PerSampleGradient:
    """The sum over runs of rows, where each row counts as a sample.

    Args:
        form: the form of the rows.
        counts: how many rows each sample has, one sample's after another's, shape ``(N,)``, on the CPU.
    """
    if not isinstance(form, Dense):
        return Ragged([form], [counts])
    return Dense(_sums(form.values, counts))


def _sums(values: Tensor, counts: Tensor) -> Tensor:
    """Sums of runs of rows."""
    samples = torch.arange(len(counts), device=values.device).repeat_interleave(counts.to(values.device))
    return values.new_zeros(len(counts), *values.shape[1:]).index_add(0, samples, values)
