"""Which samples a batch has, drawn by the secure generator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

from opacus_fgc.noise.secure import SecureGenerator
from opacus_fgc.sampling.loaders import with_batches
from opacus_fgc.sampling.poisson import POISSON, PoissonSampler, poisson_arguments


class SecurePoissonSampler(PoissonSampler):
    """Poisson sampling, with the arguments of Opacus' sampler: each sample is in a batch with probability ``sample_rate``."""

    generator: SecureGenerator

    def batches(self) -> Iterator[list[int]]:
        """See `sampling.poisson.Drawing`."""
        for _ in range(self.steps):
            yield (self.generator.uniform(self.num_samples) < self.sample_rate).nonzero().flatten().tolist()


class SecureRandomSampler(RandomSampler):
    """Shuffling, with the arguments of torch's sampler; without replacement, each sample once."""

    generator: SecureGenerator
    once_an_epoch = True

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator.permutation(len(self.data_source)).tolist())


def secured(loader: DataLoader, generator: SecureGenerator) -> DataLoader:
    """A loader like another, whose batches the secure generator draws.

    What else draws random numbers in a loader, such as the seeds of its workers, is not changed. The sampling is in the main
    process, with any number of workers.

    Args:
        loader: a loader with Poisson sampling, with ``shuffle=True``, or with the samples as they lie. It is not changed.
        generator: draws the batches.

    Raises:
        NotImplementedError: if batches come to be in any other way.
    """
    return with_batches(loader, _secured(loader.batch_sampler, generator), generator=None)


def _secured(batch_sampler: Any, generator: SecureGenerator) -> Sampler[list[int]]:
    if type(batch_sampler) in (*POISSON, PoissonSampler):
        return SecurePoissonSampler(**poisson_arguments(batch_sampler), generator=generator)
    sampler = batch_sampler.sampler if type(batch_sampler) is BatchSampler else None
    if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(sampler.data_source):
        shuffled = SecureRandomSampler(sampler.data_source, generator=generator)
        return BatchSampler(shuffled, batch_sampler.batch_size, batch_sampler.drop_last)
    if type(batch_sampler) is SecurePoissonSampler or type(sampler) in (SecureRandomSampler, SequentialSampler):
        return batch_sampler
    raise NotImplementedError(
        f"with secure_mode=True the batches of this data loader cannot be drawn securely: its batch sampler is a "
        f"{type(batch_sampler).__name__}, its sampler a {type(sampler).__name__}. Leave poisson_sampling=True, or make the "
        "DataLoader with batch_size and shuffle alone"
    )
