"""Samples with inf or NaN in their gradients never reach the weights: they are refused, or count for nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_fgc import (
    DPLossFastGradientClipping,
    DPOptimizerFastGradientClipping,
    GradSampleModuleFastGradientClipping,
    PrivacyEngine,
)
from opacus_fgc.privacy_engine import MODES
from tests.case import Apply, Case, N, classes, floats, tokens
from tests.operation_cases import CASES
from tests.reference import Reference, reference
from tests.test_exact import assert_equal
from tests.test_privacy_engine import arguments, classifier

BAD = 2


def has_floats(case: Case) -> bool:
    # The table is made before the tests' dtype is set, which a model may need.
    inputs = [make(N) for make in case.inputs]
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in inputs)


def spoiled(case: Case, value: float) -> tuple[nn.Module, tuple[Any, ...], Tensor]:
    """Model, inputs and target, with a bad sample among the inputs."""
    model, inputs, target = case.make()
    for tensor in inputs:
        if tensor.is_floating_point():
            tensor.narrow(0 if case.batch_first else 1, BAD, 1).fill_(value)
    return model, inputs, target


def private(
    model: nn.Module,
    criterion: Callable,
    mode: str,
    max_grad_norm: float = 1.0,
    batch_first: bool = True,
    **options: Any,
) -> tuple[GradSampleModuleFastGradientClipping, DPLossFastGradientClipping]:
    module = GradSampleModuleFastGradientClipping(
        model, batch_first=batch_first, max_grad_norm=max_grad_norm, **options
    )
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(params), noise_multiplier=0.0, max_grad_norm=max_grad_norm, expected_batch_size=N
    )
    return module, DPLossFastGradientClipping(module, optimizer, criterion, backward=MODES[mode])


def without_bad(oracle: Reference) -> tuple[Reference, int]:
    """What is left, and how many samples are not."""
    good = oracle.total_norm().isfinite()
    left = Reference({name: gradient[good] for name, gradient in oracle.gradients.items()}, oracle.losses[good])
    return left, int((~good).sum())


@cache
def oracle_of(number: int, value: float) -> tuple[Reference, int]:
    """What `without_bad` leaves of a case of the table with this value in it; once for all tests."""
    case = CASES[number]
    model, inputs, target = spoiled(case, value)
    return without_bad(reference(model, case.loss("mean"), inputs, target, N, 0 if case.batch_first else 1))


WITH_FLOATS = [number for number, case in enumerate(CASES) if has_floats(case)]


@pytest.mark.every(3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", WITH_FLOATS, ids=lambda number: CASES[number].id)
def test_dropped_samples_contribute_exactly_nothing(number: int, mode: str) -> None:
    """Of a first step and of the next one, on NaN and on inf; each of these comes first in one of the modes."""
    case = CASES[number]
    values = (torch.nan, torch.inf) if mode == "ghost" else (torch.inf, torch.nan)
    model, _, _ = spoiled(case, values[0])
    max_grad_norm = oracle_of(number, values[0])[0].total_norm().median().item()
    module, criterion = private(model, case.loss("mean"), mode, max_grad_norm, case.batch_first, nonfinite="drop")
    dropped = 0
    for value in values:
        _, inputs, target = spoiled(case, value)
        oracle, bad = oracle_of(number, value)
        criterion(module(*inputs), target).backward()
        dropped += bad
        assert module.dropped == dropped
        for name, wanted in oracle.clipped_sum(max_grad_norm).items():
            assert_equal(model.get_parameter(name).summed_grad, wanted, name)
        criterion.optimizer.zero_grad()


def test_most_cases_have_a_bad_sample() -> None:
    assert sum(oracle_of(number, torch.nan)[1] for number in WITH_FLOATS) >= len(WITH_FLOATS) - 3


class Root(nn.Module):
    """Has an infinite slope at 0, where its value is finite."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


def large_first(model: nn.Sequential) -> nn.Sequential:
    model[0].weight.data.fill_(1e10)
    return model


def positive(model: nn.Sequential) -> nn.Sequential:
    model[0].weight.data.abs_()
    return model


def log_loss(output: Tensor, target: Tensor) -> Tensor:
    """Infinite where the output is 0."""
    return -output.log().mean(1)


