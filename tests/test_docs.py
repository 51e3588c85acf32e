"""README.md and docs/: each block of Python runs, and what they name is there.

The blocks of a page run in order, with the same names, as a reader would type them. Before the first one there are `names()`.
A comment on the line before a block says what is special about it:

- ``<!-- new names -->``: the names are those of `names()` again;
- ``<!-- not run: reason -->``: the block does not run here, since it needs what one process of a test does not have.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import opacus_fgc
from opacus_fgc import NORM_SAMPLERS, per_sample
from opacus_fgc.planner import MEMORY

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
BLOCK = re.compile(r"^(?:<!-- (?P<comment>.*?) -->\n)?```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"new names|not run: .+")
TEST = re.compile(r"`(?:tests/)?(?P<file>test_\w+\.py)(?:::(?P<name>\w+))?`")
LINK = re.compile(r"\]\((?P<target>[^)#]+)(?:#[^)]*)?\)")
LARGEST_IMAGE = 150_000  # bytes
ELLIPSIS = "…"


@dataclass
class Block:
    """A block of Python on a page."""

    comment: str
    code: str
    line: int

    @property
    def runs(self) -> bool:
        return not self.comment.startswith("not run")


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(match["comment"] or "", match["code"], text[: match.start("code")].count("\n"))
        for match in BLOCK.finditer(text)
    ]


def names() -> dict[str, Any]:
    """What a page may use without making it: torch, a classifier of 8 features, its data, optimizer and criterion."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    dataset = TensorDataset(torch.randn(64, 8), torch.randint(3, (64,)))
    return {
        "__name__": "docs",
        "torch": torch,
        "nn": nn,
        "F": F,
        "dataset": dataset,
        "data_loader": DataLoader(dataset, batch_size=16),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": nn.CrossEntropyLoss(),
        "x": torch.randn(16, 8),
        "y": torch.randint(3, (16,)),
    }


def ids(page: Path) -> str:
    return page.name


@pytest.fixture
def as_users_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In float32, with files in a folder of the test's own, and registry and bounds as they were afterwards."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    samplers = dict(NORM_SAMPLERS)
    for name, bound in vars(MEMORY).items():
        monkeypatch.setattr(MEMORY, name, bound)
    yield
    NORM_SAMPLERS.clear()
    NORM_SAMPLERS.update(samplers)


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in blocks(page))], ids=ids)
@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")  # on the way to the noise multiplier
def test_code_runs(page: Path) -> None:
    namespace = names()
    for block in blocks(page):
        if block.comment == "new names":
            namespace = names()
        if block.runs:
            # Empty lines before it, so that a traceback has the line of the page.
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)


def test_most_blocks_run() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    assert sum(block.runs for block in found) >= 20
    assert sum(page.read_text().count("```python") for page in PAGES) == len(found)
    for block in found:
        assert not block.comment or COMMENT.fullmatch(block.comment), block.comment


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_tests_that_are_named_are_there(page: Path) -> None:
    for match in TEST.finditer(page.read_text()):
        source = (ROOT / "tests" / match["file"]).read_text()
        assert match["name"] is None or re.search(rf"^\s*def {match['name']}\(", source, re.MULTILINE), match[0]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_that_are_linked_are_there(page: Path) -> None:
    for match in LINK.finditer(page.read_text()):
        if "://" not in match["target"]:
            assert (page.parent / match["target"]).exists(), match["target"]


def test_headings_that_the_readme_links_are_there() -> None:
    """Those of other pages are checked when the site is built."""
    links = re.findall(r"\]\((docs/\w[\w-]*\.md)#([^)]+)\)", (ROOT / "README.md").read_text())
    assert len(links) >= 10
    for page, anchor in links:
        headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor


def test_images_are_small() -> None:
    images = list((ROOT / "docs" / "images").iterdir())
    assert images
    for image in images:
        assert image.suffix == ".png"
        assert image.stat().st_size < LARGEST_IMAGE


def test_readme_has_the_figures_of_the_speed_page() -> None:
    """Of one run; on both pages, the rows of time come first."""
    figures = [
        dict(re.findall(r"^\| (.+?) \| (.*\d\.\d\d) \|$", page.read_text().partition("| peak memory")[0], re.MULTILINE))
        for page in (ROOT / "README.md", ROOT / "docs" / "speed.md")
    ]
    assert len(figures[0]) >= 8
    assert figures[0].items() <= figures[1].items()


def test_picture_was_drawn_from_the_tables_beside_it() -> None:
    image = pytest.importorskip("PIL.Image")
    report = pytest.importorskip("report")  # in benchmarks/
    results = report.read((ROOT / "docs" / "speed.md").read_text())
    assert len(results) >= 10
    with image.open(ROOT / "docs" / "images" / "step.png") as picture:
        assert picture.text["Comment"] == report.tables(results)


@cache
def texts() -> list[str]:
    """The texts in the package, with an ellipsis for what is filled in."""
    found = []
    for source in (ROOT / "opacus_fgc").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else ELLIPSIS for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_are_those_of_the_package() -> None:
    headings = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) >= 20
    for heading in headings:
        parts = [part.strip() for part in heading.split(ELLIPSIS) if part.strip()]
        assert parts
        assert any(all(part in text for part in parts) for text in texts()), heading


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES[1:]:
        assert f": {page.name}\n" in navigation, page.name
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        assert f": notebooks/{notebook.name}\n" in navigation, notebook.name


def test_files_of_the_architecture_are_there() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    files = [file for row in rows for file in re.findall(r"`(\w+(?:\.py|/))`", row)]
    assert len(files) >= 15
    for file in files:
        assert (ROOT / "opacus_fgc" / file).exists(), file


def test_reference_has_every_public_name() -> None:
    reference = (ROOT / "docs" / "api.md").read_text()
    for module in (opacus_fgc, per_sample):
        for name in module.__all__:
            assert f"::: {module.__name__}.{name}\n" in reference, name
    assert "::: opacus_fgc.planner.MEMORY\n" in reference
