"""Convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from opacus_fgc.norm_samplers.registry import Forms, refuse_unbatched, register_norm_sampler
from opacus_fgc.per_sample import Convolution, Dense
from opacus_fgc.per_sample.precision import at_least_float32

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def _sides(layer: Conv) -> list[tuple[int, int]]:
    """How much padding there is before and after each axis."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        # As torch: the odd one out goes to the end.
        totals = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(side), int(side)) for side in layer.padding]


def _with_plain_padding(layer: Conv, images: Tensor) -> tuple[Tensor, list[int]]:
    """The input, and as many zeros on both sides of each axis as give what the layer saw."""
    sides = _sides(layer)
    if layer.padding_mode == "zeros" and all(before == after for before, after in sides):
        return images, [before for before, _ in sides]
    # F.pad counts from the last axis.
    pads = [amount for side in reversed(sides) for amount in side]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(images, pads, mode), [0] * len(sides)


@register_norm_sampler([nn.Conv1d, nn.Conv2d, nn.Conv3d])
def convolution(layer: Conv, activations: list[Tensor], backprops: Tensor) -> Forms:
    """Convolutions with any stride, padding, dilation and groups."""
    refuse_unbatched(backprops, 2 + len(layer.kernel_size))
    forms: Forms = {}
    if layer.weight.requires_grad:
        images, padding = _with_plain_padding(layer, activations[0].to(backprops.dtype).conj())
        forms[layer.weight] = Convolution(
            images, backprops, layer.weight.shape, layer.stride, padding, layer.dilation, layer.groups
        )
    if layer.bias is not None and layer.bias.requires_grad:
        forms[layer.bias] = Dense(at_least_float32(backprops).flatten(2).sum(2))
    return forms


@register_norm_sampler([nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def transposed_convolution(layer: ConvTranspose, activations: list[Tensor], backprops: Tensor) -> Forms:
    """Its weight's gradient is that of a convolution from output to input."""
    refuse_unbatched(backprops, 2 + len(layer.kernel_size))
    forms: Forms = {}
    if layer.weight.requires_grad:
        positions, images = activations[0].to(backprops.dtype).conj(), backprops
        padding = [int(side) for side in layer.padding]
        pads: list[int] = []
        for axis, before in enumerate(padding):
            steps, reach = positions.shape[2 + axis] - 1, layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            pads = [before, steps * layer.stride[axis] + reach + 1 - before - images.shape[2 + axis], *pads]
        if pads[::2] != pads[1::2]:
            # Output padding is on one side only.
            images, padding = F.pad(images, pads), [0] * len(padding)
        forms[layer.weight] = Convolution(
            images, positions, layer.weight.shape, layer.stride, padding, layer.dilation, layer.groups
        )
    if layer.bias is not None and layer.bias.requires_grad:
        forms[layer.bias] = Dense(at_least_float32(backprops).flatten(2).sum(2))
    return forms
