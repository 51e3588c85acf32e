"""Normalization layers: ``y = w * normalized(x) + b``, so the gradient of ``w`` is a sum of ``normalized(x) * backprop``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from opacus_fgc.norm_samplers.registry import Forms, refuse_unbatched, register_norm_sampler
from opacus_fgc.per_sample import Dense, at_least_float32


def _scale_and_shift(layer: nn.Module, normalized: Tensor, backprops: Tensor, axes: tuple[int, ...]) -> Forms:
    """The forms of ``weight`` and, where there is one, ``bias``; ``axes`` are those that the parameters are shared over."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    backprops = at_least_float32(backprops)
    forms: Forms = {}
    if weight is not None and weight.requires_grad:
        product = normalized * backprops
        forms[weight] = Dense(product.sum(axes) if axes else product)
    if bias is not None and bias.requires_grad:
        forms[bias] = Dense(backprops.sum(axes) if axes else backprops)
    return forms


@register_norm_sampler([nn.LayerNorm, nn.RMSNorm])
def norm_of_last_axes(layer: nn.LayerNorm | nn.RMSNorm, activations: list[Tensor], backprops: Tensor) -> Forms:
    """Layers that normalize the last axes of ``(N, *, *normalized_shape)``."""
    axes = tuple(range(1, backprops.dim() - len(layer.normalized_shape)))
    normalize: Callable[..., Tensor] = F.layer_norm if isinstance(layer, nn.LayerNorm) else F.rms_norm
    normalized = normalize(at_least_float32(activations[0]), layer.normalized_shape, eps=layer.eps)
    return _scale_and_shift(layer, normalized, backprops, axes)


@register_norm_sampler([nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d])
def norm_of_channels(layer: Any, activations: list[Tensor], backprops: Tensor) -> Forms:
    """Layers on ``(N, channels, *)`` with a weight for each channel; an instance norm is a group norm with a group a channel."""
    if isinstance(layer, nn.GroupNorm):
        groups, dims = layer.num_groups, 2
    else:
        groups, dims = layer.num_features, 1 + layer._get_no_batch_dim()
    refuse_unbatched(backprops, dims)
    normalized = F.group_norm(at_least_float32(activations[0]), groups, eps=layer.eps)
    return _scale_and_shift(layer, normalized, backprops, tuple(range(2, backprops.dim())))
