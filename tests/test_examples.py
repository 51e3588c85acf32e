"""The example runs as its users run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
def test_digits(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    picture = tmp_path / "digits.png"
    command = [sys.executable, EXAMPLES / "digits.py", "--epochs", "1", "--mode", mode, "--plot", picture]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"opacus_fgc {mode} " in run.stdout
    assert picture.stat().st_size > 0


def test_digits_refuses_bad_arguments() -> None:
    pytest.importorskip("sklearn")
    run = subprocess.run(
        [sys.executable, EXAMPLES / "digits.py", "--epsilon", "-1"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "not a positive number" in run.stderr
