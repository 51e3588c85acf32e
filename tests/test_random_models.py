"""Models drawn at random (layers, options, reuse, freezing, checkpointing, losses) against the oracle, in both modes.

The seed is in the name of the test: ``pytest tests/test_random_models.py -k "[17]"`` draws the same model again. More of them:
``RANDOM_MODELS=2000 pytest tests/test_random_models.py``.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opacus_fgc.loss import DPLossFastGradientClipping
from opacus_fgc.optimizer import DPOptimizerFastGradientClipping
from opacus_fgc.privacy_engine import MODES
from tests.operation_cases import HandWrittenRMSNorm
from tests.reference import reference
from tests.test_exact import ENTRIES

MODELS = int(os.environ.get("RANDOM_MODELS", "300"))
QUICK = 60
"""How many of them run by default."""
Step = Callable[[Tensor], Tensor]


class LayerScale(nn.Module):
    """A parameter of no layer, in a shape to be drawn."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Positions(nn.Module):
    """Position parameters, or a table of them."""

    def __init__(self, length: int, d: int, table: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(length, d) if table else None
        self.own = None if table else nn.Parameter(torch.randn(1, length, d))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.own if self.table is None else self.table(torch.arange(x.shape[1])))


class Token(nn.Module):
    """A token of its own in front of the others."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, d))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1)[:, :-1]


class Attention(nn.Module):
    """Self-attention by torch or by Opacus."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class AlongPositions(nn.Module):
    """A convolution over the positions."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.mT).mT


class Flat(nn.Module):
    """Tokens made one axis with the batch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def block(draw: random.Random, d: int, length: int) -> nn.Module:
    """A module from ``(N, length, d)`` to the same."""
    bias = draw.random() < 0.7
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(d, d, bias),
        lambda: nn.LayerNorm(d, bias=bias),
        lambda: nn.RMSNorm(d),
        lambda: HandWrittenRMSNorm(d, bias),
        lambda: LayerScale(*draw.choice([(d,), (1, 1, d), (length, 1), (length, d), ()])),
        lambda: Positions(length, d, bias),
        lambda: Token(d),
        lambda: Attention(nn.MultiheadAttention(d, 2, bias=bias, batch_first=True)),
        lambda: Attention(DPMultiheadAttention(d, 2, bias=bias, batch_first=True)),
        lambda: nn.TransformerEncoderLayer(d, 2, 5, 0.0, batch_first=True, norm_first=bias),
        lambda: Recurrent(draw.choice([DPLSTM, DPGRU, nn.LSTM, nn.GRU])(d, d, bias=bias, batch_first=True)),
        lambda: AlongPositions(nn.Conv1d(d, d, 3, padding=1, groups=draw.choice([1, 2]), bias=bias)),
        lambda: AlongPositions(nn.ConvTranspose1d(d, d, 3, padding=1, bias=bias)),
        lambda: AlongPositions(nn.GroupNorm(2, d, affine=True)),
        lambda: Flat(nn.Sequential(nn.Linear(d, 3), nn.PReLU(), nn.Linear(3, d, bias))),
        lambda: nn.Sequential(nn.Linear(d, d), nn.ReLU(inplace=True)),
    ]
    return draw.choice(kinds)()


class Model(nn.Module):
    """Blocks in a random order, some used twice, some checkpointed, some with a residual connection."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.length, d, self.vocabulary = draw.randint(1, 5), draw.choice([4, 6]), 7
        self.tokens = nn.Embedding(self.vocabulary, d, padding_idx=draw.choice([None, 0]))
        self.blocks = nn.ModuleList(block(draw, d, self.length) for _ in range(draw.randint(1, 4)))
        order = list(range(len(self.blocks))) + draw.choices(range(len(self.blocks)), k=draw.randint(0, 1))
        self.steps = [(number, draw.random() < 0.25, draw.random() < 0.5) for number in order]
        self.kind = draw.choice(["classes", "tokens", "tied", "functionally tied", "regression"])
        outputs = {"classes": 3, "regression": 2}.get(self.kind, self.vocabulary)
        self.head = None if self.kind == "functionally tied" else nn.Linear(d, outputs)
        if self.kind == "tied":
            self.head.weight = self.tokens.weight
        params = list(self.parameters())
        for param in draw.sample(params, k=draw.choice([0, 0, 1, len(params) // 2])):
            param.requires_grad_(False)
        self.tokens.weight.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)
        for number, checkpointed, residual in self.steps:
            module = self.blocks[number]
            new = checkpoint(module, h, use_reentrant=False) if checkpointed else module(h)
            h = new + h if residual else new.tanh()
        if self.head is None:
            return F.linear(h, self.tokens.weight).mT
        return self.head(h).mT if self.kind in ("tokens", "tied") else self.head(h.mean(1))

    def target(self, n: int) -> Tensor:
        if self.kind == "regression":
            return torch.randn(n, 2)
        return torch.randint(3, (n,)) if self.kind == "classes" else torch.randint(1, self.vocabulary, (n, self.length))

    def criterion(self, reduction: str, draw: random.Random) -> Any:
        if self.kind == "regression":
            return draw.choice([nn.MSELoss(reduction=reduction), nn.HuberLoss(reduction=reduction)])
        weight = torch.rand(3 if self.kind == "classes" else self.vocabulary) + 0.1
        return nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=draw.choice([0.0, 0.1]))


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.slow if seed >= QUICK else ()) for seed in range(MODELS)]
)
def test_equals_oracle(seed: int) -> None:
    draw = random.Random(seed)
    model, n, reduction = Model(seed), draw.randint(1, 6), draw.choice(["mean", "sum"])
    criterion, entry = model.criterion(reduction, draw), draw.choice(list(ENTRIES))
    x, y = torch.randint(model.vocabulary, (n, model.length)), model.target(n)
    oracle = reference(model, criterion, (x,), y, n)
    max_grad_norm = oracle.total_norm().median().item() or 1.0
    clipped, norms = oracle.clipped_sum(max_grad_norm), oracle.norms()
    for backward in MODES.values():
        copied = copy.deepcopy(model)
        module = ENTRIES[entry](copied, loss_reduction=reduction, max_grad_norm=max_grad_norm)
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD([param for param in copied.parameters() if param.requires_grad], lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=max_grad_norm,
            expected_batch_size=n,
            loss_reduction=reduction,
        )
        private = DPLossFastGradientClipping(module, optimizer, criterion, reduction, backward)
        private((module if entry == "wrapped" else copied)(x), y).backward()
        for name, param in copied.named_parameters():
            if param.requires_grad:
                torch.testing.assert_close(
                    param._norm_sample, norms[name], rtol=1e-9, atol=1e-9, msg=f"norms of {name}: {copied}"
                )
                torch.testing.assert_close(
                    param.summed_grad, clipped[name], rtol=1e-9, atol=1e-9, msg=f"sum of {name}: {copied}"
                )
