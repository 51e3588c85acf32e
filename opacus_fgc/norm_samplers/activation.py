"""Activation functions with a parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opacus_fgc.norm_samplers.registry import Forms, refuse_unbatched, register_norm_sampler
from opacus_fgc.per_sample import Dense
from opacus_fgc.per_sample.precision import at_least_float32


@register_norm_sampler(nn.PReLU)
def prelu(layer: nn.PReLU, activations: list[Tensor], backprops: Tensor) -> Forms:
    """``y = x`` where that is positive, ``weight * x`` elsewhere; one weight, or one a channel of ``(N, channels, *)``."""
    refuse_unbatched(backprops, 1 if layer.num_parameters == 1 else 2)
    inputs = at_least_float32(activations[0])
    products = torch.where(inputs > 0, 0, inputs * at_least_float32(backprops))
    if layer.num_parameters == 1:
        return {layer.weight: Dense(products.unsqueeze(-1).flatten(1).sum(1, keepdim=True))}
    return {layer.weight: Dense(products.flatten(2).sum(2) if products.dim() > 2 else products)}
