"""Units of several records, such as all of a user's: drawn together, so that they are one sample."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from opacus_fgc.argument_checks import is_count
from opacus_fgc.certificates.batch import values_of
from opacus_fgc.sampling.loaders import with_batches
from opacus_fgc.sampling.poisson import POISSON


class UnitDataset(Dataset):
    """A data set whose items are units: each is the list of its records, or of some of them.

    Which ones is drawn anew each time, by torch's default generator. Nothing that is accounted depends on it: whichever records
    of a unit are there, its gradient is clipped as one.

    Args:
        dataset: the records.
        unit: the unit of each record, ``len(dataset)`` hashable values.
        most: how many records of a unit there are at most; all if None.

    Raises:
        ValueError: if there is not one unit a record.
    """

    def __init__(self, dataset: Any, unit: Iterable[Hashable], most: int | None = None) -> None:
        self.dataset, self.most = dataset, most
        records: dict[Hashable, list[int]] = {}
        count = 0
        for value in values_of(unit):
            records.setdefault(value, []).append(count)
            count += 1
        if count != len(dataset):
            raise ValueError(
                f"unit has {count} values and the data set {len(dataset)} records; it is one value a record, in their order"
            )
        self.records = list(records.values())

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: int) -> list[Any]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[list[Any]]:
        """The records of several units, which are fetched at once if the data set can do so."""
        chosen = [self._chosen(self.records[place]) for place in places]
        fetch = getattr(self.dataset, "__getitems__", None)
        indices = [index for several in chosen for index in several]
        records = iter(fetch(indices) if fetch else [self.dataset[index] for index in indices])
        return [[next(records) for _ in several] for several in chosen]

    def _chosen(self, records: list[int]) -> list[int]:
        if self.most is None or len(records) <= self.most:
            return records
        return [records[place] for place in torch.randperm(len(records))[: self.most].tolist()]


class _CollateRecords:
    """Collates the records of units, one after another, as records."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, units: list[list[Any]]) -> Any:
        return self.collate([record for records in units for record in records])


def check_units(loader: DataLoader, unit: Any, records_per_unit: Any, poisson: bool, rand_on_empty: bool) -> None:
    """Refuses units of what `of_units` cannot be right for; see there.

    Args:
        loader: the caller's, which `loaders.check_loader` has nothing against.
        unit: the unit of each record; None if each record is one.
        records_per_unit: how many records of a unit a batch has at most.
        poisson: whether batches are drawn by Poisson sampling.
        rand_on_empty: whether random numbers stand in for a batch without samples.

    Raises:
        ValueError: if an argument has no meaning.
    """
    if records_per_unit is not None and not is_count(records_per_unit):
        raise ValueError(
            f"records_per_unit is {records_per_unit!r}; it is a whole number from 1 on, or None for all records"
        )
    if unit is None:
        if records_per_unit is not None:
            raise ValueError("records_per_unit without unit: pass unit=..., the unit of each record, such as its user")
        return
    if not poisson:
        raise ValueError(
            "unit and poisson_sampling=False: the account is that of units which are drawn, all with the same probability. Leave "
            "poisson_sampling out"
        )
    if rand_on_empty:
        raise ValueError("unit and rand_on_empty=True: a record of random numbers has no unit. Leave rand_on_empty out")
    if isinstance(loader.batch_sampler, POISSON):
        raise ValueError(
            "unit and a data loader that make_private returned: pass one over the records, DataLoader(dataset, batch_size=...)"
        )
    UnitDataset(loader.dataset, unit)


def of_units(loader: DataLoader, unit: Any, records_per_unit: int | None) -> DataLoader:
    """A loader like another, whose samples are units of several records, which are collated as records.

    Args:
        loader: it is not changed.
        unit: the unit of each record.
        records_per_unit: how many records of a unit a batch has at most; all if None.
    """
    dataset = UnitDataset(loader.dataset, unit, records_per_unit)
    return with_batches(loader, loader.batch_sampler, dataset=dataset, collate_fn=_CollateRecords(loader.collate_fn))


def is_of_units(loader: DataLoader) -> bool:
    """Whether the samples of a loader are units of several records."""
    return isinstance(loader.dataset, UnitDataset)
