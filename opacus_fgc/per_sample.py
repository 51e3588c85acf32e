"""The forms that a layer's per-sample gradients take, and all arithmetic on them.

A sampler says *which* form the gradients of a parameter have; everything else (norms, weighted
sums, parameters that are used several times or by several layers) follows here, once for all layers.

Shapes: ``N`` samples; ``T`` positions of a sample (tokens, pixels) at which the layer was applied.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opacus_fgc import planner
from opacus_fgc.planner import NO_ROOM, Kernels, Room, Way
from opacus_fgc.precision import at_least_float32, factor_norms, least_norm, product, row_norms, widened, widest


class Measured(NamedTuple):
    """What came of measuring a form.

    Attributes:
        norm: L2 norm of each sample's gradient, shape ``(N,)``, float32 or wider.
        kept: a form of the same gradients to make the weighted sum of; None if nothing is kept.
        way: how the norm was computed.
        temporary: elements of the largest temporary on the way.
    """

    norm: Tensor
    kept: PerSampleGradient | None
    way: Way
    temporary: int = 0

    @property
    def memory(self) -> int:
        """Bytes of the temporary and of what is kept, beyond activations, which the step without privacy holds as well."""
        return self.norm.element_size() * (self.temporary + (0 if self.kept is None else self.kept.elements))


class PerSampleGradient(ABC):
    """The gradients of one parameter, one for each of ``N`` samples.

    Attributes:
        shape: shape of the parameter.
        batch_size: number of samples, ``N``.
        way: how the norm is computed, where there is but one way.
    """

    shape: torch.Size
    batch_size: int
    way: Way

    @property
    @abstractmethod
    def elements(self) -> int:
        """How many elements are kept with the form."""

    @abstractmethod
    def norm(self) -> Tensor:
        """L2 norm of each sample's gradient, shape ``(N,)``, float32 or wider."""

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

    def above_rounding(self, norms: Tensor) -> Tensor:
        """Norms of formed gradients, as upper bounds of what is released, which is another sum of the same terms."""
        elements = self.shape.numel()
        if elements > _MANY_ELEMENTS:
            return norms
        terms = self.norm_of_terms()
        bounds = norms + self.rounding(terms)
        return bounds if elements <= _FEW_ELEMENTS else torch.where(2 * norms < terms, bounds, norms)

    def norm_of_terms(self) -> Tensor:
        """What the norms would be if the terms of a sum that a gradient is were orthogonal, so that none cancelled."""
        return self.norm()

    @abstractmethod
    def weighted_sum(self, coef: Tensor) -> Tensor:
        """``sum_n coef[n] * gradient[n]``, in the parameter's shape; ``coef`` has shape ``(N,)``.

        In float32 or wider, whatever the gradients were computed in: in half precision, coefficients and products of them are
        rounded by up to 0.4 %, and so may the clipping norm be exceeded; and in a large sum a sample moves an element by a
        step of that sum.
        """

    @abstractmethod
    def materialize(self) -> Tensor:
        """The gradients themselves, shape ``(N, *shape)``."""

    @abstractmethod
    def inner(self, other: PerSampleGradient) -> Tensor:
        """Inner product with another form of the same parameter, sample by sample, shape ``(N,)``."""

    @classmethod
    @abstractmethod
    def joined(cls, forms: Sequence[Any]) -> PerSampleGradient:
        """The sum of several forms of this type (of one parameter and one batch) as one."""

    @abstractmethod
    def select(self, samples: slice | Tensor) -> PerSampleGradient:
        """The form of some of the samples: a slice of them, or those that a mask of shape ``(N,)`` has."""

    @abstractmethod
    def folded(self, uses: int) -> PerSampleGradient:
        """The sum over the uses of a parameter, where row ``n * uses + u`` is use ``u`` by sample ``n``."""

    def measured(self, room: Room = NO_ROOM) -> Measured:
        """The norm, and what is kept for a weighted sum."""
        return Measured(self.norm(), self if self.fits(room) else None, self.way)

    def fits(self, room: Room) -> bool:
        """Whether the form itself may be kept."""
        return room.everything or self.elements <= room.elements


class Dense(PerSampleGradient):
    """Gradients stored as they are: biases, norm layers, and whatever has no better form.

    Args:
        values: shape ``(N, *shape)``.
    """

    way = Way.STORED

    def __init__(self, values: Tensor) -> None:
        self.values = at_least_float32(values)
        self.shape = values.shape[1:]
        self.batch_size = len(values)

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

    def folded(self, uses: int) -> Dense:
        return Dense(self.values.unflatten(0, (-1, uses)).sum(1))


