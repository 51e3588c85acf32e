"""`make_private`: what comes back, what goes through untouched, checkpoints, and that bad input changes nothing."""

from __future__ import annotations

import io
import math
from typing import Any

import opacus
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from opacus_fgc import (
    DPLossFastGradientClipping,
    DPOptimizerFastGradientClipping,
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
    PrivacyEngine,
)
from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.privacy_engine import MODES
from tests.case import Apply

SIZE, BATCH = 40, 8


def classifier() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def arguments(model: nn.Module, **changes: Any) -> dict[str, Any]:
    data = TensorDataset(torch.randn(SIZE, 1, 4, 4), torch.randint(3, (SIZE,)))
    defaults = dict(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(data, batch_size=BATCH),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="ghost",
    )
    return {**defaults, **changes}


def train(model: nn.Module, optimizer: Any, criterion: Any, loader: Any, steps: int | None = None) -> None:
    for step, (x, y) in enumerate(loader):
        if step == steps:
            break
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap_model", [True, False])
def test_make_private(wrap_model: bool, mode: str) -> None:
    model = classifier()
    keywords = arguments(model, wrap_model=wrap_model, grad_sample_mode=mode)
    wrapped, optimizer, criterion, loader = PrivacyEngine().make_private(**keywords)
    kind = GradSampleModuleFastGradientClipping if wrap_model else GradSampleHooksFastGradientClipping
    assert type(wrapped) is kind
    assert isinstance(wrapped, GradSampleModule) == wrap_model
    assert type(optimizer) is DPOptimizerFastGradientClipping and isinstance(optimizer, DPOptimizer)
    assert type(criterion) is DPLossFastGradientClipping
    assert criterion.clipped_backward is MODES[mode]
    assert isinstance(loader, opacus.data_loader.DPDataLoader)
    assert optimizer.expected_batch_size == BATCH
    before = [param.clone() for param in model.parameters()]
    train(wrapped if wrap_model else model, optimizer, criterion, loader)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("whole", [True, False], ids=["transformer", "attention"])
def test_attention_of_torch(whole: bool, mode: str) -> None:
    """Opacus' validators refuse it, since Opacus itself has no sampler for it."""
    attention = Apply(lambda m, x: m.inner(x, x, x)[0], inner=nn.MultiheadAttention(4, 2, batch_first=True))
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True) if whole else attention
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(16, 3))
    data = TensorDataset(torch.randn(20, 4, 4), torch.randint(3, (20,)))
    keywords = arguments(model, grad_sample_mode=mode, data_loader=DataLoader(data, batch_size=5))
    wrapped, optimizer, criterion, loader = PrivacyEngine().make_private(**keywords)
    before = [param.clone() for param in model.parameters()]
    train(wrapped, optimizer, criterion, loader, steps=1)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap_model", [True, False])
def test_nothing_is_left_behind(wrap_model: bool, mode: str) -> None:
    model = classifier()
    attributes = [set(vars(param)) for param in model.parameters()]
    module_attributes = [set(vars(module)) for module in model.modules()]
    wrapped, optimizer, criterion, loader = PrivacyEngine().make_private(
        **arguments(model, wrap_model=wrap_model, grad_sample_mode=mode)
    )
    train(wrapped if wrap_model else model, optimizer, criterion, loader, steps=1)
    if wrap_model:
        assert wrapped.to_standard_module() is model
    else:
        wrapped.cleanup()
    assert [set(vars(param)) for param in model.parameters()] == attributes
    assert [set(vars(module)) for module in model.modules()] == module_attributes
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(param._backward_hooks for param in model.parameters())
    PrivacyEngine().make_private(**arguments(model, wrap_model=wrap_model, grad_sample_mode=mode))


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")
# The search for the noise is the same whatever the mode, and that of "prv" takes seconds.
@pytest.mark.parametrize(
    "mode, accountant", [pytest.param("ghost", "prv", marks=pytest.mark.slow), ("ghost_bk", "rdp")]
)
def test_with_epsilon(mode: str, accountant: str) -> None:
    engine = PrivacyEngine(accountant=accountant)
    keywords = arguments(classifier(), grad_sample_mode=mode, target_epsilon=3.0, target_delta=1e-3, epochs=2)
    del keywords["noise_multiplier"]
    model, optimizer, criterion, loader = engine.make_private_with_epsilon(**keywords)
    for _ in range(2):
        train(model, optimizer, criterion, loader)
    assert engine.get_epsilon(1e-3) == pytest.approx(3.0, abs=0.02)


BUDGET = {"target_epsilon": 3.0, "target_delta": 1e-3, "epochs": 2}


@pytest.mark.parametrize("mode", [*MODES, "hooks"])
@pytest.mark.parametrize(
    "name, value",
    [
        *(("target_epsilon", value) for value in (0, -1.0, math.nan, math.inf, "3", None)),
        *(("target_delta", value) for value in (0, 1, 1.5, -0.1, math.nan, "1e-5")),
        *(("epochs", value) for value in (0, -1, 0.1, math.nan, math.inf, None)),
    ],
)
def test_budgets_without_a_meaning(name: str, value: Any, mode: str) -> None:
    keywords = arguments(classifier(), grad_sample_mode=mode, **{**BUDGET, name: value})
    del keywords["noise_multiplier"]
    with pytest.raises(ValueError, match=f"{name} is "):
        PrivacyEngine().make_private_with_epsilon(**keywords)


