"""Sums of outer products that go to one part of a parameter each: the weight gradients of experts on the rows routed to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opacus_fgc.per_sample.base import Dense, PerSampleGradient
from opacus_fgc.per_sample.outer import Outer
from opacus_fgc.per_sample.parts import Parts
from opacus_fgc.per_sample.precision import at_least_float32, product
from opacus_fgc.planner import NormMethod

# How many terms of a gradient are added up at once, as in `Outer`.
_TERMS = 2**14


class Routed(PerSampleGradient):
    """``gradient[n, index[n, t]] += left[n, t] (x) right[n, t]``.

    Norms come from `Parts` of `Outer`, in which each part has as many positions as the sample with most of them there.

    Args:
        index: parts, along the parameter's first axis, shape ``(N, T)``, int.
        left: shape ``(N, T, p)``.
        right: shape ``(N, T, d)``.
        shape: shape of the parameter, ``(parts, p, d)``.
    """

    method = NormMethod.SUM

    def __init__(self, index: Tensor, left: Tensor, right: Tensor, shape: torch.Size) -> None:
        self.index = index.long()
        self.left = left
        self.right = right
        self.shape = shape
        self.batch_size = len(left)

    @property
    def elements(self) -> int:
        return self.left.numel()

    def parts(self) -> Parts:
        """The same gradients part by part."""
        if not self.index.numel():
            return Parts({0: Dense(self.left.new_zeros(self.batch_size, *self.shape[1:]))}, self.shape)
        order = self.index.argsort(dim=1, stable=True)
        counts = torch.zeros(self.batch_size, self.shape[0], dtype=torch.long, device=self.index.device)
        counts.scatter_add_(1, self.index, torch.ones_like(self.index))
        ends = counts.cumsum(1)
        parts: dict[int, PerSampleGradient] = {}
        for place, most in enumerate(counts.amax(0).tolist()):
            if most:
                position = torch.arange(most, device=order.device)
                rows = order.gather(1, (position + (ends - counts)[:, place, None]).clamp(max=order.shape[1] - 1))
                padding = (position >= counts[:, place, None]).unsqueeze(2)
                left, right = (
                    side.gather(1, rows.unsqueeze(2).expand(-1, -1, side.shape[2])).masked_fill(padding, 0)
                    for side in (self.left, self.right)
                )
                parts[place] = Outer(left, right, self.shape[1:])
        return Parts(parts, self.shape)

    def norm(self) -> Tensor:
        return self.parts().norm()

    @property
    def summands(self) -> int:
        return self.left.shape[1]

    def norm_of_terms(self) -> Tensor:
        return self.parts().norm_of_terms()

    def weighted_sum(self, coef: Tensor) -> Tensor:
        order = self.index.flatten().argsort(stable=True)
        counts = self.index.flatten().bincount(minlength=self.shape[0]).tolist()
        left, right = (at_least_float32(side).flatten(0, 1) for side in (self.left, self.right))
        coef = coef.to(left.dtype.to_real()).repeat_interleave(self.index.shape[1]).unsqueeze(1)
        sums = [
            product((left[rows] * coef[rows]).mT, right[rows], _TERMS) if len(rows) else left.new_zeros(self.shape[1:])
            for rows in order.split(counts)
        ]
        return torch.stack(sums)

    def materialize(self) -> Tensor:
        return self.parts().materialize()

    def inner(self, other: PerSampleGradient) -> Tensor:
        return self.parts().inner(other.parts() if isinstance(other, Routed) else other)

    @classmethod
    def joined(cls, forms: Sequence[Routed]) -> Routed:
        sides = ([getattr(form, name) for form in forms] for name in ("index", "left", "right"))
        index, left, right = (torch.cat(several, 1) for several in sides)
        return cls(index, left, right, forms[0].shape)

    def select(self, samples: slice | Tensor) -> Routed:
        return Routed(self.index[samples], self.left[samples], self.right[samples], self.shape)

    def sum_over_uses(self, uses: int) -> Routed:
        index, left, right = (
            side.unflatten(0, (-1, uses)).flatten(1, 2) for side in (self.index, self.left, self.right)
        )
        return Routed(index, left, right, self.shape)
