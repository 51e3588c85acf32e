"""Linear heads that are called on what a loss over tokens needs of them, and give the gradient of that loss by their weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opacus_fgc.norm_samplers.registry import Forms
from opacus_fgc.per_sample import Dense, TiledOuter
from opacus_fgc.per_sample.logit_gradients import NOT_COUNTED, LogitGradients
from opacus_fgc.per_sample.precision import full_precision, without_autocast


def shares(targets: Tensor, dtype: torch.dtype) -> Tensor:
    """What each position counts in the mean of its sample, shape ``(N, T)``.

    Args:
        targets: shape ``(N, T)``; see `LogitGradients`.
        dtype: that of the result.
    """
    counted = targets != NOT_COUNTED
    return counted.to(dtype) / counted.sum(1, keepdim=True).clamp(min=1)


class HeadRows(NamedTuple):
    """What a head is called on in the place of hidden states, to give `_HeadShare` in the place of logits.

    ``head(rows)`` is a call of the layer as any other, with all hooks that are on it, in which `F.linear` finds this.

    Attributes:
        hidden: see `LogitGradients`, as are the others.
        targets: tokens.
        log_sums: of the logits.
    """

    hidden: Tensor
    targets: Tensor
    log_sums: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        """Takes the place of `F.linear`; there is nothing else that a head may do with it."""
        if func is not F.linear or kwargs or not isinstance(args[0], cls):
            raise NotImplementedError(
                f"ChunkedCausalLMLoss: the head calls {getattr(func, '__name__', func)}; it has to be a plain linear layer"
            )
        rows, weight, bias = (*args, None)[:3]
        return _HeadShare.apply(weight, bias, rows.hidden.detach(), rows.targets, rows.log_sums)


class _HeadShare(torch.autograd.Function):
    """Zeros, shape ``(N, 1)``, whose gradient by the head's weights is that of the losses of the samples.

    By itself, since the norm pass needs no weight gradient, and autograd leaves out nodes that lead to nothing else.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, hidden: Tensor, targets: Tensor, log_sums: Tensor
    ) -> Tensor:
        """Returns zeros."""
        ctx.save_for_backward(weight, bias, hidden, targets, log_sums)
        return log_sums.new_zeros(len(hidden), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Adds the gradient up in tiles."""
        weight, bias, hidden, targets, log_sums = ctx.saved_tensors
        ones = log_sums.new_ones(len(hidden))
        with without_autocast(hidden.device):
            weights, biases = _forms(weight, bias, HeadRows(hidden, targets, log_sums), gradient)
            return (
                weights.weighted_sum(ones).to(weight.dtype) if ctx.needs_input_grad[0] else None,
                biases.weighted_sum(ones).to(bias.dtype) if ctx.needs_input_grad[1] else None,
                *[None] * 3,
            )


def _forms(weight: Tensor, bias: Tensor | None, rows: HeadRows, backprops: Tensor) -> tuple[TiledOuter, TiledOuter]:
    """The forms of weight and bias; ``backprops`` has shape ``(N, 1)``."""
    factor = shares(rows.targets, rows.log_sums.dtype) * backprops.to(rows.log_sums.dtype)
    left = LogitGradients(
        rows.hidden, weight.detach(), None if bias is None else bias.detach(), rows.targets, rows.log_sums, factor
    )
    ones = rows.log_sums.new_ones(*rows.targets.shape, 1)
    return TiledOuter(left, rows.hidden, weight.shape), TiledOuter(left, ones, weight.shape[:1])


def head(layer: Any, activations: list[Tensor], backprops: Tensor) -> Forms:
    """The weights of a head that was called on `HeadRows`."""
    weights, biases = _forms(layer.weight, layer.bias, HeadRows(*activations), backprops)
    forms: Forms = {}
    if layer.weight.requires_grad:
        forms[layer.weight] = weights
    if layer.bias is not None and layer.bias.requires_grad:
        with full_precision(backprops.device):
            forms[layer.bias] = Dense(biases.materialize())
    return forms
