"""The backward certificate: whose each row is that a tap sees.

Losses are weighted with powers of two, one for each sample. Backward is linear, so that a row of one sample is multiplied by its
power, to the bit, and a row of several by none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opacus_fgc.certificates.backprops import EXPONENTS, FEW_EXPONENTS, Backprops, Output, draws_that_tell
from opacus_fgc.certificates.batch import Batch
from opacus_fgc.certificates.noise import Noise, is_beyond, noise_of
from opacus_fgc.certificates.ownership_errors import owner_error
from opacus_fgc.certificates.sketch import REPEATS, differ, raise_on_all_ranks

Pass = Callable[[Tensor], Backprops]
"""A backward pass to the taps under loss weights, shape ``(N,)``."""


@dataclass(frozen=True, eq=False)
class Owned:
    """Whose the rows of a call are.

    Attributes:
        samples: the sample of each row, shape ``(rows,)``, on the CPU; -1 for rows without a gradient.
        by_position: whether each position of the first two axes is a row, or each place along the batch axis.
        places: where they go when they are dealt out, kept for other calls with the same owners; see `step.rows_by_sample`.
    """

    samples: Tensor
    by_position: bool
    places: dict[Any, Any] = field(default_factory=dict)

    def is_in_order(self, size: int) -> bool:
        """Whether the rows follow each other as the samples do: any number for each, or all samples over and over.

        Args:
            size: number of samples.
        """
        own, rows = self.samples >= 0, torch.arange(len(self.samples), device="cpu")
        several, left = divmod(len(rows), size) if size else (0, 1)
        if several and not left and (torch.bincount(self.samples[own], minlength=size) <= several).all():
            expected = (rows // several, rows % size)
            return any(torch.equal(self.samples[own], samples[own]) for samples in expected)
        return bool((self.samples[own].diff() >= 0).all())


class _Evidence(NamedTuple):
    """Backward passes of the same losses under several weights.

    Attributes:
        draws: the weights, shape ``(N,)`` each.
        plain: what the taps were shown under ones.
        weighted: what they were shown under each draw.
        noises: by how much such passes differ, under ones and under each draw; None if they are compared to the bit.
        lost: a sample whose loss is inf or NaN, to which rows of such gradients are taken to belong; None if there is none.
    """

    draws: list[Tensor]
    plain: Backprops
    weighted: list[Backprops]
    noises: tuple[Noise, list[Noise]] | None = None
    lost: int | None = None

    def differs(self, key: Output, expected: Tensor) -> Tensor:
        """In which rows of an output something else came than a sample's gradient times its weight; shape ``(rows,)``.

        Args:
            key: the output.
            expected: the sample of each row.
        """
        of_ones = self.plain.sketches[key]
        bad = torch.zeros(len(of_ones), dtype=torch.bool, device="cpu")
        for place, (draw, one) in enumerate(zip(self.draws, self.weighted, strict=True)):
            factor = draw[expected].to(of_ones)[:, None]
            wanted, got = of_ones * factor, one.sketches.get(key, torch.zeros_like(of_ones))
            wrong = differ(wanted, got)
            if self.noises is not None:
                allowed = self.noises[0].allowed(key, of_ones) * factor + self.noises[1][place].allowed(key, got)
                wrong &= is_beyond(got - wanted, wanted, self.plain.half, allowed)
            bad |= wrong.cpu()
        return bad

    def without_gradient(self, key: Output) -> Tensor:
        """In which rows of an output nothing came; shape ``(rows,)``."""
        several = [one.sketches.get(key) for one in (self.plain, *self.weighted)]
        return torch.stack([one[:, 2].cpu() == 0 for one in several if one is not None]).all(0)


@dataclass(eq=False)
class OwnerSearch:
    """Proves that each row that a tap sees belongs to one sample, and finds out to which where it is not the one in its place.

    Attributes:
        batch: which samples the rows of the batch are of.
        draw: gives so many weights with some exponents; see `backprops.weights`.
        run: runs a backward pass.
        by_position: the layers of which each position is a row; those that are found to be such are added.
        packed: whether a row may hold several samples, one after another.
        lost: a sample whose loss is inf or NaN, whose gradients tell nothing; None if there is none.
        describe: what to call a call's layer in errors.
        on_all_ranks: whether something holds on all ranks that have to run as many passes as each other.
        idle: the owners of the rows of those calls whose rows are in order, and some have no gradient.
    """

    batch: Batch
    draw: Callable[[int, Sequence[int]], list[Tensor]]
    run: Pass
    by_position: set[Any]
    packed: bool
    lost: int | None
    describe: Callable[[Any], str]
    on_all_ranks: Callable[[bool], bool]
    idle: dict[Any, Owned] = field(default_factory=dict)

    def find(self, draws: int, plain: Backprops | None) -> dict[Any, Owned]:
        """Finds the owners.

        Args:
            draws: how many draws of weights to begin with.
            plain: what came of a pass under ones, if there was one.

        Returns:
            The owners of the rows of those calls whose rows are not the samples in order, or as many for each; by `Call.key`.

        Raises:
            NotImplementedError: if a row belongs to several samples, or has a gradient that is not linear in the loss.
            ValueError: if there are more losses than rows.
        """
        first = self._evidence(draws, self._under_ones() if plain is None else plain)
        owned, left = self._found(first)
        if self.on_all_ranks(not left):
            return owned
        # Perhaps positions are rows, or the weights did not tell all samples apart.
        several_axes = {key.call.layer for key, _ in left if self.packed and first.plain.dims[key] > 2}
        several_axes -= self.by_position
        self.by_position |= several_axes
        owned, still_left = self._found(self._evidence(draws_that_tell(self.batch.size), self._under_ones()))
        if self.on_all_ranks(not still_left):
            return owned
        self.by_position -= several_axes
        # Kernels that are not deterministic, and numbers too small to be rounded as others are, do not tell.
        noise = noise_of(first.plain, [self._under_ones() for _ in range(REPEATS)])
        noises = [
            noise_of(one, [self.run(weights) for _ in range(REPEATS)])
            for one, weights in zip(first.weighted, first.draws, strict=True)
        ]
        owned, left = self._found(first._replace(noises=(noise, noises)))
        eights = self._under_ones(8.0)
        error = None
        if left:
            key, row = left[0]
            error = owner_error(self.batch.size, first.plain, eights, noise, key, row, self.describe(key.call))
        raise_on_all_ranks(error, self.on_all_ranks)
        return owned

    def _under_ones(self, factor: float = 1.0) -> Backprops:
        return self.run(factor * torch.ones(self.batch.size, dtype=torch.float64, device="cpu"))

    def _evidence(self, count: int, plain: Backprops) -> _Evidence:
        draws = self.draw(count, FEW_EXPONENTS if plain.half else EXPONENTS)
        return _Evidence(draws, plain, [self.run(weights) for weights in draws], lost=self.lost)

    def _found(self, evidence: _Evidence) -> tuple[dict[Any, Owned], list[tuple[Output, int]]]:
        """The owners of calls whose rows are not the samples in order; and the outputs of which a row has not one owner."""
        found: dict[Any, Owned] = {}
        left: list[tuple[Output, int]] = []
        without: dict[Any, Any] = {}
        out_of_order = {
            key for key, of_ones in evidence.plain.sketches.items() if not _is_in_order(self.batch, evidence, key)
        }
        # What passes for rows in order may be rows without a gradient.
        layers = {key.call.layer for key in out_of_order}
        for key in evidence.plain.sketches:
            positions = key.call.layer in self.by_position and evidence.plain.dims[key] > 2
            if not positions and (key.call.layer not in layers or key.call.samples is not None):
                # Of packed samples the order is known, and has to be that one.
                if key in out_of_order:
                    left.append((key, 0))
                elif key.call.samples is None:
                    nothing = evidence.without_gradient(key)
                    # A row is idle where all outputs of the call are.
                    without[key.call] = without.get(key.call, True) & nothing
                continue
            samples = _owners_by_ratio(evidence, key)
            of_others = found.get(key.call)
            if of_others is not None:
                samples = torch.where(samples == -1, of_others.samples, samples)
            wrong = ((samples < -1) | _disagree(samples, of_others)).nonzero().flatten()
            if len(wrong):
                left.append((key, int(wrong[0])))
            else:
                found[key.call] = Owned(samples, positions)
        for call, nothing in without.items():
            expected = self.batch.owners(len(nothing))
            if expected is not None and nothing.any():
                self.idle[call] = Owned(torch.where(nothing, torch.full_like(expected, -1), expected), False)
        return _with_last_positions(found), left


def _is_in_order(batch: Batch, evidence: _Evidence, key: Output) -> bool:
    """Whether the rows of an output are the samples in order, as many for each, or as packed samples are known to be."""
    expected = batch.owners(len(evidence.plain.sketches[key]), key.call.samples)
    return expected is not None and not evidence.differs(key, expected).any()


def _with_last_positions(found: dict[Any, Owned]) -> dict[Any, Owned]:
    """The same, in which positions without a gradient in some layers, as the last ones have, are whose they are in others."""
    positions: dict[int, list[Tensor]] = {}
    for one in found.values():
        if one.by_position:
            positions.setdefault(len(one.samples), []).append(one.samples)
    every = {rows: Owned(torch.stack(several).amax(0), True) for rows, several in positions.items()}
    return {
        call: every[len(one.samples)] if one.by_position and _agree(one, every[len(one.samples)]) else one
        for call, one in found.items()
    }


def _agree(one: Owned, every: Owned) -> bool:
    return not ((one.samples >= 0) & (one.samples != every.samples)).any()


def _disagree(samples: Tensor, of_others: Owned | None) -> Tensor:
    """In which rows another output of the same call has another owner."""
    if of_others is None:
        return torch.zeros(len(samples), dtype=torch.bool, device="cpu")
    return (of_others.samples >= 0) & (samples != of_others.samples)


def _owners_by_ratio(evidence: _Evidence, key: Output) -> Tensor:
    """The sample of each row of an output by how its gradient is multiplied; -1 for rows of zeros, -2 where there is not one."""
    of_ones = evidence.plain.sketches[key].cpu()
    several = [one.sketches.get(key, torch.zeros_like(of_ones)).cpu() for one in evidence.weighted]
    exponents = [torch.log2(one[:, 2].double() / of_ones[:, 2].double()).round() for one in several]
    known = _code([torch.log2(draw) for draw in evidence.draws])
    order = known.argsort()
    code = _code([exponent.nan_to_num(nan=99.0, posinf=99.0, neginf=99.0) for exponent in exponents])
    place = torch.searchsorted(known[order], code).clamp(max=len(known) - 1)
    samples = order[place]
    several_have_it = torch.isin(code, known[order][1:][known[order].diff() == 0])
    wrong = (known[samples] != code) | several_have_it | evidence.differs(key, samples)
    samples = torch.where(wrong, torch.full_like(samples, -2), samples)
    if evidence.lost is not None:
        finite = torch.stack([one[:, 2].isfinite() for one in (of_ones, *several)]).all(0)
        samples = torch.where(finite, samples, torch.full_like(samples, evidence.lost))
    return torch.where(evidence.without_gradient(key), torch.full_like(samples, -1), samples)


def _code(exponents: Iterable[Tensor]) -> Tensor:
    """One number for the exponents of several draws."""
    code = torch.zeros((), dtype=torch.int64, device="cpu")
    for exponent in exponents:
        code = 256 * code + exponent.clamp(-100, 100).long() + 128
    return code
