"""What a step asks of a GPU, counted on a CPU: how often it is waited for, and how many kernels it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import Transformer, ViT

from opacus_fgc import GradSampleModuleFastGradientClipping, PrivacyEngine, planner
from opacus_fgc.clipping import note_finite
from opacus_fgc.per_sample import Outer, PerSampleGradient, doubts
from opacus_fgc.per_sample.doubts import Doubts
from opacus_fgc.planner import NormMethod
from opacus_fgc.privacy_engine import MODES
from opacus_fgc.step import norm_pass
from tests.case import Case
from tests.device_work import DeviceWork
from tests.operation_cases import CASES
from tests.test_bound import BOUND, Difference, contribution, drop, forms
from tests.test_exact import WAYS, assert_equal, expected, private

both_modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on a CPU is taken to lie on a device that has to be waited for."""
    monkeypatch.setattr(doubts, "READ_FREELY", frozenset())


# Models


class Residual(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels_in, channels, 3, stride, 1), nn.GroupNorm(4, channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, 1, 1), nn.GroupNorm(4, channels)
        self.around = nn.Conv2d(channels_in, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.around(x))


def cnn() -> nn.Module:
    blocks = [Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 32, 2)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.lstm = DPLSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0][:, -1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


N = 4
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "mlp": (mlp, lambda: (torch.randn(N, 16), torch.randint(10, (N,)))),
    "language model": (
        lambda: Transformer(50, 16, 32, depth=2, heads=2),
        lambda: (torch.randint(50, (N, 16)), torch.randint(50, (N, 16))),
    ),
    "cnn": (cnn, lambda: (torch.randn(N, 3, 16, 16), torch.randint(10, (N,)))),
    "vit": (lambda: ViT(16, width=48, depth=2), lambda: (torch.randn(N, 3, 16, 16), torch.randint(10, (N,)))),
}
RECURRENT = {"dplstm": (Recurrent, lambda: (torch.randint(50, (N, 6)), torch.randint(10, (N,))))}
every_model = pytest.mark.parametrize("name", MODELS)

# The steps of which certificates are a part are the first ones, and others after four times as many; see `Schedule`.
STEPS = 6


def steady_step(name: str, mode: str | None, device: str = "cpu", **options: Any) -> DeviceWork:
    """What a step does on which no certificate is due: forward, backward, clip, noise, step."""
    torch.manual_seed(0)
    make, batch = (MODELS | RECURRENT)[name]
    with torch.device(device):
        model, (x, y) = make().float(), batch()
    x = x.float() if x.is_floating_point() else x
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01)
    criterion: Any = nn.CrossEntropyLoss()
    loader = DataLoader(TensorDataset(torch.zeros(N, 1)), batch_size=N)
    if mode is not None:
        model, optimizer, criterion, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
            **options,
        )
    for _ in range(STEPS):
        for _batch in loader:
            with DeviceWork() as work:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()
    return work


@pytest.mark.every(3)
@both_modes
@every_model
def test_a_step_waits_for_the_device_once(name: str, mode: str, as_on_a_gpu: None) -> None:
    """Whether all norms are finite, and none is doubtful, is one question."""
    assert steady_step(name, mode).reads == {("tolist", "step/norm_pass.py:_look_at"): 1}


# Kernels of a step without privacy, of "ghost_bk" and of "ghost", with torch 2.13; of the ViT with 2.6, which has more.
KERNELS = {"mlp": (26, 69, 80), "language model": (130, 446, 471), "cnn": (95, 377, 453), "vit": (135, 450, 480)}


@pytest.mark.every(2)
@every_model
def test_kernels_of_a_step(name: str, as_on_a_gpu: None) -> None:
    counts = [sum(steady_step(name, mode).kernels.values()) for mode in (None, "ghost_bk", "ghost")]
    print(f"\n{name}: {counts}, ratios {', '.join(f'{count / counts[0]:.2f}' for count in counts[1:])}")
    assert all(count <= most for count, most in zip(counts, KERNELS[name], strict=True))


