"""The optimizer: noise once a step and of the right size, sums over physical batches, the true accounting."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from opacus.schedulers import ExponentialGradClip, ExponentialNoise, LambdaGradClip, StepGradClip
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import DPOptimizerFastGradientClipping, PrivacyEngine, PrivacyError
from opacus_fgc.privacy_engine import MODES
from tests.case import two_passes_by_hand
from tests.reference import reference

SIZE = 32


def make_private(**options: Any):
    """Engine, model, optimizer, criterion, loader of a small classifier, with ``options`` for `make_private`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    data = TensorDataset(torch.randn(SIZE, 6), torch.randint(3, (SIZE,)))
    engine = PrivacyEngine(accountant="rdp")
    defaults = dict(noise_multiplier=0.0, max_grad_norm=0.5, poisson_sampling=False)
    return engine, *engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(data, batch_size=options.pop("batch_size", 8)),
        **{**defaults, **options},
    )


@pytest.fixture(params=MODES)
def private(request: pytest.FixtureRequest) -> Any:
    return partial(make_private, grad_sample_mode=request.param)


def flat(model: nn.Module, attribute: str) -> torch.Tensor:
    return torch.cat([getattr(param, attribute).flatten() for param in model.parameters()])


def test_step_is_the_clipped_mean(private: Any) -> None:
    _, model, optimizer, criterion, loader = private()
    x, y = next(iter(loader))
    oracle = reference(model._module, nn.CrossEntropyLoss(), (x,), y, len(x))
    before = flat(model, "data").clone()
    criterion(model(x), y).backward()
    optimizer.step()
    clipped = torch.cat([gradient.flatten() for gradient in oracle.clipped_sum(0.5).values()])
    torch.testing.assert_close(flat(model, "data"), before - 0.1 * clipped / 8)


def noise_of(model: nn.Module, optimizer: Any, criterion: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    return flat(model, "grad") * optimizer.expected_batch_size - flat(model, "summed_grad")


@pytest.mark.parametrize("max_grad_norm, noise_multiplier", [(0.5, 1.0), (2.0, 0.3)])
def test_noise_has_the_right_deviation(private: Any, max_grad_norm: float, noise_multiplier: float) -> None:
    _, model, optimizer, criterion, loader = private(max_grad_norm=max_grad_norm, noise_multiplier=noise_multiplier)
    x, y = next(iter(loader))
    noise = torch.stack([noise_of(model, optimizer, criterion, x, y) for _ in range(100)])
    std = noise_multiplier * max_grad_norm
    # 8300 draws: the deviation of the estimates is below 1 % of std; 5 % are over five of them.
    assert noise.std().item() == pytest.approx(std, rel=0.05)
    assert abs(noise.mean().item()) < 0.05 * std
    # Independent between parameters and steps, and on every one of them.
    assert noise.std(0).min() > 0.5 * std
    assert abs((noise[1:] * noise[:-1]).mean().item()) < 0.05 * std**2


def test_noise_without_samples_and_for_unused_parameters(private: Any) -> None:
    _, model, optimizer, criterion, loader = private(noise_multiplier=1.0)
    x, y = next(iter(loader))
    criterion(model(x[:0]), y[:0]).backward()
    assert flat(model, "summed_grad").abs().max() == 0
    optimizer.step()
    assert (flat(model, "grad") != 0).all()
    optimizer.zero_grad()
    # The second layer only.
    criterion(model._module[2](torch.randn(8, 8)), y).backward()
    assert model._module[0].weight.summed_grad.abs().max() == 0
    optimizer.step()
    assert (flat(model, "grad") != 0).all()


def test_same_seed_same_run(private: Any) -> None:
    runs = []
    for _ in range(2):
        _, model, optimizer, criterion, loader = private(noise_multiplier=1.0, poisson_sampling=True)
        torch.manual_seed(3)
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        runs.append(flat(model, "data"))
    assert torch.equal(*runs)


def test_own_noise_generator(private: Any) -> None:
    noise = []
    for seed in (1, 1, 2):
        _, model, optimizer, criterion, loader = private(
            noise_multiplier=1.0, noise_generator=torch.Generator().manual_seed(seed)
        )
        noise.append(noise_of(model, optimizer, criterion, *next(iter(loader))))
    torch.testing.assert_close(noise[0], noise[1])
    assert not torch.allclose(noise[0], noise[2])


@pytest.mark.parametrize("clearing", [True, False])
def test_physical_batches_add_up_to_the_logical_one(private: Any, clearing: bool) -> None:
    gradients = []
    for physical in (SIZE, 5):
        engine, model, optimizer, criterion, loader = private(batch_size=16)
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer
        ) as memory_safe:
            sizes = []
            for x, y in memory_safe:
                # What a skipped step has summed is kept, with or without a call that would clear it.
                if clearing or not optimizer._is_last_step_skipped:
                    optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()
                sizes.append(len(x))
        assert max(sizes) <= physical and sum(sizes) == SIZE
        assert engine.accountant.history == [(0.0, 0.5, 2)]
        gradients.append(flat(model, "data"))
    torch.testing.assert_close(*gradients)


