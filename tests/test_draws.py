"""Each step is on a batch of its own that the private loader drew: whatever else would be accounted wrongly, and is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import (
    DPLossFastGradientClipping,
    DPOptimizerFastGradientClipping,
    GradSampleModuleFastGradientClipping,
    PrivacyEngine,
    PrivacyError,
)
from opacus_fgc.privacy_engine import MODES
from opacus_fgc.sampling.draws import Draws
from tests.reference import reference

SIZE, BATCH, C = 60, 10, 0.5


class Private:
    """A private run on numbered samples, without noise unless it is said."""

    def __init__(self, mode: str = "ghost", workers: dict[str, Any] | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.plain = nn.Linear(4, 3)
        self.engine = PrivacyEngine(accountant="rdp")
        data = TensorDataset(torch.randn(SIZE, 4), torch.randint(3, (SIZE,)))
        self.given = DataLoader(data, batch_size=options.pop("batch_size", BATCH), **(workers or {}))
        self.model, self.optimizer, self.criterion, self.loader = self.engine.make_private(
            module=self.plain,
            optimizer=torch.optim.SGD(self.plain.parameters(), lr=0.1),
            criterion=nn.CrossEntropyLoss(),
            data_loader=self.given,
            grad_sample_mode=mode,
            **{"noise_multiplier": 0.0, "max_grad_norm": C, **options},
        )

    def backward(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()

    def step(self, x: Tensor, y: Tensor) -> None:
        self.backward(x, y)
        self.optimizer.step()

    def refused(self, match: str, *batch: Tensor) -> None:
        """A step on this batch is an error before the weights move, and is not accounted."""
        before, history = [param.clone() for param in self.plain.parameters()], list(self.engine.accountant.history)
        with pytest.raises(PrivacyError, match=match) as error:
            self.step(*batch)
        assert isinstance(error.value, ValueError)
        assert all(map(torch.equal, before, self.plain.parameters()))
        assert self.engine.accountant.history == history

    def error(self, x: Tensor, y: Tensor) -> list[str]:
        """What a step is refused with; nothing if it is made."""
        try:
            self.step(x, y)
        except ValueError as error:
            return [str(error)]
        return []

    @property
    def steps(self) -> int:
        return sum(steps for _, _, steps in self.engine.accountant.history)

    def split(self, most: int) -> BatchMemoryManager:
        return BatchMemoryManager(data_loader=self.loader, max_physical_batch_size=most, optimizer=self.optimizer)


@pytest.fixture(params=MODES)
def private(request: pytest.FixtureRequest) -> Private:
    return Private(request.param)


WORKERS = {
    "none": {},
    "one": {"num_workers": 1},
    "two-that-stay": {"num_workers": 2, "persistent_workers": True},
    "many-ahead": {"num_workers": 1, "prefetch_factor": 9},
}
workers = pytest.mark.parametrize("workers", WORKERS.values(), ids=WORKERS)


# What is refused


def test_loader_that_was_replaced(private: Private) -> None:
    for x, y in private.given:
        private.refused(r"without a draw of its own.*the loader that make_private returned", x, y)


def test_whole_data_set_in_one_step(private: Private) -> None:
    next(iter(private.loader))
    private.refused(r"this step is on 60 samples, but the batch .* has", *private.given.dataset.tensors)


@workers
def test_second_step_on_one_draw(workers: dict[str, Any]) -> None:
    """However far workers have drawn ahead."""
    private = Private(workers=workers)
    for number, (x, y) in enumerate(itertools.islice(private.loader, 3), 1):
        private.step(x, y)
        private.refused("without a draw of its own", x, y)
        assert private.steps == number


def test_batches_of_another_epoch_again(private: Private) -> None:
    batches = list(private.loader)
    for batch in batches:
        private.step(*batch)
    assert private.steps == len(batches)
    private.refused("without a draw of its own", *batches[0])


def test_part_of_a_draw(private: Private) -> None:
    x, y = next(iter(private.loader))
    private.refused("BatchMemoryManager", x[:-1], y[:-1])


def test_samples_beside_those_of_the_draw(private: Private) -> None:
    x, y = next(iter(private.loader))
    generated = torch.randn(len(x), 4)
    private.refused(r"Generated .* as many as there are", torch.cat([x, generated]), y.repeat(2))
    # What it says works.
    private.optimizer.zero_grad()
    (private.criterion(private.model(x), y) + private.criterion(private.model(generated), y)).backward()
    private.optimizer.step()
    assert private.steps == 1


def test_empty_batch_that_is_skipped() -> None:
    """That no step was made would tell that nobody was in the batch."""
    private = Private(batch_size=1)
    seen = 0
    for x, y in private.loader:
        if len(x) == 0 and private.steps:
            seen += 1
            continue
        if seen:
            private.refused("a batch without samples was drawn, and skipped", x, y)
            return
        private.step(x, y)
    raise AssertionError("no empty batch was drawn")


@workers
@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_part_that_is_skipped(poisson_sampling: bool, workers: dict[str, Any]) -> None:
    """The signals that say where a batch ends would be those of other parts, and a sum that of two draws."""
    if workers.get("prefetch_factor"):
        pytest.skip("the whole epoch is drawn before the first step")
    private = Private(workers=workers, poisson_sampling=poisson_sampling)
    errors = []
    with private.split(3) as loader:
        for number, (x, y) in enumerate(loader):
            if number == 2:
                private.refused("a part of a batch that was split was drawn, and skipped", x, y)
            elif number != 1:
                errors += private.error(x, y)
        # What is left of a batch, some part of which is gone, is not the batch.
        assert len(errors) <= poisson_sampling and all("this step is on" in error for error in errors)
        assert 0 <= SIZE // BATCH - private.steps <= 2 * poisson_sampling
        steps = private.steps
        for x, y in loader:
            private.step(x, y)
    assert private.steps == steps + SIZE // BATCH


def test_part_that_fails() -> None:
    """Its signal is not the next part's: the step is refused, and the batches after are right."""
    private = Private()
    with private.split(3) as loader:
        errors = [private.error(x * torch.nan if number == 2 else x, y) for number, (x, y) in enumerate(loader)]
    assert "inf or NaN" in errors[2][0] and "was split was drawn, and skipped" in errors[3][0]
    assert 1 <= SIZE // BATCH - private.steps <= 2


