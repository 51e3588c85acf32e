"""Whether a criterion's losses are of one sample each: what mixes samples is refused, what does not is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_fgc.certificates import criterion as criterion_check
from opacus_fgc.criterion.sample_losses import SampleLosses
from opacus_fgc.privacy_engine import MODES
from tests.reference import reference
from tests.test_exact import assert_equal
from tests.test_loss import check, wrapped

N, D, LENGTH = 8, 4, 6
MIXES = "no weighted sum|depends on the other samples|batches before|draws random numbers"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def outputs() -> Tensor:
    return 3 * torch.randn(N, D)


def classes() -> Tensor:
    return torch.randint(D, (N,))


def tokens() -> Tensor:
    return 3 * torch.randn(N, LENGTH, D)


def token_classes() -> Tensor:
    return torch.where(torch.rand(N, LENGTH) < 0.4, -100, torch.randint(D, (N, LENGTH)))


def one_number() -> Tensor:
    return torch.randn(N)


def of_each(o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o, y, reduction="none") if y.dim() == 1 and o.dim() == 2 else (o - y).square()


def soft_dice(o: Tensor, y: Tensor, axis: Any) -> Tensor:
    p, truth = o.sigmoid(), (y > 0).to(o)
    return (1 - (2 * (p * truth).sum(axis) + 1) / (p.sum(axis) + truth.sum(axis) + 1)).mean()


class Logging(nn.Module):
    """Keeps what it returned last, and does not use it."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.calls = None, 0

    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        loss = of_each(o, y).mean()
        self.last, self.calls = loss.detach(), self.calls + 1
        return loss


class ClassWeights(nn.Module):
    """Has tensors of its own, in the outputs' type alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([0.1, 0.5, 2.0, 1.0], dtype=dtype))

    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o, y, self.weight)


class Negatives(nn.Module):
    """Compares with the samples of the batch before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.ones(D))

    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        losses = of_each(o - self.queue.to(o), y)
        self.queue = o.detach().mean(0)
        return losses


class ReducedNegatives(Negatives):
    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        return super().forward(o, y).mean()


