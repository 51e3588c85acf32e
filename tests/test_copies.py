"""Copies of a private model, and files with one in it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from opacus_fgc import GradSampleHooksFastGradientClipping, GradSampleModuleFastGradientClipping, PrivacyEngine
from opacus_fgc.privacy_engine import MODES
from opacus_fgc.step.phase import Phase
from opacus_fgc.taps.hooks import does_nothing
from tests.operation_cases import vision_transformer
from tests.reference import reference

N = 5


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


class Scaled(nn.Module):
    """A layer, and an operation on a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh() * self.scale


def after_a_step(model: nn.Module, x: Tensor, mode: str = "ghost") -> GradSampleModuleFastGradientClipping:
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=0.1)
    MODES[mode](wrapped, wrapped(x).square().sum(1))
    return wrapped


def check_training(wrapped: GradSampleModuleFastGradientClipping, x: Tensor, mode: str) -> None:
    """One clipped backward pass equals the oracle."""
    oracle = reference(wrapped._module, lambda output, _: output.square().sum(), (x,), x, N)
    wrapped.max_grad_norm = oracle.total_norm().median().item()
    MODES[mode](wrapped, wrapped(x).square().sum(1))
    for path, wanted in oracle.clipped_sum(wrapped.max_grad_norm).items():
        torch.testing.assert_close(wrapped._module.get_parameter(path).summed_grad, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved, pickled])
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_trains_by_itself(copied: Callable, mode: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(N, 4)
    wrapped = after_a_step(Scaled(), x, mode)
    record, sums = wrapped.record, {name: param.summed_grad.clone() for name, param in wrapped.named_parameters()}
    other = copied(wrapped)
    with torch.no_grad():
        torch.testing.assert_close(other(x), wrapped(x), rtol=0, atol=0)
    assert other.max_grad_norm == 0.1
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(1.5)
    check_training(other, x, mode)
    assert wrapped.record is record
    for name, param in wrapped.named_parameters():
        assert torch.equal(param.summed_grad, sums[name])


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
def test_a_copy_has_nothing_of_a_step(copied: Callable) -> None:
    wrapped = after_a_step(Scaled(), torch.randn(N, 4))
    other = copied(wrapped)
    assert other.record.phase is Phase.IDLE and other.clipped_sum.passes == 0
    for param in other.parameters():
        assert getattr(param, "summed_grad", None) is None
        assert getattr(param, "_norm_sample", None) is None


def test_a_file_has_no_sum_of_a_step_in_it() -> None:
    wrapped = after_a_step(Scaled(), torch.randn(N, 4))
    file = pickle.dumps(wrapped)
    assert b"summed_grad" not in file and b"_norm_sample" not in file
    assert wrapped._module.scale.summed_grad is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
def test_a_copy_of_a_model_with_hooks_is_a_model_without(copied: Callable) -> None:
    x = torch.randn(N, 4)
    model = Scaled()
    hooks = GradSampleHooksFastGradientClipping(model, max_grad_norm=0.1)
    MODES["ghost"](hooks, model(x).square().sum(1))
    other = copied(model)
    record = hooks.record
    with torch.no_grad():
        wanted = model(x)
    torch.testing.assert_close(other(x), wanted, rtol=0, atol=0)
    assert hooks.record is record
    check_training(GradSampleModuleFastGradientClipping(other), x, "ghost")
    for module in other.modules():
        assert does_nothing not in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())


def test_a_copy_goes_through_make_private() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(N, 4), torch.randn(N, 3)
    wrapped = after_a_step(Scaled(), x)
    other = saved(wrapped)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=N)
    model, optimizer, criterion, _ = PrivacyEngine().make_private(
        module=other,
        optimizer=torch.optim.SGD(other.parameters(), lr=0.1),
        data_loader=loader,
        criterion=nn.MSELoss(),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        poisson_sampling=False,
        grad_sample_mode="ghost",
    )
    oracle = reference(model._module, nn.MSELoss(), (x,), y, N)
    criterion(model(x), y).backward()
    optimizer.step()
    for path, wanted in oracle.clipped_sum(0.5).items():
        torch.testing.assert_close(model._module.get_parameter(path).grad * N, wanted, rtol=1e-10, atol=1e-10)


def test_average_of_weights() -> None:
    torch.manual_seed(0)
    x = torch.randn(N, 1, 4, 4)
    wrapped = GradSampleModuleFastGradientClipping(vision_transformer())
    average = AveragedModel(wrapped)
    before = {name: param.clone() for name, param in wrapped.named_parameters()}
    average.update_parameters(wrapped)
    with torch.no_grad():
        for param in wrapped.parameters():
            param.add_(1.0)
    average.update_parameters(wrapped)
    for name, param in average.module.named_parameters():
        torch.testing.assert_close(param, before[name] + 0.5)
    average(x)
    assert wrapped.record.phase is Phase.IDLE
    check_training(wrapped, x, "ghost")
