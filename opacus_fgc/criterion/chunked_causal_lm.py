"""The loss of language models with a large vocabulary, one a sequence, of which few logits are held at a time."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from opacus_fgc import planner
from opacus_fgc.criterion.causal_lm import CausalLMLoss
from opacus_fgc.criterion.head_terms import base_of, terms_of
from opacus_fgc.norm_samplers.head import HeadRows
from opacus_fgc.per_sample.logit_gradients import NOT_COUNTED, counted, spans_of
from opacus_fgc.per_sample.precision import widened, without_autocast


class ChunkedCausalLMLoss(nn.Module):
    """`CausalLMLoss` of hidden states and a head, without logits of shape ``(N, T, vocabulary)``.

    Losses, gradients and norms are those of `CausalLMLoss` on ``head(hidden)``. A chunk of logits is made, used and given up,
    at most `planner.Memory.temporary` bytes of them at a time; the gradient by the hidden states is computed along with the
    losses. The head's own gradient is added up over tiles of the vocabulary, and so are the squared norms of its per-sample
    gradients; see `per_sample.TiledOuter`. So the head is multiplied with more often than by `CausalLMLoss`.

    It computes in float32, or wider where the model does, also under autocast.

    The head is a `torch.nn.Linear` of the model that `make_private` gets; it may be frozen, or tied with the embedding. The
    model may do nothing else to its logits (a scale, a soft cap, a bias of another layer): those are not seen here.

    Args:
        ignore_index: label of tokens that do not count.
        reduction: how the losses of the sequences are reduced: "mean", "sum" or "none".

    Example:
        >>> hidden = model.model(input_ids).last_hidden_state
        >>> criterion(hidden, model.lm_head, labels).backward()
    """

    def __init__(self, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, hidden: Tensor, head: nn.Linear, labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Computes the loss.

        Args:
            hidden: what the head is applied to, shape ``(N, T, d)``, floating point.
            head: a linear layer from ``d`` features to the vocabulary.
            labels: tokens, shape ``(N, T)``, not shifted.
            position_ids: of packed sequences the place of each token in its sequence, shape ``(1, T)``; see `CausalLMLoss`.

        Returns:
            The loss, in float32 at least; shape ``(N,)`` without reduction, ``()`` with it. ``N`` is the number of sequences.

        Raises:
            TypeError: if the head is no linear layer.
            ValueError: if the shapes do not fit, or a label is no token.
            NotImplementedError: if the head is trained and not served by the norm sampler of linear layers, or is sharded
                and not to be made whole.
        """
        base = base_of(head)
        self._check(hidden, base, labels)
        starts = None if position_ids is None else self._starts(position_ids, labels)
        labels = labels.long()
        targets = labels.masked_fill(labels == self.ignore_index, NOT_COUNTED)
        if starts is not None:
            # The first token of a sequence is not predicted from the last one of the sequence before.
            targets = targets.masked_fill(starts, NOT_COUNTED)
        targets, bias = targets[:, 1:], base.bias
        terms = terms_of(head, hidden)
        lengths = [targets.shape[1]] * len(targets) if starts is None else _lengths(starts)
        with_gradient = torch.is_grad_enabled()
        of_positions, log_sums = _LossesInChunks.apply(
            None if bias is None else bias.detach(),
            targets,
            _counts(targets, lengths),
            [with_gradient and term.hidden.requires_grad for term in terms],
            *[term.hidden for term in terms],
            *[term.layer.weight.detach() for term in terms],
        )
        if starts is None:
            spans, losses = None, of_positions.sum(1)
        else:
            spans = spans_of(lengths).squeeze(1)
            several = of_positions[0].split(lengths) if lengths else ()
            losses = torch.stack([one.sum() for one in several]) if lengths else of_positions.sum(1)[:0]
        for term in terms:
            if with_gradient and term.is_trained:
                others = [pair for other in terms if other is not term for pair in other.pairs()]
                rows = HeadRows.of(term.hidden, targets, log_sums, spans, others)
                losses = losses + term.layer(rows).squeeze(1)
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()

    def _starts(self, position_ids: Tensor, labels: Tensor) -> Tensor:
        starts = CausalLMLoss.starts(position_ids)
        if starts.shape != labels.shape:
            raise ValueError(
                f"ChunkedCausalLMLoss: position_ids have shape {tuple(starts.shape)}, labels {tuple(labels.shape)}; packed "
                "sequences lie one after another in one row, and each token has a place"
            )
        return starts

    def _check(self, hidden: Tensor, head: nn.Linear, labels: Tensor) -> None:
        if hidden.dim() != 3 or hidden.shape[:2] != labels.shape or hidden.shape[2] != head.in_features:
            raise ValueError(
                f"ChunkedCausalLMLoss: hidden states have shape {tuple(hidden.shape)}, labels {tuple(labels.shape)}, and the "
                f"head takes {head.in_features} features; they have to be (N, T, {head.in_features}) and (N, T), batch first"
            )
        wrong = (labels != self.ignore_index) & ((labels < 0) | (labels >= head.out_features))
        if wrong.any():
            raise ValueError(
                f"ChunkedCausalLMLoss: label {int(labels[wrong][0])} is no token of a vocabulary of {head.out_features}. Tokens "
                f"that do not count have ignore_index={self.ignore_index}"
            )


