"""The house stays a house: short files and classes, imports without a circle, a wrapped model with little of its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping as OpacusModule
from torch import nn

import opacus_fgc
from opacus_fgc import GradSampleModuleFastGradientClipping

ROOT = Path(opacus_fgc.__file__).parent
FILES = {
    ".".join(("opacus_fgc", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imported(name: str) -> set[str]:
    """The modules of the package that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one in FILES else node.module for one in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in FILES}
    return found


@pytest.mark.parametrize("name", FILES)
def test_files_and_classes_are_short(name: str) -> None:
    text = FILES[name].read_text()
    assert text.count("\n") <= 350
    classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    assert all(node.end_lineno - node.lineno < 200 for node in classes)


def test_no_imports_go_in_circles() -> None:
    left = {name: imported(name) - {name} for name in FILES}
    assert sum(map(len, left.values())) > len(FILES)
    while left:
        done = {name for name, others in left.items() if not others & left.keys()}
        assert done, f"in circles: {sorted(left)}"
        left = {name: others for name, others in left.items() if name not in done}


def test_a_wrapped_model_has_little_of_its_own() -> None:
    theirs, ours = OpacusModule(nn.Linear(3, 2)), GradSampleModuleFastGradientClipping(nn.Linear(3, 2))
    for model in (theirs, ours):
        model(torch.randn(4, 3, requires_grad=True)).sum().backward()
    own = vars(ours).keys() - vars(theirs).keys()
    assert 0 < len(own) < 12
    assert list(ours._modules) == ["_module"]