class Squares(NamedTuple):
    """Squared norms that came of adding up what may cancel.

    Attributes:
        values: shape ``(N,)``.
        scale: the sum of the absolute values of what was added up, or more; shape ``(N,)``.
        small: a mask of the samples with factors so small that squares of them may have vanished, shape ``(N,)``; None for none.
        vanished: says of which samples that matters, by another such mask.
    """

    values: Tensor
    scale: Tensor
    small: Tensor | None = None
    vanished: Callable[[], Tensor] | None = None

    def norm(self, exact: Callable[[Tensor], Tensor]) -> Tensor:
        """The norms: what they are, or more by as much as they may have been rounded down.

        Args:
            exact: computes those of the masked samples in another way, in which nothing is squared before it cancels.
        """
        rounding = _ROUNDINGS * torch.finfo(self.values.dtype).eps
        norm = torch.add(self.values, self.scale, alpha=rounding).clamp_(min=0).sqrt_()
        # Not `<=`: where something overflowed, NaN is neither.
        doubtful = ~(_CANCELLED * self.values > self.scale)
        seen = doubtful if self.small is None else doubtful | self.small
        if seen.any():
            doubtful &= self.scale != 0
            if self.small is not None and self.vanished is not None:
                doubtful |= self.small & self.vanished()
            if doubtful.any():
                norm[doubtful] = exact(doubtful)
        return norm


# Squares are off by so many roundings of their scale at most (3.6 were measured, with few and with many, with equal and with
# random terms), which is less than 1e-5 of them as long as this share of the scale is left.
_ROUNDINGS, _CANCELLED = 4, 32

# All of so few elements may cancel at once by chance. Of more, roundings matter where the terms were made to cancel; of so
# many, they take each other away.
_FEW_ELEMENTS, _MANY_ELEMENTS = 2**6, 2**14


# How many terms of an inner product, and of a gradient, are added up at once.
_GRAM_TERMS, _TERMS = 2**11, 2**14


def _gram_inner(left: Tensor, right: Tensor) -> Squares:
    """``sum_ts <left_t, left_s> <right_t, right_s>`` of each sample, from both ``(N, groups, T, *)``.

    Gram matrices are Hermitian: where they are large, only blocks from the diagonal on are computed.
    """
    positions = left.shape[2]
    blocks = 1 if positions < 96 else 2 if positions < 256 else 4
    step = -(-positions // blocks)
    totals: list[Tensor] = []
    scales: list[Tensor] = []
    shortest: list[list[Tensor]] = []  # squared, of left and right

    def add(factor: int, left_gram: Tensor, right_gram: Tensor) -> None:
        products = left_gram.mul_(right_gram).flatten(1)
        sums = products.sum(1).real, (products.abs() if products.is_complex() else products.abs_()).sum(1)
        for sum_, several in zip(sums, (totals, scales), strict=True):
            several.append(sum_ if factor == 1 else factor * sum_)

    for start in range(0, positions, step):
        rows, others = slice(start, start + step), slice(start + step, None)
        left_rows, right_rows = left[:, :, rows], right[:, :, rows]
        grams = [product(side, side.mH, _GRAM_TERMS) for side in (left_rows, right_rows)]
        shortest.append([gram.diagonal(dim1=2, dim2=3).real.amin((1, 2)) for gram in grams])
        add(1, *grams)
        if start + step < positions:
            sides = (left_rows, left[:, :, others]), (right_rows, right[:, :, others])
            add(2, *(product(of_rows, of_others.mH, _GRAM_TERMS) for of_rows, of_others in sides))

    total, scale = (several[0] if len(several) == 1 else torch.stack(several).sum(0) for several in (totals, scales))
    bounds = [least_norm(side.shape[3], total.dtype) for side in (left, right)]
    small = torch.zeros_like(total, dtype=torch.bool)
    for of_left, of_right in shortest:
        small |= (of_left < bounds[0] ** 2) | (of_right < bounds[1] ** 2)

    def vanished() -> Tensor:
        norms = [factor_norms(side) for side in (left, right)]
        # A small side does not matter if the other one is 0, or its product with it is nothing beside the rest.
        lost = norms[0] * norms[1] * ((norms[0] < bounds[0]) | (norms[1] < bounds[1]))
        return ~(lost.flatten(1).sum(1) <= torch.finfo(total.dtype).eps * total.clamp(min=0).sqrt())

    return Squares(total, scale, small, vanished)


class SumOverPositions(PerSampleGradient):
    """Gradients that are, in each of ``groups`` groups, a sum of ``T`` outer products of ``p`` and ``d`` elements.

    The norm comes from Gram matrices or from the gradients, whatever is cheaper for the shapes at hand; see `planner`.

    Attributes:
        KERNELS: what the ways cost.
    """

    KERNELS: Kernels

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, int, int, int]:
        """``(groups, T, p, d)``."""

    @property
    def summands(self) -> int:
        return self.sizes[1]

    @abstractmethod
    def select(self, samples: slice | Tensor) -> SumOverPositions: ...

    def temporary(self, way: Way) -> int:
        """How many elements one sample's work takes beyond what is there."""
        groups, positions, p, d = self.sizes
        return groups * (positions**2 if way is Way.GRAM else p * d)

    @abstractmethod
    def gram(self) -> Squares:
        """Squared norms from Gram matrices."""

    @abstractmethod
    def formed(self) -> Dense:
        """The gradients, in whatever order they come cheapest."""

    def norm(self) -> Tensor:
        return self.measured().norm

    def measured(self, room: Room = NO_ROOM) -> Measured:
        groups, positions, p, d = self.sizes
        options = planner.costs(self.KERNELS, positions, p, d)
        if self.batch_size * groups * p * d > room.elements:
            del options[Way.KEPT]
        way = planner.cheapest(options) if self.batch_size else Way.KEPT
        if way is Way.KEPT:
            gradients = self.formed()
            return Measured(gradients.norm(), gradients, way)
        temporary = self.temporary(way)
        parts = [self.select(samples) for samples in planner.slices(self.batch_size, temporary)]
        if way is Way.GRAM:
            norms = [part.gram().norm(part.norm_one_by_one) for part in parts]
        else:
            norms = [part.above_rounding(part.formed().norm()) for part in parts]
        return Measured(torch.cat(norms), self if self.fits(room) else None, way, parts[0].batch_size * temporary)


