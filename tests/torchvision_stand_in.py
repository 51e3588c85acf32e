"""What Opacus' unit tests take from torchvision, for where there is no torchvision.

This one module stands for the package and for its submodules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

models = transforms = datasets = sys.modules[__name__]

NAMES = ("torchvision", "torchvision.models", "torchvision.transforms", "torchvision.datasets")


@contextmanager
def installed() -> Iterator[None]:
    """A context in which torchvision can be imported: the real one if there is one, else this module."""
    names = () if find_spec("torchvision") else NAMES
    sys.modules.update(dict.fromkeys(names, sys.modules[__name__]))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class FakeData(Dataset):
    """Random images and labels, the same ones whenever they are asked for."""

    def __init__(
        self, size: int, image_size: Sequence[int], num_classes: int, transform: Callable[[Tensor], Tensor]
    ) -> None:
        self.size = size
        self.image_size = tuple(image_size)
        self.num_classes = num_classes
        self.transform = transform

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, self.image_size, generator=generator, dtype=torch.uint8)
        label = torch.randint(self.num_classes, (), generator=generator)
        return self.transform(image), int(label)


class Compose:
    """One transform after the other."""

    def __init__(self, steps: Sequence[Callable[[Any], Any]]) -> None:
        self.steps = steps

    def __call__(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image


class ToTensor:
    """Bytes to numbers from 0 to 1."""

    def __call__(self, image: Tensor) -> Tensor:
        return image / 255


class Normalize:
    """Shifts and scales each channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


class BatchNormNet(nn.Module):
    """All that the tests want of a model: batch normalization, which mixes samples, and a ``classifier``."""

    def __init__(self, weights: None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.conv(x)).relu().mean((2, 3)))


mobilenet_v3_small = resnet18 = densenet121 = BatchNormNet
