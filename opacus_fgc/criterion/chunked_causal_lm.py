"""The loss of language models with a large vocabulary, one a sequence, of which few logits are held at a time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opacus_fgc import planner
from opacus_fgc._compat.distributed import gather_for_loss
from opacus_fgc.criterion.causal_lm import CausalLMLoss
from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.norm_samplers.head import SHARDED, HeadRows
from opacus_fgc.norm_samplers.linear import linear
from opacus_fgc.norm_samplers.registry import norm_sampler_of
from opacus_fgc.per_sample.logit_gradients import NOT_COUNTED, counted, spans_of
from opacus_fgc.per_sample.precision import widened, without_autocast
from opacus_fgc.taps.lookup import Registered, find_sampler


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
        if isinstance(head, FSDPModule):
            gather_for_loss(head)
        self._check(hidden, head, labels)
        if isinstance(head, FSDPModule):
            hidden = hidden.to(head.weight.dtype)  # as FSDP does to what its modules are called on
        starts = None if position_ids is None else self._starts(position_ids, labels)
        labels = labels.long()
        targets = labels.masked_fill(labels == self.ignore_index, NOT_COUNTED)
        if starts is not None:
            # The first token of a sequence is not predicted from the last one of the sequence before.
            targets = targets.masked_fill(starts, NOT_COUNTED)
        hidden, targets, bias = hidden[:, :-1], targets[:, 1:], head.bias
        lengths = [targets.shape[1]] * len(targets) if starts is None else _lengths(starts)
        with_gradient = torch.is_grad_enabled()
        of_positions, log_sums = _LossesInChunks.apply(
            hidden,
            head.weight.detach(),
            None if bias is None else bias.detach(),
            targets,
            _counts(targets, lengths),
            with_gradient and hidden.requires_grad,
        )
        if starts is None:
            spans, losses = None, of_positions.sum(1)
        else:
            spans = spans_of(lengths).squeeze(1)
            several = of_positions[0].split(lengths) if lengths else ()
            losses = torch.stack([one.sum() for one in several]) if lengths else of_positions.sum(1)[:0]
        if with_gradient and any(param.requires_grad for param in head.parameters()):
            losses = losses + head(HeadRows.of(hidden, targets, log_sums, spans)).squeeze(1)
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()

    def _starts(self, position_ids: Tensor, labels: Tensor) -> Tensor:
        starts = CausalLMLoss.starts(position_ids)
        if starts.shape != labels.shape:
            raise ValueError(
                f"ChunkedCausalLMLoss: position_ids have shape {tuple(starts.shape)}, labels {tuple(labels.shape)}; packed "
                "sequences lie one after another in one row, and each token has a place"
            )
        return starts

    def _check(self, hidden: Any, head: Any, labels: Any) -> None:
        linear_layer = isinstance(head, nn.Linear)
        if not linear_layer or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
            adapted = " Leave the head out of the adapter's target_modules." if hasattr(head, "base_layer") else ""
            raise TypeError(
                f"ChunkedCausalLMLoss: the head is a {type(head).__name__}{' with a forward of its own' * linear_layer}; it has "
                f"to be a torch.nn.Linear (model.lm_head), whose logits are computed in chunks.{adapted} CausalLMLoss takes the "
                "logits of any head"
            )
        if isinstance(head.weight, DTensor):
            raise PrivacyNotImplementedError(SHARDED)
        if any(param.requires_grad for param in head.parameters()) and not _is_served(head):
            raise PrivacyNotImplementedError(
                f"ChunkedCausalLMLoss: the head, a {type(head).__name__}, is trained, and is not one that the norm sampler of "
                "torch.nn.Linear serves: it has a parametrization, or a registered norm sampler. Take a plain torch.nn.Linear, "
                "freeze the head, or take CausalLMLoss"
            )
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


def _is_served(head: nn.Linear) -> bool:
    registered = (norm_sampler_of(base) for base in type(head).__mro__)
    function = next(one for one in registered if one is not None)
    return function is linear and isinstance(find_sampler(head), Registered)


class _LossesInChunks(torch.autograd.Function):
    """The losses of positions by their hidden states, with the head as a constant.

    A loss is one number, so that its gradient is known but for a factor as soon as its logits are there: it is computed with
    them, and kept in the place of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        counts: Tensor,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        """Returns what positions add to losses, and the logarithms of the sums of exponentials, each of shape ``(N, T)``."""
        dtype = widened(torch.promote_types(hidden.dtype, weight.dtype))
        weight, positions, tokens = weight.to(dtype), hidden.flatten(0, 1), targets.flatten()
        share = (tokens != NOT_COUNTED).to(dtype) / counts.flatten()
        losses, log_sums = (torch.zeros_like(share) for _ in range(2))
        gradients = torch.zeros_like(positions, dtype=dtype) if with_gradient else None
        with without_autocast(hidden.device):
            for rows in planner.slices(len(positions), len(weight)):
                logits = positions[rows].to(dtype) @ weight.mT
                if bias is not None:
                    logits += bias
                log_sums[rows] = logits.logsumexp(1)
                is_counted, places = tokens[rows] != NOT_COUNTED, tokens[rows].clamp(min=0).unsqueeze(1)
                losses[rows] = torch.where(is_counted, log_sums[rows] - logits.gather(1, places).squeeze(1), 0.0)
                if gradients is not None:
                    by_logits = logits.sub_(log_sums[rows].unsqueeze(1)).exp_()
                    by_logits.scatter_add_(1, places, -is_counted.to(dtype).unsqueeze(1))
                    gradients[rows] = by_logits.mul_(share[rows].unsqueeze(1)) @ weight
        if gradients is not None:
            ctx.save_for_backward(gradients.reshape(hidden.shape))
        ctx.dtype = hidden.dtype
        log_sums = log_sums.reshape(targets.shape)
        ctx.mark_non_differentiable(log_sums)
        return (losses * share).reshape(targets.shape), log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Multiplies what is known with the factors."""
        (gradients,) = ctx.saved_tensors
        return (gradient.unsqueeze(2) * gradients).to(ctx.dtype), *[None] * 5
