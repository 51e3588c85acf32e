"""Linear maps."""

from __future__ import annotations

from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn

from opacus_fgc.norm_samplers.registry import Forms, refuse_unbatched, register_norm_sampler
from opacus_fgc.per_sample import Dense, Outer, at_least_float32


def as_positions(tensor: Tensor) -> Tensor:
    """Brings ``(N, features)`` or ``(N, *, features)`` to ``(N, T, features)``."""
    refuse_unbatched(tensor, 2)
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


@register_norm_sampler([nn.Linear, RNNLinear])
def linear(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> Forms:
    """``y = x W^T + b`` on the last axis of ``(N, in)`` or ``(N, *, in)``."""
    left = as_positions(backprops)
    forms: Forms = {}
    if layer.weight.requires_grad:
        forms[layer.weight] = Outer(left, as_positions(activations[0]).to(left.dtype), layer.weight.shape)
    if layer.bias is not None and layer.bias.requires_grad:
        forms[layer.bias] = Dense(left[:, 0] if left.shape[1] == 1 else at_least_float32(left).sum(1))
    return forms
