"""What is measured: a model, a batch and a loss each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from opacus.layers import DPLSTM
from torch import Tensor, nn


class Block(nn.Module):
    """A transformer block, layer norms first."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, T, width)`` to the same shape."""
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Positions(nn.Module):
    """Adds position parameters, and puts a class token in front if asked to."""

    def __init__(self, length: int, width: int, class_token: bool) -> None:
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width)) if class_token else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, T, width)`` to ``(N, length, width)``."""
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return x + self.position


class Transformer(nn.Module):
    """Tokens to classes, or to the next token."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        classes: int = 0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = Positions(length, width, class_token=False)
        self.blocks = nn.Sequential(*[Block(width, heads, causal=not classes) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes or vocabulary, bias=not tied)
        self.pooled = bool(classes)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens ``(N, T)`` to logits ``(N, classes)`` or ``(N, vocabulary, T)``."""
        h = self.norm(self.blocks(self.positions(self.embedding(x))))
        return self.head(h.mean(1)) if self.pooled else self.head(h).mT


class Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.GroupNorm(8, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.GroupNorm(8, channels),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.around = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.GroupNorm(8, channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to images."""
        return F.relu(self.body(x) + self.around(x))


def resnet18(width: int = 32) -> nn.Module:
    """ResNet-18 for small images, with group norms."""
    channels = [width, width, 2 * width, 4 * width, 8 * width]
    blocks: list[nn.Module] = []
    for i in range(1, 5):
        blocks += [Residual(channels[i - 1], channels[i], 1 if i == 1 else 2), Residual(channels[i], channels[i], 1)]
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))


class ViT(nn.Module):
    """A vision transformer with class token and position parameters."""

    def __init__(self, size: int = 32, patch: int = 4, width: int = 192, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = Positions(1 + (size // patch) ** 2, width, class_token=True)
        self.blocks = nn.Sequential(*[Block(width, 3, causal=False) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images ``(N, 3, size, size)`` to logits ``(N, 10)``."""
        h = self.positions(self.patches(x).flatten(2).mT)
        return self.head(self.norm(self.blocks(h))[:, 0])


class Recurrent(nn.Module):
    """An LSTM on tokens: Opacus', or torch's own."""

    def __init__(self, kind: Callable[..., nn.Module] = DPLSTM) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 64)
        self.lstm = kind(64, 128, batch_first=True)
        self.head = nn.Linear(128, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens ``(N, T)`` to logits ``(N, 2)``."""
        return self.head(self.lstm(self.embedding(x))[0][:, -1])


class LoRA(nn.Module):
    """A frozen linear layer with a trainable correction of low rank."""

    def __init__(self, layer: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a, self.b = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        return self.layer(x) + self.b(self.a(x))


def lora() -> nn.Module:
    """LoRA on queries and values of a frozen transformer."""
    model = Transformer(2000, 128, classes=2).requires_grad_(False)
    for block in model.blocks:
        block.q, block.v = LoRA(block.q), LoRA(block.v)
    model.head.requires_grad_(True)
    return model


@dataclass(frozen=True)
class Workload:
    """One row of the benchmark.

    Attributes:
        model: makes it.
        inputs: makes the batch, given its size.
        target: makes the target, given the batch size.
        batch: its size.
        large: whether it is left out on a CPU unless asked for.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    target: Callable[[int], Tensor]
    batch: int
    large: bool = False


@dataclass(frozen=True)
class Sweep:
    """One kind of workload at growing sizes.

    Attributes:
        title: what it is called.
        axis: what grows.
        points: the workload at each size.
        constant: what does not grow with it, though it might.
    """

    title: str
    axis: str
    points: dict[int, Workload]
    constant: str = ""

    @property
    def heading(self) -> str:
        """What stands over its table."""
        return f"{self.title} by {self.axis}{self.constant and f' ({self.constant})'}"

    def names(self) -> dict[int, str]:
        """The name of the workload at each size."""
        return {size: f"{self.title}, {self.axis}={size}" for size in self.points}


def tokens(length: int, vocabulary: int = 2000) -> Callable[[int], Tensor]:
    """Random tokens."""
    return lambda n: torch.randint(vocabulary, (n, length))


def classes(count: int) -> Callable[[int], Tensor]:
    """Random classes."""
    return lambda n: torch.randint(count, (n,))


def images(n: int) -> Tensor:
    """Random images."""
    return torch.randn(n, 3, 32, 32)


def mlp() -> nn.Module:
    """Three layers."""
    return nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))


def perceptron(batch: int) -> Workload:
    """The MLP on random vectors."""
    return Workload(mlp, lambda n: torch.randn(n, 1024), classes(10), batch)


def residual(batch: int) -> Workload:
    """ResNet-18 on random images."""
    return Workload(resnet18, images, classes(10), batch)


def text(length: int) -> Workload:
    """A text classifier, on as many tokens whatever the length."""
    return Workload(lambda: Transformer(2000, length, classes=2), tokens(length), classes(2), 2048 // length)


def language(length: int, tied: bool = False) -> Workload:
    """A language model, on as many tokens whatever the length."""
    return Workload(lambda: Transformer(2000, length, tied=tied), tokens(length), tokens(length), 2048 // length)


def gpt2(
    length: int, batch: int, width: int = 768, depth: int = 12, heads: int = 12, vocabulary: int = 50257
) -> Workload:
    """A language model of the size of GPT-2 small, if nothing else is said."""
    words = tokens(length, vocabulary)
    return Workload(
        lambda: Transformer(vocabulary, length, width, depth, heads, tied=True), words, words, batch, large=True
    )


MAIN = {
    "MLP": perceptron(128),
    "text classifier, T=128": text(128),
    "language model, T=128": language(128),
    "language model, tied, T=128": language(128, tied=True),
    "language model, T=512": language(512),
    "language model, tied, T=512": language(512, tied=True),
    "ResNet-18 GroupNorm": residual(32),
    "ViT": Workload(ViT, images, classes(10), 16),
    "DPLSTM, T=32": Workload(Recurrent, tokens(32, 1000), classes(2), 32),
    "LSTM, T=32": Workload(partial(Recurrent, nn.LSTM), tokens(32, 1000), classes(2), 32),
    "LoRA": Workload(lora, tokens(128), classes(2), 16),
    "GPT-2 small, T=256": gpt2(256, 16),
    "GPT-2 small, T=1024": gpt2(1024, 4),
}
SWEEPS = [
    Sweep("text classifier", "T", {length: text(length) for length in (32, 64, 128, 256, 512, 1024)}, "B*T = 2048"),
    Sweep("MLP", "B", {batch: perceptron(batch) for batch in (1, 4, 16, 64)}),
    Sweep("ResNet-18 GroupNorm", "B", {batch: residual(batch) for batch in (1, 4, 16, 32)}),
]
WORKLOADS = MAIN | {name: sweep.points[size] for sweep in SWEEPS for size, name in sweep.names().items()}
