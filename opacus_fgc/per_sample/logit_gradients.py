"""The gradients of a cross-entropy by the logits of a linear head, computed anew in tiles of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from opacus_fgc.per_sample.precision import at_least_float32

NOT_COUNTED = -1
"""The target of positions that have no loss."""


class Term(NamedTuple):
    """What logits are a sum of: ``hidden W^T``; one of a linear head, one more for each adapter on it.

    Attributes:
        hidden: shape ``(positions, d)``.
        weight: shape ``(V, d)``.
    """

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class LogitGradients:
    """``factor * (softmax(logits[t]) - onehot(target[t]))`` for the positions of each sample, made when it is needed.

    Positions of all samples lie one after another. A sample has some spans of them, each with a factor of its own.

    Attributes:
        terms: what the logits are the sum of, but for the bias.
        bias: that of the head, shape ``(V,)``; None if there is none.
        targets: tokens, shape ``(positions,)``, int64; `NOT_COUNTED` where there is none, and the gradient is 0.
        log_sums: the logarithms of the sums of the exponentials of the logits, shape ``(positions,)``.
        spans: where spans begin and end, shape ``(N, spans, 2)``, int64 on the CPU.
        factor: what each position of a span counts, shape ``(N, spans)``.
    """

    terms: tuple[Term, ...]
    bias: Tensor | None
    targets: Tensor
    log_sums: Tensor
    spans: Tensor
    factor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """That of the gradients: float32 or wider."""
        return self.log_sums.dtype

    @property
    def tokens(self) -> int:
        """How many the vocabulary has."""
        return len(self.terms[0].weight)

    @property
    def width(self) -> int:
        """The features of the widest term."""
        return max(term.hidden.shape[1] for term in self.terms)

    @cached_property
    def places(self) -> list[list[slice]]:
        """The positions of each sample, span by span."""
        return [[slice(start, stop) for start, stop in of_sample] for of_sample in self.spans.tolist()]

    def lengths(self) -> list[int]:
        """How many positions each sample has."""
        return [sum(span.stop - span.start for span in of_sample) for of_sample in self.places]

    def of_sample(self, sample: int, by_position: Tensor) -> Tensor:
        """What a tensor of all positions, shape ``(positions, *)``, has of those of one sample."""
        return _joined([by_position[span] for span in self.places[sample]])

    def tile(self, sample: int, rows: slice) -> Tensor:
        """The gradients of one sample by some logits, shape ``(its positions, rows)``; the same to the bit each time.

        Args:
            sample: which sample.
            rows: which tokens of the vocabulary, with a start and a stop.
        """
        targets, log_sums = (self.of_sample(sample, each) for each in (self.targets, self.log_sums))
        first, *others = (
            (at_least_float32(self.of_sample(sample, hidden)).to(self.dtype), _whole(weight)[rows].to(self.dtype).mT)
            for hidden, weight in self.terms
        )
        gradients = first[0] @ first[1]
        for hidden, weight in others:
            gradients.addmm_(hidden, weight)
        if self.bias is not None:
            gradients += self.bias[rows]
        gradients.sub_(log_sums.unsqueeze(1)).exp_()
        places = targets.unsqueeze(1) - rows.start
        within = (places >= 0) & (places < gradients.shape[1])
        gradients.scatter_add_(1, places.clamp(0, gradients.shape[1] - 1), -within.to(self.dtype))
        factors = zip(self.places[sample], self.factor[sample], strict=True)
        factor = _joined([factor.expand(span.stop - span.start) for span, factor in factors])
        return gradients.mul_(factor.masked_fill(targets == NOT_COUNTED, 0).unsqueeze(1))

    def select(self, samples: slice | Tensor) -> LogitGradients:
        """Those of some samples: a slice of them, or those that a mask of shape ``(N,)`` has."""
        on_cpu = samples if isinstance(samples, slice) else samples.to(self.spans.device)
        return replace(self, spans=self.spans[on_cpu], factor=self.factor[samples])

    def over_uses(self, uses: int) -> LogitGradients:
        """Those of samples that have ``uses`` rows each, one after another, which become spans of one."""
        spans, factor = (each.unflatten(0, (-1, uses)).flatten(1, 2) for each in (self.spans, self.factor))
        return replace(self, spans=spans, factor=factor)

    @staticmethod
    def joined(several: list[LogitGradients]) -> LogitGradients:
        """Those of several uses of one head by the same samples, of which the spans come one after another."""
        targets, log_sums = (torch.cat([getattr(one, each) for one in several]) for each in ("targets", "log_sums"))
        terms = tuple(
            Term(torch.cat([term.hidden for term in of_each]), of_each[0].weight)
            for of_each in zip(*(one.terms for one in several), strict=True)
        )
        spans, before = [], 0
        for one in several:
            spans.append(one.spans + before)
            before += len(one.targets)
        factor = torch.cat([one.factor for one in several], 1)
        return replace(
            several[0],
            terms=terms,
            targets=targets,
            log_sums=log_sums,
            spans=torch.cat(spans, 1),
            factor=factor,
        )


def spans_of(lengths: Iterable[int]) -> Tensor:
    """Spans that lie one after another, one a sample, shape ``(N, 1, 2)``.

    Args:
        lengths: how many positions each sample has.
    """
    stops = torch.tensor([0, *lengths], dtype=torch.int64, device="cpu").cumsum(0)
    return torch.stack([stops[:-1], stops[1:]], 1).unsqueeze(1)


def counted(targets: Tensor, spans: Tensor) -> Tensor:
    """How many positions of each span have a target, shape ``(N, spans)``.

    Args:
        targets: see `LogitGradients`, as are ``spans``.
        spans: see there.
    """
    up_to = torch.cat([targets.new_zeros(1), (targets != NOT_COUNTED).cumsum(0)])
    start, stop = spans.to(targets.device).unbind(2)
    return up_to[stop] - up_to[start]


def _whole(weight: Tensor) -> Tensor:
    """A weight, if FSDP has not given up its memory."""
    if weight.numel() and not weight.untyped_storage().size():
        raise RuntimeError("ChunkedCausalLMLoss: a weight of the head was resharded while it was still needed")
    return weight


def _joined(several: list[Tensor]) -> Tensor:
    return several[0] if len(several) == 1 else torch.cat(several)
