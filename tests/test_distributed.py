"""Several processes give what one gives: each backend and mode against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import PrivacyEngine
from tests.ranks import Ranks, ranks
from tests.reference import reference

C = 0.5


@pytest.fixture(scope="module", params=[2, 4])
def group(request) -> Iterator[Ranks]:
    with ranks(request.param) as processes:
        yield processes


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3, padding=1)
        self.norm = nn.GroupNorm(1, 5)
        self.head = nn.Linear(5 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).flatten(1))


class Block(nn.Module):
    def __init__(self, width: int = 6, hidden: int = 9) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x)))) * self.scale


class Tokens(nn.Module):
    """A token of its own, positions that the batch shares, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6, padding_idx=0)
        self.positions = nn.Embedding(6, 6)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embedding(x)], 1)
        x = x + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean(1)


def images() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Images(), torch.randn(11, 1, 4, 4), torch.randint(3, (11,))


def tokens() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Tokens(), torch.randint(7, (11, 5)), torch.randint(7, (11,))


def frozen() -> tuple[nn.Module, Tensor, Tensor]:
    model, x, y = tokens()
    model.blocks[0].requires_grad_(False)
    model.embedding.requires_grad_(False)
    return model, x, y


def ddp(model: nn.Module) -> nn.Module:
    return DPDDP(model)


def fsdp(model: nn.Module) -> nn.Module:
    for module in (model.conv, model.head) if isinstance(model, Images) else model.blocks:
        fully_shard(module)
    return fully_shard(model)


def hsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def part(batch: Tensor, rank: int, size: int) -> Tensor:
    """Unequal parts: the first rank has but one sample, the last none at all where there are more than two."""
    cuts = [0, 1, len(batch)] if size == 2 else [0, 1, 5, len(batch), len(batch)]
    return batch[cuts[rank] : cuts[rank + 1]]


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(make: Callable, wrap: Callable, mode: str) -> None:
    model, x, y = make()
    expected = reference(model, nn.CrossEntropyLoss(), (x,), y, len(x))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    model = wrap(model)
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=1.0)
    private, optimizer, criterion, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=len(x)),
        noise_multiplier=0.0,
        max_grad_norm=C,
        grad_sample_mode=mode,
    )
    layout = private.layout
    rank, size = layout.data_rank, layout.data_ranks
    mine, labels = (part(x, rank, size), part(y, rank, size)) if size > 1 else (x, y)
    for repeat in range(2):
        optimizer.zero_grad()
        criterion(private(mine), labels).backward()
        norms = private.per_sample_gradient_norms
        torch.testing.assert_close(
            norms, part(expected.total_norm(), rank, size) if size > 1 else expected.total_norm()
        )
        if repeat == 0:
            continue
        optimizer.step()
    sums = expected.clipped_sum(C)
    after = {
        name.removeprefix("_module.").removeprefix("module."): whole(param)
        for name, param in private.named_parameters()
    }
    assert after.keys() == before.keys()
    for name, param in before.items():
        moved = (param - after[name]) * len(x)
        exact = sums.get(name, torch.zeros_like(param))
        torch.testing.assert_close(moved, exact, rtol=1e-9, atol=1e-9, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("make", [images, tokens, frozen])
@pytest.mark.parametrize("wrap", [ddp, fsdp, hsdp])
def test_a_step_is_that_of_one_process(group, make, wrap, mode):
    group(step, make, wrap, mode)


def tensor_parallel(model: nn.Module, mesh: Any = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    plan = {"head": ColwiseParallel(output_layouts=Replicate())}
    if isinstance(model, Table):
        plan["embedding"] = RowwiseParallel(input_layouts=Replicate())
        plan["kinds"] = ColwiseParallel(output_layouts=Replicate())
        plan["block.up"], plan["block.down"] = ColwiseParallel(), RowwiseParallel()
    return parallelize_module(model, mesh, plan)


class Table(nn.Module):
    """With linear layers and embeddings to cut, two of them unevenly, and layers that are left whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8, padding_idx=5)
        self.kinds = nn.Embedding(3, 8)
        self.positions = nn.Embedding(5, 8)
        self.block = Block(8, 12)
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.kinds(x % 3) + self.positions(torch.arange(x.shape[1]))
        return self.head(self.block(x)).mean(1)


def table() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Table(), torch.randint(7, (11, 5)), torch.randint(7, (11,))


def both(model: nn.Module) -> nn.Module:
    """FSDP over pairs of ranks that are tensor parallel."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    tensor_parallel(model, mesh["tensor"])
    fully_shard(model.block, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


@pytest.mark.parametrize("mode", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("wrap", [tensor_parallel, both])
def test_tensor_parallel(group, wrap, mode):
    group(step, table, wrap, mode)