def test_budget_for_data_without_a_length() -> None:
    keywords = arguments(classifier(), data_loader=DataLoader(Endless()), poisson_sampling=False, **BUDGET)
    del keywords["noise_multiplier"]
    with pytest.raises(ValueError, match="sampling rate is not known"):
        PrivacyEngine().make_private_with_epsilon(**keywords)


@pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
@pytest.mark.parametrize("accountant", ["prv", "rdp", "gdp"])
def test_epsilon_before_the_first_step_and_without_noise(accountant: str) -> None:
    for noise_multiplier, epsilon in ((1.0, None), (0.0, math.inf)):
        engine = PrivacyEngine(accountant=accountant)
        model, optimizer, criterion, loader = engine.make_private(
            **arguments(classifier(), noise_multiplier=noise_multiplier)
        )
        assert engine.get_epsilon(1e-3) == 0.0
        train(model, optimizer, criterion, loader)
        after = engine.get_epsilon(1e-3)
        assert after == epsilon if epsilon else 0 < after < math.inf


@pytest.mark.parametrize("mode", ["goast", None, 3])
def test_unknown_mode(mode: Any) -> None:
    with pytest.raises(ValueError, match=r"grad_sample_mode is .*'ghost', 'ghost_bk', .*Opacus.*hooks"):
        PrivacyEngine().make_private(**arguments(classifier(), grad_sample_mode=mode))


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew", "no_op"])
def test_other_modes_are_those_of_opacus(mode: str) -> None:
    results = []
    for engine in (PrivacyEngine(), opacus.PrivacyEngine()):
        torch.manual_seed(0)
        model, optimizer, loader = engine.make_private(
            **arguments(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), grad_sample_mode=mode)
        )
        results.append((type(model), type(optimizer), type(loader)))
    assert results[0] == results[1]
    assert not issubclass(results[0][0], GradSampleHooksFastGradientClipping)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_other_mode_gives_the_run_of_opacus() -> None:
    weights = []
    for engine in (PrivacyEngine(), opacus.PrivacyEngine()):
        torch.manual_seed(0)
        model, optimizer, loader = engine.make_private(**arguments(classifier(), grad_sample_mode="hooks"))
        train(model, optimizer, nn.CrossEntropyLoss(), loader)
        weights.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    assert torch.equal(*weights)


def test_per_layer_clipping_of_another_mode_goes_through() -> None:
    keywords = arguments(classifier(), grad_sample_mode="hooks", clipping="per_layer", max_grad_norm=[1.0] * 6)
    assert len(PrivacyEngine().make_private(**keywords)) == 3


def test_checkpoint_keeps_model_optimizer_and_budget() -> None:
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, criterion, loader = engine.make_private(**arguments(classifier()))
    train(model, optimizer, criterion, loader)
    file = io.BytesIO()
    engine.save_checkpoint(path=file, module=model, optimizer=optimizer)
    file.seek(0)

    resumed = PrivacyEngine(accountant="rdp")
    other, other_optimizer, other_criterion, other_loader = resumed.make_private(**arguments(classifier()))
    resumed.load_checkpoint(path=file, module=other, optimizer=other_optimizer)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["momentum_buffer"], other_optimizer.state[b]["momentum_buffer"])
    assert resumed.get_epsilon(1e-3) == engine.get_epsilon(1e-3)
    train(other, other_optimizer, other_criterion, other_loader)
    train(model, optimizer, criterion, loader)
    assert resumed.get_epsilon(1e-3) == pytest.approx(engine.get_epsilon(1e-3))


def test_model_that_is_wrapped_already() -> None:
    model, optimizer, _, _ = PrivacyEngine().make_private(**arguments(classifier()))
    again, optimizer, criterion, loader = PrivacyEngine().make_private(
        **arguments(model, optimizer=optimizer, max_grad_norm=0.25)
    )
    assert again is model
    assert model.max_grad_norm == optimizer.max_grad_norm == 0.25
    train(model, optimizer, criterion, loader)
    with pytest.raises(ValueError, match="wrapped already"):
        PrivacyEngine().make_private(**arguments(model, optimizer=optimizer, batch_first=False))
    with pytest.raises(ValueError, match="hooks of Opacus already"):
        PrivacyEngine().make_private(**arguments(model._module, wrap_model=False))


def test_both_modes_give_the_same_run() -> None:
    weights = []
    for mode in MODES:
        torch.manual_seed(0)
        model, optimizer, criterion, loader = PrivacyEngine().make_private(
            **arguments(classifier(), grad_sample_mode=mode)
        )
        train(model, optimizer, criterion, loader)
        weights.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-10)


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1, 4, 4), 0


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


