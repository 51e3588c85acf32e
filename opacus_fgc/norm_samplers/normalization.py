"""Normalization layers: ``y = w * normalized(x) + b``, so the gradient of ``w`` is a sum of ``normalized(x) * backprop``."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_fgc._compat.modules import dims_without_batch
from opacus_fgc.norm_samplers.registry import Forms, refuse_unbatched, register_norm_sampler
from opacus_fgc.per_sample import Dense
from opacus_fgc.per_sample.precision import at_least_float32


def _scale_and_shift(layer: nn.Module, normalized: Tensor, backprops: Tensor, axis: int) -> Forms:
    """The forms of ``weight`` and, where there is one, ``bias``.

    Args:
        layer: the layer.
        normalized: its normalized input, shape ``(N, T, *weight.shape)`` or ``(N, *weight.shape, T)``, which is overwritten.
        backprops: of the same shape, float32 or wider.
        axis: that of the ``T`` positions, over which the parameters are shared.
    """
    weight, bias = layer.weight, getattr(layer, "bias", None)
    forms: Forms = {}
    if weight is not None and weight.requires_grad:
        forms[weight] = Dense(normalized.mul_(backprops).sum(axis))
    if bias is not None and bias.requires_grad:
        forms[bias] = Dense(backprops.sum(axis))
    return forms


def _of_last_axes(layer: Any, normalized: Tensor, backprops: Tensor) -> Forms:
    leading = backprops.shape[1 : backprops.dim() - len(layer.normalized_shape)]
    shape = (len(backprops), math.prod(leading), *layer.normalized_shape)
    return _scale_and_shift(layer, normalized.reshape(shape), at_least_float32(backprops).reshape(shape), 1)


@register_norm_sampler(nn.LayerNorm, by_row=True)
def layer_norm(layer: nn.LayerNorm, activations: list[Tensor], backprops: Tensor) -> Forms:
    """Normalizes the last axes of ``(N, *, *normalized_shape)``."""
    normalized = F.layer_norm(at_least_float32(activations[0]), layer.normalized_shape, eps=layer.eps)
    return _of_last_axes(layer, normalized, backprops)


@cache
def _default_eps(dtype: torch.dtype, device: torch.device) -> float:
    """The ``eps`` of an RMSNorm that has none: that of the input's dtype, or of the float32 that torch may compute it in."""
    one = 2.0**-7
    normalized = F.rms_norm(torch.full((1,), one, dtype=dtype, device=device), (1,)).item()
    own = torch.finfo(dtype).eps
    # It is 1 / sqrt(1 + eps / one^2): nearly 1 with that of float32, below 1/2 with that of half precision.
    return own if normalized < 0.9 else min(own, torch.finfo(torch.float32).eps)


@register_norm_sampler(nn.RMSNorm, by_row=True)
def rms_norm(layer: nn.RMSNorm, activations: list[Tensor], backprops: Tensor) -> Forms:
    """As `layer_norm`, without centering."""
    inputs = activations[0]
    eps = _default_eps(inputs.dtype, inputs.device) if layer.eps is None else layer.eps
    normalized = F.rms_norm(at_least_float32(inputs), layer.normalized_shape, eps=eps)
    return _of_last_axes(layer, normalized, backprops)


def _of_channels(layer: Any, activations: list[Tensor], backprops: Tensor, groups: int) -> Forms:
    normalized = F.group_norm(at_least_float32(activations[0]), groups, eps=layer.eps)
    shape = (*backprops.shape[:2], math.prod(backprops.shape[2:]))
    return _scale_and_shift(layer, normalized.reshape(shape), at_least_float32(backprops).reshape(shape), 2)


@register_norm_sampler(nn.GroupNorm)
def group_norm(layer: nn.GroupNorm, activations: list[Tensor], backprops: Tensor) -> Forms:
    """Normalizes groups of the channels of ``(N, channels, *)``; one weight a channel."""
    refuse_unbatched(backprops, 2)
    return _of_channels(layer, activations, backprops, layer.num_groups)


@register_norm_sampler([nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d])
def instance_norm(layer: Any, activations: list[Tensor], backprops: Tensor) -> Forms:
    """A group norm with a group for each channel."""
    refuse_unbatched(backprops, 1 + dims_without_batch(layer))
    return _of_channels(layer, activations, backprops, layer.num_features)
