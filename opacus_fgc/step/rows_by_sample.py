"""Rows that are not the samples in order, dealt out to their samples: as many rows for each, some of them padding.

Padding has a backprop of zero and the activations of a row of the same sample, so that every sampler takes it as it takes any
row, and nothing comes of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opacus_fgc import planner
from opacus_fgc.certificates.batch import Batch
from opacus_fgc.certificates.ownership import Owned
from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.per_sample import PerSampleGradient, sum_over_runs
from opacus_fgc.taps.operation_samplers import Op
from opacus_fgc.taps.tap import Call, Use

# Samples are in one group if the most rows of one are not so many times those of another, but for the last group.
_FEW_TIMES, _GROUPS = 1.5, 4


class _Group:
    """Uses that are one when their rows are put together: calls of the same on rows of the same shape."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.activations: list[list[Tensor]] = []
        self.backprops: list[tuple[Tensor, ...]] = []
        self.samples: list[Tensor] = []
        self.owned: list[Owned | None] = []

    def owners(self) -> Tensor:
        """The sample of each row, shape ``(rows,)``."""
        return self.samples[0] if len(self.samples) == 1 else torch.cat(self.samples)

    @property
    def is_of_operation(self) -> bool:
        """Whether these are uses of an operation, and not of a layer."""
        return isinstance(self.calls[0].fingerprint, Op)


class Dealt(NamedTuple):
    """Uses of a layer by some of the samples.

    Attributes:
        samples: which samples these are, ascending.
        uses: the uses, on ``len(samples) * rows`` rows, so many for each sample.
        rows: how many.
        counts: how many rows each sample has, where these are not as many, one sample's after another's; else None.
    """

    samples: Tensor
    uses: Sequence[Use]
    rows: int
    counts: Tensor | None = None

    def form_of(self, form: PerSampleGradient) -> PerSampleGradient:
        """The form of these samples, from one of all their rows."""
        if self.counts is not None:
            return sum_over_runs(form, self.counts)
        several = self.rows > 1 and form.batch_size == len(self.samples) * self.rows
        return form.sum_over_uses(self.rows) if several else form


def dealt_out(uses: Sequence[Use], owned: Mapping[Any, Owned], batch: Batch, by_row: bool) -> list[Dealt]:
    """Uses of a layer whose rows are dealt out to the samples, in groups of samples with about as many rows.

    Args:
        uses: all uses of the layer in a backward pass.
        owned: the owners of the rows of some calls, by `Call.key`; those of the others are the samples in order.
        batch: which samples the rows of the batch are of.
        by_row: whether the layer's sampler may be given each row as if it were a sample.

    Returns:
        The groups; together they have each sample once.

    Raises:
        NotImplementedError: if rows of such a layer cannot be taken apart.
    """
    groups: dict[Any, _Group] = {}
    size = batch.size
    for call, backprops in uses:
        found = owned.get(call.key)
        rows = backprops[0].shape[call.batch_axis]
        samples = batch.owners(rows, call.key.samples) if found is None else found.samples
        if samples is None or (call.key.samples is not None and batch.unit is None):
            raise PrivacyNotImplementedError(
                f"it was called on rows of the samples in an order of their own, and on {rows} rows for {size} samples besides. "
                "Call another layer for one of them"
            )
        positions = found is not None and found.by_position
        if positions and backprops[0].shape[:2].numel() != len(samples):
            raise PrivacyNotImplementedError(
                f"it was called on {tuple(backprops[0].shape[:2])} positions, and the packed samples have {len(samples)}"
            )
        activations = [_rows(tensor, call, positions, len(samples)) for tensor in call.activations]
        backprops = tuple(_rows(tensor, call, positions, len(samples)) for tensor in backprops)
        fingerprint = call.fingerprint
        if positions and (
            isinstance(fingerprint, Tensor) or (isinstance(fingerprint, Op) and fingerprint.norms is not None)
        ):
            raise PrivacyNotImplementedError(
                "its rows hold several samples each, and it has no norm sampler, so that it cannot be repeated on one sample at "
                "a time. Register a norm sampler for it (opacus_fgc.register_norm_sampler), or give each sample a row of its own"
            )
        shapes = [(tensor.shape[1:], tensor.dtype) for tensor in (*activations, *backprops)]
        # Of an operation each use may be one on another tensor, such as an expert's part of a parameter.
        alone = (
            fingerprint is not None
            or any(len(tensor) != len(samples) for tensor in activations)
            or call.has_other_arguments
        )
        group = groups.setdefault((str(shapes), id(call) if alone else None), _Group())
        group.calls.append(call)
        group.activations.append(activations)
        group.backprops.append(backprops)
        group.samples.append(samples)
        group.owned.append(found)
    if by_row and len(groups) == 1:
        (group,) = groups.values()
        if not group.is_of_operation and (group.owners() >= 0).any() and planner.runs_pay(size, len(group.owners())):
            return [_in_runs(group, size)]
    counts = {key: _counts(torch.cat(group.samples), size) for key, group in groups.items()}
    return [
        _dealt(groups, {key: int(count[samples].amax().clamp(min=1)) for key, count in counts.items()}, samples, size)
        for samples in _alike(torch.stack(list(counts.values())).sum(0))
    ]


