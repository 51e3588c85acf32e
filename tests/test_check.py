"""The check that users run: it says right of what is right, finds what is wrong and where, and changes nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import opacus_fgc
from opacus_fgc import NORM_SAMPLERS, CausalLMLoss, PrivacyEngine, check
from opacus_fgc.clipping import FlatClipping
from opacus_fgc.per_sample import Dense, NormOnly, Outer
from opacus_fgc.privacy_engine import MODES
from tests.case import Apply
from tests.cases import ScaleByOwn, tied_language_model

N = 6


class Linear(nn.Linear):
    """One that a test can register a sampler for."""


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))


def data(n: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4), torch.randint(3, (n,))


def convolutional() -> nn.Module:
    norm = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True))
    return nn.Sequential(norm, nn.Flatten(), nn.Linear(64, 3))


def language_model() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.positions = nn.Parameter(torch.randn(1, 5, 8))
            self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, input_ids: Tensor, scale: Tensor | None = None) -> Any:
            x = self.embedding(input_ids) + self.positions
            return SimpleNamespace(logits=self.head(self.block(x if scale is None else x * scale)))

    return Model()


def tokens() -> Tensor:
    return torch.randint(11, (N, 5))


def recurrent(batch_first: bool) -> nn.Module:
    last = (lambda x: x[:, -1]) if batch_first else (lambda x: x[-1])
    return Apply(
        lambda m, x: m.head(last(m.lstm(x)[0])), lstm=DPLSTM(3, 4, batch_first=batch_first), head=nn.Linear(4, 3)
    )


def attention() -> nn.Module:
    return Apply(lambda m, x: m.attention(x, x, x)[0].mean(1), attention=nn.MultiheadAttention(6, 2, batch_first=True))


class PerTokenLoss(nn.Module):
    """Unreduced, without a ``reduction``."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square()


def classes() -> Tensor:
    return torch.randint(3, (N,))


