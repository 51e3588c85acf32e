"""Per-sample gradients of many small parameters, which are measured and summed together: few operations in place of many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from opacus_fgc.per_sample import Dense, PerSampleGradient
from opacus_fgc.per_sample.base import LATER
from opacus_fgc.per_sample.precision import row_norms
from opacus_fgc.planner import Room

# Elements from which on an operation takes longer than it takes to start it, and a copy is not for nothing.
_LARGE, _LARGE_ON_CPU = 2**18, 2**15


class Together:
    """The gradients of several parameters in one matrix, whose sum is taken once.

    Args:
        forms: by parameter, of one batch, dtype and device.
    """

    def __init__(self, forms: Mapping[Any, Dense]) -> None:
        # Those of one size lie next to each other, so that their norms are one operation.
        self._params = sorted(forms, key=lambda param: forms[param].shape.numel())
        self._sizes = [forms[param].shape.numel() for param in self._params]
        self._shapes = [forms[param].shape for param in self._params]
        rows = next(iter(forms.values())).batch_size
        matrices = [
            forms[param].values.reshape(rows, size) for param, size in zip(self._params, self._sizes, strict=True)
        ]
        self.form = Dense(torch.cat(matrices, 1))

    def norms(self) -> Iterator[tuple[Any, Tensor]]:
        """Each parameter and its norms."""
        place, column = 0, 0
        while place < len(self._sizes):
            size, count = self._sizes[place], self._sizes.count(self._sizes[place])
            norms = row_norms(self.form.values[:, column : column + count * size].unflatten(1, (count, size)))
            yield from zip(self._params[place : place + count], norms.unbind(1), strict=True)
            place, column = place + count, column + count * size

    def parts(self, total: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Each parameter and its part of a sum over the samples."""
        parts = zip(total.split(self._sizes), self._shapes, strict=True)
        yield from zip(self._params, (part.view(shape) for part, shape in parts), strict=True)


class SmallGradients:
    """Takes the gradients of small parameters as they come in a pass, where they are kept anyway."""

    def __init__(self) -> None:
        self._forms: dict[Any, dict[Any, Dense]] = {}

    @staticmethod
    def takes(form: PerSampleGradient, room: Room) -> bool:
        """Whether gradients are such ones."""
        if type(form) is not Dense or not form.fits(room):
            return False
        return form.elements <= (_LARGE_ON_CPU if form.values.device.type == "cpu" else _LARGE)

    def add(self, param: Any, form: Any) -> Tensor:
        """Takes the gradients of a parameter; gives what takes the place of their norms until these are known."""
        key = (param.dtype, form.values.dtype, form.values.device, form.batch_size)
        self._forms.setdefault(key, {})[param] = form
        return LATER

    def together(self) -> Iterator[Together]:
        """What came, and is given up here."""
        while self._forms:
            yield Together(self._forms.popitem()[1])
