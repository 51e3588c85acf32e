"""The planner: the cheapest exact method for the norms of a layer's per-sample gradients, and what is kept for their sum.

Decided anew for every call, from the shapes at hand. Nothing here changes a result; only time and memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple


class NormMethod(Enum):
    """How the norms of per-sample gradients are computed."""

    STORED = "gradients as they are"
    CLOSED = "product of norms"
    ROWS = "sums of rows"
    GRAM = "Gram matrices"
    FORMED = "gradients, formed"
    KEPT = "gradients, formed and kept"
    TILES = "tiles of the vocabulary"
    SUM = "inner products"
    GIVEN = "norms of the sampler"


@dataclass(frozen=True)
class Room:
    """What a form may keep of itself for the clipped sum.

    Attributes:
        elements: it may keep what is not larger than this, and whatever saves time most.
        everything: it has to keep what the clipped sum can be made of, whatever the size.
        later: it may leave its norms to the end of the pass, when those of all parameters are finished together.
    """

    elements: float = 0.0
    everything: bool = False
    later: bool = False


NO_ROOM = Room()


@dataclass(frozen=True)
class KeepPolicy:
    """What a first pass keeps for the clipped sum.

    Attributes:
        share: the room of a parameter, as a share of what its layer and it hold in the step without privacy: activations,
            backprops and the parameter.
        everything: keep all forms, so that no second pass is needed.
        freed: whether a layer has as much room as the pass has given up memory by then, so that by estimate it stays within the
            peak of the step without privacy.
    """

    share: float = 0.0
    everything: bool = False
    freed: bool = False


NOTHING = KeepPolicy()


class Freed(NamedTuple):
    """What a layer may keep in memory that a pass has given up before it came there.

    Attributes:
        own: bytes of what it keeps in any case.
        room: bytes of what it may keep instead.
    """

    own: int
    room: int


class KeepBudget:
    """What a first pass may keep, told layer by layer.

    Args:
        keep: the bounds.
        freed: the room in memory that is given up by then, by layer.
    """

    def __init__(self, keep: KeepPolicy = NOTHING, freed: Mapping[Any, Freed] | None = None) -> None:
        self.keep = keep
        self._freed = freed or {}
        self._left = 0.0
        # Bytes: of an element of the layer at hand, what it would keep in any case, and what layers before it kept beyond that.
        self._itemsize = self._own = self._beyond = 0

    def room(self, layer: Any, held: int, uses: int, spared: bool, itemsize: int) -> Room:
        """The room for the forms of a layer.

        Args:
            layer: the layer.
            held: elements of the layer's activations, backprops and parameters.
            uses: how often it was called.
            spared: whether the second pass may still be spared altogether.
            itemsize: bytes of an element of per-sample gradients.
        """
        share, everything = self.keep.share * held, self.keep.everything
        self._itemsize = itemsize
        if layer in self._freed:
            self._own, room = self._freed[layer]
            share = max(share, (room - self._beyond) / itemsize)
        self._left += share
        if share and uses > 1:
            # All uses were held until now, so that keeping what came of them takes no more than there was.
            return Room(share, everything=True)
        # Where no second pass may be needed, what other layers left of their room counts as well.
        return Room(self._left) if spared and not everything else Room(share, everything)

    def spend(self, room: Room, elements: int) -> None:
        """Notes that so many elements of the layer at hand were kept in its room."""
        if not room.everything:
            self._left -= elements
        beyond = elements * self._itemsize - self._own
        self._own, self._beyond = max(0, -beyond), self._beyond + max(0, beyond)


@dataclass
class Memory:
    """The bounds on memory, beyond that of the step without privacy. Set them on `planner.MEMORY`.

    Attributes:
        temporary: the most bytes that one temporary of a layer takes; larger work is done in slices of the batch.
            (The gradient of one sample is the least that is formed at a time.)
        peak: in mode "ghost" the most that one backward pass may take by estimate, as a multiple of what the step without privacy
            takes, or two passes do. Within it one pass keeps what "ghost_bk" keeps; beyond it there are two.
        ghost: what mode "ghost" keeps of the first of two passes, which spares the second pass these parameters.
        ghost_bk: what mode "ghost_bk" keeps. All forms are kept; ``share`` and ``freed`` bound the per-sample gradients that are
            kept in place of activations and backprops since they are the faster method.
    """

    temporary: int = 2**25
    peak: float = 1.1
    ghost: KeepPolicy = KeepPolicy(share=1 / 6)
    ghost_bk: KeepPolicy = KeepPolicy(share=1.3, everything=True, freed=True)


MEMORY = Memory()


@dataclass(frozen=True)
class Kernels:
    """What a multiply-add costs in each norm method, as a multiple of one in a large matrix product (measured on CPUs).

    Attributes:
        gram: of Gram matrices.
        formed: of per-sample gradients.
        gradient: of the ordinary gradient.
    """

    gram: float
    formed: float
    gradient: float


# An element of a per-sample gradient that is written and read again costs as much as so many multiply-adds.
_TRAFFIC = 30


def costs(kernels: Kernels, positions: int, p: int, d: int) -> dict[NormMethod, float]:
    """The extra work of each norm method for one sample: beyond the step without privacy where the sum is made of what is kept.

    Gram matrices take ``T^2 (p + d)`` multiply-adds, gradients ``T p d``. Gradients that are kept are all that the sum
    needs, so the ordinary gradient's work is saved.

    Args:
        kernels: what the work costs.
        positions: ``T``.
        p: output features.
        d: input features.
    """
    traffic = _TRAFFIC * p * d
    work = positions * p * d
    return {
        NormMethod.GRAM: kernels.gram * positions**2 * (p + d),
        NormMethod.FORMED: kernels.formed * work + traffic,
        NormMethod.KEPT: (kernels.formed - kernels.gradient) * work + traffic,
    }


def cheapest(options: Mapping[NormMethod, float]) -> NormMethod:
    """The norm method that costs least."""
    return min(options, key=options.__getitem__)


# A product of one sample takes longer than its arithmetic. So many on a CPU take less time than padding them all.
_FEW_RUNS, _LONG_RUN = 64, 64


def runs_pay(samples: int, rows: int) -> bool:
    """Whether samples with different numbers of rows are better worked on one by one than padded (measured on CPUs).

    Args:
        samples: number of samples.
        rows: number of their rows, of all together.
    """
    return samples <= _FEW_RUNS or rows >= _LONG_RUN * samples


def slices(count: int, elements: int) -> Iterator[slice]:
    """Divides samples into slices whose temporaries stay within `Memory.temporary`.

    Args:
        count: number of samples.
        elements: float32 elements of the temporary of one sample.
    """
    step = max(1, MEMORY.temporary // max(1, 4 * elements))
    return (slice(start, start + step) for start in range(0, count, step))
