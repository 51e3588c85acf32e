"""Random numbers of Gaussian noise."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from opacus_fgc.distributed.topology import Layout


def generator_of_rank(layout: Layout, generator: torch.Generator | None) -> torch.Generator | None:
    """A generator of noise that no other rank has, also where all ranks set one seed: noise that is used twice hides nothing.

    Args:
        layout: the layout of the model.
        generator: what it is seeded by; torch's default if None.
    """
    if not layout.axes:
        return generator
    device = layout.params[0].device
    source = generator.device if generator is not None else "cpu"
    drawn = torch.randint(2**62, (1,), generator=generator, device=source).item()
    digest = hashlib.sha256(f"noise {drawn} of rank {dist.get_rank()}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
