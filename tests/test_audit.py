"""An audit: what an adversary finds out about who was in the training is no more than the accountant says.

Canaries are samples whose gradient is one coordinate of one parameter and far above the clipping norm ("Dirac canaries", Nasr et
al. 2021, arXiv:2101.04535), so no sample hides another's. Each is in the training set or not by the toss of a coin. The adversary
sees the weights after every step and says for each canary whether it was in. From how often that is right and wrong follows a
lower bound on epsilon (Kairouz et al. 2015, arXiv:1311.0776; counted as in Jagielski et al. 2020, arXiv:2006.07709):

    epsilon >= log((P[says in | in] - delta) / P[says in | out]).

The canaries of one run count as independent trials: they are, where each sample is clipped, sampled and noised by itself. That
is what is asked, so a bound above the accountant's epsilon says at 95 % that this, or the account, is wrong. It holds for every
delta; at one near 0 it would take far more canaries to see the events that decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from opacus.accountants import PRVAccountant
from scipy.stats import beta
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import DPOptimizerFastGradientClipping, PrivacyEngine
from opacus_fgc.clipping import FlatClipping
from opacus_fgc.per_sample import Measured, Rows
from opacus_fgc.planner import Room
from opacus_fgc.privacy_engine import MODES

COORDINATES = 1000  # of each parameter, and so canaries
RUNS, BATCHES, EPOCHS = 6, 4, 2
NOISE_MULTIPLIER, MAX_GRAD_NORM, DELTA = 0.7, 0.5, 0.1
RATE = 1 / BATCHES


class Coordinates(nn.Module):
    """Maps canary ``i`` to its own weight: of a layer with activations, of an operation, of a lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(COORDINATES, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(COORDINATES))
        self.embedding = nn.Embedding(1 + COORDINATES, 1, padding_idx=0)

    def forward(self, canary: Tensor) -> Tensor:
        hot = F.one_hot(canary, 3 * COORDINATES).to(self.scale)
        row = (canary - 2 * COORDINATES + 1).clamp(min=0)
        scaled = hot[:, COORDINATES : 2 * COORDINATES] * self.scale
        return self.linear(hot[:, :COORDINATES])[:, 0] + scaled.sum(1) + self.embedding(row)[:, 0]

    def weights(self) -> Tensor:
        """The weight of each canary."""
        return torch.cat([self.linear.weight[0], self.scale, self.embedding.weight[1:, 0]]).detach().clone()


def train(mode: str) -> tuple[Tensor, Tensor, PrivacyEngine]:
    """One run: a score for each canary, whether it was in, and the engine that kept the account."""
    coordinates = Coordinates()
    included = torch.rand(3 * COORDINATES) < 0.5
    canaries = included.nonzero()[:, 0]
    engine = PrivacyEngine()
    model, optimizer, criterion, loader = engine.make_private(
        module=coordinates,
        optimizer=torch.optim.SGD(coordinates.parameters(), lr=1.0),
        criterion=nn.MSELoss(),
        # A gradient of norm 2000.
        data_loader=DataLoader(
            TensorDataset(canaries, torch.full((len(canaries),), 1e3)), batch_size=math.ceil(len(canaries) / BATCHES)
        ),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=MAX_GRAD_NORM,
        grad_sample_mode=mode,
    )
    score = torch.zeros(3 * COORDINATES)
    weights = coordinates.weights()
    for _ in range(EPOCHS):
        for canary, target in loader:
            optimizer.zero_grad()
            criterion(model(canary), target).backward()
            optimizer.step()
            moved = (coordinates.weights() - weights) * optimizer.expected_batch_size / MAX_GRAD_NORM
            weights = coordinates.weights()
            # The log likelihood ratio of (1 - rate) N(0, s^2) + rate N(1, s^2) to N(0, s^2): the best score if all is right.
            ratio = (moved - 0.5) / NOISE_MULTIPLIER**2
            score += torch.logaddexp(torch.tensor(math.log(1 - RATE)), math.log(RATE) + ratio)
    return score, included, engine


def lower_bound(found: np.ndarray, wrong: np.ndarray, n_in: int, n_out: int, miss: float = 0.025) -> np.ndarray:
    """Lower bounds on epsilon, with the bounds of Clopper and Pearson on both rates, each missing with probability ``miss``.

    ``found`` of the ``n_in`` canaries that were in were said to be in, and ``wrong`` of the ``n_out`` that were not.
    """
    true = np.where(found > 0, beta.ppf(miss, np.maximum(found, 1), n_in - found + 1), 0.0)
    false = np.where(wrong < n_out, beta.ppf(1 - miss, wrong + 1, np.maximum(n_out - wrong, 1)), 1.0)
    return np.log(np.maximum(true - DELTA, 1e-9) / false)


