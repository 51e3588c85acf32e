"""Models of transformers and peft over several processes equal the oracle in one; in both modes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.distributed_cases import ddp, private, weights
from tests.ranks import Ranks, ranks
from tests.reference import reference
from tests.test_huggingface import MODELS, N, Named, loss_of

pytestmark = [
    pytest.mark.slow,  # several processes
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]


def by_layer(model: nn.Module) -> nn.Module:
    """FSDP2 of each layer of a stack, as is usual; of stacks within stacks, the inner ones first."""
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.ModuleList):
            for layer in module:
                fully_shard(layer)
    return fully_shard(model)


def by_head(model: nn.Module) -> nn.Module:
    """Tensor parallel of each layer of a Llama; of LoRA's two factors, the first is copied."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns, rows = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}, {"o_proj", "down_proj"}
    linear = {name: set(name.split(".")) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    plan = {name: ColwiseParallel() for name, parts in linear.items() if parts & columns and "lora_A" not in parts}
    plan |= {name: RowwiseParallel() for name, parts in linear.items() if parts & rows}
    return parallelize_module(model, mesh, plan)


def step(name: str, wrap: Callable[[nn.Module], nn.Module], mode: str) -> None:
    torch.manual_seed(0)
    row = MODELS[name]
    model, inputs = row.make().double().train(), row.inputs()
    target = row.target(inputs)
    oracle = reference(
        Named(copy.deepcopy(model), list(inputs)), lambda *args: loss_of(*args).sum(), tuple(inputs.values()), target, N
    )
    max_grad_norm = oracle.total_norm().median().item()
    before = weights(model)
    model, optimizer, criterion, _ = private(
        wrap(model),
        target,
        target,
        criterion=loss_of,
        max_grad_norm=max_grad_norm,
        grad_sample_mode=mode,
        any_batch=True,
    )
    share = slice(model.layout.data_rank, None, model.layout.data_ranks)
    criterion(model(**{key: value[share] for key, value in inputs.items()}), target[share]).backward()
    torch.testing.assert_close(model.per_sample_gradient_norms, oracle.total_norm()[share], rtol=1e-6, atol=0)
    optimizer.step()
    after, scale = weights(model), oracle.total_norm().max().item()
    batch = optimizer.expected_batch_size * model.layout.data_ranks
    for path, exact in oracle.clipped_sum(max_grad_norm).items():
        path = path.removeprefix("model.")
        moved = (before[path] - after[path]) * batch
        torch.testing.assert_close(moved, exact, rtol=1e-5, atol=1e-6 * scale, msg=partial("{}: {}".format, path))


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks(2) as processes:
        yield processes


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("wrap", [ddp, by_layer])
@pytest.mark.parametrize("name", MODELS)
def test_data_parallel_and_sharded(two: Ranks, name: str, wrap: Callable, mode: str) -> None:
    two(step, name, wrap, mode)


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("name", ["llama", "llama-lora", "mistral", "qwen2", "gemma"])
def test_tensor_parallel(two: Ranks, name: str, mode: str) -> None:
    two(step, name, by_head, mode)
