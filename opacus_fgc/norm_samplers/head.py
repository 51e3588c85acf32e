"""Linear heads that are called on what a loss over tokens needs of them, and give the gradient of that loss by their weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.norm_samplers.registry import Forms
from opacus_fgc.per_sample import Dense, TiledOuter
from opacus_fgc.per_sample.logit_gradients import LogitGradients, Term, counted, spans_of
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
        others: what else is added to the logits, as adapters do: pairs of what is as ``hidden``, and of a weight of shape
            ``(1, V, d)``.
    """

    hidden: Tensor
    targets: Tensor
    bits: Tensor
    spans: Tensor | None = None
    others: tuple[Tensor, ...] = ()

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        targets: Tensor,
        log_sums: Tensor,
        spans: Tensor | None = None,
        others: Iterable[tuple[Tensor, Tensor]] = (),
    ) -> HeadRows:
        """The rows of some hidden states; see the class. The weights of ``others`` have shape ``(V, d)``."""
        bits = log_sums.view(torch.int64 if log_sums.dtype is torch.float64 else torch.int32)
        pairs = [(rows.detach(), weight.detach().unsqueeze(0)) for rows, weight in others]
        return cls(hidden, targets, bits, spans, tuple(tensor for pair in pairs for tensor in pair))

    @classmethod
    def of_tensors(cls, hidden: Tensor, targets: Tensor, bits: Tensor, *rest: Tensor) -> HeadRows:
        """The rows whose tensors these are, in order."""
        packed = bool(rest) and not rest[0].is_floating_point()
        return cls(hidden, targets, bits, rest[0] if packed else None, rest[packed:])

    def terms(self, weight: Tensor) -> tuple[Term, ...]:
        """What the logits are made of, that of the layer with this weight first.

        Raises:
            NotImplementedError: if all samples had to share something, and do not any more.
        """
        if any(len(other) != 1 for other in self.others[1::2]) or (self.spans is not None and len(self.hidden) != 1):
            raise PrivacyNotImplementedError(
                "ChunkedCausalLMLoss: a head with packed sequences, or with an adapter, was called on one row, and on more rows "
                "for other losses of the same step. Call backward() for each loss, or take CausalLMLoss"
            )
        pairs = zip(self.others[::2], self.others[1::2], strict=True)
        others = [Term(rows.flatten(0, 1), of_others[0]) for rows, of_others in pairs]
        return Term(self.hidden.flatten(0, 1), weight.detach()), *others

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
        return _HeadShare.apply(weight, bias, rows.hidden.detach(), *rows[1:4], *rows.others)


def are_head_rows(args: tuple[Any, ...]) -> bool:
    """Whether positional arguments of a layer are `HeadRows`."""
    return bool(args) and isinstance(args[0], HeadRows)


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
        *others: Tensor,
    ) -> Tensor:
        """Returns zeros."""
        ctx.save_for_backward(weight, bias, hidden, targets, bits, spans, *others)
        rows = HeadRows(hidden, targets, bits, spans, others)
        return rows.log_sums.new_zeros(rows.size, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Adds the gradient up in tiles."""
        weight, bias, hidden, targets, bits, spans, *others = ctx.saved_tensors
        rows, ones = HeadRows(hidden, targets, bits, spans, tuple(others)), torch.ones_like(gradient[:, 0])
        with without_autocast(gradient.device):
            weights, biases = _forms(weight, bias, rows, gradient)
            return (
                weights.weighted_sum(ones).to(weight.dtype) if ctx.needs_input_grad[0] else None,
                biases.weighted_sum(ones).to(bias.dtype) if ctx.needs_input_grad[1] else None,
                *[None] * (4 + len(others)),
            )


def _forms(weight: Tensor, bias: Tensor | None, rows: HeadRows, backprops: Tensor) -> tuple[TiledOuter, TiledOuter]:
    """The forms of weight and bias; ``backprops`` has shape ``(N, 1)``."""
    targets, log_sums = rows.targets.flatten(), rows.log_sums.flatten()
    packed = rows.spans
    spans = spans_of([rows.targets.shape[1]] * rows.size) if packed is None else packed.unsqueeze(1).cpu()
    factor = backprops.to(log_sums.dtype) / counted(targets, spans).clamp(min=1)
    terms = rows.terms(weight)
    left = LogitGradients(terms, None if bias is None else bias.detach(), targets, log_sums, spans, factor)
    ones = log_sums.new_ones(len(targets), 1)
    return TiledOuter(left, terms[0].hidden, weight.shape), TiledOuter(left, ones, weight.shape[:1])


def head(layer: Any, activations: list[Tensor], backprops: Tensor) -> Forms:
    """The weights of a head that was called on `HeadRows`."""
    weights, biases = _forms(layer.weight, layer.bias, HeadRows.of_tensors(*activations), backprops)
    forms: Forms = {}
    if layer.weight.requires_grad:
        forms[layer.weight] = weights
    if layer.bias is not None and layer.bias.requires_grad:
        with full_precision(backprops.device):
            forms[layer.bias] = Dense(biases.materialize())
    return forms
