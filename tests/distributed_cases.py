"""Models, and the ways in which they are laid out over processes."""

from __future__ import annotations

from typing import Any

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

C = 0.5


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
    cuts = {1: [0, len(batch)], 2: [0, 1, len(batch)], 4: [0, 1, 5, len(batch), len(batch)]}[size]
    return batch[cuts[rank] : cuts[rank + 1]]


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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


def wide() -> tuple[nn.Module, Tensor, Tensor]:
    """Enough parameters to tell a standard deviation by, cut and copied ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 24), nn.LayerNorm((2, 24)), nn.Linear(24, 40))
    return model, torch.randn(11, 2, 8), torch.randint(2, (11,))


def wide_fsdp(model: nn.Module, mesh: Any = None) -> nn.Module:
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wide_hsdp(model: nn.Module) -> nn.Module:
    return wide_fsdp(
        model, init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    )


def wide_tensor_parallel(model: nn.Module, mesh: Any = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def wide_both(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    return wide_fsdp(wide_tensor_parallel(model, mesh["tensor"]), mesh["data"])


def private(
    model: nn.Module, x: Tensor, y: Tensor, *, engine: PrivacyEngine | None = None, optimizer: Any = None, **kwargs: Any
) -> Any:
    """What `make_private` makes of a model and its data, the samples' numbers with them."""
    arguments = {
        "module": model,
        "optimizer": optimizer
        or torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=1.0),
        "criterion": nn.CrossEntropyLoss(),
        "data_loader": DataLoader(TensorDataset(x, y, torch.arange(len(x))), batch_size=3),
        "noise_multiplier": 0.0,
        "max_grad_norm": C,
        "grad_sample_mode": "ghost_bk",
    }
    return (engine or PrivacyEngine()).make_private(**{**arguments, **kwargs})


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's parameters, all of them on every rank, by their names in one process."""
    return {
        name.removeprefix("_module.").removeprefix("module."): whole(param.detach()).clone()
        for name, param in model.named_parameters()
    }
