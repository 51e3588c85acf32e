"""Scaled losses: what vanishes in float16 comes through, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import GradScaler, PrivacyEngine
from opacus_fgc.privacy_engine import MODES
from tests.reference import Reference, reference

B = 6


def model(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    made = {
        "linear": (nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3)), (5, 8)),
        "convolution": (nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)), (2, 8, 8)),
    }[kind]
    return made[0].float(), made[1]


def private(model: nn.Module, x: Tensor, mode: str, **options: Any):
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.MSELoss(),
        data_loader=DataLoader(TensorDataset(x), batch_size=B),
        **{
            "noise_multiplier": 0.0,
            "max_grad_norm": 1e-3,
            "poisson_sampling": False,
            "grad_sample_mode": mode,
            **options,
        },
    )


@pytest.mark.parametrize("init_scale", [2.0**8, 2.0**14])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_scale_leaves_no_trace(kind: str, mode: str, init_scale: float) -> None:
    """In float32 nothing vanishes, and a power of two is exact: the same norms, sums and weights."""
    results = []
    for scaler in (None, GradScaler("cpu", init_scale=init_scale)):
        net, shape = model(kind)
        x = torch.randn(B, *shape, dtype=torch.float32)
        module, optimizer, criterion, _ = private(net, x, mode)
        output = module(x)
        loss = criterion(output, torch.zeros_like(output))
        (scaler.scale(loss) if scaler else loss).backward()
        norms, sums = module.per_sample_gradient_norms, [param.summed_grad.clone() for param in net.parameters()]
        if scaler:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        results.append((norms, *sums, *(param.detach() for param in net.parameters())))
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_what_vanishes_in_float16(kind: str, mode: str) -> None:
    """Gradients of 1e-8 at the outputs are next to nothing in float16; scaled, they are as near the oracle as float16 is."""
    size, large = 1e-8, 2.0**23
    net, shape = model(kind)
    x = torch.randn(B, *shape, dtype=torch.float32)
    with torch.autocast("cpu", torch.float16):
        oracle = reference(net, lambda output, _: large * size * output.float().square().sum(), (x,), x, B)
    oracle = Reference({name: gradient / large for name, gradient in oracle.gradients.items()}, oracle.losses)
    norms = oracle.total_norm()
    deviations = []
    for init_scale in (1.0, large):
        net, _ = model(kind)
        max_grad_norm = norms.median().item()
        module, _, criterion, _ = private(net, x, mode, max_grad_norm=max_grad_norm)
        criterion.criterion = lambda output, y: size * output.float().square().flatten(1).sum(1)
        criterion.loss_reduction = "sum"
        with torch.autocast("cpu", torch.float16):
            loss = criterion(module(x), x)
        GradScaler("cpu", init_scale=init_scale).scale(loss).backward()
        deviations.append(((module.per_sample_gradient_norms - norms).abs() / norms).max().item())
    for name, wanted in oracle.clipped_sum(max_grad_norm).items():
        torch.testing.assert_close(net.get_parameter(name).summed_grad, wanted, rtol=0.01, atol=0.01 * max_grad_norm)
    assert deviations[1] < 0.01 < 0.1 < deviations[0]


@pytest.mark.parametrize("mode", MODES)
def test_samples_that_overflow(mode: str) -> None:
    """They are refused or dropped, whatever the others are; the step is made, and the scale stays."""
    net, shape = model("linear")
    x = torch.randn(B, *shape, dtype=torch.float32)
    module, optimizer, criterion, _ = private(net, x, mode, nonfinite="drop")
    scaler = GradScaler("cpu", init_scale=2.0**8)
    weights = torch.ones(B)
    weights[0] = 1e6
    before = [param.detach().clone() for param in net.parameters()]
    with torch.autocast("cpu", torch.float16):
        output = module(x)
        loss = criterion(output, torch.zeros_like(output)) * weights
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert module.dropped == 1
    assert scaler.get_scale() == 2.0**8
    assert all(param.isfinite().all() for param in net.parameters())
    assert not any(map(torch.equal, before, net.parameters()))


def test_plain_losses_are_refused() -> None:
    with pytest.raises(TypeError, match=r"scale\(\) got a Tensor"):
        GradScaler("cpu").scale(torch.ones(()))


def test_disabled() -> None:
    net, shape = model("linear")
    x = torch.randn(B, *shape, dtype=torch.float32)
    module, _, criterion, _ = private(net, x, "ghost")
    assert GradScaler("cpu", enabled=False).scale(criterion(module(x), torch.zeros(B, 5, 3))).loss_scale == 1.0


def test_another_scale() -> None:
    scaler = GradScaler("cpu")
    scaler.update(4.0)
    assert scaler.get_scale() == 4.0
    other = GradScaler("cpu")
    other.load_state_dict(scaler.state_dict())
    assert other.get_scale() == 4.0