PLACES = {
    "data": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),
        lambda x: x.index_fill(0, torch.tensor([BAD]), torch.nan),
        F.mse_loss,
        r"forward, in the input of layer '0' \(Linear\)",
    ),
    "overflow-in-forward": (
        lambda: large_first(nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))),
        lambda x: x.index_fill(0, torch.tensor([BAD]), 1e300),
        F.mse_loss,
        r"forward, in the input of layer '2' \(Linear\)",
    ),
    "backward": (
        lambda: positive(nn.Sequential(nn.Linear(3, 4, bias=False), Root(), nn.Linear(4, 2))),
        lambda x: x.index_fill(0, torch.tensor([BAD]), 0.0),
        F.mse_loss,
        r"backward, in the gradient of 0\.weight",
    ),
    "loss": (
        lambda: positive(nn.Sequential(nn.Linear(3, 2, bias=False))),
        lambda x: x.index_fill(0, torch.tensor([BAD]), 0.0),
        log_loss,
        "the loss, while the inputs of all trainable layers are finite",
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", PLACES)
def test_the_error_says_where(place: str, mode: str) -> None:
    torch.manual_seed(0)
    make, change, loss, message = PLACES[place]
    model, x, y = make(), change(torch.rand(N, 3)), torch.rand(N, 2)
    module, criterion = private(model, loss, mode)
    with pytest.raises(ValueError, match=f"of 1 of {N} samples.*it shows first in {message}"):
        criterion(module(x), y).backward()
    with pytest.raises(ValueError, match=r"step\(\) without a clipped gradient"):
        criterion.optimizer.step()


@pytest.mark.parametrize("mode", MODES)
def test_tied_and_reused_layers(mode: str) -> None:
    """Uses are held until all have come, and once more for the samples that are left."""
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor, scale: Tensor) -> Tensor:
        h = m.inner(m.inner(m.embedding(x)).tanh()) * scale[:, None]
        return F.linear(h, m.embedding.weight).mT

    model = Apply(forward, embedding=nn.Embedding(7, 3), inner=nn.Linear(3, 3))
    x, scale, y = tokens(7, 4)(N), floats(1)(N), tokens(7, 4)(N)
    scale[BAD] = torch.inf
    oracle, bad = without_bad(reference(model, classes("mean"), (x, scale), y, N))
    assert bad == 1
    module, criterion = private(model, classes("mean"), mode, 0.1, nonfinite="drop")
    criterion(module(x, scale), y).backward()
    for name, wanted in oracle.clipped_sum(0.1).items():
        assert_equal(model.get_parameter(name).summed_grad, wanted, name)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_bad_samples_is_an_empty_one(mode: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 2))
    module, criterion = private(model, nn.MSELoss(), mode, nonfinite="drop")
    criterion(module(torch.full((N, 1, 3, 3), torch.nan)), torch.zeros(N, 2)).backward()
    assert module.dropped == N
    assert all(torch.equal(param.summed_grad, torch.zeros_like(param)) for param in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_training_goes_on(mode: str) -> None:
    """With `make_private`, over batches of which some have bad samples; the weights stay finite."""
    torch.manual_seed(0)
    model = classifier()
    module, optimizer, criterion, loader = PrivacyEngine().make_private(
        **arguments(model, grad_sample_mode=mode, nonfinite="drop")
    )
    for x, y in loader:
        x[: len(x) // 2] = torch.inf
        optimizer.zero_grad()
        criterion(module(x), y).backward()
        optimizer.step()
    assert module.dropped > 0
    assert all(param.isfinite().all() for param in model.parameters())


def test_options() -> None:
    with pytest.raises(ValueError, match="nonfinite is 'skip'"):
        PrivacyEngine().make_private(**arguments(classifier(), grad_sample_mode="ghost", nonfinite="skip"))
    with pytest.raises(ValueError, match="nonfinite is 'skip'"):
        GradSampleModuleFastGradientClipping(classifier(), nonfinite="skip")


def test_two_passes_by_hand_cannot_drop() -> None:
    module = GradSampleModuleFastGradientClipping(nn.Linear(3, 2), nonfinite="drop")
    module(torch.full((N, 3), torch.nan)).sum().backward()
    with pytest.raises(ValueError, match=f"{N} of {N} samples"):
        module.get_clipping_coef()
