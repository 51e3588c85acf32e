"""Batches without samples, in the shapes of the data set's own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from opacus.data_loader import CollateFnWithEmpty
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import (
    DataLoader,
)

# Batches of no samples


class EmptyBatches(CollateFnWithEmpty):
    """Collates as the user's function does, and makes batches of no samples that look like its others.

    How they look says that function, called on one sample of the data set and on the same one twice: what becomes longer by it
    has the samples, and loses them; what does not has neither numbers nor texts of any sample.

    Args:
        collate: the user's function.
        dataset: the data set.
        batch_first: which axis has the samples where that does not show.
        rand_on_empty: whether there is one sample of random numbers instead of none.
    """

    def __init__(
        self, collate: Callable[[list[Any]], Any], dataset: Any, batch_first: bool = True, rand_on_empty: bool = False
    ) -> None:
        super().__init__(collate, batch_first, rand_on_empty)
        self.dataset = dataset
        self._empty: list[Any] = []

    @classmethod
    def of(cls, loader: DataLoader) -> EmptyBatches:
        """That of a loader with Poisson sampling, whose collate function is one of Opacus' class."""
        collate: Any = loader.collate_fn
        options = {"batch_first": collate.batch_first, "rand_on_empty": collate.rand_on_empty}
        while isinstance(collate, CollateFnWithEmpty):
            collate = collate.wrapped_collator_fn
        return cls(collate, loader.dataset, **options)

    def __call__(self, batch: list[Any]) -> Any:
        """The batch that some samples make."""
        if len(batch):
            return self.wrapped_collator_fn(batch)
        if not self._empty:
            self._empty.append(self._make())
        return copy.deepcopy(self._empty[0])

    def _make(self) -> Any:
        one, two = (self._collated(count) for count in (1, 2))
        try:
            return self._without(one, two)
        except TypeError as error:
            try:
                return self.wrapped_collator_fn([])
            except Exception:
                raise TypeError(
                    f"Poisson sampling has drawn a batch of no samples, and what the collate function gives has a {error} in "
                    "it, of which none can be made with no samples. Have the collate function take an empty list, or return "
                    "tensors, numbers and texts in dicts, lists and data classes"
                ) from error

    def _collated(self, count: int) -> Any:
        fetch = getattr(self.dataset, "__getitems__", None)
        (sample,) = fetch([0]) if fetch else [self.dataset[0]]
        # A collate function may change what it gets.
        return self.wrapped_collator_fn([copy.deepcopy(sample) for _ in range(count)])

    def _without(self, one: Any, two: Any) -> Any:
        """What becomes ``one`` with a sample and ``two`` with two, as it is with none; a TypeError names a type without."""
        if isinstance(one, Tensor):
            shape = self._shape(one, two)
            if self.rand_on_empty:
                return torch.randint(0, 2, shape, device=one.device).to(one.dtype)
            return torch.zeros(shape, dtype=one.dtype, device=one.device)
        if isinstance(one, np.ndarray):
            return np.zeros(self._shape(one, two), one.dtype)
        if one is None or isinstance(one, (str, bytes, int, float, complex)):
            return None if one is None else type(one)()
        if isinstance(one, Mapping):
            values = {key: self._without(value, two[key]) for key, value in one.items()}
            if not isinstance(one, MutableMapping):
                return values
            mapping = copy.copy(one)
            mapping.update(values)
            return mapping
        if isinstance(one, (list, tuple)) and not isinstance(one, PackedSequence):
            if len(one) == len(two):
                items = [self._without(*pair) for pair in zip(one, two, strict=True)]
            else:
                items = [self._without(item, item) for item in one] if self.rand_on_empty else []
            return type(one)(*items) if hasattr(one, "_fields") else type(one)(items)
        if dataclasses.is_dataclass(one) and not isinstance(one, type):
            result = copy.copy(one)
            for field in dataclasses.fields(one):
                value = self._without(getattr(one, field.name), getattr(two, field.name))
                object.__setattr__(result, field.name, value)
            return result
        raise TypeError(type(one).__name__)

    def _shape(self, one: Any, two: Any) -> tuple[int, ...]:
        if self.rand_on_empty:
            return tuple(one.shape)
        return tuple(max(2 * length - longer, 0) for length, longer in zip(one.shape, two.shape, strict=True))
