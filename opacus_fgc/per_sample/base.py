"""What every form of per-sample gradients gives, and what follows from the gradients themselves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opacus_fgc import planner
from opacus_fgc.per_sample.precision import at_least_float32, row_norms
from opacus_fgc.planner import NO_ROOM, NormMethod, Room

# All of so few elements may cancel at once by chance. Of more, roundings matter where the terms were made to cancel; of so
# many, they take each other away.
_FEW_ELEMENTS, _MANY_ELEMENTS = 2**6, 2**14


LATER = torch.empty(0, device="cpu")
"""In the place of norms that are left to the end of a pass; see `planner.Room`."""


class Measured(NamedTuple):
    """What came of measuring a form.

    Attributes:
        norm: L2 norm of each sample's gradient, shape ``(N,)``, float32 or wider.
        kept: a form of the same gradients to make the weighted sum of; None if nothing is kept.
        method: how the norm was computed.
        temporary: elements of the largest temporary on the way.
    """

    norm: Tensor
    kept: PerSampleGradient | None
    method: NormMethod
    temporary: int = 0

    @property
    def memory(self) -> int:
        """Bytes of the temporary and of what is kept, beyond activations, which the step without privacy holds as well."""
        return self.norm.element_size() * (self.temporary + (0 if self.kept is None else self.kept.elements))


class PerSampleGradient(ABC):
    """The gradients of one parameter, one for each of ``N`` samples.

    A form writes `elements`, `materialize` and `select`. All else follows from the gradients themselves, some samples at a time
    where they are large; a form overrides what it computes with less time or memory.

    Attributes:
        shape: shape of the parameter.
        batch_size: number of samples, ``N``.
        method: how the norm is computed, where there is one method only.
    """

    shape: torch.Size
    batch_size: int
    method: NormMethod = NormMethod.FORMED

    @property
    @abstractmethod
    def elements(self) -> int:
        """How many elements are kept with the form."""

    @abstractmethod
    def materialize(self) -> Tensor:
        """The gradients themselves, shape ``(N, *shape)``."""

    @abstractmethod
    def select(self, samples: slice | Tensor) -> PerSampleGradient:
        """The form of some of the samples: a slice of them, or those that a mask of shape ``(N,)`` has."""

    def _slices(self) -> Iterator[tuple[slice, Dense]]:
        """The gradients of all samples, as many at a time as `planner.MEMORY` allows."""
        for samples in planner.slices(max(1, self.batch_size), self.shape.numel()):  # an empty batch is one slice
            yield samples, Dense(self.select(samples).materialize())

    def norm(self) -> Tensor:
        """L2 norm of each sample's gradient, shape ``(N,)``, float32 or wider."""
        return torch.cat([gradients.norm() for _, gradients in self._slices()])

    def norm_one_by_one(self, samples: Tensor) -> Tensor:
        """The norms of some samples, from one gradient at a time.

        Args:
            samples: a mask of them, shape ``(N,)``.

        Returns:
            Upper bounds: what rounding adds to the terms of a sum is small against them, not against what is left of them.
        """
        norms = []
        for n in samples.nonzero().flatten().tolist():
            one = self.select(slice(n, n + 1))
            norms.append(Dense(one.materialize()).norm() + one.rounding(one.norm_of_terms()))
        return torch.cat(norms)

    @property
    def summands(self) -> int:
        """How many terms a gradient is the sum of."""
        return 1

    def rounding(self, norm_of_terms: Tensor) -> Tensor:
        """By how much norms of two such sums of the same terms, in other orders, may differ; shape ``(N,)``.

        For random terms the larger half of it is reached in one sample of some thousands, if all elements cancel by chance.

        Args:
            norm_of_terms: see there.
        """
        return 2 * math.sqrt(self.summands) * torch.finfo(norm_of_terms.dtype).eps * norm_of_terms

    @property
    def rounds(self) -> bool:
        """Whether gradients are so small that all their elements may be rounded in one direction; see `above_rounding`."""
        return self.shape.numel() <= _MANY_ELEMENTS

    def above_rounding(self, norms: Tensor) -> Tensor:
        """Norms of formed gradients, as upper bounds of what is released, which is another sum of the same terms."""
        elements = self.shape.numel()
        if not self.rounds:
            return norms
        terms = self.norm_of_terms()
        bounds = norms + self.rounding(terms)
        return bounds if elements <= _FEW_ELEMENTS else torch.where(2 * norms < terms, bounds, norms)

    def norm_of_terms(self) -> Tensor:
        """What the norms would be if the terms of a sum that a gradient is were orthogonal, so that none cancelled."""
        return self.norm()

    def weighted_sum(self, coef: Tensor) -> Tensor:
        """``sum_n coef[n] * gradient[n]``, in the parameter's shape; ``coef`` has shape ``(N,)``.

        In float32 or wider, whatever the gradients were computed in: in half precision, coefficients and products of them are
        rounded by up to 0.4 %, and so may the clipping norm be exceeded; and in a large sum a sample moves an element by a
        step of that sum.
        """
        # Added up one by one: side by side, the sums of the slices take as much memory as the gradients.
        return reduce(torch.add, (gradients.weighted_sum(coef[samples]) for samples, gradients in self._slices()))

    def inner(self, other: PerSampleGradient) -> Tensor:
        """Inner product with another form of the same parameter, sample by sample, shape ``(N,)``."""
        return Dense(self.materialize()).inner(other)

    @classmethod
    def joined(cls, forms: Sequence[Any]) -> PerSampleGradient:
        """The sum of several forms of this type (of one parameter and one batch) as one."""
        return Dense.joined([Dense(form.materialize()) for form in forms])

    def sum_over_uses(self, uses: int) -> PerSampleGradient:
        """The sum over the uses of a parameter, where row ``n * uses + u`` is use ``u`` by sample ``n``."""
        return Dense(self.materialize()).sum_over_uses(uses)

    def norm_of_runs(self, counts: Tensor) -> Tensor | None:
        """The norms of sums over runs of rows, where each row counts as a sample; None if that is no faster than one by one.

        Args:
            counts: how many rows each run has, shape ``(runs,)``, on the CPU.
        """
        return None

    def measured(self, room: Room = NO_ROOM) -> Measured:
        """The norm, and what is kept for a weighted sum."""
        return Measured(self.norm(), self if self.fits(room) else None, self.method)

    def fits(self, room: Room) -> bool:
        """Whether the form itself may be kept."""
        return room.everything or self.elements <= room.elements