def test_poisson_batches_with_empty_ones_under_the_memory_manager(private: Any) -> None:
    engine, model, optimizer, criterion, loader = private(batch_size=1, poisson_sampling=True, noise_multiplier=1.0)
    sizes = []
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as memory_safe:
        for x, y in memory_safe:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            sizes.append(len(x))
    assert 0 in sizes and max(sizes) == 2
    assert engine.accountant.history == [(1.0, 1 / SIZE, SIZE)]


def test_accumulated_batches_are_accounted(private: Any) -> None:
    engine, model, optimizer, criterion, loader = private(noise_multiplier=1.0)
    batches = list(loader)
    optimizer.zero_grad()
    for x, y in batches[:3]:
        criterion(model(x), y).backward()
    assert optimizer.accumulated_iterations == 3
    summed = flat(model, "summed_grad").clone()
    optimizer.step()
    assert engine.accountant.history == [(1.0, 3 * 8 / SIZE, 1)]
    noise = flat(model, "grad") * 8 * 3 - summed
    assert noise.std().item() == pytest.approx(0.5, rel=0.3)


def test_accumulated_batches_add_up(private: Any) -> None:
    _, model, optimizer, criterion, loader = private()
    expected = torch.zeros_like(flat(model, "data"))
    for x, y in loader:
        oracle = reference(model._module, nn.CrossEntropyLoss(), (x,), y, len(x))
        expected += torch.cat([gradient.flatten() for gradient in oracle.clipped_sum(0.5).values()])
        criterion(model(x), y).backward()
    torch.testing.assert_close(flat(model, "summed_grad"), expected)


def test_parameters_that_come_later_start_from_nothing(private: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    data = TensorDataset(torch.randn(SIZE, 6), torch.randint(3, (SIZE,)))
    module, optimizer, criterion, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model[2].parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(data, batch_size=8),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        poisson_sampling=False,
        **private.keywords,
    )
    for x, y in loader:
        criterion(module(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    # Unfrozen between two steps, as in fine-tuning layer by layer.
    optimizer.add_param_group({"params": list(model[0].parameters())})
    oracle = reference(model, nn.CrossEntropyLoss(), (x,), y, len(x))
    criterion(module(x), y).backward()
    optimizer.step()
    clipped = torch.cat([gradient.flatten() for gradient in oracle.clipped_sum(0.5).values()])
    torch.testing.assert_close(flat(model, "grad"), clipped / 8)


def test_accumulation_is_refused_under_poisson_sampling(private: Any) -> None:
    _, model, optimizer, criterion, _ = private(poisson_sampling=True)
    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    criterion(model(x), y).backward()
    with pytest.raises(ValueError, match="BatchMemoryManager"):
        criterion(model(x), y).backward()


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: ExponentialGradClip(optimizer, gamma=0.5),
        lambda optimizer: LambdaGradClip(optimizer, scheduler_function=lambda epoch: 1 / (1 + epoch)),
        lambda optimizer: StepGradClip(optimizer, step_size=1, gamma=2.0),
    ],
)
def test_clip_schedulers_move_clip_and_noise(private: Any, schedule: Any) -> None:
    _, model, optimizer, criterion, loader = private(noise_multiplier=1.0, max_grad_norm=0.1)
    scheduler = schedule(optimizer)
    x, y = next(iter(loader))
    for _ in range(3):
        scheduler.step()
        oracle = reference(model._module, nn.CrossEntropyLoss(), (x,), y, len(x))
        expected = torch.cat([gradient.flatten() for gradient in oracle.clipped_sum(optimizer.max_grad_norm).values()])
        noise = torch.stack([noise_of(model, optimizer, criterion, x, y) for _ in range(1)])
        torch.testing.assert_close(flat(model, "summed_grad"), expected)
        assert model.max_grad_norm == optimizer.max_grad_norm != 0.1
        assert noise.std().item() == pytest.approx(optimizer.max_grad_norm, rel=0.4)


def test_noise_schedulers(private: Any) -> None:
    engine, model, optimizer, criterion, loader = private(noise_multiplier=1.0)
    scheduler = ExponentialNoise(optimizer, gamma=2.0)
    scheduler.step()
    noise = torch.cat([noise_of(model, optimizer, criterion, x, y) for x, y in loader])
    assert noise.std().item() == pytest.approx(2 * 0.5, rel=0.2)
    assert engine.accountant.history[-1][0] == 2.0


def test_max_grad_norm_may_not_change_between_backward_and_step(private: Any) -> None:
    _, model, optimizer, criterion, loader = private()
    x, y = next(iter(loader))
    criterion(model(x), y).backward()
    optimizer.max_grad_norm = 0.1
    with pytest.raises(ValueError, match="max_grad_norm changed"):
        optimizer.step()
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()


