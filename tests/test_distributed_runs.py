"""Whole runs over several processes: batches, noise, checkpoints, faults."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from opacus.layers import DPLSTM
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.distributed._composable import replicate
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from opacus_fgc import DPLossFastGradientClipping, DPOptimizerFastGradientClipping, GradScaler, PrivacyEngine, check
from tests.distributed_cases import (
    C,
    Table,
    both,
    ddp,
    fsdp,
    hsdp,
    images,
    needs_fsdp,
    private,
    table,
    tensor_parallel,
    tokens,
    ways,
    weights,
    wide,
    wide_both,
    wide_fsdp,
    wide_hsdp,
    wide_tensor_parallel,
)
from tests.ranks import Failed, Ranks, ranks, refused_on_all_ranks
from tests.reference import reference

pytestmark = pytest.mark.slow  # several processes


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks(2) as processes:
        yield processes


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with ranks(4) as processes:
        yield processes


def gathered(value: Any) -> list[Any]:
    """A value of every rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def batches(layout: Any, mine: list[list[int]]) -> list[list[int]]:
    """The whole batches of a run, from what each rank had of them; no sample is twice in one."""
    shares = gathered((layout.data_rank, mine))
    assert len({len(share) for _, share in shares}) == 1
    if layout.data_ranks < len(shares):
        by_rank = dict(shares)
        assert all(by_rank[rank] == share for rank, share in shares)
        shares = list(by_rank.items())
    result = [[n for _, share in shares for n in share[place]] for place in range(len(mine))]
    assert all(len(set(batch)) == len(batch) for batch in result)
    return result


def follow(
    model: nn.Module, x: Tensor, y: Tensor, steps: list[list[int]], expected_batch_size: float
) -> dict[str, Tensor]:
    """What stochastic gradient descent with rate 1 does in one process, one sample at a time."""
    model = copy.deepcopy(model)
    for batch in steps:
        sums = reference(model, nn.CrossEntropyLoss(), (x[batch],), y[batch], len(batch)).clipped_sum(C)
        with torch.no_grad():
            for name, param in model.named_parameters():
                param -= sums[name] / expected_batch_size
    return weights(model)


