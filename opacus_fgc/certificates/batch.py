"""Which samples the rows of a batch are of, as the criterion was told."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch, of whose samples each has one loss.

    Attributes:
        size: number of samples.
        unit: which of them each row of the batch is of, shape ``(rows,)``, on the CPU, where a sample is a unit of several
            records; None if each row is a sample.
        packed: of packed sequences, which sample each position of the single row is of, shape ``(T,)``; else None.
    """

    size: int
    unit: Tensor | None = None
    packed: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of rows that the model is called on."""
        return self.size if self.unit is None else len(self.unit)

    @cached_property
    def is_regular(self) -> bool:
        """Whether each sample has as many rows as the others, one after another."""
        return self.unit is None or (
            self.size > 0 and not self.rows % self.size and torch.equal(self.unit, _regular(self.rows, self.size))
        )

    def owners(self, rows: int, places: Tensor | None = None) -> Tensor | None:
        """Which sample each of some rows is taken to be of; None if there is no saying.

        Args:
            rows: how many rows there are.
            places: which rows of the batch the first ones are, where these are not all of them.
        """
        if places is not None:
            places = places[:rows].cpu()
            return places if self.unit is None else self.unit[places]
        if self.rows == 0 or rows % self.rows:
            return None
        several = rows // self.rows
        return _regular(rows, self.size) if self.unit is None else self.unit.repeat_interleave(several)

    def is_as(self, other: Batch) -> bool:
        """Whether another batch has the same samples in the same places."""
        pairs = ((self.unit, other.unit), (self.packed, other.packed))
        return self.size == other.size and all(
            one is two or (one is not None and two is not None and torch.equal(one, two)) for one, two in pairs
        )


def _regular(rows: int, size: int) -> Tensor:
    return torch.arange(size, device="cpu").repeat_interleave(rows // size)


def unit_numbers(unit: Any, rows: int) -> Tensor:
    """Numbers the units of a batch in the order in which they come.

    Args:
        unit: the unit of each row: a tensor of whole numbers, shape ``(rows,)``, or hashable values.
        rows: how many rows there are.

    Returns:
        Numbers from 0 on, int64 of shape ``(rows,)``, on the CPU.

    Raises:
        ValueError: if there is not one unit a row.
    """
    if isinstance(unit, Tensor) and (unit.dim() != 1 or unit.is_floating_point() or unit.is_complex()):
        raise ValueError(
            f"unit is a tensor of shape {tuple(unit.shape)} and {unit.dtype}; it is one whole number a record, shape ({rows},)"
        )
    numbers: dict[Hashable, int] = {}
    result = [numbers.setdefault(value, len(numbers)) for value in values_of(unit)]
    if len(result) != rows:
        raise ValueError(f"unit has {len(result)} values, and there are {rows} losses; it is one value a record")
    return torch.tensor(result, dtype=torch.int64, device="cpu")


def values_of(unit: Any) -> Iterable[Hashable]:
    """Units as hashable values, whether they are in a tensor, an array or any iterable."""
    return unit.tolist() if hasattr(unit, "tolist") else unit