def test_step_needs_a_clipped_gradient(private: Any) -> None:
    _, model, optimizer, criterion, loader = private()
    x, y = next(iter(loader))
    with pytest.raises(ValueError, match=r"step\(\) without a clipped gradient"):
        optimizer.step()
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=r"step\(\) without a clipped gradient"):
        optimizer.step()
    # Nor are they dropped without a word.
    criterion(model(x), y).backward()
    with pytest.raises(ValueError, match=r"not clipped is the gradient in p\.grad of 0\.weight"):
        optimizer.step()
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="haven't been cleared"):
        optimizer.step()
    criterion(model(x), y).backward()
    with pytest.raises(ValueError, match="haven't been cleared"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"step\(\) without a clipped gradient"):
        optimizer.step()


def test_closure(private: Any) -> None:
    _, model, optimizer, criterion, loader = private()
    x, y = next(iter(loader))
    before = flat(model, "data").clone()
    wanted = criterion(model(x), y).item()

    def closure():
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert not torch.equal(flat(model, "data"), before)
    assert loss.item() == pytest.approx(wanted)


def test_closure_of_a_part(private: Any) -> None:
    """Also where the step is skipped, to go on summing."""
    _, model, optimizer, criterion, loader = private(batch_size=16)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=5, optimizer=optimizer) as parts:
        for x, y in parts:

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = criterion(model(x), y)
                loss.backward()
                return loss

            with torch.no_grad():
                wanted = nn.functional.cross_entropy(model(x), y)
                assert optimizer.step(closure).item() == pytest.approx(wanted.item())


class Line(torch.optim.LBFGS):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Line])
def test_optimizer_of_several_gradients_a_step(kind: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(NotImplementedError, match=f"{kind.__name__} evaluates the loss several times"):
        DPOptimizerFastGradientClipping(
            kind(nn.Linear(2, 2).parameters()), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4
        )


def test_scheduled_optimizer_is_of_one_gradient(private: Any) -> None:
    """A scheduler wraps `step`."""
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    DPOptimizerFastGradientClipping(optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4)


def written(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    for param in model.parameters():
        param.grad = 0.1 * param.detach()


def plain_with_hooks_off(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    model.disable_hooks()
    nn.functional.cross_entropy(model(x), y).backward()
    model.enable_hooks()


@pytest.mark.parametrize("physical", [None, 3])
@pytest.mark.parametrize("put", [written, plain_with_hooks_off])
def test_gradient_that_a_step_would_drop(private: Any, put: Any, physical: int | None) -> None:
    """Also in a part of a batch, whose `zero_grad` would clear it."""
    engine, model, optimizer, criterion, loader = private()
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical or SIZE, optimizer=optimizer) as parts:
        x, y = next(iter(parts))
    before = flat(model, "data").clone()
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    put(model, x, y)
    with pytest.raises(PrivacyError, match=r"in p\.grad of .*register_step_pre_hook"):
        optimizer.step()
    assert torch.equal(flat(model, "data"), before) and not engine.accountant.history


@pytest.mark.parametrize("set_to_none", [True, False])
def test_public_gradient_that_is_added_after_the_noise(private: Any, set_to_none: bool) -> None:
    """As the error says."""
    _, model, optimizer, criterion, loader = private()
    target = [param.detach() + 1 for param in model.parameters()]

    def proximal(*_: Any) -> None:
        penalty = sum((param - goal).square().sum() for param, goal in zip(model.parameters(), target, strict=True))
        gradients = torch.autograd.grad(penalty, list(model.parameters()))
        for param, gradient in zip(model.parameters(), gradients, strict=True):
            param.grad += gradient

    with torch.enable_grad():
        optimizer.original_optimizer.register_step_pre_hook(torch.enable_grad()(proximal))
    for x, y in loader:
        optimizer.zero_grad(set_to_none=set_to_none)
        oracle = reference(model._module, nn.CrossEntropyLoss(), (x,), y, len(x))
        before = flat(model, "data").clone()
        criterion(model(x), y).backward()
        optimizer.step()
        clipped = torch.cat([gradient.flatten() for gradient in oracle.clipped_sum(0.5).values()])
        public = 2 * (before - torch.cat([goal.flatten() for goal in target]))
        torch.testing.assert_close(flat(model, "data"), before - 0.1 * (clipped / 8 + public))


def test_passes_by_hand_leave_no_gradient_that_a_step_would_drop(private: Any) -> None:
    _, model, optimizer, _, loader = private()
    for x, y in loader:
        optimizer.zero_grad()
        two_passes_by_hand(model, nn.functional.cross_entropy(model(x), y, reduction="none"))
        assert all(param.grad is None for param in model.parameters())
        optimizer.step()


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_torch_optimizer(optimizer: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    data = TensorDataset(torch.randn(SIZE, 6), torch.randint(3, (SIZE,)))
    private_model, private_optimizer, criterion, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(data, batch_size=SIZE),
        noise_multiplier=0.1,
        max_grad_norm=1.0,
        grad_sample_mode="ghost",
        poisson_sampling=False,
    )
    losses = []
    for _ in range(20):
        for x, y in loader:
            private_optimizer.zero_grad()
            loss = criterion(private_model(x), y)
            loss.backward()
            private_optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert math.isfinite(losses[-1])