def _alike(counts: Tensor) -> list[Tensor]:
    """Groups of samples with about as many rows, so that little of them is padding; ascending, together all samples."""
    everyone, most = torch.arange(len(counts), device="cpu"), int(counts.amax().clamp(min=1))
    if len(counts) * most <= _FEW_TIMES * int(counts.sum()):
        return [everyone]
    level = (
        (math.log(most) - counts.clamp(min=1).double().log()).div(math.log(_FEW_TIMES)).long().clamp(max=_GROUPS - 1)
    )
    return [everyone[level == one] for one in level.unique().tolist()]


def _dealt(groups: Mapping[Any, _Group], most: Mapping[Any, int], samples: Tensor, size: int) -> Dealt:
    # Operations add up their uses themselves; other samplers take uses of one number of rows.
    several = {key: most[key] if group.is_of_operation else max(most.values()) for key, group in groups.items()}
    rows = 1 if any(group.is_of_operation for group in groups.values()) else max(most.values())
    return Dealt(samples, [_padded(group, samples, size, several[key]) for key, group in groups.items()], rows)


def _in_runs(group: _Group, size: int) -> Dealt:
    """One use by all samples, with the rows of one after those of another."""
    samples = group.owners()
    order = None
    if (samples < 0).any() or (samples.diff() < 0).any():
        order = samples.argsort(stable=True)[int((samples < 0).sum()) :]

    def in_order(parts: Sequence[Tensor]) -> Tensor:
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return whole if order is None or len(whole) != len(samples) else whole.index_select(0, order.to(whole.device))

    call = group.calls[0].with_activations([in_order(parts) for parts in zip(*group.activations, strict=True)])
    call.batch_axis, call.places = 0, None
    backprops = tuple(in_order(parts) for parts in zip(*group.backprops, strict=True))
    everyone = torch.arange(size, device="cpu")
    return Dealt(everyone, [Use(call, backprops)], 1, _counts(samples, size))


def _rows(tensor: Tensor, call: Call, positions: bool, count: int) -> Tensor:
    """A tensor of a call with its rows first; as it is if it has none."""
    if positions:
        return tensor.flatten(0, 1) if tensor.dim() > 1 and tensor.shape[0] * tensor.shape[1] == count else tensor
    axis = call.batch_axis
    return tensor.movedim(axis, 0) if tensor.dim() > axis and tensor.shape[axis] == count else tensor


def _counts(samples: Tensor, size: int) -> Tensor:
    return torch.bincount(samples[samples >= 0], minlength=size)


class _Places(NamedTuple):
    """Where rows go.

    Attributes:
        rows: which row is in each place, shape ``(samples * rows,)``.
        padding: which places are padding.
        absent: which places are those of samples without a row; None if each has one.
    """

    rows: Tensor
    padding: Tensor
    absent: Tensor | None


def _places(samples: Tensor, chosen: Tensor, size: int, most: int) -> _Places | None:
    """Where the rows of some samples go, with ``most`` for each; None if they have none."""
    # The last number is that of rows which are nobody's.
    numbers = torch.full((size + 1,), -1, device="cpu").index_copy(0, chosen, torch.arange(len(chosen), device="cpu"))
    samples = numbers[samples]
    order = samples.argsort(stable=True)[int((samples < 0).sum()) :]
    if not len(order):
        return None
    counts, own = _counts(samples, len(chosen)), samples[order]
    starts = counts.cumsum(0) - counts
    places = own * most + torch.arange(len(order), device="cpu") - starts[own]
    index = order[starts.clamp(max=len(order) - 1)].repeat_interleave(most).index_copy(0, places, order)
    padding = torch.ones(len(index), dtype=torch.bool, device="cpu").index_fill(0, places, False)
    return _Places(index, padding, (counts == 0).repeat_interleave(most) if (counts == 0).any() else None)


def _padded(group: _Group, chosen: Tensor, size: int, most: int) -> Use:
    """One use by some of the samples, with ``most`` rows for each."""
    call, samples = group.calls[0], torch.cat(group.samples)
    key = tuple(chosen.tolist()), most
    # Layers of packed samples have one and the same owners.
    known = group.owned[0].places if len(group.owned) == 1 and group.owned[0] is not None else {}
    if key not in known:
        known[key] = _places(samples, chosen, size, most)
    places: _Places | None = known[key]

    def of_chosen(parts: Sequence[Tensor], zeros: Tensor | None) -> Tensor:
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        if len(whole) != len(samples):
            return whole
        if places is None:
            return whole.new_zeros(len(chosen) * most, *whole.shape[1:])
        rows = whole.index_select(0, places.rows.to(whole.device))
        # A row of another sample would be one whose inf or NaN comes to this one.
        return rows if zeros is None else rows.masked_fill_(zeros.to(rows.device).view(-1, *[1] * (rows.dim() - 1)), 0)

    absent, padding = (None, None) if places is None else (places.absent, places.padding)
    activations = [of_chosen(parts, absent) for parts in zip(*group.activations, strict=True)]
    backprops = tuple(of_chosen(parts, padding) for parts in zip(*group.backprops, strict=True))
    dealt = call.with_activations(activations)
    dealt.batch_axis, dealt.places, dealt.rows_of_a_sample = 0, None, most
    if isinstance(call.fingerprint, Tensor):
        dealt.fingerprint = of_chosen([call.fingerprint.mT], absent).mT
    elif isinstance(call.fingerprint, Op) and call.fingerprint.norms is not None:
        dealt.fingerprint = call.fingerprint._replace(norms=of_chosen([call.fingerprint.norms.mT], absent).mT)
    return Use(dealt, backprops)
