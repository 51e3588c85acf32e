"""What two forwards do to the same samples, compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opacus_fgc.certificates.observations import Forward, Seen
from opacus_fgc.certificates.ownership import Owned
from opacus_fgc.certificates.samples import Replacement
from opacus_fgc.certificates.sketch import differ, rounded

_AT_ONCE = 2**22


@dataclass(frozen=True)
class Comparison:
    """Compares a forward with one in which some samples were replaced.

    Rows that are the samples in order are compared place by place. Of layers whose rows are not, as of experts that tokens are
    routed to, any number of rows may come: there all rows of samples that were not replaced have to be among those of the other
    forward.

    Args:
        certified: of which layers the rows count: those that the loss depends on.
        dealt_out: the layers whose rows are not the samples in order.
        owned: whose the rows of their calls are, by layer and number of the call.
    """

    certified: Callable[[Any], bool]
    dealt_out: Collection[Any]
    owned: Mapping[tuple[Any, int], Owned]

    def structure(self, forward: Forward) -> list[Any]:
        """The layers that a forward called, and on what shapes."""
        seen = self._in_order(forward)
        samples = [None if one.samples is None else tuple(one.samples.tolist()) for one in seen]
        return [(one.key, one.shape, order) for one, order in zip(seen, samples, strict=True)]

    def with_routed(self, first: Forward, other: Forward) -> Comparison:
        """The same with those layers among `dealt_out` that two forwards call on other numbers of rows, or one not at all."""
        shapes: tuple[dict[Any, list[torch.Size]], ...] = ({}, {})
        for forward, of_keys in zip((first, other), shapes, strict=True):
            for one in forward.seen:
                # Of packed samples it is known which ones are there.
                if one.key is not None and one.samples is None:
                    of_keys.setdefault(one.key, []).append(one.shape)
        first_shapes, other_shapes = shapes
        routed = {
            key
            for key in first_shapes.keys() | other_shapes.keys()
            if first_shapes.get(key) != other_shapes.get(key) and _differ_by_rows(first_shapes, other_shapes, key)
        }
        return replace(self, dealt_out={*self.dealt_out, *routed}) if routed else self

    def changed(
        self, first: Forward, other: Forward, replacement: Replacement, noise: list[list[Tensor]] | None = None
    ) -> list[Seen]:
        """What is not the same for samples that were not replaced.

        Args:
            first: the forward without replacement.
            other: the forward with it.
            replacement: the replacement.
            noise: how much of a difference is none, for each tensor and axis; see `differences` and `rounding`.
        """
        if noise is None and self.dealt_out:
            # Other numbers of rows are computed in other groups, which round otherwise.
            noise = self.rounding(first)
        result = []
        for place, (one, two) in enumerate(zip(self._in_order(first), self._in_order(other), strict=True)):
            if one.key is not None and not self.certified(one.key):
                continue
            # Of what a model returns any axis may count the samples.
            wrong = [
                _kept_rows_differ(a, b, replacement, one.samples, None if noise is None else noise[place][axis])
                for axis, (a, b) in enumerate(zip(one.sketches, two.sketches, strict=True))
                if one.key is not None or one.samples is not None or len(a) == replacement.batch.rows
            ]
            if wrong and all(wrong):
                result.append(one)
        return result + self._missing(first, other, replacement)

    def differences(self, first: Forward, others: Sequence[Forward]) -> list[list[Tensor]]:
        """By how much forwards that should be the same differ, for each tensor, axis and column; and rounding if they do."""
        in_order, several = self._in_order(first), list(map(self._in_order, others))
        differences = [
            [
                torch.stack([(a - other[place].sketches[axis]).nan_to_num().abs() for other in several])
                .amax(0)
                .amax(0, keepdim=True)
                if len(a)
                else a
                for axis, a in enumerate(one.sketches)
            ]
            for place, one in enumerate(in_order)
        ]
        if not any(bool(difference.any()) for of_one in differences for difference in of_one):
            return differences
        return [
            [difference + rounded(a) / 8 if len(a) else a for difference, a in zip(of_one, one.sketches, strict=True)]
            for of_one, one in zip(differences, in_order, strict=True)
        ]

    def rounding(self, forward: Forward) -> list[list[Tensor]]:
        """What other kernels may make of rows, for each tensor and axis."""
        return [[_rounding(one, rows) for rows in one.sketches] for one in self._in_order(forward)]

    def _in_order(self, forward: Forward) -> list[Seen]:
        return [one for one in forward.seen if one.key not in self.dealt_out] if self.dealt_out else forward.seen

    def _missing(self, first: Forward, other: Forward, replacement: Replacement) -> list[Seen]:
        """Tensors of layers whose rows are not in order, of which a row is missing of a sample that was not replaced."""
        there: dict[tuple[Any, int], list[Tensor]] = {}
        in_place: dict[tuple[Any, int, int], list[Tensor]] = {}
        for one in other.seen:
            if one.key in self.dealt_out:
                there.setdefault((one.key, one.place), []).extend(one.sketches)
                in_place[one.key, one.call, one.place] = one.sketches
        chosen = torch.tensor(replacement.chosen, device="cpu")
        result = []
        for one in first.seen:
            if one.key not in self.dealt_out or not self.certified(one.key):
                continue
            for axis, rows in enumerate(one.sketches):
                found = self.owned.get((one.key, one.call))
                samples = replacement.batch.owners(len(rows)) if found is None else found.samples
                if samples is None or len(samples) != len(rows):
                    # Rows that no loss depends on, and what has no rows.
                    continue
                kept = ((samples >= 0) & ~torch.isin(samples, chosen)).to(rows.device)
                same = in_place.get((one.key, one.call, one.place), [])
                if axis < len(same) and len(same[axis]) == len(rows):
                    # Most often they are where they were.
                    kept &= ~_is_as(rows, same[axis], _rounding(one, rows))
                among = torch.cat([rows[:0], *there.get((one.key, one.place), [])])
                if kept.any() and not _are_among(rows[kept], among, _rounding(one, rows[kept])):
                    result.append(one)
        return result


def _differ_by_rows(first: dict[Any, list[torch.Size]], other: dict[Any, list[torch.Size]], key: Any) -> bool:
    if key not in first or key not in other:
        return True
    return {shape[1:] for shape in first[key]} == {shape[1:] for shape in other[key]}


def _rounding(one: Seen, rows: Tensor) -> Tensor:
    return 2**6 * one.eps * rows[:, 2:].nan_to_num()


def _is_as(rows: Tensor, others: Tensor, allowed: Tensor) -> Tensor:
    """Which rows are the others in the same places, but for rounding."""
    return ((rows.nan_to_num() - others.nan_to_num()).abs() <= allowed).all(-1)


def _are_among(rows: Tensor, others: Tensor, allowed: Tensor) -> bool:
    """Whether each row is, but for rounding, one of some others."""
    at_once = max(1, _AT_ONCE // max(1, len(others)))
    for part, tolerance in zip(rows.split(at_once), allowed.split(at_once), strict=True):
        if not _is_as(part[:, None], others, tolerance[:, None]).any(1).all():
            return False
    return True


def _kept_rows_differ(
    first: Tensor, second: Tensor, replacement: Replacement, samples: Tensor | None, noise: Tensor | None
) -> bool:
    expected = replacement.batch.owners(len(first), samples)
    if expected is None and len(first) != 1:
        # Nobody knows whose these rows are; backward refuses them.
        return False
    # One row is shared by the batch.
    chosen = torch.tensor(replacement.chosen, device="cpu")
    kept = torch.ones(1, dtype=torch.bool, device="cpu") if expected is None else ~torch.isin(expected, chosen)
    kept = kept.to(first.device)
    a, b = first[kept], second[kept]
    different = differ(a, b)
    if noise is not None:
        allowed = noise[kept] if len(noise) == len(first) else noise
        different &= ((a - b).nan_to_num().abs() > 8 * allowed).any(1)
    return bool(different.any())
