"""The forms that a layer's per-sample gradients take, and all arithmetic on them.

A sampler says *which* form the gradients of a parameter have; everything else (norms, weighted
sums, parameters that are used several times or by several layers) follows here, once for all layers.

Shapes: ``N`` samples; ``T`` positions of a sample (tokens, pixels) at which the layer was applied.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# The most elements that one temporary of `Outer` or `Rows` may have (64 MiB in float32); larger work is sliced.
_SLICE = 2**24


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widens half precision: a norm that under- or overflows is a privacy violation."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context without autocast: a backward that is called under it must not compute norms in half precision."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def slices(count: int, elements: int) -> Iterator[slice]:
    """Cuts ``count`` samples of ``elements`` elements each into slices of bounded size."""
    step = max(1, _SLICE // max(1, elements))
    return (slice(start, start + step) for start in range(0, count, step))


class PerSampleGradient(ABC):
    """The gradients of one parameter, one for each of ``N`` samples.

    Attributes:
        shape: shape of the parameter.
        batch_size: number of samples, ``N``.
    """

    shape: torch.Size
    batch_size: int

    @abstractmethod
    def squared_norm(self) -> Tensor:
        """Squared L2 norm of each sample's gradient, shape ``(N,)``, float32 or wider."""

    @abstractmethod
    def weighted_sum(self, coef: Tensor) -> Tensor:
        """``sum_n coef[n] * gradient[n]``, in the parameter's shape; ``coef`` has shape ``(N,)``."""

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

    def norm(self) -> Tensor:
        """L2 norm of each sample's gradient, shape ``(N,)``, float32 or wider."""
        return self.squared_norm().clamp(min=0).sqrt()

    def measured(self) -> tuple[Tensor, PerSampleGradient]:
        """The norm, and the form to keep for a weighted sum: a cheaper one, if it came up on the way to the norm."""
        return self.norm(), self