def compare(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, param in second.items():
        torch.testing.assert_close(first[name], param, rtol=1e-9, atol=1e-9, msg=partial("{}: {}".format, name))


# Batches


def poisson(make: Callable, wrap: Callable, mode: str, physical: int | None, secure: bool = False) -> list[int]:
    plain, x, y = make()
    model, optimizer, criterion, loader = private(
        wrap(copy.deepcopy(plain)),
        x,
        y,
        grad_sample_mode=mode,
        engine=PrivacyEngine(secure_mode=secure),
        # Distributed tensors of torch cannot be of an empty batch.
        data_loader=DataLoader(TensorDataset(x, y, torch.arange(len(x))), batch_size=3 if make is images else 9),
    )
    steps: list[list[int]] = [[]]
    manager = BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical or 100, optimizer=optimizer)
    for _ in range(2):
        with manager as few:
            for inputs, labels, numbers in few if physical else loader:
                assert physical is None or len(numbers) <= physical
                steps[-1] += numbers.tolist()
                last = not optimizer._check_skip_next_step(pop_next=False)
                criterion(model(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
                if last:
                    steps.append([])
    assert steps.pop() == [] and len(steps) == 2 * len(loader)
    mine = steps
    steps = batches(model.layout, mine)
    if not secure:
        # Whatever the seed, which is the same on all ranks here, batches are not.
        assert len({tuple(batch) for batch in steps}) > len(steps) - 2
    compare(weights(model), follow(plain, x, y, steps, len(x) // len(loader)))
    return [len(batch) for batch in mine]


@pytest.mark.parametrize("physical", [None, 1])
@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("wrap", ways(ddp, fsdp))
def test_poisson_sampling(four, wrap, mode, physical):
    sizes = four(poisson, images, wrap, mode, physical)
    assert any(0 in of_rank for of_rank in sizes)
    assert any(len(set(of_step)) > 1 for of_step in zip(*sizes, strict=True))


def only_a_norm(model: nn.Module) -> nn.Module:
    """Tensor parallel, of which nothing that is cut is trained."""
    model.requires_grad_(False)
    model[3].requires_grad_(True)
    return wide_tensor_parallel(model)


def noise_of_copies() -> tuple[dict[str, Tensor], list[int]]:
    model, x, y = wide()
    model, optimizer, criterion, loader = private(only_a_norm(model), x, y, noise_multiplier=1.0, any_batch=True)
    criterion = DPLossFastGradientClipping(model, optimizer, lambda output, target: 0 * output.sum())
    criterion(model(x), y).backward()
    optimizer.step()
    return weights(model), [n for _, _, numbers in loader for n in numbers.tolist()]


def test_copies_stay_copies_where_nothing_that_is_cut_is_trained(two):
    (first, batches_of_first), (second, batches_of_second) = two(noise_of_copies)
    assert batches_of_first == batches_of_second
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("wrap", ways(tensor_parallel, both))
def test_poisson_sampling_with_tensor_parallel(four, wrap):
    four(poisson, table, wrap, "ghost_bk", None)


@pytest.mark.parametrize("wrap", ways(ddp, fsdp))
def test_secure_sampling(four, wrap):
    four(poisson, images, wrap, "ghost_bk", 2, True)


def accumulated(wrap: Callable, mode: str) -> None:
    plain, x, y = images()
    data = TensorDataset(x, y, torch.arange(len(x)))
    loader = DataLoader(data, batch_size=1, sampler=DistributedSampler(data, drop_last=True))
    engine = PrivacyEngine()
    model, optimizer, criterion, loader = private(
        wrap(copy.deepcopy(plain)),
        x,
        y,
        grad_sample_mode=mode,
        data_loader=loader,
        poisson_sampling=False,
        noise_multiplier=1e-9,
        engine=engine,
    )
    mine: list[list[int]] = [[]]
    for place, (inputs, labels, numbers) in enumerate(loader):
        criterion(model(inputs), labels).backward()
        mine[-1] += numbers.tolist()
        if place % 2:
            optimizer.step()
            optimizer.zero_grad()
            mine.append([])
    optimizer.zero_grad()
    steps = batches(model.layout, [batch for batch in mine if len(batch) == 2])
    expected = follow(plain, x, y, steps, optimizer.expected_batch_size * 2 * 2)
    for name, param in weights(model).items():
        torch.testing.assert_close(param, expected[name], rtol=1e-6, atol=1e-6)
    # Both passes of both ranks count.
    (_, rate, count) = engine.accountant.history[0]
    assert (rate, count) == (pytest.approx(2 / len(loader)), len(steps))


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("wrap", ways(ddp, fsdp))
def test_gradient_accumulation(two, wrap, mode):
    two(accumulated, wrap, mode)


# Noise


def noise(wrap: Callable, secure: bool, mode: str = "ghost_bk") -> list[dict[str, Tensor]]:
    """The noise of two steps whose clipped sum is 0, where all ranks have set one seed."""
    model, x, y = wide()
    model, optimizer, _, _ = private(
        wrap(model),
        x,
        y,
        noise_multiplier=3.0,
        engine=PrivacyEngine(secure_mode=secure),
        grad_sample_mode=mode,
        any_batch=True,
    )
    criterion = DPLossFastGradientClipping(model, optimizer, lambda output, target: 0 * output.sum())
    result = []
    for _ in range(2):
        before = weights(model)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        batch = optimizer.expected_batch_size * model.layout.data_ranks
        result.append({name: (before[name] - param) * batch for name, param in weights(model).items()})
    return result


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("wrap", ways(ddp, wide_fsdp, wide_hsdp, wide_tensor_parallel, wide_both))
def test_noise_is_added_once_over_all_ranks(four, wrap, secure):
    first, *others = four(noise, wrap, secure)
    for steps in others:
        for step, same in zip(steps, first, strict=True):
            assert all(torch.equal(step[name], same[name]) for name in same)
    values = torch.cat([value.flatten() for step in first for value in step.values()])
    # No number twice: not on another rank's shard, not in the next step. (Weights round the last digits of what they moved by.)
    assert len(torch.unique(values.round(decimals=9))) > 0.99 * len(values)
    for name in first[0]:
        both_steps = torch.cat([step[name].flatten() for step in first])
        count = len(both_steps)
        # Of a normal sample of this size, the deviation's own is 1 / sqrt(2 n).
        assert abs(both_steps.std().item() / (3 * C) - 1) < 5 / (2 * count) ** 0.5, name
        assert abs(both_steps.mean().item()) < 5 * 3 * C / count**0.5, name


def adaptive(wrap: Callable, std: float) -> list[float]:
    model, x, y = images()
    model, optimizer, criterion, loader = private(
        wrap(model),
        x,
        y,
        clipping="adaptive",
        min_clipbound=0.01,
        max_clipbound=10.0,
        unclipped_num_std=std,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=len(x)),
    )
    norms = []
    for inputs, labels in [*loader, *loader]:
        optimizer.zero_grad()
        criterion(model(inputs), labels).backward()
        optimizer.step()
        norms.append(optimizer.max_grad_norm)
    return norms


@pytest.mark.parametrize("wrap", ways(ddp, fsdp, hsdp))
def test_adaptive_clipping_counts_the_samples_of_all_ranks(four, wrap):
    model, x, y = images()
    norms = reference(model, nn.CrossEntropyLoss(), (x,), y, len(x)).total_norm()
    expected, norm = [], C
    for _ in range(2):
        unclipped = (norms <= norm).double().mean().item()
        norm *= torch.tensor(-0.2 * (unclipped - 0.5)).exp().item()
        expected.append(pytest.approx(norm))
    assert four(adaptive, wrap, 0.0) == [expected] * 4
    # With noise on the count all ranks still go by one norm.
    first, *others = four(adaptive, wrap, 2.0)
    assert first != expected and all(other == first for other in others)


# Checkpoints


def train(path: str, wrap: Callable, optimizer: Callable, save: bool, steps: int) -> Any:
    model, x, y = tokens()
    engine = PrivacyEngine()
    wrapped = wrap(model)
    model, private_optimizer, criterion, _ = private(
        wrapped,
        x,
        y,
        optimizer=optimizer(wrapped.parameters()),
        engine=engine,
        noise_multiplier=1e-12,
        any_batch=True,
    )
    if not save:
        engine.load_checkpoint(path=path, module=model, optimizer=private_optimizer)
    rank, size = model.layout.data_rank, model.layout.data_ranks
    for _ in range(steps):
        private_optimizer.zero_grad()
        criterion(model(x[rank::size]), y[rank::size]).backward()
        private_optimizer.step()
    if save:
        engine.save_checkpoint(
            path=path, module=model, optimizer=private_optimizer, module_state_dict_kwargs={"keep_vars": False}
        )
    return weights(model), engine.accountant.history, private_optimizer.generator.initial_seed()


def save_on_one_rank(path: str) -> None:
    model, x, y = images()
    engine = PrivacyEngine()
    model, optimizer, _, _ = private(ddp(model), x, y, engine=engine)
    if dist.get_rank() == 0:
        engine.save_checkpoint(path=path, module=model, optimizer=optimizer)


def test_under_data_parallel_one_rank_can_save(two, tmp_path):
    two(save_on_one_rank, str(tmp_path / "run.pt"))
    assert (tmp_path / "run.pt").exists()


adam = partial(torch.optim.Adam, lr=0.1)


@pytest.mark.parametrize("wrap", ways(fsdp, hsdp))
def test_a_checkpoint_goes_on_with_another_number_of_ranks(two, four, wrap, tmp_path):
    path = str(tmp_path / "run.pt")
    whole_run, whole_history, _ = two(train, str(tmp_path / "other.pt"), fsdp, adam, True, 4)[0]
    two(train, path, fsdp, adam, True, 2)
    results = four(train, path, wrap, adam, False, 2)
    for parameters, history, _ in results:
        compare_loosely(parameters, whole_run)
        assert history == whole_history
    # The noise after it is no rank's noise of before, nor another's.
    assert len({seed for _, _, seed in results}) == 4
    assert not (tmp_path / "run.pt.unfinished").exists()
    # One process reads it too, without this package.
    checkpoint = torch.load(path, weights_only=False)
    plain, _, _ = tokens()
    plain.load_state_dict(
        {name.removeprefix("_module."): value for name, value in checkpoint["module_state_dict"].items()}
    )
    adam(plain.parameters()).load_state_dict(checkpoint["optimizer_state_dict"])


def compare_loosely(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    # Adam divides by what may be 0 but for rounding and the noise of 1e-12.
    for name, param in second.items():
        torch.testing.assert_close(first[name], param, rtol=1e-4, atol=1e-4, msg=partial("{}: {}".format, name))


def table_state(path: str, wrap: Callable, save: bool) -> dict[str, Tensor]:
    model, x, y = table()
    if not save:
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
    engine = PrivacyEngine()
    model, optimizer, _, _ = private(wrap(model), x, y, engine=engine)
    (engine.save_checkpoint if save else engine.load_checkpoint)(path=path, module=model, optimizer=optimizer)
    return weights(model)


@needs_fsdp
@pytest.mark.parametrize("wrap", ways(tensor_parallel, both))
def test_a_tensor_parallel_checkpoint(two, four, wrap, tmp_path):
    path = str(tmp_path / "run.pt")
    saved = two(table_state, path, tensor_parallel, True)[0]
    for loaded in four(table_state, path, wrap, False):
        compare(loaded, saved)


# What goes wrong


def refused(wrap: Callable, **kwargs: Any) -> None:
    model, x, y = images()
    private(wrap(model), x, y, **kwargs)


def partly_sharded(model: nn.Module) -> nn.Module:
    fully_shard(model.conv)
    return model


def recurrent(model: nn.Module) -> nn.Module:
    return fully_shard(nn.Sequential(fully_shard(DPLSTM(4, 5))))


@pytest.mark.parametrize(
    ("wrap", "text"),
    [
        (DistributedDataParallel, "DistributedDataParallel reduces gradients before they are clipped"),
        (
            partial(FullyShardedDataParallel, device_id=torch.device("cpu")),
            "FullyShardedDataParallel reduces gradients",
        ),
        (replicate, "replicate reduces gradients before they are clipped"),
        (partly_sharded, "norm.weight is trainable and not sharded"),
        (recurrent, "layer '0' (FSDPDPLSTM) has each parameter under two names"),
    ],
)
def test_other_layouts_are_refused_by_name(two, wrap, text):
    with refused_on_all_ranks(NotImplementedError, text):
        two(refused, wrap)


def bare() -> list[str]:
    model, x, y = images()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        private(model, x, y)
    return [str(warning.message) for warning in caught]


def test_a_model_that_lies_over_no_processes_is_warned_of(two):
    for messages in two(bare):
        assert any("each of the 2 processes trains a model of its own" in message for message in messages)


def test_data_parallel_threads_are_refused():
    model, x, y = images()
    with pytest.raises(NotImplementedError, match="DataParallel reduces gradients before they are clipped"):
        private(nn.DataParallel(model), x, y)


def disagree(name: str) -> None:
    model, x, y = images()
    private(ddp(model), x, y, **{name: 1.0 + dist.get_rank()})


@pytest.mark.parametrize("name", ["noise_multiplier", "max_grad_norm"])
def test_arguments_that_differ_between_ranks_are_refused(two, name):
    with refused_on_all_ranks(ValueError, f"ranks disagree about {name}: 1, 2"):
        two(disagree, name)


def unequal_passes() -> None:
    model, x, y = images()
    model, optimizer, criterion, _ = private(
        ddp(model), x, y, poisson_sampling=False, data_loader=split(TensorDataset(x, y))
    )
    for _ in range(1 + dist.get_rank()):
        criterion(model(x), y).backward()
    optimizer.step()


def split(data: TensorDataset, **kwargs: Any) -> DataLoader:
    return DataLoader(data, batch_size=2, sampler=DistributedSampler(data, **kwargs))


def test_unequal_numbers_of_backward_passes_are_refused(two):
    with refused_on_all_ranks(ValueError, "ranks disagree about backward passes"):
        two(unequal_passes)


def whole_on_each_rank(loader: Callable) -> None:
    model, x, y = images()
    private(ddp(model), x, y, poisson_sampling=False, data_loader=loader(TensorDataset(x, y)))


def other_seeds(data: TensorDataset) -> DataLoader:
    return split(data, drop_last=True, seed=dist.get_rank())


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        (partial(DataLoader, batch_size=2, shuffle=True), "sampler=torch.utils.data.DistributedSampler"),
        (partial(split, num_replicas=3, rank=0), "sampler=torch.utils.data.DistributedSampler"),
        (other_seeds, "ranks disagree about the sampler's seed: 0, 1"),
    ],
)
def test_a_sample_that_could_be_on_several_ranks_is_refused(two, loader, text):
    with refused_on_all_ranks(ValueError, text):
        two(whole_on_each_rank, loader)


def other_samples() -> None:
    model, x, y = table()
    model, _, criterion, _ = private(tensor_parallel(model), x, y)
    part = slice(dist.get_rank(), dist.get_rank() + 5)
    criterion(model(x[part]), y[part]).backward()


def test_other_samples_in_one_tensor_parallel_group_are_refused(two):
    with refused_on_all_ranks(ValueError, "ranks of one tensor-parallel group have different losses"):
        two(other_samples)


def by_hand(wrap: Callable) -> None:
    model, x, y = images()
    model, _, _, _ = private(wrap(model), x, y)
    loss = nn.functional.cross_entropy(model(x), y, reduction="none")
    loss.mean().backward(retain_graph=True)
    model.get_clipping_coef()


@needs_fsdp
def test_two_passes_by_hand_are_refused_under_fsdp(two):
    two(by_hand, ddp)
    with refused_on_all_ranks(NotImplementedError, "two passes by hand does not go with FSDP"):
        two(by_hand, fsdp)


def die(wrap: Callable) -> None:
    model, x, y = images()
    model, optimizer, criterion, _ = private(wrap(model), x, y, any_batch=True)
    for step in range(3):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        if step == 1 and dist.get_rank() == 1:
            os._exit(7)
        optimizer.step()


@pytest.mark.parametrize("wrap", ways(ddp, fsdp))
def test_when_a_rank_dies_the_others_stop(wrap):
    with ranks(4) as processes, pytest.raises(Failed) as failed:
        processes(die, wrap)
    kinds = [kind for kind, _ in failed.value.errors]
    assert kinds.pop(1) == "Died"
    assert "Hung" not in kinds and "RuntimeError" in kinds


class WithOthers(nn.Module):
    """Mixes a sample with one of each other rank, and with none of its own batch."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total)
        return x * total


def mix() -> None:
    torch.manual_seed(dist.get_rank())
    model, x, y = nn.Sequential(nn.Linear(4, 3), WithOthers()), torch.randn(8, 4), torch.randint(3, (8,))
    model, _, criterion, _ = private(ddp(model), x, y)
    criterion(model(x), y).backward()


def test_samples_that_are_mixed_over_ranks_are_refused(two):
    with refused_on_all_ranks(NotImplementedError, "so the model mixes samples"):
        two(mix)


def skip_empty_batches() -> None:
    """As many do, where Poisson sampling gives this rank no samples: then its next batch would meet another one of others."""
    model, x, y = images()
    model, optimizer, criterion, loader = private(
        ddp(model), x, y, data_loader=DataLoader(TensorDataset(x, y), batch_size=1)
    )
    for inputs, labels in loader:
        if len(inputs):
            optimizer.zero_grad()
            criterion(model(inputs), labels).backward()
            optimizer.step()


def test_batches_that_a_rank_skips_are_an_error(two):
    with refused_on_all_ranks(ValueError, "ranks disagree about the number of the batch"):
        two(skip_empty_batches)


class Fetched(TensorDataset):
    """Fetches a whole batch, as Hugging Face's data sets do."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[n] for n in torch.tensor(indices, dtype=torch.int64).tolist()] if len(indices) else []


def fetch() -> int:
    model, x, y = images()
    _, _, _, loader = private(ddp(model), x, y, data_loader=DataLoader(Fetched(x, y), batch_size=3))
    return sum(len(inputs) for inputs, _ in loader)


def test_a_data_set_that_fetches_batches(two):
    assert sum(two(fetch)) > 0


def forward_for_nothing(wrap: Callable) -> None:
    model, x, y = images()
    model, _, criterion, _ = private(wrap(model), x, y)
    model(x)
    criterion(model(x), y).backward()


@needs_fsdp
def test_a_forward_that_is_not_part_of_the_loss(two):
    two(forward_for_nothing, ddp)
    with refused_on_all_ranks(NotImplementedError, "Run forwards that are not part of the loss under torch.no_grad()"):
        two(forward_for_nothing, fsdp)


def evaluated_before_the_step(mode: str) -> None:
    plain, x, y = images()
    model, optimizer, criterion, _ = private(fsdp(copy.deepcopy(plain)), x, y, grad_sample_mode=mode, any_batch=True)
    share = slice(model.layout.data_rank, None, model.layout.data_ranks)
    for _ in range(2):
        optimizer.zero_grad()
        criterion(model(x[share]), y[share]).backward()
        with torch.no_grad():
            model(x)
        optimizer.step()
    every = list(range(len(x)))
    expected = follow(plain, x, y, [every, every], optimizer.expected_batch_size * model.layout.data_ranks)
    compare(weights(model), expected)


@needs_fsdp
@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
def test_evaluation_between_backward_and_step(two, mode):
    two(evaluated_before_the_step, mode)


def other_copies() -> None:
    torch.manual_seed(dist.get_rank())
    model = Table()
    private(tensor_parallel(model), torch.randint(7, (11, 5)), torch.randint(7, (11,)))


def test_copies_that_differ_in_a_tensor_parallel_group_are_refused(two):
    with refused_on_all_ranks(ValueError, "is copied, and has other values on other ranks"):
        two(other_copies)


def alike_losses() -> None:
    """Untrained models have about the same loss for everything."""
    model, x, y = table()
    with torch.no_grad():
        for param in model.parameters():
            param *= 1e-3
    model, _, criterion, _ = private(tensor_parallel(model), x, y)
    own = slice(dist.get_rank(), dist.get_rank() + 5)
    criterion(model(x[own]), y[own]).backward()


def test_other_samples_with_about_the_same_losses_are_refused(two):
    with refused_on_all_ranks(ValueError, "ranks of one tensor-parallel group"):
        two(alike_losses)


def no_samples(wrap: Callable) -> None:
    model, x, y = table()
    model, _, criterion, _ = private(wrap(model), x, y)
    criterion(model(x[:0]), y[:0]).backward()


@pytest.mark.parametrize("wrap", ways(tensor_parallel, both))
def test_an_empty_batch_under_tensor_parallel_is_refused(four, wrap):
    with refused_on_all_ranks(NotImplementedError, "this batch has no samples"):
        four(no_samples, wrap)


def in_half(wrap: Callable, mode: str) -> None:
    """Under autocast with a scaled loss, against one process."""
    after = []
    for layout in (lambda model: model, wrap):
        model, x, y = tokens()
        model, optimizer, criterion, _ = private(layout(model.float()), x, y, grad_sample_mode=mode, any_batch=True)
        scaler = GradScaler("cpu", init_scale=1024.0)
        share = slice(model.layout.data_rank, None, model.layout.data_ranks)
        with torch.autocast("cpu", torch.float16):
            loss = criterion(model(x[share]), y[share])
        scaler.scale(loss).backward()
        optimizer.expected_batch_size = 1 / model.layout.data_ranks
        scaler.step(optimizer)
        scaler.update()
        after.append(weights(model))
    for name, param in after[0].items():
        torch.testing.assert_close(after[1][name], param, rtol=1e-2, atol=1e-2, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("wrap", ways(ddp, fsdp))
def test_scaled_losses_under_autocast(two, wrap, mode):
    two(in_half, wrap, mode)


def not_finite(wrap: Callable, mode: str) -> int:
    plain, x, y = tokens() if wrap is both else images()
    x[3] = float("nan")
    model, optimizer, criterion, _ = private(
        wrap(copy.deepcopy(plain)), x, y, grad_sample_mode=mode, nonfinite="drop", any_batch=True
    )
    rank, size = model.layout.data_rank, model.layout.data_ranks
    criterion(model(x[rank::size]), y[rank::size]).backward()
    optimizer.step()
    rest = [n for n in range(len(x)) if n != 3]
    compare(weights(model), follow(plain, x, y, [rest], optimizer.expected_batch_size * size))
    return model.dropped


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("wrap", ways(ddp, fsdp))
def test_samples_that_are_not_finite_are_dropped(two, wrap, mode):
    assert two(not_finite, wrap, mode) == [0, 1]


def checked(wrap: Callable) -> str:
    model, x, y = table()
    return check(wrap(model), nn.CrossEntropyLoss(), x, y).raise_if_wrong()


@pytest.mark.parametrize("wrap", ways(tensor_parallel, both))
def test_a_model_that_is_cut_is_to_be_checked_before(four, wrap):
    four(checked, ddp)
    with refused_on_all_ranks(NotImplementedError, "check it before fully_shard and parallelize_module"):
        four(checked, wrap)


def hand_wired() -> None:
    """Without an engine, as Opacus' own users of ranks do."""
    from opacus_fgc import GradSampleModuleFastGradientClipping

    plain, x, y = images()
    model = GradSampleModuleFastGradientClipping(fsdp(copy.deepcopy(plain)), max_grad_norm=C)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=4
    )
    criterion = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss())
    rank, size = dist.get_rank(), dist.get_world_size()
    criterion(model(x[rank::size]), y[rank::size]).backward()
    optimizer.step()
    compare(weights(model), follow(plain, x, y, [list(range(len(x)))], 4 * size))


@needs_fsdp
def test_wired_by_hand(two):
    two(hand_wired)
