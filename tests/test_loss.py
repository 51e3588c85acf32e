"""The criterion: one loss a sample, whatever the criterion's shape; arithmetic on it; or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping as OpacusLoss
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping as OpacusTensor
from torch import Tensor, nn

from opacus_fgc import (
    DPLossFastGradientClipping,
    DPOptimizerFastGradientClipping,
    DPTensorFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
from opacus_fgc.loss import Backward, double_backward
from opacus_fgc.privacy_engine import MODES
from tests.reference import reference
from tests.test_exact import assert_equal

N, D = 5, 3
VOCABULARY, LENGTH = 7, 4


def wrapped(
    model: nn.Module,
    criterion: Any,
    reduction: str = "mean",
    max_grad_norm: float = 0.05,
    backward: Backward = double_backward,
):
    module = GradSampleModuleFastGradientClipping(model, loss_reduction=reduction, max_grad_norm=max_grad_norm)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        expected_batch_size=N,
        loss_reduction=reduction,
    )
    return module, DPLossFastGradientClipping(module, optimizer, criterion, reduction, backward)


def check(model: nn.Module, criterion: Any, plain: Callable, x: Tensor, y: Tensor, reduction: str = "mean") -> None:
    """A private criterion against the plain one, which the oracle evaluates on each sample."""
    oracle = reference(model, plain, (x,), y, len(x))
    clipped = oracle.clipped_sum(0.05)
    for backward in MODES.values():
        copied = copy.deepcopy(model)
        module, private = wrapped(copied, criterion, reduction, backward=backward)
        loss = private(module(x), y)
        loss.backward()
        assert_equal(loss.loss_per_sample.detach(), oracle.losses, "losses")
        for name, param in copied.named_parameters():
            assert_equal(param.summed_grad, clipped[name], name)


LOSSES: dict[str, tuple[Callable, int, Callable[[], Tensor]]] = {
    "cross-entropy": (nn.CrossEntropyLoss, D, lambda: torch.randint(D, (N,))),
    "cross-entropy-smoothed": (
        lambda **k: nn.CrossEntropyLoss(label_smoothing=0.1, **k),
        D,
        lambda: torch.randint(D, (N,)),
    ),
    "cross-entropy-soft": (nn.CrossEntropyLoss, D, lambda: torch.rand(N, D).softmax(1)),
    "mse-one-output": (nn.MSELoss, 1, lambda: torch.randn(N, 1)),
    "mse": (nn.MSELoss, D, lambda: torch.randn(N, D)),
    "l1": (nn.L1Loss, D, lambda: torch.randn(N, D)),
    "huber": (nn.HuberLoss, D, lambda: torch.randn(N, D)),
    "bce-one-output": (nn.BCEWithLogitsLoss, 1, lambda: torch.rand(N, 1)),
    "bce": (nn.BCEWithLogitsLoss, D, lambda: torch.rand(N, D)),
    "multi-margin": (nn.MultiMarginLoss, D, lambda: torch.randint(D, (N,))),
    "multi-label": (nn.MultiLabelSoftMarginLoss, D, lambda: torch.randint(2, (N, D)).double()),
    "soft-margin": (nn.SoftMarginLoss, D, lambda: torch.randint(2, (N, D)) * 2.0 - 1),
    "poisson": (nn.PoissonNLLLoss, D, lambda: torch.rand(N, D)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_torch(name: str, reduction: str) -> None:
    torch.manual_seed(0)
    make, outputs, target = LOSSES[name]
    x, y = torch.randn(N, 4), target()
    check(nn.Linear(4, outputs), make(reduction=reduction), make(reduction=reduction), x, y, reduction)


def test_functional_criterion() -> None:
    x, y = torch.randn(N, 4), torch.randint(D, (N,))
    check(nn.Linear(4, D), F.cross_entropy, F.cross_entropy, x, y)
    assert not hasattr(F.cross_entropy, "reduction")


def test_own_criterion_without_reduction() -> None:
    class Own(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return (output - target).square().sum(1)

    x, y = torch.randn(N, 4), torch.randn(N, D)
    check(nn.Linear(4, D), Own(), lambda output, target: Own()(output, target).sum(), x, y)


def test_image_of_classes() -> None:
    x, y = torch.randn(N, 2, 5, 5), torch.randint(D, (N, 3, 3))
    check(nn.Conv2d(2, D, 3), nn.CrossEntropyLoss(), nn.CrossEntropyLoss(), x, y)


@pytest.mark.parametrize("scalar", [lambda o, y: F.cross_entropy(o, y), lambda o, y: 1.0])
def test_reduced_criterion_is_refused(scalar: Callable) -> None:
    module, criterion = wrapped(nn.Linear(4, D), scalar)
    with pytest.raises(ValueError, match="one value for the whole batch"):
        criterion(module(torch.randn(N, 4)), torch.randint(D, (N,)))


def flattened_tokens(ignored: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY))
    y = torch.randint(1, VOCABULARY, (N, LENGTH))
    y[0, 2:], y[1, 0] = ignored, ignored
    return model, torch.randint(VOCABULARY, (N, LENGTH)), y


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_flattened_tokens(reduction: str) -> None:
    model, x, y = flattened_tokens(-100)
    plain = nn.CrossEntropyLoss(reduction=reduction)
    oracle = reference(model, lambda output, target: plain(output.flatten(0, 1), target.flatten()), (x,), y, N)
    module, criterion = wrapped(model, nn.CrossEntropyLoss(reduction=reduction), reduction)
    logits = module(x)
    loss = criterion(logits.flatten(0, 1), y.flatten(), shape=logits.shape)
    loss.backward()
    assert_equal(loss.loss_per_sample.detach(), oracle.losses, "losses")
    for name, param in model.named_parameters():
        assert_equal(param.summed_grad, oracle.clipped_sum(0.05)[name], name)


def test_flattened_tokens_without_shape_are_refused() -> None:
    model, x, y = flattened_tokens(0)
    module, criterion = wrapped(model, nn.CrossEntropyLoss())
    loss = criterion(module(x).flatten(0, 1), y.flatten())
    with pytest.raises(ValueError, match="shape="):
        loss.backward()


def test_target_by_keyword() -> None:
    model, x, y = flattened_tokens(0)
    module, criterion = wrapped(model, nn.CrossEntropyLoss(ignore_index=0))
    logits = module(x)
    by_position = criterion(logits.flatten(0, 1), y.flatten(), shape=logits.shape)
    by_keyword = criterion(logits.flatten(0, 1), target=y.flatten(), shape=logits.shape)
    assert torch.equal(by_position.loss_per_sample, by_keyword.loss_per_sample)


def test_criterion_is_left_as_it_was() -> None:
    plain = nn.CrossEntropyLoss()
    module, criterion = wrapped(nn.Linear(4, D), plain)
    with pytest.raises(IndexError):
        criterion(module(torch.randn(N, 4)), torch.full((N,), D))
    assert plain.reduction == "mean"


def test_types_are_also_those_of_opacus() -> None:
    module, criterion = wrapped(nn.Linear(4, D), nn.CrossEntropyLoss())
    loss = criterion(module(torch.randn(N, 4)), torch.randint(D, (N,)))
    assert isinstance(criterion, OpacusLoss)
    assert isinstance(loss, OpacusTensor)


def test_arithmetic() -> None:
    torch.manual_seed(0)
    model, plain = nn.Linear(4, D), nn.CrossEntropyLoss()
    x, y, z = torch.randn(N, 4), torch.randint(D, (N,)), torch.randint(D, (N,))
    weights = torch.rand(N)

    def combined(first: Any, second: Any, weight: Any) -> Any:
        return -(1 - (2 * (first + second / 4) - 0.5 * second * 3 + 1) * weight) + 0

    def of_one(output: Tensor, target: Tensor) -> Tensor:
        return combined(plain(output, target[:, 0].long()), plain(output, target[:, 1].long()), target[0, 2])

    oracle = reference(model, of_one, (x,), torch.stack([y, z, weights], 1), N)
    module, criterion = wrapped(model, plain)
    output = module(x)
    loss = combined(criterion(output, y), criterion(output, z), weights)
    assert isinstance(loss, DPTensorFastGradientClipping)
    loss.backward()
    assert_equal(loss.loss_per_sample.detach(), oracle.losses, "losses")
    assert loss.item() == pytest.approx(oracle.losses.mean().item())
    assert not loss.detach().requires_grad
    for name, param in model.named_parameters():
        assert_equal(param.summed_grad, oracle.clipped_sum(0.05)[name], name)


def test_arithmetic_that_mixes_samples_or_hides_gradients_is_refused() -> None:
    model = nn.Linear(4, D)
    module, criterion = wrapped(model, nn.CrossEntropyLoss())
    loss = criterion(module(torch.randn(N, 4)), torch.randint(D, (N,)))
    with pytest.raises(ValueError, match=r"shape \(5, 5\)"):
        loss * torch.rand(N, 1)
    with pytest.raises(ValueError, match="no share for each sample"):
        loss + 0.1 * model.weight.norm()
    with pytest.raises(ValueError, match="reductions"):
        loss + DPTensorFastGradientClipping(module, criterion.optimizer, loss.loss_per_sample, "sum")


def test_penalty_inside_the_criterion_is_refused() -> None:
    model = nn.Linear(4, D)
    module, criterion = wrapped(
        model, lambda output, target: F.cross_entropy(output, target, reduction="none") + model.weight.norm()
    )
    loss = criterion(module(torch.randn(N, 4)), torch.randint(D, (N,)))
    with pytest.raises(ValueError, match="weight past the layer"):
        loss.backward()
