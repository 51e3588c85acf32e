"""Poisson sampling: each sample is in a batch with the same probability, whatever the others do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler, UniformWithReplacementSampler

from opacus_fgc.sampling.draws import Draws

POISSON = (UniformWithReplacementSampler, DistributedUniformWithReplacementSampler)
"""Opacus' samplers of whole batches, which are drawn by Poisson sampling."""


class Drawing:
    """A mix-in for samplers of whole batches whose draws are counted. What is drawn says `batches`."""

    draws: Draws

    def batches(self) -> Iterator[list[int]]:
        """The batches of an epoch, for a loader that counts them itself when it gives them out."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[int]]:
        add = self.draws.begin_elsewhere()
        for batch in self.batches():
            # The length of a rank's part is that of the longest.
            add(len([*iter(batch)]))
            yield batch


class PoissonSampler(Drawing, UniformWithReplacementSampler):
    """Opacus' Poisson sampling, whose draws are counted.

    Args:
        draws: where; a count of its own if None.
        **kwargs: the arguments of Opacus' sampler.
    """

    def __init__(self, *, draws: Draws | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.draws = Draws() if draws is None else draws

    def batches(self) -> Iterator[list[int]]:
        """See `Drawing`."""
        return UniformWithReplacementSampler.__iter__(self)


def poisson_arguments(sampler: Any) -> dict[str, Any]:
    """What a sampler of Opacus draws the batches of all ranks by, as arguments for one of one process."""
    several = isinstance(sampler, DistributedUniformWithReplacementSampler)
    return {
        "num_samples": sampler.total_size if several else sampler.num_samples,
        "sample_rate": sampler.sample_rate,
        "steps": len(sampler),
    }
