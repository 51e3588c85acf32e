"""Which samples the batches of a private loader have, how many they are, and what a batch of none looks like."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from opacus.data_loader import DPDataLoader
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from opacus_fgc.errors import PrivacyValueError
from opacus_fgc.sampling.draws import Batches, Draws, LargestBatch
from opacus_fgc.sampling.empty_batches import EmptyBatches
from opacus_fgc.sampling.poisson import POISSON, Drawing, PoissonSampler, poisson_arguments


class _Ahead:
    """A sampler for a `DrawnLoader`: plain lists, whose lengths wait for the batches to come out of the loader."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.lengths: deque[int] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        self.lengths = deque()
        return self._noted(self.lengths)

    def _noted(self, lengths: deque[int]) -> Iterator[list[int]]:
        for batch in self.sampler.batches():
            # Some data sets fetch a whole batch, and ask for its length.
            indices = [*iter(batch)]
            lengths.append(len(indices))
            yield indices

    def __len__(self) -> int:
        return len(self.sampler)


class _Delivered:
    """An iterator of a loader, which counts a batch as drawn when it gives it out: workers draw ahead."""

    def __init__(self, iterator: Iterator[Any], lengths: deque[int], add: Callable[[int], None]) -> None:
        self._iterator, self._lengths, self._add = iterator, lengths, add

    def __iter__(self) -> _Delivered:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self._iterator)
        except StopIteration:
            raise
        except Exception:
            # Of the data set or the collate function; the next batch is another.
            if self._lengths:
                self._lengths.popleft()
            raise
        self._add(self._lengths.popleft())
        return batch

    def __len__(self) -> int:
        return len(self._iterator)  # type: ignore[arg-type]


class DrawnLoader(DPDataLoader):
    """A loader whose batches a sampler with `Drawing` draws, and which counts those that it gives out."""

    _ahead: _Ahead

    @property
    def _index_sampler(self) -> Any:
        return self._ahead

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        sampler: Any = self.batch_sampler
        return _Delivered(iterator, self._ahead.lengths, sampler.draws.begin())


def with_batches(
    loader: DataLoader, batch_sampler: Any, kind: type[DataLoader] | None = None, **changes: Any
) -> DataLoader:
    """A loader like another, with other batches.

    Args:
        loader: it is not changed.
        batch_sampler: says which samples each batch has, in the main process.
        kind: the type of the result, that of the loader if None.
        **changes: its other attributes.
    """
    result: Any = object.__new__(kind or type(loader))
    # A data loader's own assignment refuses this after its making; an iterator with living workers would keep the old sampler.
    vars(result).update(
        vars(copy.copy(loader)),
        batch_sampler=batch_sampler,
        sampler=getattr(batch_sampler, "sampler", loader.sampler),
        _iterator=None,
    )
    vars(result).update(changes)
    return result


def counted(loader: DataLoader, batch_sampler: Any, **changes: Any) -> DrawnLoader:
    """A loader like one with Poisson sampling, which counts what it draws, and whose empty batches look like the others.

    Args:
        loader: it is not changed.
        batch_sampler: draws its batches; a sampler with `Drawing`.
        **changes: its other attributes.
    """
    collate: Any = EmptyBatches.of(loader)
    batch_sampler.draws.least = int(collate.rand_on_empty)
    ahead = _Ahead(batch_sampler)
    return with_batches(loader, batch_sampler, DrawnLoader, collate_fn=collate, _ahead=ahead, **changes)  # type: ignore[return-value]


def with_own_draws(loader: DataLoader) -> DataLoader:
    """A loader like another, which counts what it draws if it draws by Poisson sampling."""
    sampler: Any = loader.batch_sampler
    if isinstance(sampler, Drawing):
        own = copy.copy(sampler)
        own.draws = Draws()
        return counted(loader, own)
    if isinstance(sampler, UniformWithReplacementSampler):
        return counted(loader, PoissonSampler(**poisson_arguments(sampler), generator=sampler.generator))
    return loader


# What the caller's loader draws by


def check_loader(loader: DataLoader, poisson: bool) -> None:
    """Refuses a loader whose sampling rate is not known, and what Poisson sampling, or going without, cannot be right for.

    Args:
        loader: the caller's.
        poisson: whether Poisson sampling is to take the place of what it draws by.

    Raises:
        ValueError: if it has no batches, or no rate.
        PrivacyError: if its sampler repeats samples, or leaves out some that Poisson sampling would draw.
    """
    if isinstance(loader.dataset, IterableDataset) and poisson:
        raise ValueError(
            "Poisson sampling needs a data set that can be indexed, not an IterableDataset; load it into a map-style data set"
        )
    check_length(loader)
    if loader.batch_sampler is None:
        raise ValueError(
            "the data loader makes no batches (batch_size=None), so what the data set gives would count as one sample, "
            "however many are in it. Make the DataLoader with a batch_size over a data set of samples"
        )
    if poisson:
        _check_what_poisson_sampling_replaces(loader)
    elif not isinstance(loader.dataset, IterableDataset):
        _check_replacement(_sampler(loader))


def check_length(loader: DataLoader) -> None:
    """Raises a ValueError unless a loader says how many batches an epoch has, which is what its sampling rate comes from."""
    try:
        batches = len(loader)
    except TypeError as error:
        raise ValueError(
            f"the sampling rate is not known, since the data loader has no length ({error}). It is one over the number of "
            "batches of an epoch: give the IterableDataset (or the sampler) a __len__, or load the data into a map-style "
            "data set"
        ) from error
    if batches == 0:
        raise ValueError("the data loader has no batches, so there is no sampling rate to account for")


