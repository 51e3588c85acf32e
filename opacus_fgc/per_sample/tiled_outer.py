"""The weight gradients of a head that predicts tokens, where the gradients by its logits are too large to be held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from opacus_fgc import planner
from opacus_fgc.per_sample.base import Dense, Measured, PerSampleGradient
from opacus_fgc.per_sample.logit_gradients import LogitGradients
from opacus_fgc.per_sample.outer import TERMS, Outer
from opacus_fgc.per_sample.precision import at_least_float32, factor_norms, product, row_norms
from opacus_fgc.planner import NO_ROOM, NormMethod, Room


class TiledOuter(PerSampleGradient):
    """``gradient[n] = sum_t left[t] (x) right[t]`` over the positions t of a sample, with left sides computed anew in tiles.

    Rows of the gradient are of one token of the vocabulary each, and need its logits alone. So the vocabulary is gone through
    in tiles, sample by sample, each an `Outer` of its own: ``|g|^2`` is the sum of the tiles' squared norms, and the weighted
    sum is written tile by tile. Each pass over the tiles takes one product of the head more than an `Outer`.

    Args:
        left: the gradients by the logits.
        right: shape ``(positions, d)``.
        shape: shape of the parameter, ``V * d`` elements in that order.
    """

    method = NormMethod.TILES

    def __init__(self, left: LogitGradients, right: Tensor, shape: torch.Size) -> None:
        self.left = left
        self.right = right
        self.shape = shape
        self.batch_size = len(left.spans)
        self._left_norms: list[Tensor] | None = None

    @property
    def elements(self) -> int:
        # The activations are in memory anyway, for as long as autograd has use for them.
        return 3 * len(self.right)

    @property
    def _tiles(self) -> list[slice]:
        """The vocabulary in tiles, of which logits and gradients of one sample stay within `planner.Memory.temporary`."""
        tokens = self.left.tokens
        longest = max(self.left.lengths(), default=0)
        tiles = planner.slices(tokens, max(longest, self.right.shape[1], self.left.width))
        return [slice(rows.start, min(rows.stop, tokens)) for rows in tiles]

    def left_tiles(self, sample: int) -> Iterator[tuple[slice, Tensor]]:
        """The left side of one sample: some tokens of the vocabulary at a time, and a tile of shape ``(T, tokens)``."""
        return ((rows, self.left.tile(sample, rows)) for rows in self._tiles)

    def right_of(self, sample: int) -> Tensor:
        """The right side of one sample, shape ``(T, d)``, float32 or wider."""
        return at_least_float32(self.left.of_sample(sample, self.right)).to(self.left.dtype)

    def measured(self, room: Room = NO_ROOM) -> Measured:
        temporary = self._tiles[0].stop * max(max(self.left.lengths(), default=0), self.right.shape[1])
        return super().measured(room)._replace(temporary=temporary)

    def norm(self) -> Tensor:
        norms, self._left_norms = [self.left.log_sums.new_zeros(0)], []
        for n, length in enumerate(self.left.lengths()):
            right, of_tiles, left_of_tiles = self.right_of(n), [], []
            for _, left in self.left_tiles(n) if length else ():
                left_of_tiles.append(row_norms(left))
                shape = torch.Size((left.shape[1], right.shape[1]))
                of_tiles.append(Outer(left.unsqueeze(0), right.unsqueeze(0), shape).norm())
            norms.append(row_norms(torch.cat(of_tiles)).reshape(1) if length else right.new_zeros(1))
            self._left_norms.append(row_norms(torch.stack(left_of_tiles, 1)) if length else right.new_zeros(0))
        return torch.cat(norms)

    @property
    def summands(self) -> int:
        return max(self.left.lengths(), default=0)

    def norm_of_terms(self) -> Tensor:
        if self._left_norms is None:
            self.norm()
        assert self._left_norms is not None
        norms = [self.left.log_sums.new_zeros(0)]
        for n, left in enumerate(self._left_norms):
            terms = factor_norms(left.unsqueeze(1)) * factor_norms(self.left.of_sample(n, self.right))
            norms.append(row_norms(terms.unsqueeze(0)).to(self.left.dtype))
        return torch.cat(norms)

    def _write_sum(self, total: Tensor, sample: int, right: Tensor) -> None:
        for rows, left in self.left_tiles(sample):
            total[rows] += product(left.mT, right, TERMS)

    def weighted_sum(self, coef: Tensor) -> Tensor:
        coef = coef.to(self.left.dtype)
        total = self.left.log_sums.new_zeros(self.left.tokens, self.right.shape[1])
        for n in range(self.batch_size):
            self._write_sum(total, n, coef[n] * self.right_of(n))
        return total.reshape(self.shape)

    def materialize(self) -> Tensor:
        gradients = self.left.log_sums.new_zeros(self.batch_size, self.left.tokens, self.right.shape[1])
        for n, gradient in enumerate(gradients):
            self._write_sum(gradient, n, self.right_of(n))
        return gradients.reshape(self.batch_size, *self.shape)

    def inner(self, other: PerSampleGradient) -> Tensor:
        if not isinstance(other, (Dense, Outer, TiledOuter)):
            return other.inner(self)
        if not self.batch_size:
            return self.left.log_sums.new_zeros(0)
        each = [slice(n, n + 1) for n in range(self.batch_size)]
        return torch.cat([Dense(self.select(one).materialize()).inner(other.select(one)) for one in each])

    @classmethod
    def joined(cls, forms: Sequence[TiledOuter]) -> TiledOuter:
        left = LogitGradients.joined([form.left for form in forms])
        return cls(left, torch.cat([form.right for form in forms]), forms[0].shape)

    def select(self, samples: slice | Tensor) -> TiledOuter:
        return TiledOuter(self.left.select(samples), self.right, self.shape)

    def sum_over_uses(self, uses: int) -> TiledOuter:
        return TiledOuter(self.left.over_uses(uses), self.right, self.shape)