@pytest.mark.parametrize("passes", [1, 3])
def test_more_than_a_batch_without_poisson_sampling(passes: int) -> None:
    private = Private(poisson_sampling=False)
    x, y = private.given.dataset.tensors
    for part in range(passes):
        private.criterion(private.model(x[: BATCH + (part == 0)]), y[: BATCH + (part == 0)]).backward()
    before = private.plain.weight.clone()
    with pytest.raises(
        PrivacyError, match=rf"no more than 10{', 30 in 3 backward passes' if passes > 1 else ''}\. Each"
    ):
        private.optimizer.step()
    assert torch.equal(before, private.plain.weight) and not private.steps
    private.optimizer.zero_grad()
    for _ in range(passes):
        private.criterion(private.model(x[:BATCH]), y[:BATCH]).backward()
    private.optimizer.step()
    assert private.engine.accountant.history == [(0.0, passes * BATCH / SIZE, 1)]


# What is right


def whole_epochs(private: Private) -> int:
    for x, y in (batch for _ in range(3) for batch in private.loader):
        private.step(x, y)
    return 3 * SIZE // BATCH


def epochs_that_end_early(private: Private) -> int:
    for _ in range(4):
        for number, batch in enumerate(private.loader):
            if number == 2:
                break
            private.step(*batch)
    return 4 * 2


def one_batch_at_a_time(private: Private) -> int:
    for _ in range(5):
        private.step(*next(iter(private.loader)))
    return 5


def draws_that_are_skipped(private: Private) -> int:
    taken = 0
    for number, batch in enumerate(private.loader):
        if number % 2:
            private.step(*batch)
            taken += 1
    return taken


def one_batch_ahead(private: Private) -> int:
    """As frameworks do that look for the end of an epoch."""
    batches: Iterator[Any] = iter(private.loader)
    waiting = next(batches)
    for batch in batches:
        private.step(*waiting)
        waiting = batch
    private.step(*waiting)
    return SIZE // BATCH


def epochs_in_a_list(private: Private) -> int:
    for batch in [*private.loader, *private.loader]:
        private.step(*batch)
    return 2 * SIZE // BATCH


def looked_at_before(private: Private) -> int:
    """As for the accuracy on the training data."""
    assert sum(len(x) for x, _ in private.loader) > 0
    return whole_epochs(private)


def loader_of_another_class(private: Private) -> int:
    """As some frameworks make one of what is in it."""
    loader = DataLoader(
        private.loader.dataset,
        batch_sampler=private.loader.batch_sampler,
        collate_fn=private.loader.collate_fn,
        num_workers=private.loader.num_workers,
    )
    for batch in loader:
        private.step(*batch)
    return SIZE // BATCH


def split_batches(private: Private) -> int:
    with private.split(3) as loader:
        for x, y in (batch for _ in range(2) for batch in loader):
            private.step(x, y)
    return 2 * SIZE // BATCH


@workers
@pytest.mark.parametrize(
    "train",
    [
        whole_epochs,
        epochs_that_end_early,
        one_batch_at_a_time,
        draws_that_are_skipped,
        one_batch_ahead,
        epochs_in_a_list,
        looked_at_before,
        loader_of_another_class,
        split_batches,
    ],
)
def test_steps_are_the_draws(train: Callable[[Private], int], workers: dict[str, Any]) -> None:
    private = Private(workers=workers)
    number = train(private)
    assert private.engine.accountant.history == [(0.0, BATCH / SIZE, number)]