def _lengths(starts: Tensor) -> list[int]:
    """The positions of each packed sequence, without the last of the row, which predicts nothing."""
    begins = [*starts[0].nonzero().flatten().tolist(), starts.shape[1]]
    lengths = [stop - start for start, stop in pairwise(begins)]
    return [*lengths[:-1], lengths[-1] - 1] if lengths else []


def _counts(targets: Tensor, lengths: list[int]) -> Tensor:
    """How many positions count of the sample that each one is of, shape ``(N, T)``."""
    counts = counted(targets.flatten(), spans_of(lengths)).squeeze(1)
    of_each = counts.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device=counts.device))
    return of_each.clamp(min=1).reshape(targets.shape)


class _LossesInChunks(torch.autograd.Function):
    """The losses of positions by their hidden states, with the head as a constant.

    A loss is one number, so that its gradient is known but for a factor as soon as its logits are there: it is computed with
    them, and kept in the place of them.
    """

    @staticmethod
    def forward(
        ctx: Any, bias: Tensor | None, targets: Tensor, counts: Tensor, trained: list[bool], *terms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns what positions add to losses, and the logarithms of the sums of exponentials, each of shape ``(N, T)``."""
        every, weights = terms[: len(terms) // 2], terms[len(terms) // 2 :]
        dtype = widened(reduce(torch.promote_types, [term.dtype for term in terms]))
        weights, tokens = tuple(weight.to(dtype) for weight in weights), targets.flatten()
        positions = [hidden.flatten(0, 1) for hidden in every]
        share = (tokens != NOT_COUNTED).to(dtype) / counts.flatten()
        losses, log_sums = (torch.zeros_like(share) for _ in range(2))
        gradients = [
            torch.zeros_like(of_term, dtype=dtype) if is_trained else None
            for of_term, is_trained in zip(positions, trained, strict=True)
        ]
        with without_autocast(targets.device):
            for rows in planner.slices(len(tokens), len(weights[0])):
                logits = positions[0][rows].to(dtype) @ weights[0].mT
                for of_term, weight in zip(positions[1:], weights[1:], strict=True):
                    logits.addmm_(of_term[rows].to(dtype), weight.mT)
                if bias is not None:
                    logits += bias
                log_sums[rows] = logits.logsumexp(1)
                is_counted, places = tokens[rows] != NOT_COUNTED, tokens[rows].clamp(min=0).unsqueeze(1)
                losses[rows] = torch.where(is_counted, log_sums[rows] - logits.gather(1, places).squeeze(1), 0.0)
                if any(trained):
                    by_logits = logits.sub_(log_sums[rows].unsqueeze(1)).exp_()
                    by_logits.scatter_add_(1, places, -is_counted.to(dtype).unsqueeze(1))
                    by_logits.mul_(share[rows].unsqueeze(1))
                for gradient, weight in zip(gradients, weights, strict=True):
                    if gradient is not None:
                        gradient[rows] = by_logits @ weight
        pairs = zip(gradients, every, strict=True)
        ctx.save_for_backward(*[None if one is None else one.reshape(hidden.shape) for one, hidden in pairs])
        ctx.dtypes = [term.dtype for term in every]
        log_sums = log_sums.reshape(targets.shape)
        ctx.mark_non_differentiable(log_sums)
        return (losses * share).reshape(targets.shape), log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Multiplies what is known with the factors."""
        factors, dtypes = gradient.unsqueeze(2), ctx.dtypes
        pairs = zip(ctx.saved_tensors, dtypes, strict=True)
        products = [None if one is None else (factors * one).to(dtype) for one, dtype in pairs]
        return *[None] * 4, *products, *[None] * len(dtypes)