RIGHT: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[], Any], Callable[[], Any], dict[str, Any]]] = {
    "convolutions": (convolutional, nn.CrossEntropyLoss(), lambda: torch.randn(N, 2, 6, 6), classes, {}),
    "tied-transformer": (language_model, CausalLMLoss(), lambda: {"input_ids": tokens()}, tokens, {}),
    "two-keywords": (
        language_model,
        CausalLMLoss(),
        lambda: {"input_ids": tokens(), "scale": torch.rand(N, 5, 1)},
        tokens,
        {},
    ),
    "shared-input": (language_model, CausalLMLoss(), lambda: (tokens(), torch.rand(1, 5, 1)), tokens, {}),
    "tied-tokens": (tied_language_model, nn.CrossEntropyLoss(), tokens, tokens, {}),
    "recurrent": (lambda: recurrent(True), F.cross_entropy, lambda: torch.randn(N, 4, 3), classes, {}),
    "batch-second": (
        lambda: recurrent(False),
        nn.CrossEntropyLoss(),
        lambda: torch.randn(4, N, 3),
        classes,
        {"batch_first": False},
    ),
    "attention": (attention, nn.MSELoss(), lambda: torch.randn(N, 3, 6), lambda: torch.randn(N, 6), {}),
    "operations": (ScaleByOwn, PerTokenLoss(), lambda: torch.randn(N, 4), lambda: torch.randn(N, 4), {}),
    "sum": (
        layers,
        nn.CrossEntropyLoss(torch.tensor([0.1, 0.5, 2.0]), reduction="sum"),
        lambda: torch.randn(N, 4),
        classes,
        {"loss_reduction": "sum"},
    ),
    "lambda": (
        layers,
        lambda output, target: F.cross_entropy(output, target) + output.square().mean(),
        lambda: torch.randn(N, 4),
        classes,
        {},
    ),
    "one-mode": (layers, nn.CrossEntropyLoss(), lambda: torch.randn(N, 4), classes, {"grad_sample_mode": "ghost_bk"}),
    "one-sample": (layers, nn.CrossEntropyLoss(), lambda: torch.randn(N, 4), classes, {"samples": 1}),
    "given-norm": (layers, nn.CrossEntropyLoss(), lambda: torch.randn(N, 4), classes, {"max_grad_norm": 1e-3}),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", RIGHT)
def test_right(name: str, dtype: torch.dtype) -> None:
    """Models are float32, as users have them."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    make, criterion, inputs, target, options = RIGHT[name]
    model = make()
    report = check(model, criterion, inputs(), target(), dtype=dtype, **options)
    report.raise_if_wrong()
    assert report.ok
    assert report.tolerance == torch.finfo(dtype).eps ** 0.5
    assert 0.99 < report.contribution < report.largest_contribution
    assert sum(row.parameters for row in report.rows) == sum(param.numel() for param in model.parameters())
    # As near as that precision comes: nothing passes by a wide bound.
    worst = max(report.losses, report.coefficients, *(max(row.norms, row.clipped_sum) for row in report.rows))
    assert worst < 1000 * torch.finfo(dtype).eps
    assert report.notes[0].startswith(f"{1 if name == 'one-sample' else N} of {N} samples")


def off(sampler: Callable, change: Callable) -> Callable:
    return lambda layer, activations, backprops: {
        param: change(form) for param, form in sampler(layer, activations, backprops).items()
    }


def scaled(form: Outer | Dense) -> Outer | Dense:
    if isinstance(form, Outer):
        return Outer(form.left * 1.01, form.right, form.shape)
    return Dense(form.materialize() * 1.01)


def only_first_token(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Any]:
    x = activations[0]
    return {layer.weight: Outer(backprops[:, :1], x[:, :1], layer.weight.shape), layer.bias: Dense(backprops.sum(1))}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, None], ids=["float64", "own"])
def test_a_layer_one_percent_off_is_found(
    monkeypatch: pytest.MonkeyPatch, mode: str, dtype: torch.dtype | None
) -> None:
    monkeypatch.setitem(NORM_SAMPLERS, Linear, off(NORM_SAMPLERS[nn.Linear], scaled))
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    report = check(layers(), nn.CrossEntropyLoss(), *data(), grad_sample_mode=mode, dtype=dtype)
    assert not report.ok
    assert {row.layer: row.wrong for row in report.rows} == {"0": [], "2": ["weight", "bias"], "4": []}
    wrong = next(row for row in report.rows if row.wrong)
    assert wrong.norms == pytest.approx(0.01, rel=1e-3)
    assert report.wrong[:3] == ["2.weight", "2.bias", "(clipping coefficients)"]
    with pytest.raises(AssertionError, match=r"wrong: 2\.weight, 2\.bias"):
        report.raise_if_wrong()


def test_norms_without_gradients_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are used in one mode, so that only there they are wrong."""
    smaller = lambda form: NormOnly(form.norm() * 0.99, form.shape).norms
    monkeypatch.setitem(NORM_SAMPLERS, Linear, off(NORM_SAMPLERS[nn.Linear], smaller))
    torch.manual_seed(0)
    arguments = layers(), nn.CrossEntropyLoss(), *data()
    report = check(*arguments, grad_sample_mode="ghost")
    assert {row.layer: row.wrong for row in report.rows} == {"0": [], "2": ["weight", "bias"], "4": []}
    assert all(row.clipped_sum <= report.tolerance for row in report.rows)
    # Norms too small: a sample has more than its share.
    assert report.contribution > report.largest_contribution
    assert "(contribution of a sample)" in report.wrong
    check(*arguments, grad_sample_mode="ghost_bk").raise_if_wrong()


@pytest.mark.parametrize("mode", MODES)
def test_a_part_left_out_is_found(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setitem(NORM_SAMPLERS, Linear, only_first_token)
    torch.manual_seed(0)
    report = check(
        layers(), lambda output, _: output.square().sum(), torch.randn(N, 3, 4), torch.zeros(N), grad_sample_mode=mode
    )
    assert {row.layer: row.wrong for row in report.rows} == {"0": [], "2": ["weight"], "4": []}


@pytest.mark.parametrize("factor", [1.01, 0.99])
def test_a_wrong_clipping_coefficient_is_found(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    right = FlatClipping.coefficients
    monkeypatch.setattr(FlatClipping, "coefficients", lambda self, norms: right(self, norms) * factor)
    torch.manual_seed(0)
    report = check(layers(), nn.CrossEntropyLoss(), *data())
    assert not any(row.wrong for row in report.rows)
    assert report.coefficients == pytest.approx(0.01, rel=1e-6)
    assert report.contribution == pytest.approx(factor, rel=1e-6)
    assert ("(contribution of a sample)" in report.wrong) == (factor > 1)


def test_a_sum_that_is_not_clipped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coefficients that are right, and not used."""
    unclipped = opacus_fgc.GradSampleModuleFastGradientClipping.clipped_gradients
    monkeypatch.setattr(
        opacus_fgc.GradSampleModuleFastGradientClipping,
        "clipped_gradients",
        lambda self, coef, loss: unclipped(self, torch.ones_like(coef), loss),
    )
    torch.manual_seed(0)
    report = check(layers(), nn.CrossEntropyLoss(), *data())
    assert [row.layer for row in report.rows if row.clipped_sum > 0.01] == ["0", "2", "4"]
    assert report.coefficients <= report.tolerance
    assert report.contribution > 1.1


def test_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    not_a_number = lambda form: Dense(form.materialize() * 0)
    monkeypatch.setitem(NORM_SAMPLERS, Linear, off(NORM_SAMPLERS[nn.Linear], not_a_number))
    torch.manual_seed(0)
    report = check(layers(), nn.CrossEntropyLoss(), *data())
    report.rows[0].norms = report.contribution = report.losses = float("nan")
    assert {"(losses)", "(contribution of a sample)"} < set(report.wrong)
    assert {row.layer: row.wrong for row in report.rows}["2"] == ["weight", "bias"]


def test_a_criterion_that_mixes_samples_is_refused() -> None:
    """As it is in training."""
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="depends on the other samples"):
        check(layers(), lambda output, _: (output - output.mean(0)).square().sum(1), *data())


def state(model: nn.Module) -> list[Any]:
    """All of a model that a check could change; tensors by identity and value."""

    def tensors(tree: Any) -> Any:
        return (id(tree), tree.detach().clone(), tree._version) if isinstance(tree, Tensor) else tree

    found: list[Any] = [torch.get_rng_state()]
    for module in model.modules():
        for key, value in vars(module).items():
            entries = value.items() if isinstance(value, dict) else [("", value)]
            found += [
                (type(module), key, name, tensors(entry)) for name, entry in entries if not isinstance(entry, nn.Module)
            ]
    for param in model.parameters():
        found += [tensors(param), tensors(param.grad), param.requires_grad, list(param._backward_hooks or ())]
        found += [(key, tensors(value)) for key, value in vars(param).items()]
    return found


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, (list, tuple)):
        assert len(before) == len(after)
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
    else:
        assert before is after or before == after


def busy_model() -> nn.Module:
    """With a buffer that counts, dropout, frozen parameters, a hook, a gradient, and a child in eval mode."""

    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) + self.calls

    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), Counting(), spectral_norm(nn.Linear(5, 3)))
    model[0].bias.requires_grad_(False)
    model[2].eval()
    model[2].register_forward_hook(lambda module, args, output: output * 2)
    model[2].weight.grad = torch.randn(5, 5)
    return model


@pytest.mark.parametrize("wrapped", [None, "wrapper", "hooks"])
@pytest.mark.parametrize("wrong", [False, True])
def test_nothing_changes(monkeypatch: pytest.MonkeyPatch, wrapped: str | None, wrong: bool) -> None:
    torch.manual_seed(0)
    model, (x, y), criterion = busy_model(), data(), nn.CrossEntropyLoss(torch.rand(3))
    checked: Any = model
    if wrapped is not None:
        checked, optimizer, private, _ = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD([param for param in model.parameters() if param.requires_grad]),
            criterion=criterion,
            data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y)),
            noise_multiplier=1.0,
            max_grad_norm=0.5,
            grad_sample_mode="ghost",
            wrap_model=wrapped == "wrapper",
            poisson_sampling=False,
        )
        # In the middle of a step: there are norms, a clipped sum and a graph.
        private((checked if wrapped == "wrapper" else model)(x), y).backward()
        pending = private((checked if wrapped == "wrapper" else model)(x), y)
        record = checked.record
        criterion = private
    before, inputs = state(model), (x.clone(), y.clone())
    if wrong:
        with pytest.raises(RuntimeError, match="shape"):
            check(checked, criterion, torch.zeros(N, 7), y)
    else:
        report = check(checked, criterion, x, y)
        report.raise_if_wrong()
        assert (report.max_grad_norm == 0.5) == (wrapped is not None)
    assert_same(before, state(model))
    assert_same(inputs, (x, y))
    if wrapped is not None:
        assert checked.record is record
        optimizer.zero_grad()
        pending.backward()
        assert all(param.summed_grad is not None for param in optimizer.params)
    else:
        assert not hasattr(model, "autograd_grad_sample_hooks")


def test_wrapped_model_and_criterion_are_checked_as_they_are() -> None:
    torch.manual_seed(0)
    model, x = recurrent(False), torch.randn(4, N, 3)
    wrapped = opacus_fgc.GradSampleModuleFastGradientClipping(
        model, batch_first=False, loss_reduction="sum", max_grad_norm=0.3
    )
    report = check(wrapped, nn.CrossEntropyLoss(reduction="sum"), x, classes())
    report.raise_if_wrong()
    assert report.max_grad_norm == 0.3
    # The model that the hooks are on is as good as what holds them.
    report = check(model, nn.CrossEntropyLoss(), x, classes(), batch_first=False)
    report.raise_if_wrong()


def test_dropout_is_checked_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.01), nn.Linear(5, 3))
    report = check(model, nn.CrossEntropyLoss(), *data())
    report.raise_if_wrong()
    assert any("eval mode" in note for note in report.notes)
    assert model.training and "eval mode" in str(report)
    assert not any("eval mode" in note for note in check(layers(), nn.CrossEntropyLoss(), *data()).notes)


def test_random_numbers_in_eval_mode_are_refused() -> None:
    model = Apply(lambda m, x: m.linear(x + torch.randn_like(x)), linear=nn.Linear(4, 3))
    with pytest.raises(ValueError, match="random numbers in eval mode too"):
        check(model, nn.CrossEntropyLoss(), *data())


def test_a_model_that_does_not_run_in_float64_is_run_as_it_is() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    weights = torch.rand(3)
    report = check(layers(), partial(F.cross_entropy, weight=weights), *data())
    report.raise_if_wrong()
    assert report.tolerance > 1e-5
    assert any(
        note.startswith("in the model's own precision, since it does not run in torch.float64") for note in report.notes
    )


def test_parts_in_less_precision_are_judged_by_it() -> None:
    torch.manual_seed(0)
    model = Apply(lambda m, x: m.b(m.a(x).float().tanh().double()), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    report = check(model, nn.CrossEntropyLoss(), *data())
    report.raise_if_wrong()
    assert report.tolerance == torch.finfo(torch.float32).eps ** 0.5


def test_half_precision_is_checked_in_double() -> None:
    torch.manual_seed(0)
    model, (x, y) = layers().bfloat16(), data()
    check(model, nn.CrossEntropyLoss(), x.bfloat16(), y).raise_if_wrong()
    assert model[0].weight.dtype == torch.bfloat16


def test_gradients_that_are_but_rounding_are_not_taken_for_wrong() -> None:
    """The bias of an attention's keys has no gradient, but for rounding."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = Apply(
        lambda m, x: F.scaled_dot_product_attention(m.q(x), m.k(x), x).mean(1), q=nn.Linear(6, 6), k=nn.Linear(6, 6)
    )
    for dtype in (torch.float64, torch.float32):
        check(model, nn.MSELoss(), torch.randn(N, 5, 6), torch.randn(N, 6), dtype=dtype).raise_if_wrong()


def test_samples_are_evenly_chosen() -> None:
    seen: set[int] = set()

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        seen.update(target[:, 0].int().tolist())
        return (output - target[:, :1]).square().sum(1)

    report = check(layers(), criterion, torch.randn(9, 4), torch.arange(9.0).repeat(2, 1).T, samples=3)
    assert seen == {0, 4, 8}
    assert report.notes[0].startswith("3 of 9 samples")


def test_layers_of_a_large_model_are_chosen_by_kind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(5)], nn.Linear(4, 100))
    report = check(model, nn.MSELoss(), torch.randn(N, 4), torch.randn(N, 100), max_elements=60)
    report.raise_if_wrong()
    assert [row.layer for row in report.rows] == ["0.0", "0.1", "1.0", "1.1"]
    assert sum(row.parameters for row in report.rows) == 56 <= 60
    assert any("8 of 22 parameters" in note for note in report.notes)
    assert all(param.requires_grad for param in model.parameters())
    with pytest.raises(ValueError, match="raise max_elements"):
        check(model, nn.MSELoss(), torch.randn(N, 4), torch.randn(N, 100), max_elements=5)


