"""Which samples each rank has of a batch."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from opacus_fgc.distributed.agreement import check_agreement
from opacus_fgc.distributed.topology import Layout
from opacus_fgc.errors import PrivacyValueError
from opacus_fgc.noise.secure import CommonSecureGenerator, SecureGenerator
from opacus_fgc.sampling.draws import Draws
from opacus_fgc.sampling.loaders import counted
from opacus_fgc.sampling.poisson import Drawing, PoissonSampler, poisson_arguments
from opacus_fgc.sampling.secure import SecurePoissonSampler


class Part(list[int]):
    """What one rank has of a batch. Its length is that of the largest part of all ranks.

    So whoever divides it into physical batches by its length, as Opacus' `BatchMemoryManager` does, makes as many on every rank,
    the last ones maybe empty: under FSDP each forward has to be on all ranks.

    Args:
        indices: this rank's samples.
        longest: how many samples the largest part has.
    """

    def __init__(self, indices: list[int], longest: int) -> None:
        super().__init__(indices)
        self._longest = longest

    def __len__(self) -> int:
        return self._longest


class PartSampler(Drawing, DistributedUniformWithReplacementSampler):
    """Poisson sampling over the samples of all ranks, of which each rank has its own.

    Sample ``i`` is rank ``i % ranks``'s and never another's, so that no sample can be in a batch twice. All ranks draw the
    whole batch, by one stream of random numbers, so that they know of each other's parts. Opacus' sampler has ranks draw
    by streams of their own, which are the same one where a script sets a seed, so that samples come and go together; and it
    leaves out empty batches, so that the ranks' steps do not match.

    Args:
        whole: draws the whole batch; its generator has to give the same on all ranks.
        rank: this rank, of those that have different samples.
        ranks: how many of them there are.
    """

    def __init__(self, whole: PoissonSampler, rank: int, ranks: int) -> None:
        super().__init__(
            total_size=whole.num_samples, sample_rate=whole.sample_rate, steps=whole.steps, generator=whole.generator
        )
        self.whole, self.draws = whole, Draws()
        self.rank, self.num_replicas = rank, ranks
        self.num_samples = len(range(rank, whole.num_samples, ranks))

    def batches(self) -> Iterator[list[int]]:
        """See `sampling.poisson.Drawing`."""
        for batch in self.whole.batches():
            sizes = Counter(index % self.num_replicas for index in batch)
            own = [index for index in batch if index % self.num_replicas == self.rank]
            yield Part(own, max(sizes.values(), default=0))


def common_generator(layout: Layout, generator: Any) -> Any:
    """A generator that gives the same numbers on all ranks of a model.

    Args:
        layout: the layout of the model.
        generator: what a torch generator is seeded by, torch's default if None; or a `SecureGenerator`.
    """
    if isinstance(generator, SecureGenerator):
        return CommonSecureGenerator(layout.common(secrets.token_bytes(32)))
    generator = torch.default_generator if generator is None else generator
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    return torch.Generator().manual_seed(int.from_bytes(layout.common(int(seed).to_bytes(8, "big")), "big"))


def shared(loader: DataLoader, layout: Layout, generator: Any) -> DataLoader:
    """A loader like one with Poisson sampling in one process, which gives each rank its part of a batch.

    Args:
        loader: it is not changed.
        layout: the layout of the model.
        generator: gives the same numbers on all ranks; see `common_generator`.
    """
    drawn = loader.batch_sampler
    sampler = SecurePoissonSampler if isinstance(drawn, SecurePoissonSampler) else PoissonSampler
    whole = sampler(**poisson_arguments(drawn), generator=generator)
    return counted(loader, PartSampler(whole, layout.data_rank, layout.data_ranks), generator=None)


def check_parts(loader: DataLoader, layout: Layout) -> None:
    """Raises a PrivacyValueError unless each sample is on one rank only, in a loader without Poisson sampling.

    Args:
        loader: the loader.
        layout: the layout of the model.
    """
    if layout.data_ranks == 1:
        return
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if (
        not isinstance(sampler, DistributedSampler)
        or (sampler.num_replicas, sampler.rank) != (layout.data_ranks, layout.data_rank)
        or (len(loader) == 1 and not sampler.drop_last and sampler.total_size > len(loader.dataset))  # type: ignore[arg-type]
    ):
        raise PrivacyValueError(
            "with several ranks and without Poisson sampling a sample could be in a batch several times, on several ranks, and "
            "count several times. Make the DataLoader with sampler=torch.utils.data.DistributedSampler(dataset, num_replicas="
            f"{layout.data_ranks}, rank={layout.data_rank}, drop_last=True), or leave poisson_sampling=True"
        )
    check_agreement(layout, {"the sampler's seed": sampler.seed, "the sampler's shuffle": sampler.shuffle})
