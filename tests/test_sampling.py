"""What a loader draws by, before Poisson sampling takes its place or without it; and batches that have no samples."""

from __future__ import annotations

import warnings
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from opacus_fgc import PrivacyEngine, PrivacyError

SIZE, BATCH = 24, 6


def data(size: int = SIZE) -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(size, 4), torch.randint(3, (size,)), torch.arange(size))


def private(loader: DataLoader, **options: Any) -> Any:
    model = nn.Linear(4, 3)
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        data_loader=loader,
        **{"noise_multiplier": 1.0, "max_grad_norm": 1.0, "grad_sample_mode": "ghost", **options},
    )


def loader_of(sampler: Any = None, **options: Any) -> DataLoader:
    return DataLoader(data(), batch_size=BATCH, sampler=sampler, **options)


class Listed(Sampler[int]):
    """A sampler of the user's own."""

    def __init__(self, indices: list[Any]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[Any]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class OwnRandom(RandomSampler):
    pass


# Without Poisson sampling


@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(range(SIZE), replacement=True),
        OwnRandom(range(SIZE), replacement=True),
        WeightedRandomSampler([1.0] * SIZE, SIZE),
        RandomSampler(range(SIZE), num_samples=2 * SIZE),
        SubsetRandomSampler([0, 1, 2, 1]),
    ],
    ids=["replacement", "subclass", "weighted", "more-than-there-are", "subset-with-one-twice"],
)
def test_samplers_that_repeat_samples(sampler: Any) -> None:
    with pytest.raises(PrivacyError, match=f"{type(sampler).__name__} gives a sample more than once.*shuffle=True"):
        private(loader_of(sampler), poisson_sampling=False)


@pytest.mark.parametrize(
    "loader",
    [
        loader_of(),
        loader_of(shuffle=True),
        loader_of(SubsetRandomSampler(range(0, SIZE, 2))),
        loader_of(WeightedRandomSampler([1.0] * SIZE, 12, replacement=False)),
        loader_of(RandomSampler(range(SIZE), num_samples=12)),
        DataLoader(data(), batch_sampler=BatchSampler(SequentialSampler(range(SIZE)), 5, True)),
    ],
    ids=["plain", "shuffled", "subset", "weighted", "some", "batch-sampler"],
)
def test_loaders_that_are_known_stay_as_they_are(loader: DataLoader) -> None:
    *_, result = private(loader, poisson_sampling=False)
    assert result is loader


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_own_sampler_is_looked_at_while_it_draws(kind: Callable[[Any], Any]) -> None:
    order = list(range(SIZE - 1, -1, -1))
    given = loader_of(Listed(list(kind(order))))
    model, optimizer, criterion, loader = private(given, poisson_sampling=False)
    for _ in range(2):
        assert torch.cat([which for *_, which in loader]).tolist() == order
    assert loader.sampler.indices is given.sampler.indices  # what else it has is at hand
    *_, loader = private(loader_of(Listed(list(kind([*order, 3])))), poisson_sampling=False)
    with pytest.raises(PrivacyError, match="Listed gives a sample more than once an epoch"):
        list(loader)


def test_own_sampler_of_batches(recwarn: Any) -> None:
    batches = [[0, 1], [2, 3, 4, 5, 6, 7, 8, 9, 10], [11]]
    model, optimizer, criterion, loader = private(
        DataLoader(data(), batch_sampler=Listed(batches)), poisson_sampling=False
    )
    for number, (x, y, which) in enumerate(loader):
        assert which.tolist() == batches[number]
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    x, y, _ = data().tensors
    criterion(model(x), y).backward()
    with pytest.raises(PrivacyError, match="have no more than 9"):
        optimizer.step()
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer) as parts:
        assert sum(len(x) for x, *_ in parts) == 12
    *_, loader = private(DataLoader(data(), batch_sampler=Listed([[0, 1], [2, 2]])), poisson_sampling=False)
    with pytest.raises(PrivacyError, match="more than once an epoch"):
        list(loader)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from data()

    def __len__(self) -> int:
        return SIZE