@workers
def test_loop_that_breaks_off_within_a_split_batch(workers: dict[str, Any]) -> None:
    """What was summed of it is dropped, and the next epoch's first step is that of its own first batch."""
    private = Private(workers=workers)
    with private.split(2) as loader:
        for x, y in loader:
            private.step(x, y)
            if private.optimizer._is_last_step_skipped:
                break
        steps, parts = private.steps, []
        for x, y in loader:
            private.backward(x, y)
            parts.append((x, y))
            weights = private.plain.weight.clone()
            oracle_of = torch.nn.Linear(4, 3)
            oracle_of.load_state_dict(private.plain.state_dict())
            private.optimizer.step()
            if not private.optimizer._is_last_step_skipped:
                break
    x, y = (torch.cat(values) for values in zip(*parts, strict=True))
    wanted = reference(oracle_of, nn.CrossEntropyLoss(), (x,), y, len(x)).clipped_sum(C)["weight"]
    torch.testing.assert_close(private.plain.weight, weights - 0.1 * wanted / BATCH)
    assert len(parts) > 1 and private.steps == steps + 1


def test_loop_goes_on_after_a_refusal(private: Private) -> None:
    batches = iter(private.loader)
    x, y = next(batches)
    private.refused("BatchMemoryManager", x[1:], y[1:])
    for batch in batches:
        private.step(*batch)
    assert private.steps == SIZE // BATCH - 1


@pytest.mark.parametrize("mode", MODES)
def test_rounds_with_the_loader_of_the_round_before(mode: str) -> None:
    """As in federated learning: each round has an engine, a model and an optimizer of its own."""
    private = Private(mode)
    loader = private.loader
    for _ in range(3):
        model = nn.Linear(4, 3)
        engine = PrivacyEngine(accountant="rdp")
        module, optimizer, criterion, again = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            criterion=nn.CrossEntropyLoss(),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=C,
            grad_sample_mode=mode,
        )
        for x, y in again:
            optimizer.zero_grad()
            criterion(module(x), y).backward()
            optimizer.step()
        assert engine.accountant.history == [(1.0, BATCH / SIZE, SIZE // BATCH)]
        criterion(module(x), y)
        loader = again


def test_two_models_take_turns_on_loaders_of_their_own() -> None:
    first, second = Private(), Private("ghost_bk")
    for a, b in zip(first.loader, second.loader, strict=True):
        first.step(*a)
        second.step(*b)
    assert first.steps == second.steps == SIZE // BATCH
    second.refused("without a draw of its own", *next(iter(first.loader)))


def test_optimizer_that_was_made_by_hand() -> None:
    """Nobody says what its batches are, and nothing is accounted."""
    module = GradSampleModuleFastGradientClipping(nn.Linear(4, 3), max_grad_norm=C)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=C, expected_batch_size=4
    )
    criterion = DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss())
    for size in (4, 9):
        optimizer.zero_grad()
        criterion(module(torch.randn(size, 4)), torch.randint(3, (size,))).backward()
        optimizer.step()


def test_random_sample_in_empty_batches() -> None:
    """Opacus' option, whose sample is nobody's."""
    private = Private(batch_size=1, rand_on_empty=True)
    sizes = []
    for x, y in private.loader:
        private.step(x, y)
        sizes.append(len(x))
    assert min(sizes) == 1 and private.steps == SIZE


def test_dataset_that_fails_now_and_then() -> None:
    private = Private()
    broken = private.loader.collate_fn.wrapped_collator_fn

    def collate(samples: list[Any]) -> Any:
        if next(count) == 2:
            raise OSError
        return broken(samples)

    count = itertools.count()
    private.loader.collate_fn.wrapped_collator_fn = collate
    batches = iter(private.loader)
    for number in range(SIZE // BATCH):
        if number == 2:
            with pytest.raises(OSError):  # noqa: PT011
                next(batches)
            continue
        x, y = next(batches)
        private.step(x, y)
        private.refused("without a draw of its own", x, y)
    assert private.steps == SIZE // BATCH - 1


# The count itself


def test_steps_of_several_draws() -> None:
    draws = Draws()
    add = draws.begin()
    for size in (3, 4, 5):
        add(size)
    draws.take(9, 2)
    with pytest.raises(PrivacyError, match="without a draw"):
        draws.take(5, 1)


def test_skipped_draws_are_no_steps_any_more() -> None:
    draws = Draws()
    add = draws.begin()
    for size in (3, 4, 5, 3):
        add(size)
    draws.take(4, 1)
    draws.take(3, 1)
    with pytest.raises(PrivacyError, match="without a draw"):
        draws.take(5, 1)


def test_steps_in_the_order_of_the_draws_are_never_refused() -> None:
    """Whatever was drawn besides, and never used."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(4, (40,), generator=generator).tolist()
        used = (torch.rand(40, generator=generator) < 0.6).tolist()
        draws = Draws()
        for epoch in range(4):
            add = draws.begin()
            for size in sizes[10 * epoch : 10 * epoch + 10]:
                add(size + 1)
        for size, taken in zip(sizes, used, strict=True):
            if taken:
                draws.take(size + 1, 1)


def test_empty_draws_may_be_of_an_epoch_that_nobody_steps_on() -> None:
    """As of an evaluation on the private loader."""
    draws = Draws()
    for sizes in ((0, 2, 0, 1), (1, 0, 2, 0)):
        add = draws.begin()
        for size in sizes:
            add(size)
    for size in (1, 0, 2, 0):
        draws.take(size, 1)
