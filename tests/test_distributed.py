"""Several processes give what one gives: each backend and mode against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed_cases import (
    C,
    both,
    ddp,
    frozen,
    fsdp,
    hsdp,
    images,
    part,
    private,
    table,
    tensor_parallel,
    tokens,
    weights,
)
from tests.ranks import Ranks, ranks
from tests.reference import reference


@pytest.fixture(scope="module", params=[2, 4])
def group(request) -> Iterator[Ranks]:
    with ranks(request.param) as processes:
        yield processes


def step(make: Callable, wrap: Callable, mode: str, **kwargs: Any) -> None:
    model, x, y = make()
    expected = reference(model, nn.CrossEntropyLoss(), (x,), y, len(x))
    before = weights(model)
    model, optimizer, criterion, _ = private(wrap(model), x, y, grad_sample_mode=mode, **kwargs)
    rank, size = model.layout.data_rank, model.layout.data_ranks
    for last in (False, True):
        optimizer.zero_grad()
        criterion(model(part(x, rank, size)), part(y, rank, size)).backward()
        torch.testing.assert_close(model.per_sample_gradient_norms, part(expected.total_norm(), rank, size))
        if last:
            optimizer.step()
    after = weights(model)
    assert after.keys() == before.keys()
    for name, exact in expected.clipped_sum(C).items():
        moved = (before[name] - after[name]) * optimizer.expected_batch_size * size
        torch.testing.assert_close(moved, exact, rtol=1e-9, atol=1e-9, msg=partial("{}: {}".format, name))
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - expected.gradients.keys())


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("make", [images, tokens, frozen])
@pytest.mark.parametrize("wrap", [ddp, fsdp, hsdp])
def test_a_step_is_that_of_one_process(group, make, wrap, mode):
    group(step, make, wrap, mode)


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("wrap", [tensor_parallel, both])
def test_tensor_parallel(group, wrap, mode):
    group(step, table, wrap, mode)
