"""What a step costs a rank, by formulas: what it sends, and what it holds beyond the step without privacy.

They are derived, and compared with what was measured, in ``docs/scaling.md``. All is float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from communication import all_gather, all_reduce, reduce_scatter
from measure import BASELINE
from tabulate import tabulate
from torch import nn
from workloads import Transformer

from opacus_fgc.distributed.reductions import buckets
from opacus_fgc.planner import MEMORY

ELEMENT = 4
GIB = 2**30
COLUMNS, ROWS = ("q", "k", "v", "up", "head"), ("out", "down", "embedding")
"""The layers that tensor parallel cuts by output and by input features (the embedding by its rows)."""
SHARES = {BASELINE: 0.0, "ghost": MEMORY.ghost.share, "ghost_bk": MEMORY.ghost_bk.share}
WAYS = list(SHARES)


@dataclass(frozen=True)
class Mesh:
    """Ranks by axis. Copies without shards are data parallel, with shards they are hybrid FSDP.

    Attributes:
        replicate: ranks with copies of parameters, and different samples.
        shard: ranks with shards of parameters, and different samples.
        tensor: ranks with parts of the same samples' computation.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """By name, in their order."""
        return {"replicate": self.replicate, "shard": self.shard, "tensor": self.tensor}


class Batch(NamedTuple):
    """A rank's batch: samples, and positions of each."""

    samples: int
    positions: int


class Sent(NamedTuple):
    """Bytes that a rank sends, in so many collectives."""

    size: float
    calls: int = 1


class Layer(NamedTuple):
    """A layer with parameters, on one rank of tensor parallel.

    Attributes:
        kind: "columns" or "rows" if tensor parallel cuts it by these, else "".
        head: whether it is the head.
        unit: the place of its block; -1 for what FSDP has in no block.
        cut: elements of each parameter of which this rank has its part.
        copied: elements of each that all ranks of tensor parallel have.
        vectors: elements of those of them that have one axis.
        rows: times that it is applied: samples times positions.
        inputs: input features on all ranks.
        outputs: output features on all ranks.
        held: elements of activations and backprops.
    """

    kind: str
    head: bool
    unit: int
    cut: list[int]
    copied: list[int]
    vectors: list[int]
    rows: int
    inputs: int
    outputs: int
    held: float

    @property
    def params(self) -> list[int]:
        """Elements of each parameter."""
        return self.cut + self.copied

    @property
    def elements(self) -> int:
        """Of all parameters."""
        return sum(self.params)


