"""The plan of a step: which way each layer took to its norms and its clipped sum, and what that cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from opacus_fgc.per_sample import Measured
from opacus_fgc.planner import Way
from opacus_fgc.taps import Use


@dataclass
class Row:
    """What a layer cost beyond the step without privacy.

    Attributes:
        layer: its name in the model; in parentheses what is no layer.
        type: its type.
        sampler: where its per-sample gradients come from.
        parameters: number of trainable elements.
        shapes: of its first input and output in the last step, and how often it was called.
        way: how the norms were computed.
        memory: the most bytes beyond activations and backprops: temporaries, and what was kept for the clipped sum.
        seconds: time for its norms and its clipped sum.
    """

    layer: str
    type: str = ""
    sampler: str = ""
    parameters: int = 0
    shapes: str = ""
    way: str = ""
    memory: int = 0
    seconds: float = 0.0


@dataclass
class Plan:
    """All layers of the steps that ran while it was being made; see `GradSampleHooksFastGradientClipping.plan`.

    ``print(plan)`` gives a table. On CUDA the device is synchronized before each reading of the clock, so that steps take longer
    while they are watched.

    Attributes:
        rows: what was measured, in the order in which backward came to the layers.
        seconds: time for all that ran.
    """

    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    _by_param: dict[Any, Row] = field(default_factory=dict, repr=False)

    @contextmanager
    def watching(self, device: torch.device) -> Iterator[None]:
        """A context whose duration is that of the plan."""
        start = clock(device)
        try:
            yield
        finally:
            self.seconds += clock(device) - start

    def row(self, layer: str) -> Row:
        """The row of a layer, a new one for a new name."""
        for row in self.rows:
            if row.layer == layer:
                return row
        self.rows.append(Row(layer))
        return self.rows[-1]

    def measured(
        self,
        layer: str,
        module: nn.Module,
        sampler: str,
        uses: Sequence[Use],
        params: Sequence[nn.Parameter],
        measured: Mapping[Any, Measured],
        seconds: float,
    ) -> None:
        """Notes the norms of a layer.

        Args:
            layer: its name in the model.
            module: the layer.
            sampler: where its per-sample gradients come from.
            uses: its uses in this step.
            params: its trainable parameters.
            measured: what was measured of them; nothing of a parameter that is shared with a layer yet to come.
            seconds: the time that it took.
        """
        row = self.row(layer)
        row.type, row.sampler, row.parameters = type(module).__name__, sampler, sum(param.numel() for param in params)
        call, backprops = uses[0]
        tensors = [*call.activations[:1], *backprops[:1]]
        row.shapes = " -> ".join("x".join(map(str, tensor.shape)) for tensor in tensors)
        if len(uses) > 1:
            row.shapes = f"{len(uses)} times {row.shapes}"
        ways = [one.way.value for one in measured.values() if one.way is not Way.STORED]
        if len(measured) < len(params):
            ways.append("with a layer that shares its parameters")
        # Of weight and bias, the weight's way says more.
        row.way = ", ".join(dict.fromkeys(ways)) or Way.STORED.value
        row.memory = max(row.memory, sum(one.memory for one in measured.values()))
        row.seconds += seconds
        self._by_param.update(dict.fromkeys(measured, row))

    def summed(self, param: nn.Parameter, seconds: float) -> None:
        """Notes the time for a parameter's clipped sum."""
        # A parameter shared with a layer that the loss does not use was measured after all layers, and has no row.
        if param in self._by_param:
            self._by_param[param].seconds += seconds

    def second_pass(self, params: Sequence[nn.Parameter], seconds: float) -> None:
        """Notes a second pass for the parameters of which nothing was kept."""
        row = self.row("(second pass)")
        row.parameters, row.way = sum(param.numel() for param in params), "backward of the weighted loss"
        row.seconds += seconds

    def __str__(self) -> str:
        """A table, one row a layer."""
        total = self.seconds or 1.0
        rest = Row("(all else)", way="forward, backward to the taps, checks")
        rest.seconds = self.seconds - sum(row.seconds for row in self.rows)
        cells = [
            (
                row.layer or "(the model)",
                row.type,
                row.sampler,
                f"{row.parameters:,}" if row.parameters else "",
                row.shapes,
                row.way,
                f"{row.memory / 2**20:.1f}" if row.type else "",
                f"{row.seconds / total:.1%}",
            )
            for row in (*self.rows, rest)
        ]
        headers = ("layer", "type", "sampler", "parameters", "shapes", "way to the norm", "extra MiB", "share of step")
        return tabulate(cells, headers, colalign=("left",) * 3 + ("right", "left", "left", "right", "right"))


def clock(device: torch.device) -> float:
    """Seconds by a clock that waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
