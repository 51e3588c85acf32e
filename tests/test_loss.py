"""The criterion: one loss a sample, whatever the criterion's shape; arithmetic on it; or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping as OpacusLoss
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping as OpacusTensor
from torch import Tensor, nn

from opacus_fgc import (
    CausalLMLoss,
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
    "smooth-l1": (nn.SmoothL1Loss, D, lambda: torch.randn(N, D)),
    "hinge-embedding": (nn.HingeEmbeddingLoss, D, lambda: torch.randint(2, (N, D)) * 2.0 - 1),
    "multi-label-margin": (nn.MultiLabelMarginLoss, D, lambda: torch.tensor([[0, 2, -1]] * N)),
    "cross-entropy-weighted": (
        lambda **k: nn.CrossEntropyLoss(torch.tensor([0.1, 0.5, 0.9]), ignore_index=1, **k),
        D,
        lambda: torch.tensor([0, 2, 0, 2, 0]),
    ),
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


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_image_of_classes(functional: bool, reduction: str, smoothing: float) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(N, 2, 5, 5), torch.randint(D, (N, 3, 3))
    y[0, 1:], y[1, :, 0] = -1, -1
    options = {"weight": torch.rand(D) / 9, "ignore_index": -1, "label_smoothing": smoothing}
    plain = nn.CrossEntropyLoss(reduction=reduction, **options)
    check(nn.Conv2d(2, D, 3), partial(F.cross_entropy, **options) if functional else plain, plain, x, y, reduction)


def test_sample_of_which_nothing_counts() -> None:
    module, criterion = wrapped(nn.Conv2d(2, D, 3), nn.CrossEntropyLoss(ignore_index=1))
    y = torch.zeros(N, 3, 3, dtype=torch.long)
    y[0] = 1
    assert criterion(module(torch.randn(N, 2, 5, 5)), y).loss_per_sample[0] == 0


class Focal(nn.Module):
    """Own, with a reduction, and a mean of its own."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(output, target, reduction="none")
        losses = losses * (1 - torch.exp(-losses))
        if self.reduction == "none":
            return losses
        return losses.sum() / (target > 0.5).sum() if self.reduction == "mean" else losses.sum()


def test_own_mean() -> None:
    torch.manual_seed(0)
    y = torch.rand(N, D)
    y[:, 0] = 1
    check(nn.Linear(4, D), Focal(), Focal(), torch.randn(N, 4), y)


