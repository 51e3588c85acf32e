"""Norms that may have lost what cancelled, where a look at them is a wait for the device.

On a CPU a look costs nothing, and `Squares.norm` looks at each norm as it comes. Any other device works behind the program, which
has to wait for it until all is done that was asked for so far. There a pass notes what makes norms doubtful, and looks once, at
its end; the few that are doubtful are then computed as on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

READ_FREELY = frozenset({"cpu"})
"""The types of device on which a look costs nothing; none in tests of what is done on others."""


def reads_are_free(device: torch.device) -> bool:
    """Whether the program can look at what lies on a device without waiting for it."""
    return device.type in READ_FREELY


class Factors(NamedTuple):
    """What tells whether squares of small factors vanished.

    Attributes:
        left: the largest absolute value of each factor on the left, shape ``(N, *)``.
        right: likewise on the right.
        least: norms that a left and a right factor have at least, if no square that vanishes matters.
        elements: number of elements of a left times that of a right factor.
    """

    left: Tensor
    right: Tensor
    least: tuple[float, float]
    elements: int

    @classmethod
    def of(cls, left: Tensor, right: Tensor, least: tuple[float, float]) -> Factors:
        """Of the factors themselves, along the last axes."""
        largest = [torch.linalg.vector_norm(side, ord=math.inf, dim=-1).flatten(1) for side in (left, right)]
        return cls(largest[0], largest[1], least, left.shape[-1] * right.shape[-1])


def upper_bounds(values: Tensor, scale: Tensor) -> Tensor:
    """Norms by squares that were added up: what they are, or more by as much as they may have been rounded down."""
    rounding = _ROUNDINGS * torch.finfo(values.dtype).eps
    return torch.add(values, scale, alpha=rounding).clamp_(min=0).sqrt_()


def cancelled(values: Tensor, scale: Tensor) -> Tensor:
    """A mask of sums of which so little of their scale is left that roundings of it matter; or NaN."""
    # Not `<=`: where something overflowed, NaN is neither.
    return ~(_CANCELLED * values > scale)


# Squares are off by so many roundings of their scale at most (3.6 were measured, with few and with many, with equal and with
# random terms), which is less than 1e-5 of them as long as this share of the scale is left.
_ROUNDINGS, _CANCELLED = 4, 32


class _Noted(NamedTuple):
    """Squares that were noted; see `squares.Squares`. With ``later`` their norms are to be finished."""

    param: Any
    values: Tensor
    scale: Tensor
    factors: Factors | None
    later: bool


class Doubts:
    """What makes the norms of a pass doubtful, noted until it is looked at."""

    def __init__(self) -> None:
        self._param: Any = None
        self._noted: dict[Any, list[_Noted]] = {}
        self._flags: list[tuple[list[Any], Tensor]] = []

    @contextmanager
    def noting(self, param: Any) -> Iterator[None]:
        """A context in which the norms of a parameter are computed, and none is looked at."""
        global _noted
        before, _noted, self._param = _noted, self, param
        try:
            yield
        finally:
            _noted = before

    def add(self, values: Tensor, scale: Tensor, factors: Factors | None, later: bool = False) -> None:
        """Notes squared norms, of which norms are made at once; or with ``later`` by `finish`."""
        shapes = () if factors is None else (factors.left.shape, factors.right.shape)
        key = (values.shape, values.dtype, values.device, *shapes)
        self._noted.setdefault(key, []).append(_Noted(self._param, values, scale, factors, later))

    def add_mask(self, mask: Tensor) -> None:
        """Notes which norms are doubtful."""
        self._flags.append(([self._param], mask.any().unsqueeze(0)))

    def finish(self) -> Iterator[tuple[Any, Tensor]]:
        """The parameters whose norms were left for later, and these: few operations on what all have."""
        while self._noted:
            several = self._noted.popitem()[1]
            values, scale = torch.stack([one.values for one in several]), torch.stack([one.scale for one in several])
            norms = upper_bounds(values, scale)
            doubtful = cancelled(values, scale) & (scale != 0)
            factors = [one.factors for one in several if one.factors is not None]
            if factors:
                doubtful |= ~(_lost(factors) <= torch.finfo(values.dtype).eps * norms)
            self._flags.append(([one.param for one in several], doubtful.any(1)))
            yield from ((one.param, norm) for one, norm in zip(several, norms.unbind(), strict=True) if one.later)

    def flags(self, device: torch.device) -> tuple[list[Any], Tensor | None]:
        """The parameters of which something was noted, and for each whether one of its norms is doubtful; None for none."""
        params = [param for several, _ in self._flags for param in several]
        return params, torch.cat([flags.to(device) for _, flags in self._flags]) if params else None


def _lost(factors: list[Factors]) -> Tensor:
    """The norm that factors whose squares may vanish give at most, of several parameters: ``(parameters, N)``."""
    left, right = torch.stack([one.left for one in factors]), torch.stack([one.right for one in factors])
    least = [max(one.least[side] for one in factors) for side in (0, 1)]
    # Of 0 nothing is lost. (No inf is a part of this: what is small is multiplied with inf elsewhere, and gives NaN.)
    lost = (left * right).mul_((left < least[0]) | (right < least[1])).sum(2)
    return lost.mul_(math.sqrt(max(one.elements for one in factors)))


_noted: Doubts | None = None


def noted(device: torch.device) -> Doubts | None:
    """Where norms on a device are to be noted; None if they are to be looked at as they come."""
    return None if _noted is None or reads_are_free(device) else _noted