def _sampler(loader: DataLoader) -> Any:
    batch_sampler: Any = loader.batch_sampler
    return batch_sampler.sampler if type(batch_sampler) is BatchSampler else batch_sampler


def _repeats(sampler: Any) -> bool | None:
    """Whether a sampler gives a sample more than once an epoch; None if its type does not say."""
    if isinstance(sampler, (RandomSampler, WeightedRandomSampler)) and sampler.replacement:
        return True
    if type(sampler) is RandomSampler:
        return sampler.num_samples > len(sampler.data_source)
    if type(sampler) is SubsetRandomSampler:
        return len(set(sampler.indices)) < len(sampler.indices)
    once = type(sampler) in (SequentialSampler, DistributedSampler, WeightedRandomSampler)
    return False if once or isinstance(sampler, POISSON) or vars(type(sampler)).get("once_an_epoch") else None


def _check_replacement(sampler: Any) -> None:
    if _repeats(sampler):
        raise PrivacyValueError(
            f"the data loader's {type(sampler).__name__} gives a sample more than once an epoch, so that it may be in a batch "
            "several times, and count several times. Without Poisson sampling each sample has to come once: make the "
            "DataLoader with shuffle=True, or a sampler without replacement; put weights of classes into the loss; or leave "
            "poisson_sampling=True"
        )


def _check_what_poisson_sampling_replaces(loader: DataLoader) -> None:
    sampler, size = _sampler(loader), len(loader.dataset)  # type: ignore[arg-type]
    name = type(sampler).__name__
    shuffling = type(sampler) is RandomSampler or vars(type(sampler)).get("once_an_epoch")
    if type(sampler) in (SequentialSampler, DistributedSampler) or isinstance(sampler, POISSON):
        return
    if shuffling and not getattr(sampler, "replacement", False) and len(sampler) == size:
        return
    inner = getattr(sampler, "sampler", sampler)
    chosen = getattr(inner, "indices", None) if isinstance(inner, SubsetRandomSampler) else None
    weights = inner.weights if isinstance(inner, WeightedRandomSampler) else None
    left_out = (chosen is not None and len(set(map(int, chosen))) < size) or (
        weights is not None and bool((weights == 0).any())
    )
    if left_out:
        raise PrivacyValueError(
            f"Poisson sampling draws from the whole data set, so that what the data loader's {type(inner).__name__} leaves "
            "out would be trained on. Pass a DataLoader of torch.utils.data.Subset(dataset, indices), and no sampler"
        )
    warnings.warn(
        f"Poisson sampling takes the place of the data loader's {name}: each sample of the data set is drawn with the same "
        f"probability, 1 / {len(loader)}, and the sampler is not used. For a balance of classes put weights into the loss; "
        "for a part of the data pass a DataLoader of torch.utils.data.Subset(dataset, indices)",
        stacklevel=5,
    )


class Once(Sampler[Any]):
    """A sampler, of samples or of batches, that has given no sample twice in an epoch; else it stops.

    Args:
        sampler: any.

    Raises:
        PrivacyValueError: when it gives a sample again.
    """

    once_an_epoch = True

    def __init__(self, sampler: Iterable[Any]) -> None:
        self._given = sampler
        self.largest = 0

    def __iter__(self) -> Iterator[Any]:
        seen: set[Any] = set()
        for drawn in self._given:
            one = isinstance(drawn, (int, str)) or not isinstance(drawn, Iterable) or getattr(drawn, "ndim", None) == 0
            indices: list[Any] = [drawn] if one else list(drawn)
            indices = [index.item() if hasattr(index, "item") else index for index in indices]
            if len(set(indices)) < len(indices) or not seen.isdisjoint(indices):
                raise PrivacyValueError(
                    f"the data loader's {type(self._given).__name__} gives a sample more than once an epoch, so that it "
                    "counts more often than it is accounted. Without Poisson sampling each sample has to come once: put "
                    "weights of classes into the loss, or leave poisson_sampling=True"
                )
            seen.update(indices)
            self.largest = max(self.largest, len(indices))
            yield drawn

    def __len__(self) -> int:
        return len(self._given)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if "_given" not in vars(self):  # while it is copied
            raise AttributeError(name)
        return getattr(self._given, name)


def checked(loader: DataLoader) -> DataLoader:
    """A loader without Poisson sampling, itself if each sample is known to come once an epoch; else one that looks."""
    sampler = _sampler(loader)
    if isinstance(loader.dataset, IterableDataset) or _repeats(sampler) is False:
        return loader
    batch_sampler: Any = loader.batch_sampler
    if sampler is batch_sampler:
        return with_batches(loader, Once(batch_sampler))
    return with_batches(loader, BatchSampler(Once(sampler), batch_sampler.batch_size, batch_sampler.drop_last))


def largest_batch(loader: DataLoader) -> int:
    """How many samples a batch of a loader without Poisson sampling has at most, as far as it says."""
    sampler: Any = loader.batch_sampler
    size = getattr(sampler, "batch_size", None)
    # The mean, rounded up, of batches that are not of one size; the largest of those so far.
    return size or max(-(-len(loader.dataset) // len(loader)), getattr(sampler, "largest", 0))  # type: ignore[arg-type]


def batches_of(loader: DataLoader, interrupt: Callable[[], None]) -> Batches:
    """What the steps of an optimizer are to be on, given the private loader.

    Args:
        loader: the loader that make_private returns.
        interrupt: see `Draws`.
    """
    sampler = loader.batch_sampler
    if isinstance(sampler, Drawing):
        sampler.draws.interrupt = interrupt
        return sampler.draws
    return LargestBatch(lambda: largest_batch(loader), len(loader))