Make = Callable[[], Tensor]
OF_ONE_SAMPLE: dict[str, tuple[Any, Make, Make]] = {
    "mean": (lambda o, y: F.cross_entropy(o, y), outputs, classes),
    "sum": (lambda o, y: F.cross_entropy(o, y, reduction="sum"), outputs, classes),
    "class-weights": (lambda o, y: F.cross_entropy(o, y, torch.arange(1, 5).to(o)), outputs, classes),
    "mean-over-tokens": (lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()), tokens, token_classes),
    "one-output": (lambda o, y: F.binary_cross_entropy_with_logits(o, (y > 0).to(o)), one_number, one_number),
    "hinge": (lambda o, y: (1 - o * y).clamp(min=0).mean(), outputs, outputs),
    "hinge-mostly-zero": (lambda o, y: (-20 - o * y).clamp(min=0).mean(), outputs, outputs),
    "nothing-left-to-learn": (lambda o, y: F.cross_entropy(30 * o, o.argmax(1)), outputs, classes),
    "root-of-each": (lambda o, y: (o - y).square().mean(1).sqrt().mean(), outputs, outputs),
    "dice-of-each": (lambda o, y: soft_dice(o, y, 1), outputs, outputs),
    "mean-over-those-that-count": (
        lambda o, y: ((o - y).square() * (y > -1)).sum() / (y > -1).sum().clamp(min=1),
        outputs,
        outputs,
    ),
    "constant": (lambda o, y: F.mse_loss(o, y) + 3, outputs, outputs),
    "logging": (Logging(), outputs, classes),
    "losses": (of_each, outputs, classes),
    "losses-with-dropout": (lambda o, y: of_each(F.dropout(o), y), outputs, classes),
    "losses-of-elements": (of_each, outputs, outputs),
}
OF_SEVERAL_SAMPLES: dict[str, tuple[Any, Make, Make]] = {
    "in-batch-negatives": (lambda o, y: F.cross_entropy(o @ y.T, torch.arange(len(o))), outputs, outputs),
    "in-batch-negatives-of-each": (
        lambda o, y: F.cross_entropy(o @ o.T, torch.arange(len(o)), reduction="none"),
        outputs,
        classes,
    ),
    "over-its-mean": (lambda o, y: of_each(o, y).div(of_each(o, y).detach().mean()).mean(), outputs, classes),
    "over-its-mean-of-each": (lambda o, y: of_each(o, y) / of_each(o, y).detach().mean(), outputs, classes),
    "standardised": (
        lambda o, y: (of_each(o, y) - of_each(o, y).mean()).div(of_each(o, y).std()).square().mean(),
        outputs,
        classes,
    ),
    "hardest": (
        lambda o, y: of_each(o, y).topk(len(o) // 2).values.mean() if len(o) > 1 else of_each(o, y),
        outputs,
        classes,
    ),
    "harder-than-the-median": (
        lambda o, y: of_each(o, y) * (of_each(o, y).detach() >= of_each(o, y).detach().median()),
        outputs,
        classes,
    ),
    "balanced": (lambda o, y: (of_each(o, y) / torch.bincount(y, minlength=D)[y]).mean(), outputs, classes),
    "balanced-of-each": (lambda o, y: of_each(o, y) / torch.bincount(y, minlength=D)[y], outputs, classes),
    "root-of-the-mean": (lambda o, y: F.mse_loss(o, y).sqrt(), outputs, outputs),
    "root-of-the-mean-of-one-output": (lambda o, y: F.mse_loss(o, y).sqrt(), one_number, one_number),
    "dice": (lambda o, y: soft_dice(o, y, (0, 1)), outputs, outputs),
    "ranks": (
        lambda o, y: -F.logsigmoid((o[:, None] - o[None]) * (y[:, None] - y[None]).sign()).mean(),
        one_number,
        one_number,
    ),
    "correlation": (lambda o, y: -torch.corrcoef(torch.stack([o, y]))[0, 1], one_number, one_number),
    "spread": (lambda o, y: F.mse_loss(o, y) - o.var(0).sum(), outputs, outputs),
    "spread-without-gradient": (
        lambda o, y: F.mse_loss(o, y) + o.detach().var(0, correction=0).sum(),
        outputs,
        outputs,
    ),
    "other-sign-in-a-batch": (lambda o, y: F.mse_loss(o, y) * (1 if len(o) == 1 else -1), outputs, outputs),
    "scaled-by-the-largest": (lambda o, y: F.mse_loss(o / o.abs().max(), y), outputs, outputs),
    "broadcast": (lambda o, y: F.mse_loss(o[:, :1], y[:, 0]), outputs, outputs),
    "mean-and-sum": (lambda o, y: o.square().mean() + (o - y).abs().sum(), outputs, outputs),
    "weakly": (lambda o, y: of_each(o, y).mean(1) + 1e-9 * o.detach().sum(), outputs, outputs),
    "neighbours": (lambda o, y: (o * o.roll(1, 0)).sum(1), outputs, outputs),
    "two-views": (lambda o, y: (o * o.roll(len(o) // 2, 0)).sum(1), outputs, outputs),
    "running-sum": (lambda o, y: of_each(o, y).mean(1).cumsum(0), outputs, outputs),
    "mixed-labels": (lambda o, y: of_each(o, y[torch.randperm(len(y))]), outputs, classes),
    "noise": (lambda o, y: F.mse_loss(o + torch.randn_like(o), y), outputs, outputs),
    "negatives-of-the-last-batch": (Negatives(), outputs, classes),
    "negatives-of-the-last-batch-reduced": (ReducedNegatives(), outputs, classes),
}


def losses_of(criterion: Any, output: Tensor, target: Tensor, **options: Any) -> Tensor:
    return SampleLosses(criterion)((output.requires_grad_(), target), {}, reduction="mean", due=True, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OF_ONE_SAMPLE)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_losses_of_one_sample(name: str, dtype: torch.dtype) -> None:
    criterion, output, target = copy.deepcopy(OF_ONE_SAMPLE[name])
    y = target()
    losses = losses_of(criterion, output().to(dtype), y.to(dtype) if y.is_floating_point() else y)
    assert losses.shape == (N,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", OF_SEVERAL_SAMPLES)
@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:.*degrees of freedom")
def test_losses_of_several_samples(name: str, dtype: torch.dtype) -> None:
    if name == "weakly" and dtype is torch.float32:
        pytest.skip("vanishes in rounding")
    criterion, output, target = copy.deepcopy(OF_SEVERAL_SAMPLES[name])
    y = target()
    with pytest.raises(ValueError, match=MIXES):
        losses_of(criterion, output().to(dtype), y.to(dtype) if y.is_floating_point() else y)


def test_random_numbers_are_told() -> None:
    """Of one loss a sample they are right, and else nothing can be compared."""
    noisy = lambda o, y, **options: F.mse_loss(o + torch.randn_like(o), y, **options)
    with pytest.raises(ValueError, match="draws random numbers"):
        losses_of(noisy, outputs(), outputs())
    losses_of(partial(noisy, reduction="none"), outputs(), outputs())


def test_losses_that_are_others_in_each_run() -> None:
    generator = torch.Generator()
    with pytest.raises(ValueError, match="other losses for the same batch and the same random numbers"):
        losses_of(lambda o, y: of_each(o, y) * torch.rand(1, generator=generator), outputs(), classes())


def test_criterion_that_cannot_be_run_again() -> None:
    once = iter([1.0])
    with pytest.raises(ValueError, match="cannot be run again"):
        losses_of(lambda o, y: of_each(o, y) * next(once), outputs(), classes())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_criterion_with_tensors_of_one_type(dtype: torch.dtype) -> None:
    losses_of(ClassWeights(dtype), outputs().to(dtype), classes())


def test_half_of_a_batch_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criterion_check, "_ELEMENTS", D)
    monkeypatch.setattr(criterion_check, "_SAMPLES", N // 2)
    losses_of(OF_ONE_SAMPLE["mean"][0], outputs(), classes())
    with pytest.raises(ValueError, match=MIXES):
        losses_of(OF_SEVERAL_SAMPLES["in-batch-negatives"][0], outputs(), outputs())


def test_texts_have_no_numbers_of_samples() -> None:
    for name in ("in-batch-negatives-of-each", "in-batch-negatives"):
        criterion, output, target = OF_SEVERAL_SAMPLES[name]
        with pytest.raises(ValueError, match=r"^\D*$"):
            losses_of(criterion, output(), target())


def test_nothing_changes() -> None:
    """Neither random numbers, nor the criterion, nor the model that it calls."""
    model = nn.Sequential(nn.Linear(3, D), nn.Dropout(0.5))
    module, criterion = wrapped(model, Logging())
    criterion.criterion = drawing = lambda o, y: of_each(o, y) + torch.rand(len(o)).detach() * 0
    x, y = torch.randn(N, 3), classes()
    output = module(x)
    torch.manual_seed(1)
    drawing(output, y)
    expected = torch.rand(3)
    torch.manual_seed(1)
    criterion(output, y)
    assert torch.equal(torch.rand(3), expected)
    criterion.criterion = logging = Logging()
    criterion(module(x), y).backward()
    assert logging.calls == 2  # as often as without a check: on the batch, and by vmap
    assert module.training


def test_it_is_checked_again_and_again() -> None:
    """At calls 1, 2, 4, 8 ..., so that what mixes later on shows; and at once where arguments are of another kind."""
    mixing: list[int] = []

    def criterion(o: Tensor, y: Tensor) -> Tensor:
        return of_each(o, y) * (of_each(o, y).detach().mean() if mixing else 1)

    module, private = wrapped(nn.Linear(3, D), criterion)
    x, y = torch.randn(N, 3), classes()
    private(module(x), y)
    private(module(x), y)
    mixing.append(1)
    private(module(x), y)
    output = module(x)
    for _ in range(2):  # it stays due
        with pytest.raises(ValueError, match=MIXES):
            private(output, y)
    mixing.clear()
    private(module(x), y)
    mixing.append(1)
    private(output, y)
    with pytest.raises(ValueError, match=MIXES):
        private(output, y=y)


def test_a_batch_of_one_is_not_enough() -> None:
    """There is nothing to compare it with, so that the check stays due."""
    losses = SampleLosses(OF_SEVERAL_SAMPLES["in-batch-negatives"][0])
    losses((outputs()[:1].requires_grad_(), outputs()[:1]), {}, reduction="mean", due=True)
    with pytest.raises(ValueError, match=MIXES):
        losses((outputs().requires_grad_(), outputs()), {}, reduction="mean")


# What has by chance as many rows as there are samples


@pytest.mark.parametrize("size", [N, N - 1])
@pytest.mark.parametrize("function", [F.binary_cross_entropy_with_logits, partial(F.binary_cross_entropy_with_logits)])
def test_weights_of_as_many_classes_as_samples(function: Any, size: int) -> None:
    model, x, y, weight = nn.Linear(3, N), torch.randn(size, 3), torch.rand(size, N), 10 ** torch.arange(8.0)
    plain = partial(function, pos_weight=weight)
    oracle = reference(model, plain, (x,), y, size)
    module, criterion = wrapped(model, function)
    loss = criterion(module(x), y, pos_weight=weight)
    loss.backward()
    assert_equal(loss.loss_per_sample.detach(), oracle.losses, "losses")
    assert_equal(model.weight.summed_grad, oracle.clipped_sum(0.05)["weight"], "weight")


def test_weights_that_an_own_criterion_takes() -> None:
    """What had another number of rows once is shared; what cannot be told from rows of samples is refused, not guessed."""

    def own(o: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(o, y, pos_weight=weight)

    weight, losses = 10 ** torch.arange(4.0), SampleLosses(own)
    few, many = (tuple(torch.rand(n, D) for _ in range(2)) for n in (3, D))
    for o, y in (few, many):
        expected = torch.stack([own(o[n], y[n], weight) for n in range(len(o))])
        assert_equal(losses((o.clone().requires_grad_(), y, weight), {}, reduction="mean").detach(), expected, "losses")
    with pytest.raises(ValueError, match=r"functools\.partial"):
        SampleLosses(own)((many[0].clone().requires_grad_(), many[1], weight), {}, reduction="mean", due=True)
    o, y = many
    losses = SampleLosses(partial(own, weight=weight))((o.requires_grad_(), y), {}, reduction="mean", due=True)
    assert_equal(losses.detach(), expected, "by partial")


# Torch's criteria


@pytest.mark.parametrize(
    "criterion",
    [
        *(nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), nn.BCEWithLogitsLoss(), nn.KLDivLoss()),
        *(nn.PoissonNLLLoss(), nn.SoftMarginLoss(), nn.HingeEmbeddingLoss(), F.mse_loss, F.huber_loss, F.l1_loss),
        *(partial(F.smooth_l1_loss, beta=0.5), lambda o, y: F.mse_loss(o, y), lambda o, y: (o - y).square()),
    ],
)
@pytest.mark.parametrize("shapes", [((N, 1), (N,)), ((N,), (N, 1))])
@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:reduction. 'mean' divides")
def test_shapes_that_broadcast(criterion: Any, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    output, target = map(torch.rand, shapes)
    with pytest.raises(ValueError, match=r"view_as\(output\)|" + MIXES):
        losses_of(criterion, output, target)
    assert losses_of(F.mse_loss, output, target.view_as(output)).shape == (N,)


@pytest.mark.parametrize("criterion", [nn.KLDivLoss(reduction="batchmean"), partial(F.kl_div, reduction="batchmean")])
def test_mean_over_the_batch_of_sums(criterion: Any) -> None:
    class LogSoftmax(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).log_softmax(1)

    check(LogSoftmax(3, D), criterion, criterion, torch.randn(5, 3), torch.rand(5, D).softmax(1))
    with pytest.raises(ValueError, match="loss_reduction='mean'"):
        wrapped(LogSoftmax(3, D), criterion, "sum")


def test_unreduced_criterion_of_torch() -> None:
    """The mean over the samples of what it gives: class weights do not cancel."""
    weight = torch.tensor([0.1, 0.5, 2.0, 1.0])
    plain = nn.CrossEntropyLoss(weight, reduction="none")
    check(nn.Linear(3, D), plain, lambda o, y: plain(o, y).mean(), torch.randn(5, 3), torch.randint(D, (5,)))


@pytest.mark.parametrize("function", [F.cross_entropy, partial(F.cross_entropy, reduction="mean")])
def test_weighted_mean_of_a_function(function: Any) -> None:
    options = {"weight": torch.tensor([0.1, 0.5, 2.0, 1.0]), "ignore_index": 1, "label_smoothing": 0.1}
    plain = partial(F.cross_entropy, **options)
    x, y = torch.randn(5, 2, 5, 5), torch.randint(D, (5, 3, 3))
    model = nn.Conv2d(2, D, 3)
    check(model, partial(function, **options), plain, x, y)
    module, criterion = wrapped(copy.deepcopy(model), function)
    oracle = reference(model, plain, (x,), y, 5)
    assert_equal(criterion(module(x), y, **options).loss_per_sample.detach(), oracle.losses, "options of the call")


def test_reduction_of_a_function() -> None:
    check(nn.Linear(3, D), partial(F.mse_loss, reduction="sum"), nn.MSELoss(reduction="sum"), *two_batches(), "sum")
    with pytest.raises(ValueError, match="criterion's reduction is 'sum'"):
        wrapped(nn.Linear(3, D), partial(F.mse_loss, reduction="sum"))
    module, criterion = wrapped(nn.Linear(3, D), F.mse_loss)
    x, y = two_batches()
    with pytest.raises(ValueError, match="criterion's reduction is 'sum'"):
        criterion(module(x), y, reduction="sum")


def two_batches() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 3), torch.randn(5, D)


# Losses of tokens, and of batches that are not first


def test_own_criterion_of_flattened_tokens() -> None:
    x, y = tokens().flatten(0, 1), token_classes().flatten()
    losses = losses_of(of_each, x, y.clamp(min=0), shape=(N, LENGTH, D))
    assert_equal(losses.detach(), of_each(x, y.clamp(min=0)).detach().view(N, LENGTH).mean(1), "losses")
    over_all = lambda o, y: of_each(o, y) / of_each(o, y).detach().mean()
    with pytest.raises(ValueError, match=MIXES):
        losses_of(over_all, x.detach(), y.clamp(min=0), shape=(N, LENGTH, D))


@pytest.mark.parametrize("length", [LENGTH, N])
def test_own_criterion_of_a_batch_that_is_not_first(length: int) -> None:
    o, y = torch.randn(length, N, D), classes()
    last = lambda o, y: of_each(o[-1], y)
    assert_equal(losses_of(last, o, y, batch_first=False).detach(), last(o, y).detach(), "losses")
    with pytest.raises(ValueError, match=MIXES):
        losses_of(lambda o, y: last(o - o.mean(1, keepdim=True), y), o.detach(), y, batch_first=False)
    with pytest.raises(ValueError, match="one value for all"):
        losses_of(lambda o, y: last(o, y).mean(), o.detach(), y, batch_first=False)


# What is no row of an argument


def test_object_with_outputs() -> None:
    logits, y = outputs().requires_grad_(), classes()
    with pytest.raises(ValueError, match=r"outputs\.logits, not an object"):
        SampleLosses(lambda out, y: F.cross_entropy(out.logits, y))(
            (SimpleNamespace(logits=logits), y), {}, reduction="mean"
        )
    out = {"logits": logits, "hidden": (logits * 2, None)}
    losses = SampleLosses(lambda out, y: F.cross_entropy(out["logits"], y))((out, y), {}, reduction="mean", due=True)
    assert_equal(losses.detach(), of_each(logits, y).detach(), "losses")


class WithLoss(nn.Module):
    """Computes a loss of its own, and keeps a term."""

    def __init__(self, result: Callable) -> None:
        super().__init__()
        self.layer, self.result = nn.Linear(3, D), result

    def forward(self, x: Tensor, y: Tensor) -> Any:
        logits = self.layer(x)
        self.term = logits.square().mean()
        return self.result(F.cross_entropy(logits, y), logits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("result", "criterion"),
    [
        (lambda loss, logits: {"loss": loss, "logits": logits}, lambda out, y: out["loss"]),
        (lambda loss, logits: SimpleNamespace(loss=loss, logits=logits), lambda out, y: out.loss),
        (lambda loss, logits: (loss, logits), lambda out, y: out[0]),
        (lambda loss, logits: loss, lambda out, y: out),
        (lambda loss, logits: loss, lambda out: out),
    ],
)
def test_loss_of_the_model(result: Callable, criterion: Callable, mode: str) -> None:
    module, private = wrapped(WithLoss(result), criterion, backward=MODES[mode])
    y = classes()
    out = module(torch.randn(N, 3), y)
    with pytest.raises(ValueError, match=r"logits.*reduction='none'"):
        private(*(out, y)[: criterion.__code__.co_argcount])


@pytest.mark.parametrize("mode", MODES)
def test_term_of_the_model(mode: str) -> None:
    model = WithLoss(lambda loss, logits: logits)
    module, private = wrapped(model, lambda out, y: F.cross_entropy(out, y) + model.term, backward=MODES[mode])
    y = classes()
    with pytest.raises(ValueError, match="would be whole in every sample's loss"):
        private(module(torch.randn(N, 3), y), y)


class Proxies(nn.Module):
    """Metric learning, with a vector for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(D, 3))

    def forward(self, features: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(features @ self.proxies.T, y)


def test_weights_of_the_criterion() -> None:
    model, proxies = nn.Linear(3, 3), Proxies()
    with pytest.raises(ValueError, match="the criterion has weights of its own, proxies"):
        wrapped(model, proxies)
    module, criterion = wrapped(nn.Linear(3, 3), lambda o, y: proxies(o, y))
    output, y = module(torch.randn(N, 3)), classes()
    with pytest.raises(ValueError, match="Weights of its own belong into the module"):
        criterion(output, y)
    x, y = torch.randn(5, 3), torch.randint(D, (5,))
    check(nn.Linear(3, 3), proxies.requires_grad_(False), proxies, x, y)


def test_weights_of_the_criterion_in_the_module() -> None:
    """What the error says to do."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.proxies = nn.Linear(3, 3), nn.Parameter(torch.randn(D, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x) @ self.proxies.T

    check(Both(), nn.CrossEntropyLoss(), nn.CrossEntropyLoss(), torch.randn(5, 3), torch.randint(D, (5,)))
