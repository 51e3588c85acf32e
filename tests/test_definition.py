"""The guarantee itself, which needs no oracle: one sample moves the clipped sum by C at most, and by 2 C where it is replaced."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from opacus_fgc import (
    DPLossFastGradientClipping,
    DPOptimizerFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
from opacus_fgc.privacy_engine import MODES
from tests.case import Case, N
from tests.operation_cases import CASES
from tests.test_random_models import Model

C, ROUNDING = 0.05, 1 + 1e-6
both_modes = pytest.mark.parametrize("mode", MODES)


class Summing:
    """Clipped sums of a model on batches of its samples."""

    def __init__(self, model: nn.Module, criterion: nn.Module, mode: str, batch_first: bool) -> None:
        self.axis = 0 if batch_first else 1
        self.module = GradSampleModuleFastGradientClipping(
            model, batch_first=batch_first, loss_reduction="sum", max_grad_norm=C
        )
        self.params = [param for param in model.parameters() if param.requires_grad]
        self.optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(self.params, lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=C,
            expected_batch_size=N,
            loss_reduction="sum",
        )
        self.criterion = DPLossFastGradientClipping(self.module, self.optimizer, criterion, "sum", MODES[mode])

    def __call__(self, inputs: tuple[Any, ...], target: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        self.criterion(self.module(*inputs), target).backward()
        parts = [param.summed_grad.detach().flatten() for param in self.params]
        return torch.cat([torch.view_as_real(part).flatten() if part.is_complex() else part for part in parts])

    def taken(self, inputs: Any, target: Tensor, samples: list[int]) -> tuple[Any, Tensor]:
        index = torch.tensor(samples)
        return tree_map_only(Tensor, lambda tensor: tensor.index_select(self.axis, index), inputs), target[index]

    def moves(self, inputs: tuple[Any, ...], target: Tensor, size: int) -> Iterator[tuple[float, float]]:
        """By how much each sample moves the sum, in C: taken out; and replaced by another one of the batch."""
        whole = self(inputs, target)
        for sample in range(size):
            others = [other for other in range(size) if other != sample]
            without = self(*self.taken(inputs, target, others))
            replaced = [other if other != sample else others[0] for other in range(size)]
            instead = self(*self.taken(inputs, target, replaced))
            yield tuple(torch.linalg.vector_norm(whole - other).item() / C for other in (without, instead))


def check(summing: Summing, inputs: tuple[Any, ...], target: Tensor, size: int) -> None:
    for taken_out, replaced in summing.moves(inputs, target, size):
        assert taken_out <= ROUNDING and replaced <= 2 * ROUNDING


@pytest.mark.every(5)
@both_modes
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_cases(case: Case, mode: str) -> None:
    model, inputs, target = case.make()
    check(Summing(model, case.loss("sum"), mode, case.batch_first), inputs, target, N)


@pytest.mark.every(5)
@both_modes
@pytest.mark.parametrize("seed", range(60))
def test_random_models(seed: int, mode: str) -> None:
    model, draw = Model(seed), random.Random(seed)
    x, y = torch.randint(model.vocabulary, (4, model.length)), model.target(4)
    check(Summing(model, model.criterion("sum", draw), mode, batch_first=True), (x,), y, 4)