class Outer(SumOverPositions):
    """``gradient[n] = sum_t left[n, :, t] (x) right[n, :, t]``, the weight gradient of a linear map.

    The norm needs no gradient: it is one product of norms where ``T = 1`` (Goodfellow 2015,
    arXiv:1510.01799), and ``sum_ts <left_t, left_s> <right_t, right_s>``, from two Gram matrices,
    otherwise (Li et al. 2022, arXiv:2110.05679). Where ``T`` is large, forming the product is cheaper.

    Args:
        left: shape ``(N, groups, T, p)``; ``(N, T, p)`` is one group.
        right: shape ``(N, groups, T, d)``; ``(N, T, d)`` is one group.
        shape: shape of the parameter, ``groups * p * d`` elements in that order.
    """

    KERNELS = Kernels(gram=1.25, formed=1.2, gradient=1.0)

    def __init__(self, left: Tensor, right: Tensor, shape: torch.Size) -> None:
        self.left = left if left.dim() == 4 else left.unsqueeze(1)
        self.right = right if right.dim() == 4 else right.unsqueeze(1)
        self.shape = shape
        self.batch_size = len(left)

    @property
    def elements(self) -> int:
        # The activations are in memory anyway, for as long as autograd has use for them.
        return self.left.numel()

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return *self.left.shape[1:], self.right.shape[3]

    def select(self, samples: slice | Tensor) -> Outer:
        return Outer(self.left[samples], self.right[samples], self.shape)

    def gram(self) -> Squares:
        return _gram_inner(at_least_float32(self.left), at_least_float32(self.right))

    def formed(self) -> Dense:
        return Dense(self.materialize())

    def measured(self, room: Room = NO_ROOM) -> Measured:
        if self.left.shape[2] > 1:
            return super().measured(room)
        return Measured(self.norm_of_terms(), self if self.fits(room) else None, Way.CLOSED)

    def norm_of_terms(self) -> Tensor:
        # The square of one side may vanish, or overflow, and its product with the other be of an ordinary size.
        norms = (factor_norms(self.left) * factor_norms(self.right)).flatten(1)
        norm = row_norms(norms) if norms.shape[1] > 1 else norms.squeeze(1)
        return norm.to(widened(self.left.dtype).to_real())

    def weighted_sum(self, coef: Tensor) -> Tensor:
        left, right = at_least_float32(self.left), at_least_float32(self.right)
        coef = coef.to(left.dtype.to_real())[:, None, None, None]
        if left.shape[3] < right.shape[3]:
            left = left * coef
        else:
            right = right * coef
        if left.shape[1] == 1:
            return product(left.flatten(0, 2).mT, right.flatten(0, 2), _TERMS).reshape(self.shape)
        return torch.einsum("ngtp,ngtd->gpd", left, right).reshape(self.shape)

    def materialize(self) -> Tensor:
        gradients = product(at_least_float32(self.left).mT, at_least_float32(self.right), _TERMS)
        return gradients.reshape(self.batch_size, *self.shape)

    def inner(self, other: PerSampleGradient) -> Tensor:
        if isinstance(other, Rows):
            return other.inner(self)
        groups, _, p, d = self.sizes
        dense = at_least_float32(other.materialize()).reshape(self.batch_size, groups, p, d)
        left, right = at_least_float32(self.left), at_least_float32(self.right)
        return (left.conj() @ dense * right.conj()).sum((1, 2, 3)).real

    @classmethod
    def joined(cls, forms: Sequence[Outer]) -> Outer:
        left, right = torch.cat([form.left for form in forms], 2), torch.cat([form.right for form in forms], 2)
        return cls(left, right, forms[0].shape)

    def folded(self, uses: int) -> Outer:
        # (N * uses, groups, T, *) to (N, groups, uses * T, *), by a view where there is one group.
        left, right = (side.unflatten(0, (-1, uses)).transpose(1, 2).flatten(2, 3) for side in (self.left, self.right))
        return Outer(left, right, self.shape)


