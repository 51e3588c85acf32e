"""The layouts of a model over several processes that are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from scaling import Mesh
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from workloads import Transformer

Wrap = Callable[[Transformer, DeviceMesh, bool], nn.Module]


def ddp(model: Transformer, mesh: DeviceMesh, private: bool) -> nn.Module:
    """Data parallel: torch's own, which a private model cannot be in, and Opacus'."""
    return DifferentiallyPrivateDistributedDataParallel(model) if private else DistributedDataParallel(model)


def fsdp(model: Transformer, mesh: DeviceMesh, private: bool = False) -> nn.Module:
    """FSDP2, block by block; hybrid over a mesh of two axes."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: Transformer, mesh: DeviceMesh, private: bool = False) -> nn.Module:
    """Linear layers and the embedding are cut, all else is copied."""
    plan: dict[str, Any] = {"embedding": RowwiseParallel(input_layouts=Replicate())}
    if not model.pooled:  # a few classes are not worth it
        plan["head"] = ColwiseParallel(output_layouts=Replicate())
    for i, block in enumerate(model.blocks):
        plan.update({f"blocks.{i}.{name}": ColwiseParallel() for name in ("q", "k", "v", "up")})
        plan.update({f"blocks.{i}.{name}": RowwiseParallel() for name in ("out", "down")})
        block.heads //= mesh.size()
    return parallelize_module(model, mesh, plan)


def fsdp_and_tensor_parallel(model: Transformer, mesh: DeviceMesh, private: bool = False) -> nn.Module:
    """Tensor parallel along the last axis of a mesh, FSDP2 along the first."""
    return fsdp(tensor_parallel(model, mesh["tensor"]), mesh["shard"])


@dataclass(frozen=True)
class Layout:
    """A way to lay a model out.

    Attributes:
        wrap: does it.
        mesh: the mesh of so many ranks.
    """

    wrap: Wrap
    mesh: Callable[[int], Mesh]


LAYOUTS = {
    "ddp": Layout(ddp, lambda ranks: Mesh(replicate=ranks)),
    "fsdp": Layout(fsdp, lambda ranks: Mesh(shard=ranks)),
    "tensor parallel": Layout(tensor_parallel, lambda ranks: Mesh(tensor=ranks)),
    "hsdp": Layout(fsdp, lambda ranks: Mesh(replicate=2, shard=ranks // 2)),
    "fsdp + tensor parallel": Layout(fsdp_and_tensor_parallel, lambda ranks: Mesh(shard=ranks // 2, tensor=2)),
}
OF_TWO_AXES = {"hsdp", "fsdp + tensor parallel"}
