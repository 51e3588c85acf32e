"""Time of a step's noise: secure, and torch's own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from opacus_fgc.noise.secure import SecureGenerator

VALUES, ROUNDS = 22_715_526, 7


def seconds(add_noise: Callable[[], Tensor]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    add_noise()
    return time.perf_counter() - start


def main() -> None:
    """Prints the medians, and their ratio."""
    values = torch.zeros(VALUES)
    ways: list[Callable[[], Tensor]] = [
        lambda: values + torch.normal(0.0, 1.0, values.shape),
        lambda: SecureGenerator().add_normal(values, 1.0),
    ]
    rounds = [[seconds(way) for way in ways] for _ in range(ROUNDS)]
    plain, secure = map(statistics.median, zip(*rounds, strict=True))
    print(f"{VALUES:,} values: torch {plain:.2f} s, secure {secure:.2f} s, ratio {secure / plain:.1f}")


if __name__ == "__main__":
    main()
