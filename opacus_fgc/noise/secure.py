"""Random numbers that nobody can predict, for ``secure_mode=True``."""

from __future__ import annotations

import math
import secrets

import torch
from torch import Tensor

GRID = 20
"""Noisy values are multiples of ``2**-GRID`` of the noise's standard deviation, which is rounded down to a power of two."""

CHUNK = 2**17
"""How many values get their noise at a time: few enough for a cache, and enough for torch to use many threads."""


class SecureGenerator:
    """Random numbers from AES-256 in counter mode, each call with a key of its own from the operating system.

    There is no state. So there is none to leak by a checkpoint or a pickle, and copies, forked processes and threads do not
    repeat each other's numbers. Nor can there be a seed.

    The cipher is OpenSSL's, from the package `cryptography`: kept by a team, with wheels for all systems, and it goes
    with any numpy. The alternative, `randomgen.ChaCha` under numpy's `Generator`, would spare the Box-Muller formula here. It
    takes about twice the time on one thread, has one author, and rejects draws, so that its time depends on the noise.

    Raises:
        ImportError: if the package `cryptography` is missing.
    """

    def __init__(self) -> None:
        try:
            from cryptography.hazmat.primitives import ciphers  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "secure_mode=True takes its random numbers from the package cryptography, which is not installed: pip install "
                "opacus_fgc[secure]"
            ) from error

    def _key(self) -> tuple[bytes, bytes]:
        """A key, and where to start to count: a pair that no other call has."""
        return secrets.token_bytes(32), bytes(16)

    def words(self, *shape: int) -> Tensor:
        """Random bits, int64 of any value, with the given shape."""
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        key, start = self._key()
        cipher = Cipher(algorithms.AES256(key), modes.CTR(start)).encryptor()
        return torch.frombuffer(bytearray(cipher.update(bytes(8 * math.prod(shape)))), dtype=torch.int64).view(shape)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform on the multiples of ``2**-53`` in ``[0, 1)``, float64 with the given shape."""
        return (self.words(*shape) & (2**53 - 1)).double().mul_(2**-53)

    def permutation(self, n: int) -> Tensor:
        """The numbers from 0 to ``n - 1`` in an order where each is as likely as the other, int64."""
        return self.words(n).argsort()

    def normal(self, n: int) -> Tensor:
        """Standard normal, float64 of shape ``(n,)``, by a way that floating-point attacks do not undo.

        Which numbers a sampler can give, in floating point, depends on its arithmetic, and shows what noise was added (Mironov
        2012; Jin et al., arXiv:2112.05307). Half the sum of four normal draws can be nearly all of them, in so many ways that
        none can be traced (Holohan and Braghin, arXiv:2107.10138, section 5.1). Box-Muller makes draws in pairs. The first draw
        is thrown away, as there, so that each value has its four from four pairs.
        """
        radius, angle = self.uniform(2, 2, n + 1)
        radius = (1 - radius).log_().mul_(-2).sqrt_()
        angle.mul_(2 * math.pi)
        return ((radius * angle.cos())[:, 1:] + (radius * angle.sin())[:, :-1]).sum(0) / 2

    def add_normal(self, values: Tensor, std: float) -> Tensor:
        """Values plus normal noise, rounded to a grid that depends on ``std`` alone.

        Noise, sum and rounding are in float64 whatever the values' dtype, on the CPU. The values' own dtype comes last, and is
        post-processing. In float32 the draws would have 24 bits, and the sum would tell: the gaps between floats grow with
        their size, so ``value + noise`` has no finer bits than value and noise leave it, and a result near 0 that has them
        excludes every value that is not near 0 (Haney et al., arXiv:2207.13793). On one grid for all values nothing is excluded.
        The grid is too fine to cost accuracy, and coarse enough that some ``2**31`` numbers of float64 lie in each of its steps
        where the noise lies, so that each step has the probability that it has in real arithmetic.

        No draw is rejected, so that the time says little of the noise. What is not covered: that the clipped sum was rounded
        itself, in the order in which it was summed.

        Args:
            values: any shape, floating dtype and device.
            std: standard deviation of the noise, as a number from 0 on. With 0 the values are not changed.

        Returns:
            A new tensor with the shape, dtype and device of ``values``.
        """
        if std == 0:
            return values.detach().clone()
        grid = 2.0 ** (math.floor(math.log2(std)) - GRID)
        flat = values.detach().cpu().reshape(-1)
        noisy = torch.empty_like(flat)
        for source, target in zip(flat.split(CHUNK), noisy.split(CHUNK), strict=True):
            total = self.normal(len(source)).mul_(std).add_(source)
            target.copy_(total.div_(grid).round_().mul_(grid))
        return noisy.view(values.shape).to(values.device)


class CommonSecureGenerator(SecureGenerator):
    """The same numbers on all processes that have its key, which nobody else can predict; for batches, never for noise.

    Args:
        key: 32 random bytes, for this generator alone.
    """

    def __init__(self, key: bytes) -> None:
        super().__init__()
        self._bytes = key
        self._calls = 0

    def _key(self) -> tuple[bytes, bytes]:
        self._calls += 1
        return self._bytes, self._calls.to_bytes(8, "big") + bytes(8)
