"""Samples in whatever a model is called with: how many there are, and the same batch with some of them replaced."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from opacus_fgc.certificates.batch import Batch
from opacus_fgc.certificates.ownership import Owned

_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.Size,
    range,
    slice,
)
Change = Callable[[str, Any], Any]
"""Called with the path and the value of a tensor, a packed sequence, or a list; gives what comes in its place, or `UNCHANGED`."""

UNCHANGED = object()


def mapped(
    tree: Any, change: Change, path: str = "", opaque: set[str] | None = None, around: frozenset[int] = frozenset()
) -> Any:
    """A copy of any nesting with other tensors in it: of tuples, lists, mappings, and objects with attributes.

    Args:
        tree: the nesting. It is not changed.
        change: says what comes in the place of a tensor, a packed sequence or a whole list; see `Change`.
        path: what to call ``tree``.
        opaque: the paths of what cannot be looked into are added to it.
        around: what ``tree`` is in, by id, for objects that are in themselves.
    """
    if id(tree) in around:
        return tree
    around = around | {id(tree)}
    if isinstance(tree, (Tensor, PackedSequence)):
        new = change(path, tree)
        return tree if new is UNCHANGED else new
    if isinstance(tree, _PLAIN) or tree is None:
        return tree
    if isinstance(tree, (list, tuple)):
        new = change(path, tree)
        if new is not UNCHANGED:
            return new
        values = [mapped(value, change, f"{path}[{place}]", opaque, around) for place, value in enumerate(tree)]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if isinstance(tree, Mapping):
        result: Any = {} if type(tree) is dict else copy.copy(tree)
        for key, value in tree.items():
            result[key] = mapped(value, change, f"{path}[{key!r}]", opaque, around)
        return result
    if hasattr(tree, "__dict__") and not callable(tree) and not isinstance(tree, nn.Module):
        result = copy.copy(tree)
        for name, value in vars(tree).items():
            object.__setattr__(result, name, mapped(value, change, f"{path}.{name}", opaque, around))
        return result
    if opaque is not None and not callable(tree):
        opaque.add(f"{path or 'the argument'} ({type(tree).__name__})")
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in any nesting, in order, also in objects with attributes."""
    return list(tensors_by_path(tree).values())


def tensors_by_path(tree: Any) -> dict[str, Tensor]:
    """The same, by what `Change` calls their paths."""
    found: dict[str, Tensor] = {}

    def note(path: str, value: Any) -> Any:
        if isinstance(value, PackedSequence):
            found[path] = value.data
        elif isinstance(value, Tensor):
            found[path] = value
        return UNCHANGED

    mapped(tree, note)
    return found


