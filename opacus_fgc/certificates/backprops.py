"""What taps are shown in a backward pass whose losses are weighted with powers of two."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opacus_fgc.certificates.sketch import sketch

EXPONENTS = tuple(exponent for exponent in range(-12, 13) if exponent)
"""Of the powers of two that losses are weighted with."""

FEW_EXPONENTS = (1, 2, 3)
"""The same for float16, most of whose range backprops need for themselves."""


class Output(NamedTuple):
    """One output of a tapped call."""

    call: Any
    place: int


class Backprops:
    """What the taps of a step were shown in one backward pass, as sketches, in the order in which backward came to them.

    Args:
        by_position: the layers of which each position of the first two axes is a row of its own.

    Attributes:
        sketches: of the backprops of each output.
        dims: their number of axes.
        half: whether float16 is among them, or on their way, whose range is too small for rounding to be that of all numbers.
    """

    def __init__(self, by_position: Collection[Any] = ()) -> None:
        self.sketches: dict[Output, Tensor] = {}
        self.dims: dict[Output, int] = {}
        self.half = False
        self._by_position = by_position

    def see(self, call: Any, backprops: Sequence[Tensor]) -> None:
        """Notes the backprops of the outputs of one call."""
        self.half |= call.autocast == (True, torch.float16)
        self.half |= any(backprop.dtype is torch.float16 for backprop in backprops)
        for place, backprop in enumerate(backprops):
            if backprop.dim() > call.batch_axis:
                key = Output(call.key, place)
                self.dims[key] = backprop.dim()
                positions = call.key.layer in self._by_position
                self.sketches[key] = (
                    sketch(backprop.flatten(0, 1), 0) if positions else sketch(backprop, call.batch_axis)
                )


def weights(size: int, draws: int, generator: random.Random, exponents: Sequence[int] = EXPONENTS) -> list[Tensor]:
    """Powers of two, one for each sample, float64 of shape ``(N,)`` each; so many draws of them.

    Several draws are digits: as long as they can, they give no two samples the same ones.
    """
    base = len(exponents)
    # Distinct numbers, whose digits are the exponents.
    numbers = generator.sample(range(base**draws), min(size, base**draws))
    numbers += [generator.randrange(base**draws) for _ in range(size - len(numbers))]
    digits = [[exponents[number // base**draw % base] for number in numbers] for draw in range(draws)]
    return [
        torch.tensor([2.0**exponent for exponent in of_draw], dtype=torch.float64, device="cpu") for of_draw in digits
    ]


def draws_that_tell(size: int) -> int:
    """How many draws of weights tell all samples apart."""
    return max(1, math.ceil(math.log(max(size, 2), len(EXPONENTS))))
