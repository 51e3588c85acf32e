"""Gradients that touch few rows of a table: those of embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opacus_fgc import planner
from opacus_fgc.per_sample.base import PerSampleGradient
from opacus_fgc.per_sample.outer import Outer
from opacus_fgc.per_sample.precision import at_least_float32, row_norms, widest
from opacus_fgc.per_sample.tiled_outer import TiledOuter
from opacus_fgc.planner import NormMethod


class Rows(PerSampleGradient):
    """Gradients that touch few rows of a table: ``gradient[n, index[n, s]] += values[n, s]``.

    Args:
        index: rows, shape ``(N, S)``, int.
        values: what is added to them, shape ``(N, S, *)``.
        shape: shape of the parameter, ``(rows, *)``.
    """

    method = NormMethod.ROWS

    def __init__(self, index: Tensor, values: Tensor, shape: torch.Size) -> None:
        self.index = index.long()
        self.values = values.reshape(*index.shape, shape[1:].numel())
        self.shape = shape
        self.batch_size = len(values)

    @property
    def elements(self) -> int:
        return self.values.numel()

    def norm(self) -> Tensor:
        return self.above_rounding(
            self._norms(torch.arange(self.batch_size, device=self.index.device), self.batch_size)
        )

    def norm_of_runs(self, counts: Tensor) -> Tensor | None:
        if self.rounds:
            return None
        counts = counts.to(self.index.device)
        samples = torch.arange(len(counts), device=counts.device)
        return self._norms(samples.repeat_interleave(counts, output_size=self.batch_size), len(counts))

    def _norms(self, samples: Tensor, size: int) -> Tensor:
        # Row r of sample n is row n * rows + r of one table, of which only the rows in use are kept: the first some of these, in
        # their order. How many they are is not asked, since a GPU would have to be waited for.
        keys = (self.index + samples.unsqueeze(1) * self.shape[0]).flatten()
        ordered, order = keys.sort(stable=True)
        starts = torch.cat([ordered[:1] * 0, (ordered[1:] != ordered[:-1]).long()])
        of_ordered = starts.cumsum(0)
        values = at_least_float32(self.values).flatten(0, 1)
        table = torch.zeros_like(values)
        table.index_add_(0, torch.empty_like(order).scatter_(0, order, of_ordered), values)
        norms = row_norms(table)
        owners = torch.zeros_like(order).scatter_(0, of_ordered, ordered // self.shape[0])
        squares = widest(norms).square()
        squares = squares.new_zeros(size).index_add_(0, owners, squares)
        return squares.sqrt().to(norms.dtype)

    @property
    def summands(self) -> int:
        return self.values.shape[1]

    def norm_of_terms(self) -> Tensor:
        return row_norms(at_least_float32(self.values).flatten(1))

    def weighted_sum(self, coef: Tensor) -> Tensor:
        values = at_least_float32(self.values)
        values = values * coef.to(values.dtype.to_real())[:, None, None]
        total = values.new_zeros(self.shape[0], values.shape[2])
        return total.index_add_(0, self.index.flatten(), values.flatten(0, 1)).reshape(self.shape)

    def materialize(self) -> Tensor:
        values = at_least_float32(self.values)
        gradients = values.new_zeros(self.batch_size, self.shape[0], values.shape[2])
        gradients.scatter_add_(1, self.index.unsqueeze(2).expand_as(values), values)
        return gradients.reshape(self.batch_size, *self.shape)

    def inner(self, other: PerSampleGradient) -> Tensor:
        values = at_least_float32(self.values)
        if isinstance(other, Outer) and len(self.shape) == 2:
            # The head's gradient at the embedding's rows: left[:, t, index[s]] * <right_t, values_s>.
            left, right = at_least_float32(other.left.squeeze(1)), at_least_float32(other.right.squeeze(1))
            index = self.index.unsqueeze(1).expand(-1, left.shape[1], -1)
            return (left.gather(2, index) * (right @ values.mH)).sum((1, 2)).real
        if isinstance(other, TiledOuter) and len(self.shape) == 2:
            return self._inner_of_tiles(other, values)
        dense = at_least_float32(other.materialize()).reshape(self.batch_size, self.shape[0], values.shape[2])
        return (dense.gather(1, self.index.unsqueeze(2).expand_as(values)) * values.conj()).sum((1, 2)).real

    def _inner_of_tiles(self, other: TiledOuter, values: Tensor) -> Tensor:
        """As of the head's gradient, tile by tile: other products would round the logits otherwise than its norm has them."""
        inner = torch.zeros(self.batch_size, dtype=other.left.dtype, device=values.device)
        for n in range(self.batch_size):
            right = other.right_of(n)
            for rows, left in other.left_tiles(n):
                within = (self.index[n] >= rows.start) & (self.index[n] < rows.stop)
                columns, of_rows = self.index[n, within] - rows.start, values[n, within].to(right.dtype)
                for some in planner.slices(len(columns), max(1, len(right))):
                    inner[n] += (left[:, columns[some]] * (right @ of_rows[some].mT)).sum()
        return inner

    @classmethod
    def joined(cls, forms: Sequence[Rows]) -> Rows:
        index, values = torch.cat([form.index for form in forms], 1), torch.cat([form.values for form in forms], 1)
        return cls(index, values, forms[0].shape)

    def select(self, samples: slice | Tensor) -> Rows:
        return Rows(self.index[samples], self.values[samples], self.shape)

    def sum_over_uses(self, uses: int) -> Rows:
        index, values = (side.unflatten(0, (-1, uses)).flatten(1, 2) for side in (self.index, self.values))
        return Rows(index, values, self.shape)
