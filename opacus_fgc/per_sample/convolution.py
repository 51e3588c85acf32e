"""The form of a convolution's weight gradient, which needs no unfolded input where the image is large."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from opacus_fgc.per_sample.base import Dense, Measured, PerSampleGradient
from opacus_fgc.per_sample.outer import Outer
from opacus_fgc.per_sample.precision import at_least_float32, row_norms, widest
from opacus_fgc.per_sample.squares import Squares
from opacus_fgc.per_sample.sum import add
from opacus_fgc.per_sample.sum_over_positions import SumOverPositions
from opacus_fgc.planner import NO_ROOM, Kernels, NormMethod, Room

# Where the kernel sees fewer elements than this, one product of patches is faster than many small ones of shifted images.
_FEW_SEEN = 64

_WEIGHT_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


class KernelMajor(Dense):
    """Gradients of a convolution stored as they come: one product for each element of the kernel.

    Args:
        products: shape ``(kernel elements, N, out * in / groups)``.
        shape: shape of the weight, ``(out, in / groups, *kernel)``.
    """

    def __init__(self, products: Tensor, shape: torch.Size) -> None:
        self.products = products
        self.shape = shape
        self.batch_size = products.shape[1]

    @property
    def elements(self) -> int:
        return self.products.numel()

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The gradients in the order of the weight, shape ``(N, *shape)``."""
        return self.products.movedim(0, 2).reshape(self.batch_size, *self.shape)

    def norm(self) -> Tensor:
        return row_norms(row_norms(self.products).mT)

    def select(self, samples: slice | Tensor) -> KernelMajor:
        return KernelMajor(self.products[:, samples], self.shape)

    def weighted_sum(self, coef: Tensor) -> Tensor:
        return (coef.to(self.products.dtype) @ self.products).mT.reshape(self.shape)


