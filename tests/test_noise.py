"""The noise of each step: on every parameter that takes part, of the right size, fresh, and from the right generator.

Where no sample has a gradient ``summed_grad`` is 0, and ``p.grad`` times what it is divided by is the noise itself, to the bit.
Bounds are such that what is right fails a test once in 10,000 seeds, over all that it compares.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from opacus.schedulers import (
    ExponentialGradClip,
    ExponentialNoise,
    LambdaGradClip,
    LambdaNoise,
    StepGradClip,
    StepNoise,
)
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import PrivacyEngine
from opacus_fgc.privacy_engine import MODES

SIZE, BATCH = 64, 16
VOCABULARY, WIDTH = 40, 24
NOISE_MULTIPLIER, MAX_GRAD_NORM = 0.7, 3.0
STD = NOISE_MULTIPLIER * MAX_GRAD_NORM
RISK = 1e-4


class Model(nn.Module):
    """A lookup, a map, an own parameter, and a layer that a forward may leave out; the lookup's weight is also the head's."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.left_out = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, token: Tensor) -> Tensor:
        return self.head(torch.tanh(self.linear(self.embedding(token))) * self.scale)


def of_outputs(output: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy, of the outputs times the target's sign: 0 where the target is 0, and so is every gradient."""
    return (nn.functional.cross_entropy(output, target, reduction="none") * target.sign()).sum()


class Private:
    """A private model."""

    def __init__(self, mode: str, make: Callable[[], nn.Module] = Model, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(0)
        self.plain = make()
        self.params = [param for param in self.plain.parameters() if param.requires_grad]
        tokens = torch.randint(1, VOCABULARY, (2, SIZE))
        self.model, self.optimizer, self.criterion, self.loader = PrivacyEngine().make_private(
            module=self.plain,
            optimizer=torch.optim.SGD(self.plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
            criterion=of_outputs,
            data_loader=DataLoader(TensorDataset(*tokens), batch_size=BATCH),
            grad_sample_mode=mode,
            # The steps are on batches that are not drawn, of samples whose gradients are known.
            poisson_sampling=False,
            **{"noise_multiplier": NOISE_MULTIPLIER, "max_grad_norm": MAX_GRAD_NORM, **options},
        )
        torch.manual_seed(seed)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()
        self.optimizer.step()

    def noise(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """The noise of a step, by parameter, in the units of the clipped sum."""
        self.step(x, y)
        divisor = BATCH if self.optimizer.loss_reduction == "mean" else 1
        return [param.grad * divisor - param.summed_grad for param in self.params]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def batch(size: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x, y = torch.randint(1, VOCABULARY, (2, size), generator=generator)
    return x, y


def empty() -> tuple[Tensor, Tensor]:
    return batch(0)


def without_gradients() -> tuple[Tensor, Tensor]:
    x, y = batch()
    return x, torch.zeros_like(y)


def check_gaussian(noise: Tensor, std: float, tests: int = 1) -> None:
    """That draws are independent of a normal distribution with mean 0 and a known deviation; one of ``tests`` such checks."""
    draws, risk = noise.flatten().numpy() / std, RISK / 3 / tests
    assert stats.kstest(draws, "norm").pvalue > risk
    # Sharper than the former on the scale, and on the mean.
    below, above = stats.chi2.ppf([risk / 2, 1 - risk / 2], len(draws))
    assert below < (draws**2).sum() < above
    assert abs(draws.sum()) < len(draws) ** 0.5 * stats.norm.isf(risk / 2)


def check_unrelated(noise: dict[Any, Tensor]) -> None:
    """That no two of some vectors are correlated, nor one with itself moved by an element."""
    size = min(one.numel() for one in noise.values())
    rows = torch.stack([one.flatten()[:size] for one in noise.values()])
    rows = torch.cat([rows[:, 1:], rows[:, :-1]])
    pairs = len(rows) * (len(rows) - 1) / 2
    # The correlation of independent normal vectors has this as its exact distribution (Fisher 1915).
    bound = 2 * stats.beta.isf(RISK / pairs / 2, (size - 3) / 2, (size - 3) / 2) - 1
    correlation = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlation.abs().max().item() < bound


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("data", [batch, empty, without_gradients])
def test_noise_is_gaussian_on_every_parameter(mode: str, data: Callable, reduction: str) -> None:
    private = Private(mode, loss_reduction=reduction)
    steps = [private.noise(*data()) for _ in range(6)]
    if data is not batch:
        assert all(param.summed_grad.count_nonzero() == 0 for param in private.params)
    for draws in zip(*steps, strict=True):
        check_gaussian(torch.stack(draws), STD, tests=len(private.params))
    assert all((noise != 0).all() for step in steps for noise in step)


@pytest.mark.parametrize("data", [batch, empty, without_gradients])
def test_noise_is_fresh(mode: str, data: Callable) -> None:
    private = Private(mode)
    steps = [private.noise(*data()) for _ in range(5)]
    # Of all steps and parameters but the small ones; those are in the next test.
    large = [p for p, param in enumerate(private.params) if param.numel() >= WIDTH**2]
    assert len(large) == 4
    check_unrelated({(step, p): steps[step][p] for step in range(5) for p in large})


def test_no_number_is_drawn_twice(mode: str) -> None:
    private = Private(mode)
    steps = [private.noise(*data()) for data in (empty, without_gradients) * 3]
    numbers = torch.cat([noise.flatten() for step in steps for noise in step])
    assert len(numbers.abs().unique()) == len(numbers) == 6 * sum(param.numel() for param in private.params)


def test_tied_parameter_has_the_noise_of_one(mode: str) -> None:
    private = Private(mode, partial(Model, tied=True))
    assert len(private.params) == 6 and private.plain.head.weight is private.plain.embedding.weight
    steps = [private.noise(*data()) for data in (batch, empty) * 4]
    for draws in zip(*steps, strict=True):
        check_gaussian(torch.stack(draws), STD, tests=len(private.params))


@pytest.mark.parametrize("tied", [True, False])
def test_both_modes_draw_the_same_noise(tied: bool) -> None:
    runs = []
    for mode in MODES:
        private = Private(mode, partial(Model, tied), seed=5)
        noise = [private.noise(*empty())]
        for x, y in private.loader:
            private.step(x, y)
            noise.append(private.noise(*empty()))
        weights = torch.cat([param.detach().flatten() for param in private.params])
        runs.append((torch.cat([one.flatten() for step in noise for one in step]), weights))
    (noise, weights), (other_noise, other_weights) = runs
    assert torch.equal(noise, other_noise)
    torch.testing.assert_close(weights, other_weights, rtol=1e-10, atol=1e-10)


def test_the_seed_decides(mode: str) -> None:
    runs = {}
    for run, seed in enumerate((1, 1, 2)):
        private = Private(mode, seed=seed)
        for x, y in private.loader:
            private.step(x, y)
        runs[run] = torch.cat([noise.flatten() for noise in private.noise(*empty())])
    assert torch.equal(runs[0], runs[1])
    check_unrelated({1: runs[1], 2: runs[2]})


def test_noise_comes_from_its_generator_alone(mode: str) -> None:
    def run(seed: int, generator: int) -> tuple[Tensor, Tensor]:
        source = torch.Generator().manual_seed(generator)
        private = Private(mode, seed=seed, noise_generator=source)
        state = torch.get_rng_state()
        noise = torch.cat([one.flatten() for _ in range(2) for one in private.noise(*empty())])
        return noise, torch.get_rng_state() == state

    (noise, untouched), (same, _), (other, _) = run(1, 7), run(2, 7), run(1, 8)
    assert untouched.all()
    assert torch.equal(noise, same)
    check_unrelated({7: noise, 8: other})


SCHEDULES: dict[str, tuple[Callable[[Any], Any], Callable[[int], float]]] = {
    "clip-exponential": (lambda optimizer: ExponentialGradClip(optimizer, gamma=0.5), lambda step: 0.5**step),
    "clip-step": (lambda optimizer: StepGradClip(optimizer, step_size=2, gamma=0.3), lambda step: 0.3 ** (step // 2)),
    "clip-lambda": (
        lambda optimizer: LambdaGradClip(optimizer, scheduler_function=lambda step: 1 + step),
        lambda step: 1.0 + step,
    ),
    "noise-exponential": (lambda optimizer: ExponentialNoise(optimizer, gamma=0.5), lambda step: 0.5**step),
    "noise-step": (lambda optimizer: StepNoise(optimizer, step_size=2, gamma=0.3), lambda step: 0.3 ** (step // 2)),
    "noise-lambda": (
        lambda optimizer: LambdaNoise(optimizer, noise_lambda=lambda step: 1 + step),
        lambda step: 1.0 + step,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_follows_the_schedule_and_the_clip_the_noise(name: str, mode: str) -> None:
    private = Private(mode, max_grad_norm=0.01)
    make, factor = SCHEDULES[name]
    schedule = make(private.optimizer)
    for step in range(5):
        clipped_to = 0.01 * (factor(step) if name.startswith("clip") else 1)
        noise = private.noise(*batch(1))
        # One sample, whose gradient is far above the norm.
        norm = torch.stack([param.summed_grad.norm() for param in private.params]).norm()
        assert norm.item() == pytest.approx(clipped_to, rel=1e-9)
        check_gaussian(
            torch.cat([one.flatten() for one in noise]),
            NOISE_MULTIPLIER * 0.01 * factor(step),
            tests=5 * len(SCHEDULES),
        )
        schedule.step()


@pytest.mark.parametrize("frozen", ["embedding.weight", "linear.bias", "scale", "left_out.weight"])
def test_frozen_parameters_get_no_noise_and_stay(mode: str, frozen: str) -> None:
    def make() -> nn.Module:
        model = Model()
        model.get_parameter(frozen).requires_grad_(False)
        return model

    private = Private(mode, make)
    before = {name: param.detach().clone() for name, param in private.plain.named_parameters()}
    steps = [private.noise(*data()) for data in (batch, empty, without_gradients)]
    check_gaussian(torch.cat([noise.flatten() for step in steps for noise in step]), STD)
    for name, param in private.plain.named_parameters():
        if name == frozen:
            assert param.grad is None and torch.equal(param, before[name])
        else:
            assert (param != before[name]).all()


def test_frozen_layers_take_no_numbers_out_of_the_sequence(mode: str) -> None:
    def with_frozen() -> nn.Module:
        frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), frozen, nn.Linear(WIDTH, VOCABULARY))

    def without() -> nn.Module:
        return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY))

    runs = [Private(mode, make, seed=3).noise(*empty()) for make in (with_frozen, without)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
