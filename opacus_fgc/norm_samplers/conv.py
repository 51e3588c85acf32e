"""Convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from opacus_fgc.norm_samplers.registry import Forms, refuse_unbatched, register_norm_sampler
from opacus_fgc.per_sample import Dense, Outer, at_least_float32

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def _padded(layer: Conv, activations: Tensor) -> Tensor:
    """The input as the convolution sees it, its padding made explicit."""
    if layer.padding == "valid":
        return activations
    if layer.padding == "same":
        # As torch: the odd one out goes to the end.
        totals = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(int(side), int(side)) for side in layer.padding]
    # F.pad counts from the last axis.
    pads = [amount for side in reversed(sides) for amount in side]
    return F.pad(activations, pads, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _patches(layer: Conv, activations: Tensor) -> Tensor:
    """What the kernel sees at each position: ``(N, in, *size)`` to ``(N, groups, T, in / groups * kernel)``.

    Windows are taken by strides, so that the memory format of the input does not matter.
    """
    axes = len(layer.kernel_size)
    windows = _padded(layer, activations)
    for axis, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        windows = windows.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # Now (N, in, *positions, *kernel).
    windows = windows.unflatten(1, (layer.groups, layer.in_channels // layer.groups)).movedim(2, 2 + axes)
    return windows.flatten(2 + axes).flatten(2, 1 + axes)


@register_norm_sampler([nn.Conv1d, nn.Conv2d, nn.Conv3d])
def convolution(layer: Conv, activations: list[Tensor], backprops: Tensor) -> Forms:
    """A convolution is a linear map of the patches that its kernel sees (Rochette et al. 2019, arXiv:1912.06015)."""
    refuse_unbatched(backprops, 2 + len(layer.kernel_size))
    left = backprops.flatten(2)
    forms: Forms = {}
    if layer.weight.requires_grad:
        grouped = left.unflatten(1, (layer.groups, layer.out_channels // layer.groups)).mT
        patches = _patches(layer, activations[0].to(left.dtype))
        forms[layer.weight] = Outer(grouped, patches, layer.weight.shape)
    if layer.bias is not None and layer.bias.requires_grad:
        forms[layer.bias] = Dense(at_least_float32(left).sum(2))
    return forms
