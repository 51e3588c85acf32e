"""The budget after real training steps, against Google's `dp-accounting`.

Each way to train says what it did: noise multiplier, sampling rate, and number of steps, counted here and not read from the
engine. Google's accountants turn that into epsilon, and the engine's has to say the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.schedulers import ExponentialGradClip, ExponentialNoise, StepNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import PrivacyEngine
from opacus_fgc.privacy_engine import MODES
from tests.case import two_passes_by_hand

SIZE, BATCH = 60, 10
RATE = BATCH / SIZE
ORDERS = range(2, 64)


class Steps(NamedTuple):
    """Some steps of the Poisson-subsampled Gaussian mechanism."""

    noise_multiplier: float
    rate: float
    number: int


def spent(accountant: dp_accounting.PrivacyAccountant, history: list[Steps], delta: float) -> float:
    for steps in history:
        gaussian = dp_accounting.GaussianDpEvent(steps.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(steps.rate, gaussian), steps.number)
    return accountant.get_epsilon(delta)


@cache
def tightly_spent(history: tuple[Steps, ...], delta: float) -> float:
    """The same whatever the mode, so once for all."""
    return spent(PLDAccountant(value_discretization_interval=1e-3), list(history), delta)


def check(engine: PrivacyEngine, history: list[Steps], delta: float) -> None:
    epsilon = engine.get_epsilon(delta)
    tight = tightly_spent(tuple(history), delta)
    if engine.accountant.mechanism() == "rdp":
        # At orders between integers Google's series is a bound, since it adds up terms without their signs.
        at_orders = engine.accountant.get_epsilon(delta, alphas=ORDERS)
        assert at_orders == pytest.approx(spent(RdpAccountant(ORDERS), history, delta), rel=1e-8)
        assert tight < epsilon < at_orders * 1.001
    else:
        # Both round up: Google's by its grid, Opacus' by its error, which is 0.01.
        assert tight * 0.999 < epsilon < tight * 1.005 + 0.01


class Private:
    """A small private model with its loop, which counts."""

    def __init__(self, accountant: str, mode: str, size: int = SIZE, batch_size: int = BATCH, **options: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.engine = PrivacyEngine(accountant=accountant)
        make = self.engine.make_private_with_epsilon if "epochs" in options else self.engine.make_private
        self.model, self.optimizer, self.criterion, self.loader = make(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(
                TensorDataset(torch.randn(size, 4), torch.randint(3, (size,))), batch_size=batch_size
            ),
            max_grad_norm=0.5,
            grad_sample_mode=mode,
            **options,
        )

    def backward(self, x: Tensor, y: Tensor) -> None:
        self.criterion(self.model(x), y).backward()

    def epoch(self, loader: Any = None) -> list[int]:
        """Trains for an epoch; the sizes of its batches."""
        sizes = []
        for x, y in self.loader if loader is None else loader:
            self.optimizer.zero_grad()
            self.backward(x, y)
            self.optimizer.step()
            sizes.append(len(x))
        return sizes


# The accountant's own work is the same whatever the mode, and that of "prv" takes seconds.
@pytest.fixture(params=[*(("rdp", mode) for mode in MODES), ("prv", "ghost")], ids="-".join)
def make_private(request: pytest.FixtureRequest) -> Callable[..., Private]:
    return partial(Private, *request.param)


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "noise_multiplier, size, batch_size, epochs, delta",
    [
        (1.0, 60, 10, 2, 1e-5),
        (0.6, 100, 2, 3, 1e-3),
        (3.0, 30, 15, 20, 1e-6),
        # 7 batches: the rate is 1/7, not 8/50.
        (1.3, 50, 8, 3, 1e-4),
        # All at once, which leaves nothing to sampling.
        (4.0, 20, 20, 5, 1e-5),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")  # of Opacus' "prv" at rate 1
def test_epochs(
    make_private: Any, noise_multiplier: float, size: int, batch_size: int, epochs: int, delta: float
) -> None:
    private = make_private(size, batch_size, noise_multiplier=noise_multiplier)
    sizes = [n for _ in range(epochs) for n in private.epoch()]
    batches = math.ceil(size / batch_size)
    assert len(sizes) == batches * epochs
    # The samples were drawn by the rate that is accounted.
    assert binomtest(sum(sizes), size * len(sizes), 1 / batches).pvalue > 1e-3
    check(private.engine, [Steps(noise_multiplier, 1 / batches, len(sizes))], delta)


def virtual_steps(private: Private) -> list[Steps]:
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=3, optimizer=private.optimizer
    ) as loader:
        physical = [n for _ in range(2) for n in private.epoch(loader)]
    assert max(physical) == 3 and len(physical) > 4 * SIZE / BATCH
    return [Steps(1.0, RATE, 2 * SIZE // BATCH)]


def virtual_steps_cleared_once_a_step(private: Private) -> list[Steps]:
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=3, optimizer=private.optimizer
    ) as loader:
        for x, y in loader:
            private.backward(x, y)
            private.optimizer.step()
            if not private.optimizer._is_last_step_skipped:
                private.optimizer.zero_grad()
    return [Steps(1.0, RATE, SIZE // BATCH)]


def schedule_of_noise(private: Private) -> list[Steps]:
    scheduler = ExponentialNoise(private.optimizer, gamma=1.2)
    number = []
    for _ in range(3):
        number.append(len(private.epoch()))
        scheduler.step()
    return [Steps(1.2**epoch, RATE, steps) for epoch, steps in enumerate(number)]


def noise_that_comes_back(private: Private) -> list[Steps]:
    scheduler = StepNoise(private.optimizer, step_size=1, gamma=2.0)
    first = len(private.epoch())
    scheduler.step()
    second = len(private.epoch())
    private.optimizer.noise_multiplier = 1.0
    return [Steps(1.0, RATE, first + len(private.epoch())), Steps(2.0, RATE, second)]


def schedule_of_the_norm(private: Private) -> list[Steps]:
    # The noise goes with the norm, so this costs nothing.
    scheduler = ExponentialGradClip(private.optimizer, gamma=0.3)
    number = len(private.epoch())
    scheduler.step()
    return [Steps(1.0, RATE, number + len(private.epoch()))]


def passes_by_hand(private: Private) -> list[Steps]:
    number = 0
    for x, y in private.loader:
        private.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(private.model(x), y, reduction="none")
        two_passes_by_hand(private.model, loss)
        private.optimizer.step()
        number += 1
    return [Steps(1.0, RATE, number)]


def steps_that_failed(private: Private) -> list[Steps]:
    # Refused before any noise, so nothing was released.
    with pytest.raises(ValueError, match=r"step\(\) without a clipped gradient"):
        private.optimizer.step()
    number = len(private.epoch())
    with pytest.raises(ValueError, match="haven't been cleared"):
        private.optimizer.step()
    return [Steps(1.0, RATE, number)]


@pytest.mark.parametrize(
    "train",
    [
        virtual_steps,
        virtual_steps_cleared_once_a_step,
        schedule_of_noise,
        noise_that_comes_back,
        schedule_of_the_norm,
        passes_by_hand,
        steps_that_failed,
    ],
)
def test_ways_to_train(make_private: Any, train: Callable[[Private], list[Steps]]) -> None:
    private = make_private(noise_multiplier=1.0)
    check(private.engine, train(private), 1e-5)


@pytest.mark.parametrize("backwards", [2, 3])
def test_accumulated_backwards(make_private: Any, backwards: int) -> None:
    private = make_private(noise_multiplier=2.0, poisson_sampling=False)
    batches = list(private.loader)
    for start in range(0, len(batches), backwards):
        private.optimizer.zero_grad()
        for x, y in batches[start : start + backwards]:
            private.backward(x, y)
        private.optimizer.step()
    check(private.engine, [Steps(2.0, backwards * RATE, len(batches) // backwards)], 1e-5)


@pytest.mark.parametrize("physical", [None, 1])
def test_empty_batches_count(make_private: Any, physical: int | None) -> None:
    private = make_private(size=40, batch_size=1, noise_multiplier=0.8)
    if physical is None:
        sizes = private.epoch()
        assert len(sizes) == 40
    else:
        with BatchMemoryManager(
            data_loader=private.loader, max_physical_batch_size=physical, optimizer=private.optimizer
        ) as loader:
            sizes = private.epoch(loader)
    assert sizes.count(0) > 5
    check(private.engine, [Steps(0.8, 1 / 40, 40)], 1e-4)


@pytest.mark.every(5)
@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")  # on the way to the noise multiplier
@pytest.mark.parametrize("target, delta, epochs", [(1.0, 1e-3, 3), (3.0, 1e-5, 2)])
def test_target_epsilon_is_what_is_spent(make_private: Any, target: float, delta: float, epochs: int) -> None:
    private = make_private(target_epsilon=target, target_delta=delta, epochs=epochs)
    steps = sum(len(private.epoch()) for _ in range(epochs))
    history = [Steps(private.optimizer.noise_multiplier, RATE, steps)]
    check(private.engine, history, delta)
    assert 0.98 * target < private.engine.get_epsilon(delta) < target