@pytest.mark.every(3)
@both_modes
@pytest.mark.parametrize("name", [*MODELS, *RECURRENT])
def test_a_step_on_another_device(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On "meta", which has shapes and no values: all that looks at values raises, and nothing is on the CPU but what looks."""
    looks = []

    def look_at(norms: Tensor, noted: Doubts | None) -> list[Any]:
        assert noted is not None and norms.device.type == "meta"
        looks.append(noted.flags(norms.device))
        note_finite(norms)
        return []

    monkeypatch.setattr(norm_pass, "_look_at", look_at)
    with pytest.warns(UserWarning, match="certify='never'"):
        work = steady_step(name, mode, "meta", certify="never")
    assert len(looks) == STEPS
    assert not work.elsewhere and not work.reads


# What is doubtful


@both_modes
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_oracle(case: Case, mode: str, as_on_a_gpu: None) -> None:
    oracle = expected(case, "mean")
    max_grad_norm = oracle.total_norm().median().item()
    model, wrapper, _ = private(case, "wrapped", "mean", max_grad_norm, **WAYS[mode])
    clipped = oracle.clipped_sum(max_grad_norm)
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert_equal(param._norm_sample, oracle.norms()[name], f"norms of {name}")
            assert_equal(param.summed_grad, clipped[name], f"clipped sum of {name}")
    assert_equal(wrapper.per_sample_gradient_norms, oracle.total_norm(), "norms")


@settings(max_examples=300, deadline=None)
@given(form=forms())
def test_what_is_not_doubtful_is_right(form: PerSampleGradient) -> None:
    """A norm that is noted in a pass is what it is on a CPU, or noted as doubtful; so are norms that are left for later."""
    cheapest, planner.cheapest = planner.cheapest, lambda options: NormMethod.GRAM
    read_freely, doubts.READ_FREELY = doubts.READ_FREELY, frozenset()
    try:
        for later in (False, True):
            noted = Doubts()
            with noted.noting("param"):
                norms = form.measured(planner.Room(everything=True, later=later)).norm
            norms = dict(noted.finish()).get("param", norms)
            _, flags = noted.flags(norms.device)
            right = form.norm()
            if flags is None or not flags.any():
                torch.testing.assert_close(norms, right, rtol=2e-5, atol=0)
    finally:
        planner.cheapest, doubts.READ_FREELY = cheapest, read_freely


def outer(left: Tensor, right: Tensor) -> Outer:
    return Outer(left, right, torch.Size((left.shape[2], right.shape[2])))


def flagged(*several: Outer) -> list[bool]:
    noted = Doubts()
    for place, form in enumerate(several):
        with noted.noting(place):
            assert form.gram().left_for_later()
    norms = dict(noted.finish())
    assert sorted(norms) == list(range(len(several)))
    params, flags = noted.flags(torch.device("cpu"))
    assert flags is not None
    by_param = dict(zip(params, flags.tolist(), strict=True))
    return [by_param[place] for place in range(len(several))]


def test_which_norms_are_doubtful(as_on_a_gpu: None) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(N, 8, 5).float(), torch.randn(N, 8, 4).float()
    nothing = torch.zeros_like(right)
    some = right.clone()
    some[:, 3:] = 0  # as where only a class token counts
    assert flagged(outer(left, right), outer(left, nothing), outer(left, some)) == [False] * 3
    takes_away = right.clone()
    left[1, 1], takes_away[1] = left[1, 0], 0
    takes_away[1, 0] = right[1, 0]
    takes_away[1, 1] = -0.999999 * right[1, 0]
    assert flagged(outer(left, right), outer(left, takes_away)) == [False, True]
    # Squares of one side vanish, and what it is multiplied with is large.
    assert flagged(outer(1e-24 * left, 1e18 * right), outer(left, right)) == [True, False]
    # Beside the other positions, what vanishes is nothing.
    small = left.clone()
    small[:, 0] *= 1e-24
    assert flagged(outer(small, right)) == [False]
    assert flagged(outer(left, torch.full_like(right, torch.nan))) == [True]


class Passes:
    """Counts the passes to the taps, by whether norms are looked at as they come."""

    def __init__(self, wrapped: GradSampleModuleFastGradientClipping, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looking: list[bool] = []
        before = wrapped._backward_to_taps

        def counted(*args: Any, **kwargs: Any) -> None:
            if not wrapped.certification.certifying:
                self.looking.append(wrapped.record.doubts is None)
            before(*args, **kwargs)

        monkeypatch.setattr(wrapped, "_backward_to_taps", counted)


@both_modes
@pytest.mark.parametrize("left_over", [0.9, 0.01, 1e-3])
def test_doubtful_norms_are_computed_again(
    mode: str, left_over: float, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a second pass that looks at them as they come, or from what the first kept."""
    torch.manual_seed(0)
    for _ in range(5):
        wrapped = GradSampleModuleFastGradientClipping(Difference(left_over).float(), max_grad_norm=1e-5)
        x = torch.randn(1, 48, dtype=torch.float32)
        with monkeypatch.context() as patch:
            MODES[mode](wrapped, wrapped(x).square().sum(1))  # certified
            drop(wrapped)
            wrapped.clipped_sum.passes = 0
            passes = Passes(wrapped, patch)
            patch.setattr(planner, "cheapest", lambda options: NormMethod.GRAM)
            patch.setattr(planner, "MEMORY", planner.Memory(ghost=planner.NOTHING))
            MODES[mode](wrapped, wrapped(x).square().sum(1))
        assert passes.looking == [False] + [True] * (mode == "ghost" and left_over < 0.5)
        assert 0.99e-5 < contribution(wrapped) <= 1e-5 * BOUND
