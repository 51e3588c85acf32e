"""Linear maps."""

from __future__ import annotations

import math
from typing import Any

from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn

from opacus_fgc.norm_samplers.head import head
from opacus_fgc.norm_samplers.registry import Forms, refuse_unbatched, register_norm_sampler
from opacus_fgc.per_sample import Dense, Outer
from opacus_fgc.per_sample.precision import at_least_float32


def as_positions(tensor: Tensor) -> Tensor:
    """Brings ``(N, features)`` or ``(N, *, features)`` to ``(N, 1, T, features)``, one group of T positions."""
    refuse_unbatched(tensor, 2)
    shape = tensor.shape
    return tensor.reshape(shape[0], 1, math.prod(shape[1:-1]), shape[-1])


@register_norm_sampler([nn.Linear, RNNLinear], by_row=True)
def linear(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> Forms:
    """``y = x W^T + b`` on the last axis of ``(N, in)`` or ``(N, *, in)``; or `HeadRows` of a loss over tokens."""
    if len(activations) > 1:
        return head(layer, activations, backprops)
    left = as_positions(backprops)
    forms, weight = _bias(layer, left), layer.weight
    if weight.requires_grad:
        forms[weight] = Outer(left, as_positions(activations[0]).to(left.dtype).conj(), weight.shape)
    return forms


@register_norm_sampler("transformers.pytorch_utils.Conv1D", by_row=True)
def matrix(layer: Any, activations: list[Tensor], backprops: Tensor) -> Forms:
    """``y = x W + b``, likewise: the linear layer of GPT-2 in Hugging Face's transformers."""
    right = as_positions(backprops)
    forms = _bias(layer, right)
    if layer.weight.requires_grad:
        forms[layer.weight] = Outer(as_positions(activations[0]).to(right.dtype).conj(), right, layer.weight.shape)
    return forms


@register_norm_sampler(nn.Bilinear)
def bilinear(layer: nn.Bilinear, activations: list[Tensor], backprops: Tensor) -> Forms:
    """``y_k = x1^T W_k x2 + b_k``: a linear map of the products of all features of ``x1`` and ``x2``."""
    left = as_positions(backprops)
    forms = _bias(layer, left)
    if layer.weight.requires_grad:
        # Products of half precision would be rounded.
        first, second = (at_least_float32(as_positions(side).to(left.dtype)) for side in activations)
        products = (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(3)
        forms[layer.weight] = Outer(left, products, layer.weight.shape)
    return forms


def _bias(layer: Any, backprops: Tensor) -> Forms:
    bias = layer.bias
    if bias is None or not bias.requires_grad:
        return {}
    return {bias: Dense(backprops[:, 0, 0] if backprops.shape[2] == 1 else at_least_float32(backprops).sum((1, 2)))}
