"""What a forward comes by, kept as sketches."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opacus_fgc.certificates.model_state import ModelState
from opacus_fgc.certificates.samples import Replacement
from opacus_fgc.certificates.sketch import sketch
from opacus_fgc.per_sample.precision import autocast_dtype

# Forward


class Seen(NamedTuple):
    """What is kept of a tensor that a forward came by.

    Attributes:
        key: the layer that has it; None for what the model returned.
        name: what to call it.
        shape: of the tensor.
        sketches: its rows along each axis that may count samples, with their number.
        samples: the samples of its rows, where they are known.
        eps: of its dtype, or of that which autocast has it computed in.
        call: which call of the layer it is of, from 0 on.
        place: which of the tensors of that call it is.
    """

    key: Any
    name: str
    shape: torch.Size
    sketches: list[Tensor]
    samples: Tensor | None = None
    eps: float = 0.0
    call: int = 0
    place: int = 0


class Observations:
    """What a forward comes by, in order, as sketches instead of the tensors themselves.

    Args:
        size: number of rows of the batch.
        packed: which sample each position of a single row is of; None if samples are not packed.

    Attributes:
        seen: what it came by so far.
    """

    def __init__(self, size: int, packed: Tensor | None = None) -> None:
        self.seen: list[Seen] = []
        self._size, self._packed = size, packed
        self._calls: Counter[Any] = Counter()
        self._place = 0
        self._last: Callable[[], Tensor | None] = lambda: None

    def of(self, outputs: Sequence[Tensor], model: nn.Module) -> Forward:
        """What the forward came by in all.

        Args:
            outputs: what the model returned.
            model: the model, whose state is taken.
        """
        for tensor in outputs:
            if self._packed is not None and tensor.dim() > 1 and tensor.shape[:2].numel() == len(self._packed):
                self.look_at(None, "what the model returns", tensor.flatten(0, 1), [0], self._packed)
                continue
            axes = [axis for axis in range(tensor.dim()) if tensor.shape[axis] == self._size]
            self.look_at(None, "what the model returns", tensor, axes)
        return Forward(self.seen, ModelState(model), self._size)

    def begin_call(self, key: Any) -> None:
        """Told of a call of a layer, whose tensors `look_at` gets next."""
        self._calls[key] += 1
        self._place = 0

    def look_at(self, key: Any, name: str, value: Tensor, axes: Sequence[int], samples: Tensor | None = None) -> None:
        """Keeps of a tensor what `check_independence` compares.

        Args:
            key: the layer that has it; None for what the model returned.
            name: what to call it.
            value: the tensor.
            axes: the axes that may count samples.
            samples: the samples of its rows, where they are known.
        """
        call, place = self._calls[key] - 1, self._place
        self._place += 1
        if value is self._last():
            # Layers that are called on one tensor, as those of queries, keys and values are, come after each other.
            self.seen.append(self.seen[-1]._replace(key=key, name=name, call=call, place=place))
            return
        self._last = weakref.ref(value)
        axes = [axis for axis in axes if axis < value.dim()]
        dtypes = [value.dtype, autocast_dtype(value.device.type) or value.dtype]
        eps = max(torch.finfo(dtype).eps if dtype.is_floating_point else 0.0 for dtype in dtypes)
        self.seen.append(
            Seen(key, name, value.shape, [sketch(value, axis) for axis in axes], samples, eps, call, place)
        )


class Forward(NamedTuple):
    """What a forward came by, and the state that it left.

    Attributes:
        seen: what it came by.
        after: the state.
        size: the number of samples that the axes of what the model returned were chosen by.
    """

    seen: list[Seen]
    after: ModelState
    size: int


Run = Callable[[Replacement | None, ModelState | None], Forward]
"""Runs a forward again, on the batch as it is or with samples replaced, from the state that there is or from another."""
