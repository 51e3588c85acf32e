"""Linear maps."""

from __future__ import annotations

import math

from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn

from opacus_fgc.norm_samplers.registry import Forms, refuse_unbatched, register_norm_sampler
from opacus_fgc.per_sample import Dense, Outer, at_least_float32


def as_positions(tensor: Tensor) -> Tensor:
    """Brings ``(N, features)`` or ``(N, *, features)`` to ``(N, 1, T, features)``, one group of T positions."""
    refuse_unbatched(tensor, 2)
    shape = tensor.shape
    return tensor.reshape(shape[0], 1, math.prod(shape[1:-1]), shape[-1])


@register_norm_sampler([nn.Linear, RNNLinear])
def linear(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> Forms:
    """``y = x W^T + b`` on the last axis of ``(N, in)`` or ``(N, *, in)``."""
    left = as_positions(backprops)
    forms: Forms = {}
    if layer.weight.requires_grad:
        forms[layer.weight] = Outer(left, as_positions(activations[0]).to(left.dtype), layer.weight.shape)
    if layer.bias is not None and layer.bias.requires_grad:
        forms[layer.bias] = Dense(backprops if backprops.dim() == 2 else at_least_float32(left).sum((1, 2)))
    return forms
