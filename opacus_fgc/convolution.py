"""The form of a convolution's weight gradient, which needs no unfolded input where the image is large."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from opacus_fgc.per_sample import Dense, Outer, PerSampleGradient, at_least_float32, slices

_WEIGHT_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


class Convolution(PerSampleGradient):
    """``gradient[n]`` is the weight gradient of a convolution of one sample.

    A convolution is a linear map of the patches that its kernel sees (Rochette et al. 2019, arXiv:1912.06015), so its norm
    can come from Gram matrices of the patches; that is the cheaper way where there are few positions. Where there are many,
    the backend's own weight-gradient kernel forms the gradients, with a group of channels for each sample.

    Args:
        images: input of the convolution, shape ``(N, in, *size)``.
        backprops: shape ``(N, out, *positions)``.
        shape: shape of the weight, ``(out, in / groups, *kernel)``.
        stride: of each axis.
        padding: zeros on both sides of each axis.
        dilation: of each axis.
        groups: how many groups of channels.
    """

    def __init__(
        self,
        images: Tensor,
        backprops: Tensor,
        shape: torch.Size,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self.images = images
        self.backprops = backprops
        self.shape = shape
        self.batch_size = len(backprops)
        self._stride, self._padding, self._dilation, self._groups = stride, padding, dilation, groups

    def _part(self, part: slice) -> Convolution:
        images, backprops = at_least_float32(self.images[part]), at_least_float32(self.backprops[part])
        return Convolution(images, backprops, self.shape, self._stride, self._padding, self._dilation, self._groups)

    def _few_positions(self) -> bool:
        """Whether Gram matrices, ``T^2 (p + d)``, are less work than the gradients, ``T p d``."""
        positions = math.prod(self.backprops.shape[2:])
        p, d = self.shape[0] // self._groups, math.prod(self.shape[1:])
        return positions * (p + d) <= p * d

    def _patches(self) -> Tensor:
        """What the kernel sees at each position, shape ``(N, groups, T, in / groups * kernel)``."""
        pads = [amount for amount in reversed(self._padding) for _ in range(2)]
        windows = F.pad(self.images, pads)
        axes = len(self._stride)
        for axis, size in enumerate(self.shape[2:]):
            # By strides, whatever the memory format.
            dilation = self._dilation[axis]
            windows = windows.unfold(2 + axis, dilation * (size - 1) + 1, self._stride[axis])[..., ::dilation]
        # Now (N, in, *positions, *kernel).
        windows = windows.unflatten(1, (self._groups, self.shape[1])).movedim(2, 2 + axes)
        return windows.flatten(2 + axes).flatten(2, 1 + axes)

    def _as_outer(self) -> Outer:
        left = self.backprops.flatten(2).unflatten(1, (self._groups, self.shape[0] // self._groups)).mT
        return Outer(left, self._patches(), self.shape)

    def squared_norm(self) -> Tensor:
        few = self._few_positions()
        patches = math.prod(self.backprops.shape[2:]) * self._groups * math.prod(self.shape[1:])
        parts = []
        for part in slices(self.batch_size, patches if few else math.prod(self.shape)):
            sliced = self._part(part)
            parts.append((sliced._as_outer() if few else Dense(sliced.materialize())).squared_norm())
        return torch.cat(parts) if parts else at_least_float32(self.backprops).new_zeros(0)

    def measured(self) -> tuple[Tensor, PerSampleGradient]:
        size = self.batch_size * math.prod(self.shape)
        if self._few_positions() or size > self.images.numel() + self.backprops.numel():
            return super().measured()
        return Dense(self._part(slice(None)).materialize()).measured()

    def _weight_gradient(self, images: Tensor, backprops: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
        kernel = _WEIGHT_GRADIENTS[len(self._stride)]
        return kernel(images, shape, backprops, self._stride, self._padding, self._dilation, groups)

    def weighted_sum(self, coef: Tensor) -> Tensor:
        if self.batch_size == 0:
            return self.backprops.new_zeros(self.shape)
        coef = coef.to(self.backprops.dtype).view(-1, *[1] * (self.backprops.dim() - 1))
        return self._weight_gradient(self.images, coef * self.backprops, self.shape, self._groups)

    def materialize(self) -> Tensor:
        n = self.batch_size
        if n == 0:
            return self.backprops.new_zeros(0, *self.shape)
        # Samples side by side as groups of channels of one image.
        images, backprops = self.images.flatten(0, 1).unsqueeze(0), self.backprops.flatten(0, 1).unsqueeze(0)
        shape = (n * self.shape[0], *self.shape[1:])
        return self._weight_gradient(images, backprops, shape, n * self._groups).view(n, *self.shape)

    def inner(self, other: PerSampleGradient) -> Tensor:
        return Dense(self.materialize()).inner(other)

    @classmethod
    def joined(cls, forms: Sequence[Convolution]) -> PerSampleGradient:
        if all(form._few_positions() for form in forms):
            return Outer.joined([form._as_outer() for form in forms])
        return Dense.joined([Dense(form.materialize()) for form in forms])
