"""Runs that are killed and resumed: the budget is that of the weights, and no noise is used twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.schedulers import ExponentialGradClip, ExponentialNoise
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import PrivacyEngine
from opacus_fgc.privacy_engine import MODES

B = 8


class Run:
    def __init__(self, mode: str, generator: torch.Generator | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.engine = PrivacyEngine(accountant="rdp")
        data = TensorDataset(torch.randn(4 * B, 4), torch.randint(3, (4 * B,)))
        self.module, self.optimizer, self.criterion, self.loader = self.engine.make_private(
            module=self.model,
            optimizer=torch.optim.SGD(self.model.parameters(), lr=0.1),
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(data, batch_size=B),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
            noise_generator=generator,
            poisson_sampling=False,
        )

    def step(self) -> list[Tensor]:
        """The noise of a step whose clipped sum is zero."""
        self.optimizer.zero_grad()
        output = self.module(torch.zeros(B, 4))
        self.criterion(output * 0, torch.zeros(B, dtype=torch.long)).backward()
        self.optimizer.step()
        return [param.grad.clone() for param in self.model.parameters()]

    def steps(self) -> int:
        return sum(steps for _, _, steps in self.engine.accountant.history)


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_noise_is_fresh_after_a_resume(mode: str, own_generator: bool, tmp_path: Path) -> None:
    """Also in a script that sets its seeds when it starts, before or after the engine is made."""

    def generator() -> torch.Generator | None:
        return torch.Generator().manual_seed(3) if own_generator else None

    run = Run(mode, generator())
    before = [run.step() for _ in range(3)]
    run.engine.save_checkpoint(path=tmp_path / "run.pt", module=run.module, optimizer=run.optimizer)
    resumed = Run(mode, generator())
    resumed.engine.load_checkpoint(path=tmp_path / "run.pt", module=resumed.module, optimizer=resumed.optimizer)
    assert resumed.steps() == 3
    for noise in [resumed.step() for _ in range(3)]:
        assert not any(torch.equal(a, b) for old in before for a, b in zip(old, noise, strict=True))
    assert resumed.steps() == 6


@pytest.mark.parametrize("mode", MODES)
def test_waiting_sum_is_not_part_of_a_checkpoint(mode: str, tmp_path: Path) -> None:
    """Saved between backward and step: the step is neither counted nor made."""
    run = Run(mode)
    run.step()
    run.optimizer.zero_grad()
    run.criterion(run.module(torch.ones(B, 4)), torch.zeros(B, dtype=torch.long)).backward()
    run.engine.save_checkpoint(path=tmp_path / "run.pt", module=run.module, optimizer=run.optimizer)
    resumed = Run(mode)
    resumed.engine.load_checkpoint(path=tmp_path / "run.pt", module=resumed.module, optimizer=resumed.optimizer)
    assert resumed.steps() == 1
    with pytest.raises(ValueError, match=r"step\(\) without a clipped gradient"):
        resumed.optimizer.step()


@pytest.mark.parametrize("mode", MODES)
def test_budget_under_schedulers(mode: str, tmp_path: Path) -> None:
    """A resumed run is accounted with what its noise is, whatever its schedulers make of it."""

    def schedulers(run: Run) -> dict[str, Any]:
        return {
            "noise_scheduler": ExponentialNoise(run.optimizer, gamma=0.5),
            "grad_clip_scheduler": ExponentialGradClip(run.optimizer, gamma=0.5),
        }

    run = Run(mode)
    scheduled = schedulers(run)
    run.step()
    for scheduler in scheduled.values():
        scheduler.step()
    run.step()
    run.engine.save_checkpoint(path=tmp_path / "run.pt", module=run.module, optimizer=run.optimizer, **scheduled)
    resumed = Run(mode)
    resumed.engine.load_checkpoint(
        path=tmp_path / "run.pt", module=resumed.module, optimizer=resumed.optimizer, **schedulers(resumed)
    )
    assert resumed.engine.accountant.history == run.engine.accountant.history
    resumed.step()
    assert resumed.engine.accountant.history[-1][0] == resumed.optimizer.noise_multiplier


SCRIPT = """
import sys, torch
from tests.test_checkpoints import Run
run, (path, mode) = Run(sys.argv[2]), sys.argv[1:]
ballast = torch.zeros(2**21)
for step in range(1, 10_000):
    run.step()
    run.engine.save_checkpoint(
        path=path, module=run.module, optimizer=run.optimizer, checkpoint_dict={"step": step, "ballast": ballast}
    )
"""


@pytest.mark.every(2)
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_any_moment(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    for delay in (0.0, 0.013, 0.05):
        path.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path), mode], cwd=Path(__file__).parents[1])
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        resumed = Run(mode)
        checkpoint = resumed.engine.load_checkpoint(path=path, module=resumed.module, optimizer=resumed.optimizer)
        assert resumed.steps() == checkpoint["step"] > 0
        resumed.step()
        assert resumed.steps() == checkpoint["step"] + 1