def layers(model: Transformer, batch: Batch, tensor: int = 1) -> Iterator[Layer]:
    """The layers of a model, on one rank of tensor parallel over so many."""
    blocks = {layer: i for i, block in enumerate(model.blocks) for layer in block.modules()}
    for path, module in model.named_modules():
        params = dict(module.named_parameters(recurse=False))
        if not params:
            continue
        name = path.rpartition(".")[2]
        columns, rows = name in COLUMNS and not (name == "head" and model.pooled), name in ROWS
        is_sharded = {key: columns or (rows and key == "weight") for key in params}
        size = {key: param.numel() // (tensor if is_sharded[key] else 1) for key, param in params.items()}
        times = batch.samples * (1 if name == "head" and model.pooled else batch.positions)
        linear = isinstance(module, nn.Linear)
        outputs, inputs = module.weight.shape if linear else (model.embedding.weight.shape[1],) * 2
        held = times * (outputs / (tensor if columns else 1) + inputs / (tensor if rows and linear else 1))
        yield Layer(
            kind="columns" if columns else "rows" if rows else "",
            head=name == "head",
            unit=blocks.get(module, -1),
            cut=[size[key] for key in params if is_sharded[key]],
            copied=[size[key] for key in params if not is_sharded[key]],
            vectors=[size[key] for key, param in params.items() if param.dim() == 1],
            rows=times,
            inputs=inputs,
            outputs=outputs,
            held=held,
        )


def sent(model: Transformer, mesh: Mesh, way: str, batch: Batch) -> Sent:
    """What a rank sends in a step, where mode "ghost" needs its second pass."""
    parts = list(_collectives(list(layers(model, batch, mesh.tensor)), mesh, way, batch))
    return Sent(sum(part.size * part.calls for part in parts), sum(part.calls for part in parts))


def _buckets(sizes: Iterable[float]) -> int:
    """In how many buckets tensors of so many elements are summed."""
    return sum(1 for _ in buckets((None, torch.empty(math.ceil(size), device="meta")) for size in sizes))


def _collectives(every: list[Layer], mesh: Mesh, way: str, batch: Batch) -> Iterator[Sent]:
    private = way != BASELINE
    elements = sum(layer.elements for layer in every)
    params = [size for layer in every for size in layer.params]
    if mesh.replicate > 1 and mesh.shard == 1:
        total = all_reduce(ELEMENT * elements, mesh.replicate)
        # Torch's buckets are of 25 MiB, but for a first one of 1 MiB.
        buckets_of_torch = 1 + max(0, math.ceil((ELEMENT * elements / 2**20 - 1) / 25))
        calls = 2 * _buckets(params) if private else buckets_of_torch
        yield Sent(total / calls, calls)
    if mesh.shard > 1:
        yield from _fsdp(every, mesh, way)
    if mesh.tensor > 1:
        yield from _tensor_parallel(every, mesh, way, batch)
    for axis in mesh.sizes.values():
        if private and axis > 1:
            # Five numbers that all ranks have to go by.
            yield Sent(all_gather(5 * 8, axis))
            if mesh.shard > 1 or mesh.tensor > 1:
                # Whether certificates are due, are of something new, and with how many draws.
                yield Sent(all_reduce(3 * 8, axis))
                # Of which parameters to run a second pass; in it, of dropped samples.
                yield Sent(all_reduce(8 * len(params), axis))
                if way == "ghost":
                    yield Sent(all_reduce(8, axis))


def _fsdp(every: list[Layer], mesh: Mesh, way: str) -> Iterator[Sent]:
    for unit in {layer.unit for layer in every}:
        inside = [layer for layer in every if layer.unit == unit]
        shard = ELEMENT * sum(layer.elements for layer in inside) / mesh.shard
        # What is in no block stays whole between forward and backward.
        passes = (1 if unit == -1 else 2) + (way == "ghost")
        yield Sent(all_gather(shard, mesh.shard), passes)
    # FSDP reduces unit by unit; what a first pass kept is reduced in buckets.
    units = 0 if way == "ghost_bk" else len({layer.unit for layer in every})
    kept = {
        BASELINE: [],
        "ghost": [size for layer in every for size in layer.vectors],
        "ghost_bk": [size for layer in every for size in layer.params],
    }[way]
    calls = units + _buckets(kept)
    total = ELEMENT * sum(layer.elements for layer in every)
    yield Sent(reduce_scatter(total, mesh.shard) / calls, calls)
    if mesh.replicate > 1:
        yield Sent(all_reduce(total / mesh.shard, mesh.replicate) / calls, calls)
        if way != BASELINE:
            # Of copies each rank draws the noise of a part.
            calls = _buckets(size / mesh.shard for layer in every for size in layer.params)
            yield Sent(reduce_scatter(total / mesh.shard, mesh.replicate) / calls, calls)


def _tensor_parallel(every: list[Layer], mesh: Mesh, way: str, batch: Batch) -> Iterator[Sent]:
    for layer in every:
        if layer.kind == "rows":
            yield Sent(all_reduce(ELEMENT * layer.rows * layer.outputs, mesh.tensor))
        if layer.kind == "columns":
            yield Sent(all_reduce(ELEMENT * layer.rows * layer.inputs, mesh.tensor), 1 + (way == "ghost"))
        if layer.kind and layer.head:
            yield Sent(all_gather(ELEMENT * layer.rows * layer.outputs / mesh.tensor, mesh.tensor))
    if way == BASELINE:
        return
    params = sum(len(layer.params) for layer in every)
    yield Sent(all_gather(ELEMENT * batch.samples * params, mesh.tensor))  # norms
    yield Sent(all_gather(ELEMENT * batch.samples, mesh.tensor))  # losses
    yield Sent(all_gather(3 * 8, mesh.tensor))  # their number, and what the model was called on
    yield Sent(all_gather(2 * 8 * params, mesh.tensor))  # what each layer was called on
    copied = [size / mesh.shard for layer in every for size in layer.copied]
    calls = _buckets(copied)
    yield Sent(reduce_scatter(ELEMENT * sum(copied), mesh.tensor) / calls, calls)  # noise, in parts


def held(model: Transformer, mesh: Mesh, way: str, batch: Batch) -> float:
    """The most bytes that a rank holds beyond the step without privacy: the clipped sum, and what the first pass may keep."""
    if way == BASELINE:
        return 0.0
    every = list(layers(model, batch, mesh.tensor))
    shard = sum(layer.elements for layer in every) / mesh.shard
    return ELEMENT * (shard + SHARES[way] * (shard + sum(layer.held for layer in every)))


def large() -> Transformer:
    """A language model of 6.7 billion parameters, without any memory."""
    with torch.device("meta"):
        return Transformer(32000, 2048, width=4096, depth=32, heads=32)


def scaling_tables(samples: int = 1, positions: int = 2048) -> str:
    """What a rank of a large model holds and sends, in Markdown."""
    model, batch = large(), Batch(samples, positions)
    elements = sum(param.numel() for param in model.parameters())
    meshes = {
        "FSDP over 64": Mesh(shard=64),
        "HSDP, 8 copies over 64": Mesh(replicate=8, shard=64),
        "FSDP over 512": Mesh(shard=512),
        "FSDP over 64, tensor parallel over 8": Mesh(shard=64, tensor=8),
    }
    memory = [
        [
            name,
            4 * ELEMENT * elements / (mesh.shard * mesh.tensor) / GIB,
            *(held(model, mesh, way, batch) / GIB for way in WAYS if way != BASELINE),
        ]
        for name, mesh in meshes.items()
    ]
    traffic = {name: [sent(model, mesh, way, batch) for way in WAYS] for name, mesh in meshes.items()}
    sizes = [[name, *(one.size / GIB for one in row)] for name, row in traffic.items()]
    calls = [[name, *(one.calls for one in row)] for name, row in traffic.items()]

    def table(rows: list[list], *head: str) -> str:
        return tabulate(rows, head, tablefmt="github", floatfmt=".2f")

    return "\n\n".join(
        [
            f"{elements:,} parameters in {len(list(model.parameters()))} tensors, {batch.samples} samples of "
            f"{batch.positions} positions on each data rank, float32",
            table(memory, "GiB held by a rank", "parameters, gradients, Adam", "ghost: up to", "ghost_bk: up to"),
            table(sizes, "GiB sent by a rank and step", *WAYS),
            table(calls, "collectives of a step", *WAYS),
        ]
    )