def test_one_copy_at_a_time() -> None:
    made: weakref.WeakSet = weakref.WeakSet()
    alive: list[int] = []

    class Counted(nn.Linear):
        def __new__(cls, *args: Any) -> nn.Module:
            made.add(module := super().__new__(cls))
            return module

        def forward(self, x: Tensor) -> Tensor:
            alive.append(len(made))
            return super().forward(x)

    check(nn.Sequential(Counted(4, 3)), nn.CrossEntropyLoss(), *data()).raise_if_wrong()
    # The user's, and a copy.
    assert max(alive) == 2


def test_works_without_grad() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        check(layers(), nn.CrossEntropyLoss(), *data()).raise_if_wrong()
        assert not torch.is_grad_enabled()


def test_table() -> None:
    torch.manual_seed(0)
    lines = str(check(layers(), nn.CrossEntropyLoss(), *data())).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["0", "2", "4"]
    assert all(line.endswith("ok") for line in lines[2:8])
    assert [line.split("  ")[0] for line in lines[5:8]] == [
        "(losses)",
        "(clipping coefficients)",
        "(contribution of a sample)",
    ]
    assert lines[-1] == "all right"
    model = ScaleByOwn()
    assert "(the model)" in str(check(model, nn.MSELoss(), torch.randn(N, 4), torch.randn(N, 4)))


