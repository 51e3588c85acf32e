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

SHARDED = (
    "ChunkedCausalLMLoss: the head is sharded over processes, and is no FSDP2 module of its own that could be made whole for the "
    "loss. Under FSDP2, call fully_shard on the head before the model (fully_shard(model.lm_head)); or have the model's forward "
    "return the hidden states, and leave reshard_after_forward out, so that the outermost module's weights stay whole. Under "
    "tensor parallel, leave the head out of the plan for parallelize_module, or take CausalLMLoss"
)
"""The error about heads of which there is a part."""


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
        bits: `log_sums` as whole numbers, which FSDP's mixed precision does not round on their way into the layer.
    """

    hidden: Tensor
    targets: Tensor
    bits: Tensor

    @classmethod
    def of(cls, hidden: Tensor, targets: Tensor, log_sums: Tensor) -> HeadRows:
        """The rows of some hidden states; see `LogitGradients`."""
        return cls(hidden, targets, log_sums.view(torch.int64 if log_sums.dtype is torch.float64 else torch.int32))

    @property
    def log_sums(self) -> Tensor:
        """The logarithms of the sums of the exponentials of the logits, float32 or wider."""
        return self.bits.view(torch.float64 if self.bits.dtype is torch.int64 else torch.float32)

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
            weights, biases = _forms(weight, bias, HeadRows.of(hidden, targets, log_sums), gradient)
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