class Dense(PerSampleGradient):
    """Gradients stored as they are: biases, norm layers, and whatever has no better form.

    Args:
        values: shape ``(N, *shape)``.
    """

    method = NormMethod.STORED

    def __init__(self, values: Tensor) -> None:
        self.values = at_least_float32(values)
        self.shape = values.shape[1:]
        self.batch_size = values.shape[0]

    @property
    def elements(self) -> int:
        return self.values.numel()

    def _flat(self) -> Tensor:
        return self.values.reshape(self.batch_size, math.prod(self.shape))

    def norm(self) -> Tensor:
        return row_norms(self._flat())

    def weighted_sum(self, coef: Tensor) -> Tensor:
        return (coef.to(self.values.dtype) @ self._flat()).reshape(self.shape)

    def materialize(self) -> Tensor:
        return self.values

    def inner(self, other: PerSampleGradient) -> Tensor:
        if isinstance(other, Dense):
            return torch.linalg.vecdot(self._flat(), other._flat()).real
        return other.inner(self)

    @classmethod
    def joined(cls, forms: Sequence[Dense]) -> Dense:
        return Dense(torch.stack([form.values for form in forms]).sum(0))

    def select(self, samples: slice | Tensor) -> Dense:
        return Dense(self.values[samples])

    def sum_over_uses(self, uses: int) -> Dense:
        return Dense(self.values.unflatten(0, (-1, uses)).sum(1))
