"""Sums of outer products: the weight gradients of linear maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opacus_fgc import planner
from opacus_fgc.per_sample.base import Dense, Measured, PerSampleGradient
from opacus_fgc.per_sample.doubts import Factors, noted
from opacus_fgc.per_sample.precision import (
    GRAM_TERMS,
    at_least_float32,
    factor_norms,
    least_norm,
    product,
    row_norms,
    widened,
)
from opacus_fgc.per_sample.runs import norms_of_runs
from opacus_fgc.per_sample.squares import Squares
from opacus_fgc.per_sample.sum_over_positions import SumOverPositions
from opacus_fgc.planner import NO_ROOM, Kernels, NormMethod, Room

# The positions from which Gram matrices come in two blocks, and in four. A GPU needs longer for a small product than for its
# arithmetic: on one of NVIDIA's H100, four blocks of 64 positions took 20 times as long as one of 256.
_BLOCKS_FROM = {"cpu": (96, 256), "accelerator": (1024, 2048)}

# How many terms of a gradient are added up at once.
TERMS = 2**14


def _gram_inner(left: Tensor, right: Tensor) -> Squares:
    """``sum_ts <left_t, left_s> <right_t, right_s>`` of each sample, from both ``(N, groups, T, *)``.

    Gram matrices are Hermitian: where they are large, only blocks from the diagonal on are computed.
    """
    positions = left.shape[2]
    few, some = _BLOCKS_FROM["cpu" if left.device.type == "cpu" else "accelerator"]
    blocks = 1 if positions < few else 2 if positions < some else 4
    step = -(-positions // blocks)
    totals: list[Tensor] = []
    scales: list[Tensor] = []
    bounds = [least_norm(side.shape[3], left.dtype) for side in (left, right)]
    # On the diagonals are squared norms. Whether one that vanished matters is asked only if there is one; else see `doubts`.
    asked = noted(left.device) is None
    shortest: list[list[Tensor]] = []  # of left and right

    def add(factor: int, left_gram: Tensor, right_gram: Tensor) -> None:
        products = left_gram.mul_(right_gram).flatten(1)
        total = products.sum(1).real
        if asked:
            scale = (products.abs() if products.is_complex() else products.abs_()).sum(1)
        else:
            scale = torch.linalg.vector_norm(products, 1, 1)  # one kernel, but slower on a CPU
        for sum_, several in zip((total, scale), (totals, scales), strict=True):
            several.append(sum_ if factor == 1 else factor * sum_)

    for start in range(0, positions, step):
        rows, others = slice(start, start + step), slice(start + step, None)
        left_rows, right_rows = left[:, :, rows], right[:, :, rows]
        grams = [product(side, side.mH, GRAM_TERMS) for side in (left_rows, right_rows)]
        if asked:
            shortest.append([gram.diagonal(dim1=2, dim2=3).real.amin((1, 2)) for gram in grams])
        add(1, *grams)
        if start + step < positions:
            sides = (left_rows, left[:, :, others]), (right_rows, right[:, :, others])
            add(2, *(product(of_rows, of_others.mH, GRAM_TERMS) for of_rows, of_others in sides))

    total, scale = (several[0] if len(several) == 1 else torch.stack(several).sum(0) for several in (totals, scales))
    if not asked:
        return Squares(total, scale, factors=Factors.of(left, right, (bounds[0], bounds[1])))
    short = [(of_left < bounds[0] ** 2) | (of_right < bounds[1] ** 2) for of_left, of_right in shortest]
    small = short[0] if len(short) == 1 else torch.stack(short).any(0)

    def vanished() -> Tensor:
        norms = [factor_norms(side) for side in (left, right)]
        # A small side does not matter if the other one is 0, or its product with it is nothing beside the rest.
        lost = norms[0] * norms[1] * ((norms[0] < bounds[0]) | (norms[1] < bounds[1]))
        return ~(lost.flatten(1).sum(1) <= torch.finfo(total.dtype).eps * total.clamp(min=0).sqrt())

    return Squares(total, scale, small, vanished)


class Outer(SumOverPositions):
    """``gradient[n] = sum_t left[n, :, t] (x) right[n, :, t]``, the weight gradient of a linear map.

    The norm needs no gradient: it is one product of norms where ``T = 1`` (Goodfellow 2015,
    arXiv:1510.01799), and ``sum_ts <left_t, left_s> <right_t, right_s>``, from two Gram matrices,
    otherwise (Li et al. 2022, arXiv:2110.05679). Where ``T`` is large, forming the product is cheaper.

    Args:
        left: shape ``(N, groups, T, p)``; ``(N, T, p)`` is one group.
        right: shape ``(N, groups, T, d)``; ``(N, T, d)`` is one group.
        shape: shape of the parameter, ``groups * p * d`` elements in that order.
    """

    KERNELS = Kernels(gram=1.25, formed=1.05, gradient=1.0)

    def __init__(self, left: Tensor, right: Tensor, shape: torch.Size) -> None:
        self.left = left if left.dim() == 4 else left.unsqueeze(1)
        self.right = right if right.dim() == 4 else right.unsqueeze(1)
        self.shape = shape
        self.batch_size = left.shape[0]

    @property
    def elements(self) -> int:
        # The activations are in memory anyway, for as long as autograd has use for them.
        return self.left.numel()

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return *self.left.shape[1:], self.right.shape[3]

    def select(self, samples: slice | Tensor) -> Outer:
        return Outer(self.left[samples], self.right[samples], self.shape)

    def gram(self) -> Squares:
        return _gram_inner(at_least_float32(self.left), at_least_float32(self.right))

    def formed(self) -> Dense:
        return Dense(self.materialize())

    def norm_of_runs(self, counts: Tensor) -> Tensor | None:
        groups, positions, p, d = self.sizes
        if groups != 1 or not len(counts):
            return None
        lengths = (counts * positions).tolist()
        left, right = (at_least_float32(side).flatten(0, 2).split(lengths) for side in (self.left, self.right))

        def alone(place: int, from_gradient: bool) -> Tensor:
            one = Outer(left[place][None], right[place][None], self.shape)
            whole = torch.ones(1, dtype=torch.bool, device=one.left.device)
            return (one.norm_one_by_one(whole) if from_gradient else one.norm())[0]

        return norms_of_runs(left, right, lambda length: self._is_by_gram(length, p, d), alone)

    def _is_by_gram(self, positions: int, p: int, d: int) -> bool:
        options = planner.costs(self.KERNELS, positions, p, d)
        return options[NormMethod.GRAM] <= options[NormMethod.FORMED]

    def measured(self, room: Room = NO_ROOM) -> Measured:
        if self.left.shape[2] > 1:
            return super().measured(room)
        return Measured(self.norm_of_terms(), self if self.fits(room) else None, NormMethod.CLOSED)

    def norm_of_terms(self) -> Tensor:
        # The square of one side may vanish, or overflow, and its product with the other be of an ordinary size.
        norms = (factor_norms(self.left) * factor_norms(self.right)).flatten(1)
        norm = norms.squeeze(1) if norms.shape[1] == 1 else row_norms(norms)
        return norm.to(widened(self.left.dtype).to_real())

    def weighted_sum(self, coef: Tensor) -> Tensor:
        left, right = at_least_float32(self.left), at_least_float32(self.right)
        coef = coef.to(left.dtype.to_real()).view(-1, 1, 1, 1)
        if left.shape[3] < right.shape[3]:
            left = left * coef
        else:
            right = right * coef
        if left.shape[1] == 1:
            return product(left.flatten(0, 2).mT, right.flatten(0, 2), TERMS).reshape(self.shape)
        return torch.einsum("ngtp,ngtd->gpd", left, right).reshape(self.shape)

    def materialize(self) -> Tensor:
        gradients = product(at_least_float32(self.left).mT, at_least_float32(self.right), TERMS)
        return gradients.reshape(self.batch_size, *self.shape)

    def inner(self, other: PerSampleGradient) -> Tensor:
        if not isinstance(other, (Dense, Outer)):
            return other.inner(self)
        groups, _, p, d = self.sizes
        dense = at_least_float32(other.materialize()).reshape(self.batch_size, groups, p, d)
        left, right = at_least_float32(self.left), at_least_float32(self.right)
        return (left.conj() @ dense * right.conj()).sum((1, 2, 3)).real

    @classmethod
    def joined(cls, forms: Sequence[Outer]) -> Outer:
        left, right = torch.cat([form.left for form in forms], 2), torch.cat([form.right for form in forms], 2)
        return cls(left, right, forms[0].shape)

    def sum_over_uses(self, uses: int) -> Outer:
        # (N * uses, groups, T, *) to (N, groups, uses * T, *), by a view where there is one group.
        left, right = (side.unflatten(0, (-1, uses)).transpose(1, 2).flatten(2, 3) for side in (self.left, self.right))
        return Outer(left, right, self.shape)
