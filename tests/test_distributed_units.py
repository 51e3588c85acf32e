"""Units of several records over several processes: each is on one of them, whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed_cases import C, ddp, experts, fsdp, hsdp, images, private, tokens, ways, weights
from tests.ranks import Ranks, ranks
from tests.test_distributed_runs import compare, gathered
from tests.test_units import oracle

pytestmark = pytest.mark.slow  # several processes


@pytest.fixture(scope="module", params=[2, 4])
def group(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with ranks(request.param) as processes:
        yield processes


def run(make: Callable, wrap: Callable, mode: str, physical: int | None) -> list[int]:
    """Two epochs, which are those of one process; how many units each batch of this rank had."""
    plain, x, y = make()
    # As many records as it takes for several of each unit.
    x, y = x.repeat(3, *[1] * (x.dim() - 1)), y.repeat(3, *[1] * (y.dim() - 1))
    if x.is_floating_point():
        x = x + torch.randn_like(x)
    users = len(x) // 3
    unit = torch.cat([torch.arange(users), torch.randint(users, (len(x) - users,))])
    model, optimizer, criterion, loader = private(
        wrap(copy.deepcopy(plain)),
        x,
        y,
        grad_sample_mode=mode,
        data_loader=DataLoader(TensorDataset(x, y, unit, torch.arange(len(x))), batch_size=len(x) // 2),
        unit=unit,
    )
    steps: list[list[int]] = [[]]
    manager = BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical or 100, optimizer=optimizer)
    for _ in range(2):
        with manager as few:
            for inputs, labels, user, numbers in few if physical else loader:
                steps[-1] += numbers.tolist()
                last = not optimizer._check_skip_next_step(pop_next=False)
                criterion(model(inputs), labels, unit=user).backward()
                optimizer.step()
                optimizer.zero_grad()
                if last:
                    steps.append([])
    assert steps.pop() == [] and len(steps) == 2 * len(loader)
    shares = dict(gathered((model.layout.data_rank, steps)))
    for place in range(len(steps)):
        of_ranks = [set(unit[share[place]].tolist()) for share in shares.values()]
        whole = [record for share in shares.values() for record in share[place]]
        assert sum(map(len, of_ranks)) == len(set().union(*of_ranks))  # no unit is on two ranks
        assert len(whole) == len(set(whole))
        if not whole:
            continue
        _, clipped_sum = oracle(plain, (x[whole],), y[whole], unit[whole].tolist(), "mean")
        with torch.no_grad():
            for name, total in clipped_sum(C).items():
                plain.get_parameter(name).sub_(total / (users // len(loader)))
    compare(weights(model), weights(plain))
    return [len(set(unit[step].tolist())) for step in steps]


@pytest.mark.parametrize("physical", [None, 1])
@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("wrap", ways(ddp, fsdp, hsdp))
def test_a_run_is_that_of_one_process(group: Ranks, wrap: Callable, mode: str, physical: int | None) -> None:
    sizes = group(run, images, wrap, mode, physical)
    assert any(len(set(of_step)) > 1 for of_step in zip(*sizes, strict=True))


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("make", [tokens, experts])
@pytest.mark.parametrize("wrap", ways(ddp, fsdp))
def test_tokens_and_experts(group: Ranks, make: Callable, wrap: Callable, mode: str) -> None:
    group(run, make, wrap, mode, None)