class Rows(PerSampleGradient):
    """Gradients that touch few rows of a table: ``gradient[n, index[n, s]] += values[n, s]``.

    Args:
        index: rows, shape ``(N, S)``, int.
        values: what is added to them, shape ``(N, S, d)``.
        shape: shape of the parameter, ``(rows, d)``.
    """

    way = Way.ROWS

    def __init__(self, index: Tensor, values: Tensor, shape: torch.Size) -> None:
        self.index = index.long()
        self.values = values
        self.shape = shape
        self.batch_size = len(values)

    @property
    def elements(self) -> int:
        return self.values.numel()

    def norm(self) -> Tensor:
        # Row r of sample n becomes row n * rows + r of one table, of which only the rows in use are kept.
        offsets = torch.arange(self.batch_size, device=self.index.device).unsqueeze(1) * self.shape[0]
        keys, position = torch.unique(self.index + offsets, return_inverse=True)
        values = at_least_float32(self.values)
        table = values.new_zeros(len(keys), self.shape[1])
        table.index_add_(0, position.flatten(), values.flatten(0, 1))
        norms = row_norms(table)
        squares = widest(norms).square()
        squares = squares.new_zeros(self.batch_size).index_add_(0, keys // self.shape[0], squares)
        return self.above_rounding(squares.sqrt().to(norms.dtype))

    @property
    def summands(self) -> int:
        return self.values.shape[1]

    def norm_of_terms(self) -> Tensor:
        return row_norms(at_least_float32(self.values).flatten(1))

    def weighted_sum(self, coef: Tensor) -> Tensor:
        values = at_least_float32(self.values)
        values = values * coef.to(values.dtype.to_real())[:, None, None]
        return values.new_zeros(self.shape).index_add_(0, self.index.flatten(), values.flatten(0, 1))

    def materialize(self) -> Tensor:
        values = at_least_float32(self.values)
        gradients = values.new_zeros(self.batch_size, *self.shape)
        return gradients.scatter_add_(1, self.index.unsqueeze(2).expand_as(values), values)

    def inner(self, other: PerSampleGradient) -> Tensor:
        values = at_least_float32(self.values)
        if isinstance(other, Outer):
            # The head's gradient at the embedding's rows: left[:, t, index[s]] * <right_t, values_s>.
            left, right = at_least_float32(other.left.squeeze(1)), at_least_float32(other.right.squeeze(1))
            index = self.index.unsqueeze(1).expand(-1, left.shape[1], -1)
            return (left.gather(2, index) * (right @ values.mH)).sum((1, 2)).real
        dense = at_least_float32(other.materialize())
        return (dense.gather(1, self.index.unsqueeze(2).expand_as(values)) * values.conj()).sum((1, 2)).real

    @classmethod
    def joined(cls, forms: Sequence[Rows]) -> Rows:
        index, values = torch.cat([form.index for form in forms], 1), torch.cat([form.values for form in forms], 1)
        return cls(index, values, forms[0].shape)

    def select(self, samples: slice | Tensor) -> Rows:
        return Rows(self.index[samples], self.values[samples], self.shape)

    def folded(self, uses: int) -> Rows:
        index, values = (side.unflatten(0, (-1, uses)).flatten(1, 2) for side in (self.index, self.values))
        return Rows(index, values, self.shape)


class Sum(PerSampleGradient):
    """Forms of several types that add up: ``|sum_i g_i|^2 = sum_ij <g_i, g_j>``.

    Args:
        terms: the forms, of one parameter and of different types.
    """

    way = Way.SUM

    def __init__(self, terms: Sequence[PerSampleGradient]) -> None:
        self.terms = terms
        self.shape = terms[0].shape
        self.batch_size = terms[0].batch_size

    @property
    def elements(self) -> int:
        return sum(term.elements for term in self.terms)

    def norm(self) -> Tensor:
        total = torch.stack([term.norm() for term in self.terms]).square().sum(0)
        for i, term in enumerate(self.terms):
            for other in self.terms[:i]:
                total = total + 2 * term.inner(other)
        return Squares(total, self.norm_of_terms().square()).norm(self.norm_one_by_one)

    @property
    def summands(self) -> int:
        return sum(term.summands for term in self.terms)

    def norm_of_terms(self) -> Tensor:
        return torch.stack([term.norm_of_terms() for term in self.terms]).sum(0)

    def weighted_sum(self, coef: Tensor) -> Tensor:
        return torch.stack([term.weighted_sum(coef) for term in self.terms]).sum(0)

    def materialize(self) -> Tensor:
        return torch.stack([term.materialize() for term in self.terms]).sum(0)

    def inner(self, other: PerSampleGradient) -> Tensor:
        return torch.stack([term.inner(other) for term in self.terms]).sum(0)

    @classmethod
    def joined(cls, forms: Sequence[Sum]) -> PerSampleGradient:
        return add([term for form in forms for term in form.terms])

    def select(self, samples: slice | Tensor) -> Sum:
        return Sum([term.select(samples) for term in self.terms])

    def folded(self, uses: int) -> Sum:
        return Sum([term.folded(uses) for term in self.terms])


class NormsOnlyError(NotImplementedError):
    """Something is asked of plain norms that only gradients can give."""

    def __init__(
        self,
        message: str = "the norm sampler of this layer returns norms only, which cannot be added up over several uses of a "
        "parameter; let it return a form of opacus_fgc.per_sample (Outer, Rows, Dense) instead",
    ) -> None:
        super().__init__(message)


class NormOnly(PerSampleGradient):
    """What a norm sampler in Opacus' own form gives: norms, and no gradients behind them.

    Args:
        norms: shape ``(N,)``.
        shape: shape of the parameter.
    """

    way = Way.GIVEN

    def __init__(self, norms: Tensor, shape: torch.Size) -> None:
        self.norms = at_least_float32(norms)
        self.shape = shape
        self.batch_size = len(norms)

    @property
    def elements(self) -> int:
        return 0

    def norm(self) -> Tensor:
        return self.norms

    def fits(self, room: Room) -> bool:
        return False

    def weighted_sum(self, coef: Tensor) -> Tensor:
        raise NormsOnlyError

    def materialize(self) -> Tensor:
        raise NormsOnlyError

    def inner(self, other: PerSampleGradient) -> Tensor:
        raise NormsOnlyError

    @classmethod
    def joined(cls, forms: Sequence[NormOnly]) -> NormOnly:
        raise NormsOnlyError

    def select(self, samples: slice | Tensor) -> NormOnly:
        return NormOnly(self.norms[samples], self.shape)

    def folded(self, uses: int) -> NormOnly:
        raise NormsOnlyError


def add(forms: Sequence[PerSampleGradient]) -> PerSampleGradient:
    """The sum of the forms that a parameter got from all its uses in a step.

    Args:
        forms: at least one form, all of the same parameter and batch.

    Returns:
        One form. Its norm is the norm of the sum, not the sum of the norms.
    """
    by_type: dict[type[PerSampleGradient], list[PerSampleGradient]] = {}
    for form in forms:
        by_type.setdefault(type(form), []).append(form)
    terms = [group[0] if len(group) == 1 else kind.joined(group) for kind, group in by_type.items()]
    return terms[0] if len(terms) == 1 else Sum(terms)