class Convolution(SumOverPositions):
    """``gradient[n]`` is the weight gradient of a convolution of one sample.

    A convolution is a linear map of the patches that its kernel sees (Rochette et al. 2019, arXiv:1912.06015), so its norm
    can come from Gram matrices of the patches; that is the cheaper method where there are few positions. Where there are many,
    the gradients are formed, one element of the kernel at a time: as the product of the backprops and the image, shifted by
    that element's offset.

    Args:
        images: input of the convolution, shape ``(N, in, *size)``.
        backprops: shape ``(N, out, *positions)``.
        shape: shape of the weight, ``(out, in / groups, *kernel)``.
        stride: of each axis.
        padding: zeros on both sides of each axis.
        dilation: of each axis.
        groups: how many groups of channels.
    """

    # The ordinary gradient of a convolution is itself far from the speed of a large matrix product.
    KERNELS = Kernels(gram=3.4, formed=3.1, gradient=2.6)

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

    @property
    def elements(self) -> int:
        return self.backprops.numel()

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        positions, per_group = math.prod(self.backprops.shape[2:]), self.shape[0] // self._groups
        return self._groups, positions, per_group, math.prod(self.shape[1:])

    def select(self, samples: slice | Tensor) -> Convolution:
        images, backprops = self.images[samples], self.backprops[samples]
        return Convolution(images, backprops, self.shape, self._stride, self._padding, self._dilation, self._groups)

    def temporary(self, method: NormMethod) -> int:
        groups, positions, _, d = self.sizes
        if method is NormMethod.GRAM:
            return groups * positions * (positions + d)
        return super().temporary(method) + math.prod(self.images.shape[1:]) + math.prod(self.backprops.shape[1:])

    def _windows(self, images: Tensor) -> Tensor:
        """What the kernel sees of images, a view of shape ``(N, channels, *positions, *kernel)``."""
        windows = F.pad(images, [amount for amount in reversed(self._padding) for _ in range(2)])
        for axis, size in enumerate(self.shape[2:]):
            # By strides, whatever the memory format.
            dilation = self._dilation[axis]
            windows = windows.unfold(2 + axis, dilation * (size - 1) + 1, self._stride[axis])[..., ::dilation]
        return windows

    def _as_outer(self) -> Outer:
        """The same as a linear map of patches, which are copied out of the images."""
        windows = self._windows(self.images)
        axes = len(self._stride)
        # From (N, in, *positions, *kernel) to (N, groups, in / groups * kernel, T), so that whole rows are copied.
        windows = windows.permute([0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes)])
        patches = windows.flatten(2 + axes).flatten(1, 1 + axes).unflatten(1, (self._groups, -1))
        left = self.backprops.flatten(2).unflatten(1, (self._groups, -1))
        return Outer(left.mT, patches.mT, self.shape)

    def _shifted(self) -> tuple[Tensor, Iterator[Tensor]]:
        """Backprops and, for each element of the kernel, what it sees; ``(N * groups, p or in / groups, L)``, ``L >= T``.

        Both lie on one grid with the images' row length, zeros in the backprops where there is no position, so that what an
        element of the kernel sees is the image from some offset on: a view. With a stride the image is first split into its
        phases.
        """
        counts, strides, reaches = self.backprops.shape[2:], self._stride, []
        for size, dilation, stride in zip(self.shape[2:], self._dilation, strides, strict=True):
            reaches.append(dilation * (size - 1) // stride)
        grid = [count + reach for count, reach in zip(counts, reaches, strict=True)]
        rows = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
        length = 1 + sum((count - 1) * row for count, row in zip(counts, rows, strict=True))

        pads: list[int] = []
        for size, before, points, stride in zip(self.images.shape[2:], self._padding, grid, strides, strict=True):
            pads = [before, points * stride - size - before, *pads]
        images, backprops = at_least_float32(self.images), at_least_float32(self.backprops)
        images = F.pad(images, pads) if any(pads) else images
        gaps = [amount for reach in reversed(reaches[1:]) for amount in (0, reach)]
        backprops = F.pad(backprops, gaps) if any(gaps) else backprops
        left = backprops.flatten(2)[..., :length].unflatten(1, (self._groups, -1)).flatten(0, 1)

        def seen() -> Iterator[Tensor]:
            phases: dict[tuple[int, ...], Tensor] = {}
            for element in itertools.product(*map(range, self.shape[2:])):
                offsets = [index * dilation for index, dilation in zip(element, self._dilation, strict=True)]
                phase = tuple(offset % stride for offset, stride in zip(offsets, strides, strict=True))
                if phase not in phases:
                    steps = (slice(first, None, stride) for first, stride in zip(phase, strides, strict=True))
                    index = (slice(None), slice(None), *steps)
                    phases[phase] = images[index].flatten(2).unflatten(1, (self._groups, -1)).flatten(0, 1)
                start = sum(offset // stride * row for offset, stride, row in zip(offsets, strides, rows, strict=True))
                yield phases[phase][..., start : start + length]

        return left, seen()

    def gram(self) -> Squares:
        return self._as_outer().gram()

    def formed(self) -> Dense:
        n, (groups, _, p, d) = self.batch_size, self.sizes
        if n == 0 or d < _FEW_SEEN:
            return self._as_outer().formed()
        left, seen = self._shifted()
        kernel = math.prod(self.shape[2:])
        products = left.new_empty(kernel, n * groups, p, d // kernel)
        for product, right in zip(products, seen, strict=True):
            torch.bmm(left, right.mT, out=product)
        return KernelMajor(products.view(kernel, n, -1), self.shape)

    def measured(self, room: Room = NO_ROOM) -> Measured:
        return self._as_outer().measured(room) if self.sizes[1] == 1 else super().measured(room)

    def weighted_sum(self, coef: Tensor) -> Tensor:
        if self.batch_size == 0:
            return at_least_float32(self.backprops).new_zeros(self.shape)
        if self.backprops.is_complex():
            # The kernels of weight gradients are of real numbers.
            return self._as_outer().weighted_sum(coef)
        images, backprops = at_least_float32(self.images), at_least_float32(self.backprops)
        coef = coef.to(backprops.dtype).view(-1, *[1] * (backprops.dim() - 1))
        kernel = _WEIGHT_GRADIENTS[len(self._stride)]
        return kernel(images, self.shape, coef * backprops, self._stride, self._padding, self._dilation, self._groups)

    def norm_of_terms(self) -> Tensor:
        images, backprops = (
            widest(side).abs().square().unflatten(1, (self._groups, -1)).sum(2)
            for side in (self.images, self.backprops)
        )
        seen = self._windows(images).flatten(-len(self._stride)).sum(-1)
        return (seen * backprops).flatten(1).sum(1).sqrt().to(at_least_float32(self.backprops).dtype.to_real())

    def materialize(self) -> Tensor:
        return self.formed().materialize()

    def inner(self, other: PerSampleGradient) -> Tensor:
        return self.formed().inner(other)

    def _summable(self) -> Outer | Dense:
        """A form whose sum with others is simple: patches or gradients, whatever takes less."""
        _, positions, p, _ = self.sizes
        return self._as_outer() if positions <= p else self.formed()

    @classmethod
    def joined(cls, forms: Sequence[Convolution]) -> PerSampleGradient:
        return add([form._summable() for form in forms])

    def sum_over_uses(self, uses: int) -> PerSampleGradient:
        return self._summable().sum_over_uses(uses)
