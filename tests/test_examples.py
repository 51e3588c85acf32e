"""The example runs as its users run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed_cases import needs_fsdp
from tests.scripts import run_here

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("mode", [pytest.param("ghost", marks=pytest.mark.slow), "ghost_bk"])
def test_digits(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    picture = tmp_path / "digits.png"
    command = [sys.executable, EXAMPLES / "digits.py", "--epochs", "1", "--mode", mode, "--plot", picture]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"opacus_fgc {mode} " in run.stdout
    assert picture.stat().st_size > 0
    assert "Warning" not in run.stderr


@pytest.mark.slow
def test_digits_compared() -> None:
    pytest.importorskip("sklearn")
    command = [sys.executable, EXAMPLES / "digits.py", "--epochs", "1", "--compare"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split()[:2] for line in run.stdout.splitlines()]
    assert ["opacus_fgc", "ghost"] in rows and ["opacus", "ghost"] in rows
    assert "Warning" not in run.stderr


@pytest.mark.parametrize(
    "option, value, error", [("--epsilon", "-1", "not a positive number"), ("--delta", "1", "not between 0 and 1")]
)
def test_digits_refuses_bad_arguments(option: str, value: str, error: str) -> None:
    pytest.importorskip("sklearn")
    run = run_here(EXAMPLES / "digits.py", option, value)
    assert run.returncode == 2
    assert error in run.stderr


@pytest.mark.slow
@needs_fsdp
def test_distributed() -> None:
    pytest.importorskip("sklearn")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, EXAMPLES / "distributed.py", "--epochs", "2", "--parallel", "fsdp"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    (row,) = [line for line in run.stdout.splitlines() if line.startswith("fsdp")]  # of one rank
    assert row.split()[:3] == ["fsdp", "ghost_bk", "2"]
    assert row.endswith("3,093 of 6,186")
    assert "Warning" not in run.stderr


def test_distributed_says_how_to_start_it() -> None:
    pytest.importorskip("sklearn")
    run = run_here(EXAMPLES / "distributed.py")
    assert run.returncode == 2
    assert "torchrun" in run.stderr