def copied(tree: Any) -> Any:
    """A copy of any nesting, with tensors that have no graph behind them."""

    def change(path: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone().requires_grad_(value.requires_grad)
        return value._replace(data=change(path, value.data)) if isinstance(value, PackedSequence) else UNCHANGED

    return mapped(tree, change)


@dataclass
class Replacement:
    """Which samples of a batch are replaced, and by what.

    In place of a chosen sample comes what another sample has, with floating-point features enlarged, so that statistics of the
    batch move by much. What has the values 0 and 1 only, as masks have, stays: models ask whether a mask masks anything, and run
    other kernels then.

    Attributes:
        batch: which samples the rows of the batch are of.
        chosen: those that are replaced.
        sources: for each of them another sample.
        axis: the axis of tensors that counts samples.
        factor: what floating-point features are multiplied with; 1 or a large number.
        every: whether those that are whole numbers are, too, which may be categories.
        vectors: whether whole numbers of shape ``(N,)``, which may be lengths, are replaced as well.
        shared: paths of tensors that are known to have no samples in them; it is added to.
        owned: whose the rows of tensors are, by their paths, where these are not the samples in order; None where they stay.
        shorten: whether masks of chosen samples lose their last 1.
        opaque: what could not be looked into.
        masks: the paths of what has the values 0 and 1 only.
        numbers: the paths of what has one whole number a sample, and was replaced.
        replaced: the paths of what was replaced.
    """

    batch: Batch
    chosen: list[int]
    sources: list[int]
    axis: int
    factor: float = 1.0
    every: bool = True
    vectors: bool = True
    shared: set[str] = field(default_factory=set)
    owned: Mapping[str, Owned | None] = field(default_factory=dict)
    shorten: bool = False
    opaque: set[str] = field(default_factory=set)
    masks: set[str] = field(default_factory=set)
    numbers: set[str] = field(default_factory=set)
    replaced: set[str] = field(default_factory=set)

    def __call__(self, tree: Any) -> Any:
        """A copy of the batch with the chosen samples replaced."""
        batch = copied(tree)
        self.opaque, self.replaced, self.masks, self.numbers = set(), set(), set(), set()
        result = mapped(batch, self._change(one_row=True), "", self.opaque)
        if not self.replaced:
            # No tensor has a row a sample; perhaps some have several.
            result = mapped(batch, self._change(one_row=False))
        if not self.replaced and self.masks and not self.shorten:
            # What looks like masks is all that there is.
            self.shorten = True
            return self(tree)
        return result

    def _change(self, one_row: bool) -> Change:
        def change(path: str, value: Any) -> Any:
            if isinstance(value, PackedSequence):
                return value._replace(data=self._of_packed(path, value))
            return self._of_tensor(path, value, one_row) if isinstance(value, Tensor) else self._of_list(path, value)

        return change

    def _of_tensor(self, path: str, value: Tensor, one_row: bool) -> Any:
        if path in self.owned:
            owned = self.owned[path]
            return UNCHANGED if owned is None else self._of_owned(path, value, owned)
        if value.dim() <= self.axis or not value.shape[self.axis] or not self.batch.rows:
            return UNCHANGED
        samples = self.batch.owners(value.shape[self.axis])
        if samples is None:
            self.shared.add(path)
        if samples is None or path in self.shared or (len(samples) == self.batch.rows) is not one_row:
            return UNCHANGED
        return self._with_rows(path, value, self.axis, *self._exchanged(samples))

    def _of_owned(self, path: str, value: Tensor, owned: Owned) -> Any:
        rows = value.flatten(0, 1) if owned.by_position else value
        axis = 0 if owned.by_position else self.axis
        if rows.shape[axis] != len(owned.samples):
            return UNCHANGED
        places, others = self._exchanged(owned.samples)
        if not places:
            # What has no gradient is of no consequence.
            self.replaced.add(path)
            return UNCHANGED
        new = self._with_rows(path, rows, axis, places, others)
        return new if new is UNCHANGED else new.detach().reshape(value.shape).requires_grad_(value.requires_grad)

    def _exchanged(self, samples: Tensor) -> tuple[list[int], list[int]]:
        """The rows of the chosen samples, and for each of them one of another sample, over and over if that has less."""
        rows: dict[int, list[int]] = {}
        for row, sample in enumerate(samples.tolist()):
            rows.setdefault(sample, []).append(row)
        places: list[int] = []
        others: list[int] = []
        for sample, source in zip(self.chosen, self.sources, strict=True):
            own = rows.get(sample, [])
            new = rows.get(source, own)
            places += own
            others += [new[place % len(new)] for place in range(len(own))]
        return places, others

    def _with_rows(self, path: str, value: Tensor, axis: int, places: list[int], others: list[int]) -> Any:
        at, source = (torch.tensor(rows, device=value.device) for rows in (places, others))
        with torch.no_grad():
            own, new = value.index_select(axis, at), value.index_select(axis, source)
            numbers = value.is_floating_point() or value.is_complex()
            if not value.is_complex() and _is_mask(value):
                self.masks.add(path)
                if not self.shorten:
                    return UNCHANGED
                new = _shortened(own) if own.dim() > 1 else new
            elif not numbers and value.dim() == 1:
                if not self.vectors:
                    return UNCHANGED
                self.numbers.add(path)
            elif numbers and self.factor != 1:
                factor = self.factor if torch.finfo(value.dtype).max > 2.0**17 else self.factor / 256
                enlarged = new * factor
                new = enlarged if self.every else torch.where(_fractional(value, axis), enlarged, new)
            if torch.equal(own, new):
                new = _other_than(own)
            self.replaced.add(path)
            # In the same strides, for which kernels are chosen, and which `index_copy` does not keep.
            return value.detach().clone().index_copy_(axis, at, new).requires_grad_(value.requires_grad)

    def _of_packed(self, path: str, packed: PackedSequence) -> Any:
        """The rows of the chosen samples get those of other samples at the same positions."""
        samples = packed.sorted_indices
        samples = torch.arange(int(packed.batch_sizes[0]), device="cpu") if samples is None else samples
        places, others, start = [], [], 0
        for size in packed.batch_sizes.tolist():
            here = samples[:size].tolist()
            for place, sample in enumerate(here):
                if (sample if self.batch.unit is None else int(self.batch.unit[sample])) in self.chosen:
                    places.append(start + place)
                    others.append(start + (place + 1) % size)
            start += size
        new = self._with_rows(path, packed.data, 0, places, others)
        return packed.data if new is UNCHANGED else new

    def _of_list(self, path: str, values: Any) -> Any:
        """Lists with an entry a sample: of numbers, texts, or tensors of which none counts samples itself."""
        if path in ("", "[0]"):
            # The arguments themselves.
            return UNCHANGED
        if len(values) != self.batch.rows or hasattr(values, "_fields") or path in self.shared:
            return UNCHANGED
        samples = self.batch.owners(len(values))
        assert samples is not None
        if all(isinstance(value, (bool, int, float, str, bytes)) for value in values):
            if all(isinstance(value, bool) for value in values):
                return UNCHANGED
            new = list(values)
            for place, other in zip(*self._exchanged(samples), strict=True):
                new[place] = values[other]
        elif all(isinstance(value, Tensor) for value in values):
            if any(value.dim() > self.axis and value.shape[self.axis] == self.batch.rows for value in values):
                return UNCHANGED
            new = list(values)
            for place in self._exchanged(samples)[0]:
                new[place] = _other_than(values[place], self.factor)
        else:
            return UNCHANGED
        self.replaced.add(path)
        return type(values)(new)


def _is_mask(value: Tensor) -> bool:
    if value.dtype is torch.bool:
        return True
    # A few tell nearly always.
    some = value.flatten()[:64]
    return all(bool(((part == 0) | (part == 1)).all()) for part in (some, value))


def _fractional(value: Tensor, axis: int) -> Tensor:
    """Which features are no whole numbers for all samples."""
    fractional = value != (0 if value.is_complex() else value.round())
    return (fractional & value.isfinite()).any(axis, keepdim=True)


def _shortened(masks: Tensor) -> Tensor:
    """Masks without the last 1 of each row, as of a sequence that is one shorter; but for those with less than two."""
    ones = masks.long()
    last = (ones.cumsum(-1) == ones.sum(-1, keepdim=True)) & (ones == 1) & (ones.sum(-1, keepdim=True) > 1)
    return torch.where(last, torch.zeros_like(masks), masks)


def _other_than(value: Tensor, factor: float = 1.0) -> Tensor:
    """A tensor like another, with other values in it that are likely to have a meaning too."""
    flipped = value.flip(tuple(range(value.dim())))
    if not torch.equal(flipped, value):
        return flipped * factor if value.is_floating_point() and factor != 1.0 else flipped
    if value.dtype is torch.bool:
        return ~value
    if value.is_floating_point() or value.is_complex():
        return value * factor + 1
    return torch.where(value > 0, value - 1, value + 1)


def batch_size(inputs: Any, axis: int) -> int | None:
    """The number of samples that a model is called on, None if it does not show; inputs of one row may be shared.

    Args:
        inputs: any nesting.
        axis: the axis that counts samples. If it is the second, of ``(T, N)`` and ``(N, features)`` nobody can tell which it is.
    """
    packed = False
    sizes = []

    def note(path: str, value: Any) -> Any:
        nonlocal packed
        packed |= isinstance(value, PackedSequence)
        if isinstance(value, Tensor) and value.dim() >= (1 if axis == 0 else 3):
            sizes.append(value.shape[axis])
        return UNCHANGED

    mapped(inputs, note)
    if packed or not sizes:
        return None
    return next((size for size in sizes if size != 1), 1)


def some_samples(inputs: Any, size: int, start: int, length: int, axis: int) -> Any:
    """Some of the samples of a batch, in any nesting; what has no axis of ``size`` is left as it is.

    Where the batch has not as many, they are taken again, or are zeros where it has none.
    """

    def narrow(path: str, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or tensor.dim() <= axis or tensor.shape[axis] != size:
            return UNCHANGED
        if start + length <= size:
            return tensor.narrow(axis, start, length)
        if size:
            return tensor.index_select(axis, torch.arange(start, start + length, device=tensor.device) % size)
        return tensor.new_zeros(*tensor.shape[:axis], length, *tensor.shape[axis + 1 :])

    return mapped(inputs, narrow)