class Dense(PerSampleGradient):
    """Gradients stored as they are: biases, norm layers, and whatever has no better form.

    Args:
        values: shape ``(N, *shape)``.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = at_least_float32(values)
        self.shape = values.shape[1:]
        self.batch_size = len(values)

    def _flat(self) -> Tensor:
        return self.values.reshape(self.batch_size, math.prod(self.shape))

    def squared_norm(self) -> Tensor:
        return torch.linalg.vector_norm(self._flat(), dim=1).square()

    def norm(self) -> Tensor:
        return torch.linalg.vector_norm(self._flat(), dim=1)

    def weighted_sum(self, coef: Tensor) -> Tensor:
        return (coef.to(self.values.dtype) @ self._flat()).reshape(self.shape)

    def materialize(self) -> Tensor:
        return self.values

    def inner(self, other: PerSampleGradient) -> Tensor:
        if isinstance(other, Dense):
            return torch.einsum("nk,nk->n", self._flat(), other._flat())
        return other.inner(self)

    @classmethod
    def joined(cls, forms: Sequence[Dense]) -> Dense:
        return cls(torch.stack([form.values for form in forms]).sum(0))


def _gram_inner(left: Tensor, right: Tensor) -> Tensor:
    """``sum_ts <left_t, left_s> <right_t, right_s>`` of each sample, from both ``(N, groups, T, *)``.

    Gram matrices are symmetric: of four rows of blocks only the blocks from the diagonal on are computed.
    """
    positions = left.shape[2]
    step = -(-positions // 4) if positions >= 32 else positions
    total: Tensor = left.new_zeros(len(left))
    for start in range(0, positions, step):
        rows = slice(start, start + step)
        gram = (left[:, :, rows] @ left[:, :, start:].mT) * (right[:, :, rows] @ right[:, :, start:].mT)
        total = total + gram[..., :step].sum((1, 2, 3)) + 2 * gram[..., step:].sum((1, 2, 3))
    return total


class Outer(PerSampleGradient):
    """``gradient[n] = sum_t left[n, :, t] (x) right[n, :, t]``, the weight gradient of a linear map.

    The norm needs no gradient: it is one product of norms where ``T = 1`` (Goodfellow 2015,
    arXiv:1510.01799), and ``sum_ts <left_t, left_s> <right_t, right_s>``, from two Gram matrices,
    otherwise (Li et al. 2022, arXiv:2110.05679). Where ``T`` is large, forming the product is cheaper.

    Args:
        left: shape ``(N, groups, T, p)``; ``(N, T, p)`` is one group.
        right: shape ``(N, groups, T, d)``; ``(N, T, d)`` is one group.
        shape: shape of the parameter, ``groups * p * d`` elements in that order.
    """

    def __init__(self, left: Tensor, right: Tensor, shape: torch.Size) -> None:
        self.left = left if left.dim() == 4 else left.unsqueeze(1)
        self.right = right if right.dim() == 4 else right.unsqueeze(1)
        self.shape = shape
        self.batch_size = len(left)

    def _work(self) -> float:
        """Multiplications of the two Gram matrices, ``T^2 (p + d)``, over those of the gradients, ``T p d``."""
        positions, p, d = self.left.shape[2], self.left.shape[3], self.right.shape[3]
        return positions * (p + d) / max(1, p * d)

    def squared_norm(self) -> Tensor:
        _, groups, positions, p = self.left.shape
        d = self.right.shape[-1]
        if positions == 1:
            left, right = at_least_float32(self.left), at_least_float32(self.right)
            return (left.square().sum(-1) * right.square().sum(-1)).sum((1, 2))
        # Blocks save 6/16 of a Gram matrix, and products of single samples run below a large one's speed.
        use_gram = self._work() < 1.5
        elements = groups * (positions**2 if use_gram else p * d)
        parts = []
        for part in slices(self.batch_size, elements):
            left, right = at_least_float32(self.left[part]), at_least_float32(self.right[part])
            if use_gram:
                parts.append(_gram_inner(left, right))
            else:
                parts.append((left.mT @ right).square().sum((1, 2, 3)))
        return torch.cat(parts) if parts else at_least_float32(self.left).new_zeros(0)

    def measured(self) -> tuple[Tensor, PerSampleGradient]:
        # Kept gradients are all that a weighted sum needs, so forming them is no extra work; below this they take too much room.
        if self.left.shape[2] == 1 or self._work() < 0.6:
            return super().measured()
        gradients = at_least_float32(self.left).mT @ at_least_float32(self.right)
        return Dense(gradients.reshape(self.batch_size, *self.shape)).measured()

    def weighted_sum(self, coef: Tensor) -> Tensor:
        left, right = self.left, self.right
        coef = coef.to(left.dtype)[:, None, None, None]
        if left.shape[3] < right.shape[3]:
            left = left * coef
        else:
            right = right * coef
        if left.shape[1] == 1:
            return (left.flatten(0, 2).mT @ right.flatten(0, 2)).reshape(self.shape)
        return torch.einsum("ngtp,ngtd->gpd", left, right).reshape(self.shape)

    def materialize(self) -> Tensor:
        return (self.left.mT @ self.right).reshape(self.batch_size, *self.shape)

    def inner(self, other: PerSampleGradient) -> Tensor:
        if isinstance(other, Rows):
            return other.inner(self)
        groups, p, d = self.left.shape[1], self.left.shape[3], self.right.shape[3]
        dense = at_least_float32(other.materialize()).reshape(self.batch_size, groups, p, d)
        left, right = at_least_float32(self.left), at_least_float32(self.right)
        return (left @ dense * right).sum((1, 2, 3))

    @classmethod
    def joined(cls, forms: Sequence[Outer]) -> Outer:
        left, right = torch.cat([form.left for form in forms], 2), torch.cat([form.right for form in forms], 2)
        return cls(left, right, forms[0].shape)


class Rows(PerSampleGradient):
    """Gradients that touch few rows of a table: ``gradient[n, index[n, s]] += values[n, s]``.

    Args:
        index: rows, shape ``(N, S)``, int.
        values: what is added to them, shape ``(N, S, d)``.
        shape: shape of the parameter, ``(rows, d)``.
    """

    def __init__(self, index: Tensor, values: Tensor, shape: torch.Size) -> None:
        self.index = index.long()
        self.values = values
        self.shape = shape
        self.batch_size = len(values)

    def squared_norm(self) -> Tensor:
        # Row r of sample n becomes row n * rows + r of one table, of which only the rows in use are kept.
        offsets = torch.arange(self.batch_size, device=self.index.device).unsqueeze(1) * self.shape[0]
        keys, position = torch.unique(self.index + offsets, return_inverse=True)
        values = at_least_float32(self.values)
        table = values.new_zeros(len(keys), self.shape[1])
        table.index_add_(0, position.flatten(), values.flatten(0, 1))
        squares = table.square().sum(1)
        return values.new_zeros(self.batch_size).index_add_(0, keys // self.shape[0], squares)

    def weighted_sum(self, coef: Tensor) -> Tensor:
        values = self.values * coef.to(self.values.dtype)[:, None, None]
        return self.values.new_zeros(self.shape).index_add_(0, self.index.flatten(), values.flatten(0, 1))

    def materialize(self) -> Tensor:
        gradients = self.values.new_zeros(self.batch_size, *self.shape)
        return gradients.scatter_add_(1, self.index.unsqueeze(2).expand_as(self.values), self.values)

    def inner(self, other: PerSampleGradient) -> Tensor:
        values = at_least_float32(self.values)
        if isinstance(other, Outer):
            # The head's gradient at the embedding's rows: left[:, t, index[s]] * <right_t, values_s>.
            left, right = at_least_float32(other.left.squeeze(1)), at_least_float32(other.right.squeeze(1))
            index = self.index.unsqueeze(1).expand(-1, left.shape[1], -1)
            return (left.gather(2, index) * (right @ values.mT)).sum((1, 2))
        dense = at_least_float32(other.materialize())
        return (dense.gather(1, self.index.unsqueeze(2).expand_as(values)) * values).sum((1, 2))

    @classmethod
    def joined(cls, forms: Sequence[Rows]) -> Rows:
        index, values = torch.cat([form.index for form in forms], 1), torch.cat([form.values for form in forms], 1)
        return cls(index, values, forms[0].shape)


class Sum(PerSampleGradient):
    """Forms of several types that add up: ``|sum_i g_i|^2 = sum_ij <g_i, g_j>``.

    Args:
        terms: the forms, of one parameter and of different types.
    """

    def __init__(self, terms: Sequence[PerSampleGradient]) -> None:
        self.terms = terms
        self.shape = terms[0].shape
        self.batch_size = terms[0].batch_size

    def squared_norm(self) -> Tensor:
        total = torch.stack([term.squared_norm() for term in self.terms]).sum(0)
        for i, term in enumerate(self.terms):
            for other in self.terms[:i]:
                total = total + 2 * term.inner(other)
        return total

    def weighted_sum(self, coef: Tensor) -> Tensor:
        return torch.stack([term.weighted_sum(coef) for term in self.terms]).sum(0)

    def materialize(self) -> Tensor:
        return torch.stack([term.materialize() for term in self.terms]).sum(0)

    def inner(self, other: PerSampleGradient) -> Tensor:
        return torch.stack([term.inner(other) for term in self.terms]).sum(0)

    @classmethod
    def joined(cls, forms: Sequence[Sum]) -> PerSampleGradient:
        return add([term for form in forms for term in form.terms])


class NormOnly(PerSampleGradient):
    """What a norm sampler in Opacus' own form gives: norms, and no gradients behind them.

    Args:
        norms: shape ``(N,)``.
        shape: shape of the parameter.
    """

    _REASON = (
        "the norm sampler of this layer returns norms only, which cannot be added up over several uses of a "
        "parameter; let it return a form of opacus_fgc.per_sample (Outer, Rows, Dense) instead"
    )

    def __init__(self, norms: Tensor, shape: torch.Size) -> None:
        self.norms = at_least_float32(norms)
        self.shape = shape
        self.batch_size = len(norms)

    def squared_norm(self) -> Tensor:
        return self.norms.square()

    def norm(self) -> Tensor:
        return self.norms

    def weighted_sum(self, coef: Tensor) -> Tensor:
        raise NotImplementedError(self._REASON)

    def materialize(self) -> Tensor:
        raise NotImplementedError(self._REASON)

    def inner(self, other: PerSampleGradient) -> Tensor:
        raise NotImplementedError(self._REASON)

    @classmethod
    def joined(cls, forms: Sequence[NormOnly]) -> NormOnly:
        raise NotImplementedError(cls._REASON)


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
