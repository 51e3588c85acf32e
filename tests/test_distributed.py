"""Several processes give what one gives: each backend and mode against the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from opacus_fgc import CausalLMLoss, ChunkedCausalLMLoss
from opacus_fgc.distributed import reductions
from opacus_fgc.planner import MEMORY, Memory
from tests.case import Apply
from tests.distributed_cases import (
    C,
    both,
    by_columns,
    checkpointed,
    compiled_blocks,
    ddp,
    experts,
    frozen,
    fsdp,
    hit,
    hsdp,
    images,
    mixed,
    needs_fsdp,
    odd,
    part,
    private,
    sequence_parallel,
    sequences,
    several_in_one,
    stream,
    table,
    tensor_parallel,
    three_axes,
    tokens,
    ways,
    weights,
)
from tests.ranks import Ranks, ranks, refused_on_all_ranks
from tests.reference import reference
from tests.test_experts import WAYS, D, Experts, T

pytestmark = pytest.mark.slow  # several processes


@pytest.fixture(scope="module", params=[2, 4])
def group(request) -> Iterator[Ranks]:
    with ranks(request.param) as processes:
        yield processes


def step(make: Callable, wrap: Callable, mode: str, tolerance: float = 1e-9, evaluate: bool = False) -> None:
    reductions.BUCKET = 40  # several buckets a step, of one or more parameters
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance, check_dtype=False)
    model, x, y = make()
    expected = reference(model, nn.CrossEntropyLoss(), (x,), y, len(x))
    before = weights(model)
    model = wrap(model)
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=1.0)
    if evaluate:
        # Without a backward FSDP leaves the outermost parameters whole.
        with torch.no_grad():
            model(x)
    model, optimizer, criterion, _ = private(model, x, y, optimizer=optimizer, grad_sample_mode=mode, any_batch=True)
    rank, size = model.layout.data_rank, model.layout.data_ranks
    # Torch's distributed tensors cannot be of no sample.
    own = partial(part, rank=rank, size=size, least=1 if model.layout.shares_samples else 0)
    for last in (False, True):
        optimizer.zero_grad()
        criterion(model(own(x)), own(y)).backward()
        close(model.per_sample_gradient_norms, own(expected.total_norm()))
        if last:
            optimizer.step()
    after = weights(model)
    assert after.keys() == before.keys()
    for name, exact in expected.clipped_sum(C).items():
        moved = (before[name] - after[name]) * optimizer.expected_batch_size * size
        close(moved, exact, msg=partial("{}: {}".format, name))
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - expected.gradients.keys())


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("make", [images, tokens, frozen, experts])
@pytest.mark.parametrize("wrap", ways(ddp, fsdp, hsdp))
def test_a_step_is_that_of_one_process(group, make, wrap, mode):
    group(step, make, wrap, mode)


def step_as_users_have_it(make: Callable, wrap: Callable) -> None:
    """Mode "ghost" makes one pass if that of all ranks takes little memory, and two if that of one does not."""
    before = MEMORY.peak
    # Some ranks would make one pass, and others two.
    for MEMORY.peak in (Memory().peak, [0.1, 1e9][dist.get_rank() % 2]):
        step(make, wrap, "ghost")
    MEMORY.peak = before


@pytest.mark.parametrize("wrap", ways(ddp, fsdp, hsdp, both))
def test_ghost_in_one_pass(group, wrap):
    group(step_as_users_have_it, table if wrap is both else tokens, wrap)


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("wrap", ways(tensor_parallel, both))
def test_tensor_parallel(group, wrap, mode):
    group(step, table, wrap, mode)


@needs_fsdp
def test_copies_of_shards_of_parts():
    with ranks(8) as eight:
        for mode in ("ghost", "ghost_bk"):
            eight(step, table, three_axes, mode)


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
def test_sequence_parallel(group, mode):
    group(step, stream, sequence_parallel, mode)


def test_a_copied_parameter_on_parts_of_samples_is_refused(group):
    with refused_on_all_ranks(ValueError, "norm.weight has gradients of other norms, or of other activations"):
        group(step, stream, partial(sequence_parallel, norm=False), "ghost_bk")


def only_a_bias() -> tuple[nn.Module, Tensor, Tensor]:
    """Behind a mean, the parts of its gradient have the same norm."""
    model, x, y = stream()
    model.requires_grad_(False)
    model.norm.bias.requires_grad_(True)
    return model, x, y


def copies_alone() -> tuple[nn.Module, Tensor, Tensor]:
    """Nothing that is cut is trained."""
    model, x, y = table()
    model.requires_grad_(False)
    model.block.norm.requires_grad_(True)
    model.positions.requires_grad_(True)
    return model, x, y


def with_frozen_cuts(model: nn.Module) -> nn.Module:
    model = tensor_parallel(model)
    for param in model.parameters():
        # Torch before 2.10 trains whatever it cuts.
        if isinstance(param, DTensor):
            param.requires_grad_(False)
    return model


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
def test_only_copies_are_trained(group, mode):
    group(step, copies_alone, with_frozen_cuts, mode)


def test_parts_of_samples_are_refused_by_what_a_layer_is_called_on(group):
    with refused_on_all_ranks(ValueError, "norm.bias has gradients of other norms, or of other activations"):
        group(step, only_a_bias, partial(sequence_parallel, norm=False), "ghost_bk")


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("make", [checkpointed, odd, sequences])
@pytest.mark.parametrize("wrap", ways(ddp, fsdp))
def test_other_ways_to_a_norm(group, make, wrap, mode):
    group(step, make, wrap, mode)


@needs_fsdp
@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
def test_a_model_that_was_evaluated_before(group, mode):
    group(step, images, fsdp, mode, evaluate=True)


@needs_fsdp
@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize(
    "wrap",
    [
        fully_shard,
        several_in_one,
        compiled_blocks,
        partial(fsdp, reshard_after_forward=False),
        partial(fsdp, reshard_after_forward=2),
        partial(fsdp, shard_placement_fn=by_columns),
        partial(fsdp, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    ],
)
def test_options_of_fsdp(group, wrap, mode):
    group(step, tokens, wrap, mode)


def single_precision() -> tuple[nn.Module, Tensor, Tensor]:
    model, x, y = tokens()
    return model.float(), x, y


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("wrap", ways(ddp, fsdp, hsdp))
def test_single_precision(group, wrap, mode):
    """FSDP takes means of float32 and of float64 in different ways."""
    group(step, single_precision, wrap, mode, 1e-4)


@needs_fsdp
@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
def test_mixed_precision(group, mode):
    group(step, tokens, mixed, mode, 1e-4)


@needs_fsdp
@pytest.mark.parametrize(("name", "wrap"), [("ghost_fsdp", fsdp), ("ghost_tp", tensor_parallel)])
def test_names_of_opacus(group, name, wrap):
    group(step, images if wrap is fsdp else table, wrap, name)


def experts_in_one(way: str) -> tuple[nn.Module, Tensor, Tensor]:
    """More samples than experts are stored on one rank, and tokens of each go to several of them."""
    torch.manual_seed(0)
    return Apply(lambda m, x: m.a(x).mean(1), a=Experts(WAYS[way], 2)), torch.randn(11, T, D), torch.randint(2, (11,))


def by_expert(model: nn.Module) -> nn.Module:
    """FSDP2 with the experts' tensors in shards by expert."""
    fully_shard(model.a)
    return fully_shard(model)


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("way", ["loop", "lookup", "all"])
@pytest.mark.parametrize("wrap", [ddp, pytest.param(by_expert, marks=needs_fsdp)])
def test_experts(group, wrap, way, mode):
    group(step, partial(experts_in_one, way), wrap, mode)


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("in_one", [False, True])
@pytest.mark.parametrize("wrap", [ddp, pytest.param(fully_shard, marks=needs_fsdp)])
def test_experts_without_tokens_on_some_ranks(group, wrap, in_one, mode):
    group(step, partial(hit, in_one), wrap, mode)


def in_chunks(mode: str) -> None:
    """Two steps by the loss in chunks, whose head is called outside of the model's forward."""
    model = Apply(lambda m, x: m.body(m.table(x)), table=nn.Embedding(7, D), body=nn.Linear(D, D), head=nn.Linear(D, 7))
    head, x = model.head, torch.randint(7, (9, T))
    of_all = Apply(lambda m, x: m.model.head(m.model(x)), model=copy.deepcopy(model))
    expected = reference(of_all, CausalLMLoss(), (x,), x, len(x))
    before = weights(model)
    module, optimizer, criterion, _ = private(
        ddp(model), x, x, criterion=ChunkedCausalLMLoss(), grad_sample_mode=mode, any_batch=True
    )
    own = part(x, module.layout.data_rank, module.layout.data_ranks)
    criterion(module(own), head, own).backward()
    optimizer.step()
    for name, exact in expected.clipped_sum(C).items():
        short = name.removeprefix("model.")
        moved = (before[short] - weights(module)[short]) * optimizer.expected_batch_size * module.layout.data_ranks
        torch.testing.assert_close(moved, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
def test_the_loss_in_chunks(group, mode):
    group(in_chunks, mode)