def test_wrong_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NORM_SAMPLERS, Linear, off(NORM_SAMPLERS[nn.Linear], scaled))
    torch.manual_seed(0)
    lines = str(check(layers(), nn.CrossEntropyLoss(), *data())).splitlines()
    assert lines[3].endswith("WRONG: weight, bias")
    assert lines[-1].startswith("WRONG")


def with_a_graph() -> nn.Module:
    model = layers()
    model[0].cache = model[0](torch.randn(1, 4))
    return model


def closing_over(model: nn.Module) -> Callable:
    return lambda output, target: F.cross_entropy(output, target) + model[0].weight.square().sum()


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "mixes-samples": (
        lambda: {"model": Apply(lambda m, x: m.linear(x - x.mean(0)), linear=nn.Linear(4, 3))},
        NotImplementedError,
        "mixes samples",
    ),
    "batch-norm": (
        lambda: {"model": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))},
        NotImplementedError,
        r"layer '1' \(BatchNorm1d\)",
    ),
    "cannot-be-copied": (lambda: {"model": with_a_graph()}, ValueError, "cannot be copied"),
    "takes-no-single-sample": (
        lambda: {"model": Apply(lambda m, x: m.linear(x).view(N, 3), linear=nn.Linear(4, 3))},
        ValueError,
        "without sample 0 the batch cannot be run",
    ),
    "nothing-to-train": (lambda: {"model": layers().requires_grad_(False)}, ValueError, "no trainable parameters"),
    "no-target": (lambda: {"target": None}, ValueError, "no tensor with a batch axis"),
    "no-samples": (lambda: {"samples": 0}, ValueError, "at least"),
    "another-mode": (lambda: {"grad_sample_mode": "hooks"}, ValueError, "ghost, ghost_bk"),
    "reduction": (lambda: {"loss_reduction": "sum"}, ValueError, "reduction"),
    "packed": (
        lambda: {"inputs": nn.utils.rnn.pack_sequence([torch.randn(2, 4)] * N)},
        NotImplementedError,
        "PackedSequence",
    ),
    "nothing-counts": (
        lambda: {"criterion": nn.CrossEntropyLoss(ignore_index=1), "target": torch.tensor([1, 0, 0, 0, 0, 0])},
        ValueError,
        "loss of sample 0 alone is nan",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    torch.manual_seed(0)
    changes, error, message = REFUSED[name]
    x, y = data()
    arguments = {"model": layers(), "criterion": nn.CrossEntropyLoss(), "inputs": x, "target": y} | changes()
    with pytest.raises(error, match=message):
        check(**arguments)


def test_a_criterion_that_closes_over_the_model_is_refused() -> None:
    model = layers()
    with pytest.raises(ValueError, match=r"comes to parameters \(shapes \(5, 4\)\)"):
        check(model, closing_over(model), *data())


def test_a_criterion_that_has_the_model_is_copied_with_it() -> None:
    """So that its penalty on weights is refused, as it is in training."""
    model = layers()

    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output, target) + self.model[0].weight.square().sum()

    with pytest.raises(ValueError, match="penalties on weights into the optimizer"):
        check(model, Penalty(), *data())


def test_compiled_model_is_checked_as_it_was() -> None:
    torch.manual_seed(0)
    model = layers()
    report = check(torch.compile(model, backend="aot_eager"), nn.CrossEntropyLoss(), *data())
    report.raise_if_wrong()
    assert [row.layer for row in report.rows] == ["0", "2", "4"]