def test_stream_with_a_length() -> None:
    model, optimizer, criterion, loader = private(DataLoader(Stream(), batch_size=BATCH), poisson_sampling=False)
    for x, y, _ in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


# What Poisson sampling takes the place of


@pytest.mark.parametrize(
    "sampler",
    [
        WeightedRandomSampler([1.0] * SIZE, SIZE),
        Listed(list(range(SIZE))),
        RandomSampler(range(SIZE), replacement=True),
        RandomSampler(range(SIZE), num_samples=12),
    ],
    ids=["weighted", "own", "replacement", "some"],
)
def test_samplers_that_are_not_used(sampler: Any) -> None:
    with pytest.warns(UserWarning, match=f"takes the place of .* {type(sampler).__name__}.*weights into the loss"):
        private(loader_of(sampler))


def test_sampler_of_batches_that_is_not_used() -> None:
    with pytest.warns(UserWarning, match="takes the place of .* Listed"):
        private(DataLoader(data(), batch_sampler=Listed([[0, 1, 2], [3]])))


@pytest.mark.parametrize(
    "sampler",
    [SubsetRandomSampler(range(SIZE // 2)), WeightedRandomSampler([0.0] + [1.0] * (SIZE - 1), SIZE)],
    ids=["subset", "weights-of-zero"],
)
def test_samples_that_are_left_out(sampler: Any) -> None:
    """Those that are kept for validation would be trained on."""
    with pytest.raises(PrivacyError, match=rf"what the data loader's {type(sampler).__name__} leaves out.*Subset\("):
        private(loader_of(sampler))
    # What it says works.
    *_, loader = private(DataLoader(Subset(data(), range(SIZE // 2)), batch_size=BATCH))
    assert all((which < SIZE // 2).all() for _ in range(5) for *_, which in loader)


@pytest.mark.parametrize(
    "loader",
    [
        loader_of(),
        loader_of(shuffle=True),
        loader_of(SubsetRandomSampler(range(SIZE))),
        DPDataLoader.from_data_loader(loader_of()),
    ],
    ids=["plain", "shuffled", "whole-subset", "poisson"],
)
def test_plain_loaders_need_no_warning(loader: DataLoader) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        private(loader)
    whole = isinstance(loader.sampler, SubsetRandomSampler)
    assert any("takes the place" in str(warning.message) for warning in told) == whole


# Batches of no samples

Pair = namedtuple("Pair", "first second")


@dataclass
class Record:
    x: Any
    name: Any


class Made(Dataset):
    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return 30

    def __getitem__(self, n: int) -> Any:
        return self.make(n)


def row(n: int) -> Tensor:
    return torch.full((4,), float(n))


def of_records(samples: list[Any]) -> Record:
    return Record(torch.stack([sample["x"] for sample in samples]), [sample["name"] for sample in samples])


def packed_tokens(samples: list[Any]) -> dict[str, Any]:
    """All tokens in one row, and where each sample begins."""
    tokens = [torch.arange(3) + n for n, _ in samples]
    starts = torch.tensor([0, *(3 * (k + 1) for k in range(len(samples)))])
    return {"tokens": torch.cat(tokens), "starts": starts, "longest": 3}


def popped(samples: list[dict[str, Any]]) -> Any:
    """Changes the samples, as collators of transformers do."""
    labels = [sample.pop("y") for sample in samples]
    return UserDict(**default_collate(samples), labels=torch.tensor(labels))


EMPTY: dict[str, tuple[Callable[[int], Any], Any]] = {
    "tuple": (lambda n: (row(n), n), None),
    "dict": (lambda n: {"x": row(n), "y": n, "name": f"n{n}"}, None),
    "nested": (lambda n: {"views": [row(n), {"x": row(n)}], "pair": Pair(row(n), "a")}, None),
    "one-column": (lambda n: (row(n),), None),
    "array": (
        lambda n: (np.full(3, n), 2.0),
        lambda samples: [np.stack([a for a, _ in samples]), [b for _, b in samples]],
    ),
    "data-class": (lambda n: {"x": row(n), "name": f"n{n}"}, of_records),
    "packed": (lambda n: (n, 0), packed_tokens),
    "changed": (lambda n: {"x": row(n), "y": n}, popped),
}


def check_empty(empty: Any, full: Any) -> None:
    assert type(empty) is type(full)
    if isinstance(full, Tensor):
        assert empty.dtype == full.dtype and empty.shape[1:] == full.shape[1:]
        assert len(empty) == 0 or not empty.any()
    elif isinstance(full, np.ndarray):
        assert empty.dtype == full.dtype and empty.shape == (0, *full.shape[1:])
    elif isinstance(full, (dict, UserDict)):
        assert empty.keys() == full.keys()
        for key in full:
            check_empty(empty[key], full[key])
    elif isinstance(full, Record):
        check_empty(vars(empty), vars(full))
    elif isinstance(full, (list, tuple)) and len(empty):
        for pair in zip(empty, full, strict=True):
            check_empty(*pair)
    else:
        assert not empty


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", EMPTY)
def test_first_batch_is_empty(name: str, workers: int) -> None:
    make, collate = EMPTY[name]
    given = DataLoader(Made(make), batch_size=1, collate_fn=collate, num_workers=workers)
    *_, loader = private(given)
    whole = given.collate_fn([make(5), make(6)])
    empties = 0
    for _ in range(1 if workers else 3):
        torch.manual_seed(3)  # by which it is
        batches = list(loader)
        sizes = [len([*indices]) for indices in loader.batch_sampler.batches()]
        assert len(batches) == len(sizes) == 30
        for batch in batches[:3]:
            if loader_says_empty(batch):
                check_empty(batch, whole)
                empties += 1
    assert empties or workers


def loader_says_empty(batch: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves(batch.data if isinstance(batch, UserDict) else batch)
    leaves += [leaf.x for leaf in leaves if isinstance(leaf, Record)]
    return any(isinstance(leaf, (Tensor, np.ndarray)) and len(leaf) == 0 for leaf in leaves)


def test_packed_tokens_of_nobody() -> None:
    make, collate = EMPTY["packed"]
    *_, loader = private(DataLoader(Made(make), batch_size=1, collate_fn=collate))
    empty = loader.collate_fn([])
    assert empty["starts"].tolist() == [0] and empty["tokens"].tolist() == [] and empty["longest"] == 0


def test_empty_batch_has_nothing_of_a_sample() -> None:
    """Not even what the collate function makes of all of them."""
    make, collate = EMPTY["tuple"]
    both = lambda samples: (*default_collate(samples), torch.stack([x for x, _ in samples]).mean(0) + 5, 7.5, "text")
    *_, loader = private(DataLoader(Made(make), batch_size=1, collate_fn=both))
    x, y, mean, number, text = loader.collate_fn([])
    assert x.shape == (0, 4) and y.shape == (0,) and mean.tolist() == [0.0] * 4 and number == 0 and text == ""


def test_random_sample_of_nobody() -> None:
    make, _ = EMPTY["dict"]
    *_, loader = private(DataLoader(Made(make), batch_size=1), rand_on_empty=True)
    empty = loader.collate_fn([])
    assert empty["x"].shape == (1, 4) and empty["y"].shape == (1,) and empty["name"] == [""]
    assert set(empty["x"].flatten().tolist()) <= {0.0, 1.0}


def test_what_has_no_empty_form() -> None:
    make = lambda n: (row(n), n)
    packed = lambda samples: pack_sequence([x for x, _ in samples])
    *_, loader = private(DataLoader(Made(make), batch_size=1, collate_fn=packed))
    with pytest.raises(TypeError, match=r"has a PackedSequence in it.*take an empty list"):
        loader.collate_fn([])
    # What it says works.
    taking = lambda samples: pack_sequence([x for x, _ in samples]) if samples else None
    *_, loader = private(DataLoader(Made(make), batch_size=1, collate_fn=taking))
    assert loader.collate_fn([]) is None
