"""The loss of language models with a large vocabulary, one a sequence, of which few logits are held at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opacus_fgc import planner
from opacus_fgc._compat.distributed import gather_for_loss
from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.norm_samplers.head import SHARDED, HeadRows, shares
from opacus_fgc.norm_samplers.linear import linear
from opacus_fgc.norm_samplers.registry import norm_sampler_of
from opacus_fgc.per_sample.logit_gradients import NOT_COUNTED
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

    def forward(self, hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            hidden: what the head is applied to, shape ``(N, T, d)``, floating point.
            head: a linear layer from ``d`` features to the vocabulary.
            labels: tokens, shape ``(N, T)``, not shifted.

        Returns:
            The loss, in float32 at least; shape ``(N,)`` without reduction, ``()`` with it.

        Raises:
            TypeError: if the head is no linear layer.
            ValueError: if the shapes do not fit, or a label is no token.
            NotImplementedError: if the head is trained and not served by the norm sampler of linear layers, or is sharded.
        """
        if isinstance(head, FSDPModule):
            gather_for_loss(head)
        self._check(hidden, head, labels)
        if isinstance(head, FSDPModule):
            hidden = hidden.to(head.weight.dtype)  # as FSDP does to what its modules are called on
        labels = labels[:, 1:].long()
        targets = labels.masked_fill(labels == self.ignore_index, NOT_COUNTED)
        hidden, bias = hidden[:, :-1], head.bias
        with_gradient = torch.is_grad_enabled()
        losses, log_sums = _LossesInChunks.apply(
            hidden,
            head.weight.detach(),
            None if bias is None else bias.detach(),
            targets,
            with_gradient and hidden.requires_grad,
        )
        if with_gradient and any(param.requires_grad for param in head.parameters()):
            losses = losses + head(HeadRows.of(hidden, targets, log_sums)).squeeze(1)
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()

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


def _is_served(head: nn.Linear) -> bool:
    registered = (norm_sampler_of(base) for base in type(head).__mro__)
    function = next(one for one in registered if one is not None)
    return function is linear and isinstance(find_sampler(head), Registered)


class _LossesInChunks(torch.autograd.Function):
    """The losses of samples by their hidden states, with the head as a constant.

    A loss is one number, so that its gradient is known but for a factor as soon as its logits are there: it is computed with
    them, and kept in the place of them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns the losses, shape ``(N,)``, and the logarithms of the sums of exponentials, shape ``(N, T)``."""
        dtype = widened(torch.promote_types(hidden.dtype, weight.dtype))
        weight, positions, tokens = weight.to(dtype), hidden.flatten(0, 1), targets.flatten()
        share = shares(targets, dtype).flatten()
        losses, log_sums = (torch.zeros_like(share) for _ in range(2))
        gradients = torch.zeros_like(positions, dtype=dtype) if with_gradient else None
        with without_autocast(hidden.device):
            for rows in planner.slices(len(positions), len(weight)):
                logits = positions[rows].to(dtype) @ weight.mT
                if bias is not None:
                    logits += bias
                log_sums[rows] = logits.logsumexp(1)
                counted, places = tokens[rows] != NOT_COUNTED, tokens[rows].clamp(min=0).unsqueeze(1)
                losses[rows] = torch.where(counted, log_sums[rows] - logits.gather(1, places).squeeze(1), 0.0)
                if gradients is not None:
                    by_logits = logits.sub_(log_sums[rows].unsqueeze(1)).exp_()
                    by_logits.scatter_add_(1, places, -counted.to(dtype).unsqueeze(1))
                    gradients[rows] = by_logits.mul_(share[rows].unsqueeze(1)) @ weight
        if gradients is not None:
            ctx.save_for_backward(gradients.reshape(hidden.shape))
        ctx.dtype = hidden.dtype
        log_sums = log_sums.reshape(targets.shape)
        ctx.mark_non_differentiable(log_sums)
        return (losses * share).reshape(targets.shape).sum(1), log_sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Multiplies what is known with the factor."""
        (gradients,) = ctx.saved_tensors
        return (gradient[:, None, None] * gradients).to(ctx.dtype), *[None] * 4
