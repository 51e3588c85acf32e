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
from opacus_fgc.per_sample.logit_gradients import LogitGradients, counted, spans_of
from opacus_fgc.per_sample.precision import full_precision, without_autocast

SHARDED = (
    "ChunkedCausalLMLoss: the head is sharded over processes, and is no FSDP2 module of its own that could be made whole for the "
    "loss. Under FSDP2, call fully_shard on the head before the model (fully_shard(model.lm_head)); or have the model's forward "
    "return the hidden states, and leave reshard_after_forward out, so that the outermost module's weights stay whole. Under "
    "tensor parallel, leave the head out of the plan for parallelize_module, or take CausalLMLoss"
)
"""The error about heads of which there is a part."""


class HeadRows(NamedTuple):
    """What a head is called on in the place of hidden states, to give `_HeadShare` in the place of logits.

    ``head(rows)`` is a call of the layer as any other, with all hooks that are on it, in which `F.linear` finds this.

    Attributes:
        hidden: what the head is applied to, shape ``(N, T, d)``; of packed samples ``(1, T, d)``.
        targets: tokens, shape ``(N, T)`` or ``(1, T)``; see `LogitGradients`.
        bits: `log_sums` as whole numbers, which FSDP's mixed precision does not round on their way into the layer.
        spans: of packed samples where each begins and ends, shape ``(N, 2)``; None if each has a row.
    """

    hidden: Tensor
    targets: Tensor
    bits: Tensor
    spans: Tensor | None = None

    @classmethod
    def of(cls, hidden: Tensor, targets: Tensor, log_sums: Tensor, spans: Tensor | None = None) -> HeadRows:
        """The rows of some hidden states; see the class."""
        bits = log_sums.view(torch.int64 if log_sums.dtype is torch.float64 else torch.int32)
        return cls(hidden, targets, bits, spans)

    @property
    def size(self) -> int:
        """The number of samples."""
        return len(self.targets if self.spans is None else self.spans)

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
        return _HeadShare.apply(weight, bias, rows.hidden.detach(), *rows[1:])


def are_packed_head_rows(args: tuple[Any, ...]) -> bool:
    """Whether a layer was called on `HeadRows` of packed samples.

    Args:
        args: its positional arguments.
    """
    return bool(args) and isinstance(args[0], HeadRows) and args[0].spans is not None


class _HeadShare(torch.autograd.Function):
    """Zeros, shape ``(N, 1)``, whose gradient by the head's weights is that of the losses of the samples.

    By itself, since the norm pass needs no weight gradient, and autograd leaves out nodes that lead to nothing else.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        hidden: Tensor,
        targets: Tensor,
        bits: Tensor,
        spans: Tensor | None,
    ) -> Tensor:
        """Returns zeros."""
        ctx.save_for_backward(weight, bias, hidden, targets, bits, spans)
        rows = HeadRows(hidden, targets, bits, spans)
        return rows.log_sums.new_zeros(rows.size, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Adds the gradient up in tiles."""
        weight, bias, *rest = ctx.saved_tensors
        ones = torch.ones_like(gradient[:, 0])
        with without_autocast(gradient.device):
            weights, biases = _forms(weight, bias, HeadRows(*rest), gradient)
            return (
                weights.weighted_sum(ones).to(weight.dtype) if ctx.needs_input_grad[0] else None,
                biases.weighted_sum(ones).to(bias.dtype) if ctx.needs_input_grad[1] else None,
                *[None] * 4,
            )


def _forms(weight: Tensor, bias: Tensor | None, rows: HeadRows, backprops: Tensor) -> tuple[TiledOuter, TiledOuter]:
    """The forms of weight and bias; ``backprops`` has shape ``(N, 1)``."""
    hidden, targets, log_sums = (each.flatten(0, 1) for each in (rows.hidden, rows.targets, rows.log_sums))
    packed = rows.spans
    spans = spans_of([rows.targets.shape[1]] * rows.size) if packed is None else packed.unsqueeze(1).cpu()
    factor = backprops.to(log_sums.dtype) / counted(targets, spans).clamp(min=1)
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    left = LogitGradients(hidden, weight, bias, targets, log_sums, spans, factor)
    return TiledOuter(left, hidden, weight.shape), TiledOuter(left, log_sums.new_ones(len(hidden), 1), weight.shape[:1])


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
