"""The plan of a step: how each layer came to its norms and its clipped sum, and what that cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from torch import nn

from opacus_fgc.per_sample import Measured
from opacus_fgc.planner import NormMethod
from opacus_fgc.taps.tap import Use

if TYPE_CHECKING:
    from opacus_fgc.taps.tapping import Tapped


@dataclass
class Row:
    """What a layer cost beyond the step without privacy.

    Attributes:
        layer: its name in the model; in parentheses what is no layer.
        type: its type.
        sampler: where its per-sample gradients come from.
        parameters: number of trainable elements.
        shapes: of its first input and output in the last step, and how often it was called.
        norm_method: how the norms were computed.
        memory: the most bytes beyond activations and backprops: temporaries, and what was kept for the clipped sum.
        seconds: time for its norms and its clipped sum.
    """

    layer: str
    type: str = ""
    sampler: str = ""
    parameters: int = 0
    shapes: str = ""
    norm_method: str = ""
    memory: int = 0
    seconds: float = 0.0


class Unwatched:
    """In the place of a plan while none is being made."""

    def lap(self) -> float:
        """Seconds since the last lap."""
        return 0.0

    def measured(
        self,
        layer: Tapped,
        uses: Sequence[Use],
        measured: Mapping[Any, Measured],
    ) -> None:
        """Notes the norms of a layer, which took the time since the last lap.

        Args:
            layer: the layer.
            uses: its uses in this step.
            measured: what was measured of them; nothing of a parameter that is shared with a layer yet to come.
        """

    def summed(self, param: nn.Parameter) -> None:
        """Notes a parameter's clipped sum, which took the time since the last lap."""

    def second_pass(self, params: Sequence[nn.Parameter]) -> None:
        """Notes a second pass for the parameters of which nothing was kept, likewise."""


UNWATCHED = Unwatched()


@dataclass
class StepProfile(Unwatched):
    """All layers of the steps that ran while it was being made; see `GradSampleHooksFastGradientClipping.plan`.

    ``print(plan)`` gives a table. On CUDA the device is synchronized before each reading of the clock, so that steps take longer
    while they are watched.

    Attributes:
        seconds: time for all that ran.
    """

    seconds: float = 0.0
    _by_name: dict[str, Row] = field(default_factory=dict, repr=False)
    _by_param: dict[Any, Row] = field(default_factory=dict, repr=False)
    _device: torch.device = field(default=torch.device("cpu"), repr=False)
    _last: float = field(default=0.0, repr=False)

    @contextmanager
    def watching(self, device: torch.device) -> Iterator[StepProfile]:
        """A context whose duration is that of the plan."""
        self._device = device
        start = self._last = self._clock()
        try:
            yield self
        finally:
            self.seconds += self._clock() - start

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self) -> float:
        last, self._last = self._last, self._clock()
        return self._last - last

    @property
    def rows(self) -> list[Row]:
        """What was measured, in the order in which backward came to the layers."""
        return list(self._by_name.values())

    def measured(
        self,
        layer: Tapped,
        uses: Sequence[Use],
        measured: Mapping[Any, Measured],
    ) -> None:
        trainable = [param for param in layer.params.values() if param.requires_grad]
        row = self._by_name.setdefault(layer.name, Row(layer.path, layer.type, layer.sampler.name))
        row.parameters = sum(param.numel() for param in trainable)
        call, backprops = uses[0]
        tensors = [*call.activations[:1], *backprops[:1]]
        row.shapes = " -> ".join("x".join(map(str, tensor.shape)) for tensor in tensors)
        if len(uses) > 1:
            row.shapes = f"{len(uses)} times {row.shapes}"
        methods = [one.method.value for one in measured.values() if one.method is not NormMethod.STORED]
        if len(measured) < len(trainable):
            methods.append("with a layer that shares its parameters")
        # Of weight and bias, the weight's norm method says more.
        row.norm_method = ", ".join(dict.fromkeys(methods)) or NormMethod.STORED.value
        row.memory = max(row.memory, sum(one.memory for one in measured.values()))
        row.seconds += self.lap()
        self._by_param.update(dict.fromkeys(measured, row))

    def summed(self, param: nn.Parameter) -> None:
        seconds = self.lap()
        # A parameter shared with a layer that the loss does not use was measured after all layers, and has no row.
        if param in self._by_param:
            self._by_param[param].seconds += seconds

    def second_pass(self, params: Sequence[nn.Parameter]) -> None:
        row = self._by_name.setdefault("(second pass)", Row("(second pass)"))
        row.parameters = sum(param.numel() for param in params)
        row.norm_method = "backward of the weighted loss"
        row.seconds += self.lap()

    def __str__(self) -> str:
        """A table, one row a layer."""
        total = self.seconds or 1.0
        rest = Row("(all else)", norm_method="forward, backward to the taps, checks")
        rest.seconds = self.seconds - sum(row.seconds for row in self.rows)
        cells = [
            (
                row.layer or "(the model)",
                row.type,
                row.sampler,
                f"{row.parameters:,}" if row.parameters else "",
                row.shapes,
                row.norm_method,
                f"{row.memory / 2**20:.1f}" if row.type else "",
                f"{row.seconds / total:.1%}",
            )
            for row in (*self.rows, rest)
        ]
        headers = ("layer", "type", "sampler", "parameters", "shapes", "norm method", "extra MiB", "share of step")
        return tabulate(cells, headers, colalign=("left",) * 3 + ("right", "left", "left", "right", "right"))
