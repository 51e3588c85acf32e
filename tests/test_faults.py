"""Whatever breaks off a step: the next one is refused or clean."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import PrivacyEngine
from opacus_fgc.privacy_engine import MODES
from tests.reference import reference
from tests.test_exact import assert_equal

B, C = 4, 0.5


class Model(nn.Module):
    """A reused layer, a tied weight and a parameter of no layer, so that every part of a record is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)
        self.scale = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.inner(x).relu()) * self.scale
        return F.linear(self.inner(h), self.inner.weight)


class BreakOff(TorchDispatchMode):
    """Raises at the n-th operation from here on, wherever that is: in forward, a pass of backward, noise or step."""

    def __init__(self, operation: int, error: Callable[[], BaseException]) -> None:
        super().__init__()
        self.operation, self.error, self.count = operation, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.operation:
            raise self.error()
        return func(*args, **(kwargs or {}))


class Run:
    def __init__(self, mode: str) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.x, self.y = torch.randn(B, 2, 3), torch.randn(B, 2, 3)
        self.engine = PrivacyEngine(accountant="rdp")
        self.module, self.optimizer, self.criterion, self.loader = self.engine.make_private(
            module=self.model,
            optimizer=torch.optim.SGD(self.model.parameters(), lr=0.1),
            criterion=nn.MSELoss(),
            data_loader=DataLoader(TensorDataset(self.x, self.y), batch_size=B),
            noise_multiplier=0.0,
            max_grad_norm=C,
            grad_sample_mode=mode,
        )

    def draw(self) -> None:
        """Draws the batch that a step is on: all samples, at a sampling rate of 1."""
        x, y = next(iter(self.loader))
        assert torch.equal(x, self.x) and torch.equal(y, self.y)

    def step(self) -> None:
        self.draw()
        self.optimizer.zero_grad()
        self.criterion(self.module(self.x), self.y).backward()
        self.optimizer.step()

    def steps(self) -> int:
        return sum(steps for _, _, steps in self.engine.accountant.history)

    def weights(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.model.parameters()]

    def assert_clean_step(self) -> None:
        """The next step is the one that the oracle makes from the present weights."""
        before = dict(zip(self.model.state_dict(), self.weights(), strict=True))
        oracle = reference(self.model, nn.MSELoss(), (self.x,), self.y, B)
        steps = self.steps()
        self.step()
        for name, wanted in oracle.clipped_sum(C).items():
            assert_equal(self.model.get_parameter(name), before[name] - 0.1 * wanted / B, name)
        assert self.steps() == steps + 1
        assert self.module.hooks_enabled


ERRORS = (KeyboardInterrupt, torch.OutOfMemoryError)


@pytest.mark.every(3)
@pytest.mark.parametrize("first", [True, False], ids=["first-step", "later-step"])
@pytest.mark.parametrize("mode", MODES)
def test_broken_off_anywhere(mode: str, first: bool) -> None:
    """At every operation of a step: nothing half done can be stepped with, no step goes uncounted, the next one is clean.

    By one error and the other in turn: what catches the first, which is no `Exception`, catches the second.
    """
    stride = 17 if first else 3
    operation = 0
    while True:
        operation += stride
        error = ERRORS[operation // stride % 2]
        run = Run(mode)
        if not first:
            run.step()
        weights, steps = run.weights(), run.steps()
        try:
            with BreakOff(operation, error):
                run.step()
        except error:
            pass
        else:
            break
        moved = not all(map(torch.equal, weights, run.weights()))
        assert run.steps() > steps or not moved
        if run.module.clipped_sum.passes == 0:
            with pytest.raises(ValueError, match=r"step\(\) without a clipped gradient"):
                run.optimizer.step()
        run.assert_clean_step()
    assert operation > 20 * stride


@pytest.mark.every(2)
@pytest.mark.parametrize("mode", MODES)
def test_backward_that_is_tried_again(mode: str) -> None:
    """As a loop does that catches what breaks off, without `zero_grad` in between: half a sum is not added to."""
    other = Run(mode)
    other.step()
    operation = 0
    while True:
        operation += 2
        run = Run(mode)
        run.draw()
        loss = run.criterion(run.module(run.x), run.y)
        try:
            with BreakOff(operation, torch.OutOfMemoryError):
                loss.backward()
        except torch.OutOfMemoryError:
            run.criterion(run.module(run.x), run.y).backward()
            run.optimizer.step()
            for actual, wanted in zip(run.weights(), other.weights(), strict=True):
                assert_equal(actual, wanted, "weights")
            assert run.steps() == other.steps() == 1
        else:
            break
    assert operation > 40


@pytest.mark.parametrize("mode", MODES)
def test_interrupt_between_backward_and_step(mode: str) -> None:
    """The sum is whole and waits."""
    run, other = Run(mode), Run(mode)
    try:
        run.draw()
        run.criterion(run.module(run.x), run.y).backward()
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        run.optimizer.step()
    other.step()
    assert all(map(torch.equal, run.weights(), other.weights()))
    run.optimizer.zero_grad()
    run.assert_clean_step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["criterion", "forward-hook", "backward-hook", "dataset"])
def test_exception_in_the_users_code(mode: str, where: str) -> None:
    class Broken(Exception):
        pass

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise Broken

    run = Run(mode)
    run.step()
    broken = copy.copy(run.criterion)
    if where == "criterion":
        broken.criterion = fail
    handles = []
    if where == "forward-hook":
        handles.append(run.model.norm.register_forward_hook(fail))
    if where == "backward-hook":
        handles.append(run.model.norm.register_forward_hook(lambda m, i, output: output.register_hook(fail) and None))
    run.optimizer.zero_grad()
    with pytest.raises(Broken):
        broken(run.module(run.x), run.y if where != "dataset" else fail()).backward()
    for handle in handles:
        handle.remove()
    with pytest.raises(ValueError, match=r"step\(\) without a clipped gradient"):
        run.optimizer.step()
    run.assert_clean_step()