BAD = {
    "clipping-norm-zero": (classifier, {"max_grad_norm": 0}, ValueError, "max_grad_norm is 0"),
    "clipping-norm-negative": (classifier, {"max_grad_norm": -1.0}, ValueError, "max_grad_norm is -1.0"),
    "clipping-norm-nan": (classifier, {"max_grad_norm": math.nan}, ValueError, "max_grad_norm is nan"),
    "clipping-norm-inf": (classifier, {"max_grad_norm": math.inf}, ValueError, "max_grad_norm is inf"),
    "clipping-norm-list": (classifier, {"max_grad_norm": [1.0] * 6}, ValueError, "flat clipping needs one"),
    "clipping-norm-text": (classifier, {"max_grad_norm": "1"}, ValueError, "flat clipping needs one"),
    "noise-negative": (classifier, {"noise_multiplier": -0.1}, ValueError, "noise_multiplier is -0.1"),
    "noise-nan": (classifier, {"noise_multiplier": math.nan}, ValueError, "noise_multiplier is nan"),
    "loss-reduction": (classifier, {"loss_reduction": "none"}, ValueError, "loss_reduction is 'none'"),
    "loss-reduction-of-criterion": (
        classifier,
        {"loss_reduction": "sum"},
        ValueError,
        "criterion's reduction is 'mean'",
    ),
    "criterion": (classifier, {"criterion": 3}, ValueError, "cannot be called"),
    "clipping-per-layer": (classifier, {"clipping": "per_layer"}, NotImplementedError, "clipping is 'per_layer'"),
    "batch-norm": (with_batch_norm, {}, ValueError, r"layer '1' \(BatchNorm2d\).*ModuleValidator.fix"),
    "optimizer-of-another-model": (
        classifier,
        {"optimizer": torch.optim.SGD(nn.Linear(2, 7).parameters())},
        ValueError,
        r"different than optimizer Parameters: 2 .*\(7, 2\)",
    ),
    "eval-mode": (lambda: classifier().eval(), {}, ValueError, "training mode"),
    "iterable-data": (classifier, {"data_loader": DataLoader(Endless())}, ValueError, "IterableDataset"),
    "iterable-data-without-a-length": (
        classifier,
        {"data_loader": DataLoader(Endless()), "poisson_sampling": False},
        ValueError,
        "sampling rate is not known.*IterableDataset.*__len__",
    ),
    "several-gradients-a-step": (
        classifier,
        {"optimizer": torch.optim.LBFGS(nn.Linear(2, 7).parameters())},
        PrivacyNotImplementedError,
        "LBFGS evaluates the loss several times",
    ),
    "data-that-are-batches": (
        classifier,
        {"data_loader": DataLoader(TensorDataset(torch.zeros(3, 8, 1)), batch_size=None), "poisson_sampling": False},
        ValueError,
        "batch_size=None",
    ),
    "no-data": (
        classifier,
        {"data_loader": DataLoader(TensorDataset(torch.zeros(3, 1)), batch_size=8, drop_last=True)},
        ValueError,
        "no batches",
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap_model", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_changes_nothing(name: str, wrap_model: bool, mode: str) -> None:
    make, changes, error, message = BAD[name]
    model = make()
    keywords = arguments(model, wrap_model=wrap_model, grad_sample_mode=mode, **changes)
    before = [set(vars(thing)) for thing in (*model.modules(), *model.parameters())]
    with pytest.raises(error, match=message):
        PrivacyEngine().make_private(**keywords)
    assert [set(vars(thing)) for thing in (*model.modules(), *model.parameters())] == before
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("mode", MODES)
def test_optimizer_that_was_made_before_the_adapters(mode: str) -> None:
    model = classifier()
    keywords = arguments(model, grad_sample_mode=mode)
    model.requires_grad_(False)
    model.append(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"no trainable parameter.*peft\.get_peft_model"):
        PrivacyEngine().make_private(**keywords)


@pytest.mark.parametrize("options", [{"max_grad_norm": 0}, {"loss_reduction": "none"}])
def test_wrapper_refuses_bad_input(options: dict[str, Any]) -> None:
    model = classifier()
    with pytest.raises(ValueError, match=next(iter(options))):
        GradSampleModuleFastGradientClipping(model, **options)
    assert not hasattr(model, "autograd_grad_sample_hooks")


def test_optimizer_and_module_go_by_one_norm() -> None:
    model = classifier()
    module = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0)
    keywords = dict(noise_multiplier=1.0, expected_batch_size=4)
    inner = torch.optim.SGD(model.parameters())
    optimizer = DPOptimizerFastGradientClipping(inner, max_grad_norm=2.0, **keywords)
    with pytest.raises(ValueError, match=r"max_grad_norm is 2\.0, the module's 1\.0"):
        DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="attached to no wrapped model"):
        optimizer.step()
    with pytest.raises(ValueError, match="loss_reduction is 'none'"):
        DPOptimizerFastGradientClipping(inner, max_grad_norm=1.0, loss_reduction="none", **keywords)
    optimizer = DPOptimizerFastGradientClipping(inner, max_grad_norm=1.0, loss_reduction="sum", **keywords)
    with pytest.raises(ValueError, match="that of the optimizer 'sum'"):
        DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss())