def audit(mode: str, seed: int = 0) -> tuple[float, float]:
    """The lower bound, and the accountant's epsilon."""
    torch.manual_seed(seed)
    runs = [train(mode) for _ in range(RUNS)]
    engine = runs[0][2]
    assert all(other.accountant.history == engine.accountant.history for _, _, other in runs)
    scores = np.stack([score.numpy() for score, _, _ in runs])
    included = np.stack([included.numpy() for _, included, _ in runs])

    def bounds(runs: slice, params: slice, thresholds: np.ndarray, miss: float = 0.025) -> np.ndarray:
        """Of saying "in" above each threshold."""
        score, truth = scores[runs, params].ravel(), included[runs, params].ravel()
        said = score > thresholds[:, None]
        return lower_bound((said & truth).sum(1), (said & ~truth).sum(1), truth.sum(), (~truth).sum(), miss)

    # The adversary chooses in one half of the runs by which parameter to go, and by which threshold; the other half counts.
    # 1e-4, since the best of hundreds is chosen.
    chosen = (-math.inf, slice(0), 0.0)
    half = slice(None, RUNS // 2), slice(RUNS // 2, None)
    for params in (slice(None), *(slice(p * COORDINATES, (p + 1) * COORDINATES) for p in range(3))):
        thresholds = np.quantile(scores[half[0], params], np.linspace(0.01, 1, 100), method="lower")
        tried = bounds(half[0], params, thresholds, 1e-4)
        best = tried.argmax()
        chosen = max(chosen, (tried[best], params, thresholds[best]), key=lambda one: one[0])
    _, params, threshold = chosen
    return float(bounds(half[1], params, np.array([threshold]))[0]), engine.get_epsilon(DELTA)


def test_the_bound_of_randomized_response() -> None:
    # Right 3 times out of 4 is epsilon = log 3 at delta = 0; here log(0.65 / 0.25), from below.
    n = 10**7
    (bound,) = lower_bound(np.array([n * 3 // 4]), np.array([n // 4]), n, n)
    assert math.log(0.65 / 0.25) - 0.003 < bound < math.log(0.65 / 0.25)
    # All of 20 and none of 20, where the ends of the intervals are 0.025^(1/20) and 1 - 0.025^(1/20).
    (bound,) = lower_bound(np.array([20]), np.array([0]), 20, 20)
    assert bound == pytest.approx(math.log((0.025 ** (1 / 20) - DELTA) / (1 - 0.025 ** (1 / 20))))


@pytest.mark.parametrize("mode", MODES)
def test_the_accountant_is_right(mode: str) -> None:
    bound, epsilon = audit(mode)
    print(f"\n{mode}: epsilon is {bound:.2f} or more; {epsilon:.2f} by the accountant")
    # Were the bound far below, it could not tell right from wrong.
    assert 0.6 * epsilon < bound < epsilon


def without_clipping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FlatClipping, "coefficients", lambda self, norms: torch.ones_like(norms))


def clipping_to_more(patch: pytest.MonkeyPatch) -> None:
    right = FlatClipping.coefficients
    patch.setattr(FlatClipping, "coefficients", lambda self, norms: 1.5 * right(self, norms))


def norms_without_one_parameter(patch: pytest.MonkeyPatch) -> None:
    right = Rows.measured

    def measured(self: Rows, room: Room) -> Measured:
        one = right(self, room)
        return one._replace(norm=torch.zeros_like(one.norm))

    patch.setattr(Rows, "measured", measured)


def change_noise(patch: pytest.MonkeyPatch, std_of: Callable[[Tensor, float], float]) -> None:
    right = DPOptimizerFastGradientClipping.with_noise

    def changed(self: DPOptimizerFastGradientClipping, values: Tensor, std: float) -> Tensor:
        return right(self, values, std_of(values, std))

    patch.setattr(DPOptimizerFastGradientClipping, "with_noise", changed)


def noise_by_a_smaller_norm(patch: pytest.MonkeyPatch) -> None:
    change_noise(patch, lambda values, std: std / 1.5)


def noise_on_all_but_one_parameter(patch: pytest.MonkeyPatch) -> None:
    change_noise(patch, lambda values, std: 0.0 if values.shape == (COORDINATES,) else std)


def rate_of_half(patch: pytest.MonkeyPatch) -> None:
    right = PRVAccountant.step
    patch.setattr(PRVAccountant, "step", lambda self, **step: right(self, **{**step, "sample_rate": RATE / 2}))


def half_of_the_steps(patch: pytest.MonkeyPatch) -> None:
    right, calls = PRVAccountant.step, []

    def step(self: PRVAccountant, **options: Any) -> None:
        calls.append(options)
        if len(calls) % 2:
            right(self, **options)

    patch.setattr(PRVAccountant, "step", step)


@pytest.mark.every(3)
# What is broken here is the same object in both modes, but for norms; so each of the others is broken in one.
@pytest.mark.parametrize(
    "mode, break_it",
    [
        ("ghost", without_clipping),
        ("ghost_bk", clipping_to_more),
        ("ghost", norms_without_one_parameter),
        ("ghost_bk", norms_without_one_parameter),
        ("ghost", noise_by_a_smaller_norm),
        ("ghost_bk", noise_on_all_but_one_parameter),
        ("ghost", rate_of_half),
        ("ghost_bk", half_of_the_steps),
    ],
)
def test_the_audit_sees_what_is_broken(mode: str, break_it: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it(monkeypatch)
    bound, epsilon = audit(mode)
    print(f"\n{mode}, {break_it.__name__}: {bound:.2f} or more; {epsilon:.2f} by the accountant")
    assert bound > epsilon