@pytest.mark.parametrize(
    "criterion",
    [
        lambda output, target: F.cross_entropy(output, target, ignore_index=2),
        lambda output, target: F.nll_loss(output.log_softmax(1), target, torch.tensor([0.1, 0.5, 2.0])),
        lambda output, target: output.square().mean() + F.cross_entropy(output, target) * 2,
        lambda output, target: F.multi_margin_loss(output, target).reshape(1),
        lambda output, target: sum(F.cross_entropy(o, y) * y.item() for o, y in zip(output, target, strict=True)),
    ],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_criterion_of_whatever_kind(criterion: Callable) -> None:
    torch.manual_seed(0)
    check(nn.Linear(4, D), criterion, lambda o, y: criterion(o, y).sum(), torch.randn(N, 4), torch.randint(2, (N,)))


SEVERAL: dict[str, tuple[Callable, Callable[[Any, Tensor, Tensor], Any]]] = {
    "triplet": (nn.TripletMarginLoss, lambda loss, o, y: loss(o[:, :2], o[:, 2:4], o[:, 4:])),
    "cosine": (nn.CosineEmbeddingLoss, lambda loss, o, y: loss(o[:, :3], o[:, 3:], y.sign())),
    "ranking": (nn.MarginRankingLoss, lambda loss, o, y: loss(o[:, 0], o[:, 1], y.sign())),
    "gaussian": (nn.GaussianNLLLoss, lambda loss, o, y: loss(o[:, :3], y[:, None].expand(-1, 3), o[:, 3:].exp())),
    "kl": (nn.KLDivLoss, lambda loss, o, y: loss(o.log_softmax(1), (y[:, None] * torch.arange(6.0)).softmax(1))),
    "nll": (nn.NLLLoss, lambda loss, o, y: loss(o.log_softmax(1), (y > 0).long())),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_losses_of_several_outputs(name: str, reduction: str) -> None:
    torch.manual_seed(0)
    make, call = SEVERAL[name]
    model, x, y = nn.Linear(4, 6), torch.randn(N, 4), torch.randn(N)
    oracle = reference(model, lambda output, target: call(make(reduction=reduction), output, target), (x,), y, N)
    module, criterion = wrapped(model, make(reduction=reduction), reduction)
    loss = call(criterion, module(x), y)
    loss.backward()
    assert_equal(loss.loss_per_sample.detach(), oracle.losses, "losses")
    for name, param in model.named_parameters():
        assert_equal(param.summed_grad, oracle.clipped_sum(0.05)[name], name)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ctc(reduction: str) -> None:
    torch.manual_seed(0)
    model, plain = nn.Linear(4, VOCABULARY), nn.CTCLoss(reduction=reduction)
    x, y, lengths = torch.randn(N, 9, 4), torch.randint(1, VOCABULARY, (N, 3)), torch.tensor([3, 2, 1, 3, 2])

    def call(loss: Any, output: Tensor, target: Tensor, lengths: Tensor) -> Any:
        return loss(output.log_softmax(2).transpose(0, 1), target, torch.full((len(target),), 9), lengths)

    both = torch.cat([y, lengths[:, None]], 1)
    oracle = reference(model, lambda output, target: call(plain, output, target[:, :3], target[:, 3]), (x,), both, N)
    module, criterion = wrapped(model, plain, reduction)
    loss = call(criterion, module(x), y, lengths)
    loss.backward()
    assert_equal(loss.loss_per_sample.detach(), oracle.losses, "losses")
    for name, param in model.named_parameters():
        assert_equal(param.summed_grad, oracle.clipped_sum(0.05)[name], name)


def test_causal_language_model() -> None:
    model, x, y = flattened_tokens(-100)
    oracle = reference(
        model, lambda o, target: F.cross_entropy(o[:, :-1].flatten(0, 1), target[:, 1:].flatten()), (x,), y, N
    )
    for outputs_of in (lambda logits: logits, lambda logits: SimpleNamespace(logits=logits)):
        module, criterion = wrapped(copy.deepcopy(model), CausalLMLoss())
        loss = criterion(outputs_of(module(x)), y)
        loss.backward()
        assert_equal(loss.loss_per_sample.detach(), oracle.losses, "losses")
        assert_equal(CausalLMLoss()(model(x), y), oracle.losses.mean(), "mean")
        for name, param in module._module.named_parameters():
            assert_equal(param.summed_grad, oracle.clipped_sum(0.05)[name], name)


@pytest.mark.parametrize("criterion", [lambda output, target: 1.0, lambda output, target: output[:1]])
def test_criterion_that_gives_no_loss_for_a_sample(criterion: Callable) -> None:
    module, private = wrapped(nn.Linear(4, D), criterion)
    with pytest.raises(ValueError, match="not one number for one sample"):
        private(module(torch.randn(N, 4)), torch.randint(D, (N,)))


def test_empty_batch_without_reduction() -> None:
    module, criterion = wrapped(nn.Linear(4, D), lambda output, target: F.cross_entropy(output, target))
    loss = criterion(module(torch.randn(0, 4)), torch.randint(D, (0,)))
    loss.backward()
    assert loss.loss_per_sample.shape == (0,)
    assert all(param.summed_grad.count_nonzero() == 0 for param in module.parameters())


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


@pytest.mark.parametrize("sizes", [(N, 1), (1, N)])
def test_losses_of_different_batches(sizes: tuple[int, int]) -> None:
    """One of a single sample would be added to every other's."""
    module, criterion = wrapped(nn.Linear(3, 2), nn.MSELoss())
    first, second = (criterion(module(torch.randn(n, 3)), torch.zeros(n, 2)) for n in sizes)
    with pytest.raises(ValueError, match=f"losses of different batches, of {sizes[0]} and {sizes[1]} samples"):
        first + second


@pytest.mark.parametrize("shape", [(N, 1), (N, 2), ()])
def test_losses_that_are_not_one_value_a_sample(shape: tuple[int, ...]) -> None:
    module, criterion = wrapped(nn.Linear(3, 2), nn.MSELoss())
    with pytest.raises(ValueError, match=r"it has to be one value a sample, shape \(N,\)"):
        DPTensorFastGradientClipping(module, criterion.optimizer, torch.zeros(shape))


def test_weights_that_are_not_one_value_a_sample() -> None:
    module, criterion = wrapped(nn.Linear(3, 2), nn.MSELoss())
    loss = criterion(module(torch.randn(1, 3)), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"the result has shape \(5,\), the loss \(1,\)"):
        loss * torch.rand(5)


def test_penalty_inside_the_criterion_is_refused() -> None:
    model = nn.Linear(4, D)
    module, criterion = wrapped(
        model, lambda output, target: F.cross_entropy(output, target, reduction="none") + model.weight.norm()
    )
    loss = criterion(module(torch.randn(N, 4)), torch.randint(D, (N,)))
    with pytest.raises(ValueError, match="weight past the layer"):
        loss.backward()
