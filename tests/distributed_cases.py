"""Models, and the ways in which they are laid out over processes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from opacus.layers.dp_multihead_attention import SequenceBias
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import PrivacyEngine
from opacus_fgc.sampling.draws import Batches
from tests.case import Square

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
            x = self.run(block, x)
        return self.head(x).mean(1)

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)


class Routed(nn.Module):
    """Two experts, each of which gets the tokens that are routed to it; on some ranks perhaps none."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(0, 1)
        route = tokens[:, :3].argmax(1)
        out = torch.zeros_like(tokens)
        for place, expert in enumerate(self.experts):
            mine = (route == place).nonzero().flatten()
            # FSDP expects each rank to use each of a module's parameters.
            out = out.index_add(0, mine, expert(tokens[mine]))
        return x + out.view_as(x).tanh()


class Mixture(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Routed(), Routed()])


class Hit(nn.Module):
    """Experts of which only those are called that have tokens: others on each rank, and none on a rank without samples."""

    def __init__(self, in_one: bool) -> None:
        super().__init__()
        self.embedding, self.gate, self.head = nn.Embedding(7, 6), nn.Linear(6, 3), nn.Linear(6, 7)
        self.weights = nn.Parameter(torch.randn(3, 6, 6)) if in_one else None
        self.experts = nn.ModuleList([] if in_one else [nn.Linear(6, 6) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embedding(x).flatten(0, 1)
        weight, route = self.gate(tokens).softmax(1).max(1)
        out = torch.zeros_like(tokens)
        for place in route.unique().tolist():
            mine = (route == place).nonzero().flatten()
            rows = tokens[mine] @ self.weights[place] if self.weights is not None else self.experts[place](tokens[mine])
            out = out.index_add(0, mine, rows * weight[mine, None])
        return self.head(out.view(*x.shape, 6)).mean(1)


def hit(in_one: bool) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Hit(in_one), torch.randint(7, (11, 5)), torch.randint(7, (11,))


def images() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Images(), torch.randn(11, 1, 4, 4), torch.randint(3, (11,))


def tokens() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Tokens(), torch.randint(7, (11, 5)), torch.randint(7, (11,))


def experts() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Mixture(), torch.randint(7, (11, 5)), torch.randint(7, (11,))


def frozen() -> tuple[nn.Module, Tensor, Tensor]:
    model, x, y = tokens()
    model.blocks[0].requires_grad_(False)
    model.embedding.requires_grad_(False)
    return model, x, y


def ddp(model: nn.Module) -> nn.Module:
    return DPDDP(model)


def fsdp(model: nn.Module, **options: Any) -> nn.Module:
    for module in (model.conv, model.head) if isinstance(model, Images) else model.blocks:
        fully_shard(module, **options)
    return fully_shard(model, **options)


def compiled_blocks(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="eager")
    return fsdp(model)


def several_in_one(model: nn.Module) -> nn.Module:
    fully_shard(list(model.blocks))
    return fully_shard(model)


def by_columns(param: nn.Parameter) -> Shard | None:
    """The last axis, which has to be even."""
    return Shard(param.dim() - 1) if param.shape[-1] % dist.get_world_size() == 0 else None


def hsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def part(batch: Tensor, rank: int, size: int, least: int = 0) -> Tensor:
    """Unequal parts: the first rank has but one sample, the last the least where there are more than two."""
    end = len(batch)
    cuts = {1: [0, end], 2: [0, 1, end], 4: [0, 1, 5, end - least, end]}[size]
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


def three_axes(model: nn.Module) -> nn.Module:
    """Copies of shards of parts."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "shard", "tensor"))
    tensor_parallel(model, mesh["tensor"])
    fully_shard(model.block, mesh=mesh["replicate", "shard"])
    return fully_shard(model, mesh=mesh["replicate", "shard"])


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
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    engine: PrivacyEngine | None = None,
    optimizer: Any = None,
    any_batch: bool = False,
    **kwargs: Any,
) -> Any:
    """What `make_private` makes of a model and its data, the samples' numbers with them.

    With ``any_batch`` steps are on batches that the loader did not draw.
    """
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
    model, optimizer, criterion, loader = (engine or PrivacyEngine()).make_private(**{**arguments, **kwargs})
    if any_batch:
        optimizer.batches = Batches()
    return model, optimizer, criterion, loader


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's parameters, all of them on every rank, by their names in one process."""
    return {
        name.removeprefix("_module.").removeprefix("module."): whole(param.detach()).clone()
        for name, param in model.named_parameters()
    }


class Checkpointed(Tokens):
    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False)


def checkpointed() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Checkpointed(), torch.randint(7, (11, 5)), torch.randint(7, (11,))


class OutOfSight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x, self.scale)


class Odd(nn.Module):
    """What no table of ours has: torch.func, and a bias in the place of a token."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), OutOfSight())])
        self.bias = SequenceBias(6, batch_first=True)
        self.head = nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bias(self.blocks[0](x)).mean(1))


def odd() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Odd(), torch.randn(11, 3, 4), torch.randint(7, (11,))


class Sequences(nn.Module):
    """Torch's recurrent layers, of both conventions."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.LSTM(4, 6, batch_first=True, num_layers=2), nn.GRU(6, 5, bidirectional=True)])
        self.head = nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        output, (hidden, _) = self.blocks[0](x)
        output, _ = self.blocks[1]((output + hidden[-1][:, None]).transpose(0, 1))
        return self.head(output.mean(0))


def sequences() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Sequences(), torch.randn(11, 3, 4), torch.randint(7, (11,))


def mixed(model: nn.Module) -> nn.Module:
    """FSDP that computes in float32; in the tests' float64 the parameters and the sums over ranks."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=dataclasses.replace(policy, output_dtype=torch.float64))


class Stream(nn.Module):
    """What works on a part of the positions where it is sequence parallel."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        return self.head(x + self.down(F.gelu(self.up(self.norm(x))))).mean(1)


def stream() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Stream(), torch.randint(7, (11, 4)), torch.randint(7, (11,))


def sequence_parallel(model: nn.Module, norm: bool = True) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(use_local_output=True),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    if not norm:
        del plan["norm"]
    return parallelize_module(model, mesh, plan)


SHARDED = {fsdp, hsdp, both, mixed, wide_fsdp, wide_hsdp, wide_both}

needs_fsdp = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="the FSDP2 of torch 2.6 does not run on CPUs itself"
)


def ways(*wraps: Any) -> list[Any]:
    """Parameters of a test: some ways to lay out a model."""
    return [pytest.param(wrap, marks=needs_fsdp if wrap in SHARDED else ()) for wrap in wraps]
