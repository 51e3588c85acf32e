"""What the batches of a private loader have to do with steps: each step is on a batch of its own, which was drawn for it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from opacus_fgc.errors import PrivacyValueError

MOST = 2**20
"""How many batches are remembered that no step has used, as in an evaluation on the private loader."""


class Batches:
    """Where the samples of a step come from. This one knows nothing of it: it is for optimizers that are made by hand."""

    def take(self, samples: int, passes: int) -> int:
        """Takes what a step is on.

        Args:
            samples: how many samples it is on.
            passes: how many clipped backward passes it takes, for each of which the accountant counts a batch.

        Returns:
            How many batches were drawn so far, 0 where nobody counts.

        Raises:
            PrivacyValueError: if the account would not be that of the step.
        """
        return 0


class LargestBatch(Batches):
    """Batches of a loader without Poisson sampling, of which the largest is known.

    Args:
        size: says how many samples it has, so far.
        batches: how many batches an epoch has.
    """

    def __init__(self, size: Callable[[], int], batches: int) -> None:
        self.size, self.batches = size, batches

    def take(self, samples: int, passes: int) -> int:
        """See `Batches`: refuses more samples than so many batches have."""
        size = self.size()
        if samples > size * passes:
            of_passes = f", {size * passes} in {passes} backward passes" if passes > 1 else ""
            raise PrivacyValueError(
                f"this step is on {samples} samples, and the data loader's batches have no more than {size}{of_passes}. Each "
                f"backward pass is accounted as one batch of that loader, of which an epoch has {self.batches}. Use the "
                "batches of the loader that make_private returned; for larger steps call make_private with a DataLoader of a "
                "larger batch_size"
            )
        return 0


class Draw(NamedTuple):
    """One batch that was drawn.

    Attributes:
        number: the how many-th it is.
        samples: how many samples it has.
        epoch: the how many-th iterator it came from.
    """

    number: int
    samples: int
    epoch: int


class Draws(Batches):
    """The batches that were drawn, and that no step has used.

    A step takes the first of them that has as many samples; what was drawn before that one was skipped, and is no step's any
    more. So steps are refused just when no choice of draws in their order has their numbers of samples, however far a loader's
    workers draw ahead, and wherever a loop breaks off.

    Args:
        least: how many samples a batch has in which none was drawn: 1 where a loader puts a random one into it.

    Attributes:
        interrupt: called when a loader other than the private one begins to draw, as that of Opacus' `BatchMemoryManager` does.
    """

    def __init__(self, least: int = 0) -> None:
        self.least = least
        self.interrupt: Callable[[], None] = lambda: None
        self._waiting: deque[Draw] = deque(maxlen=MOST)
        self._numbers, self._epochs = itertools.count(1), itertools.count(1)
        self._under_way: int | None = None  # the epoch of the last step, if that used all draws up to it

    def begin(self) -> Callable[[int], None]:
        """Begins an epoch.

        Returns:
            What is to be called with the number of samples of each batch that is drawn in it.
        """
        epoch = next(self._epochs)

        def add(samples: int) -> None:
            self._waiting.append(Draw(next(self._numbers), max(samples, self.least), epoch))

        return add

    def begin_elsewhere(self) -> Callable[[int], None]:
        """Begins an epoch of another loader, in which what was drawn ahead in the one before gets lost."""
        self._waiting.clear()
        self.interrupt()
        return self.begin()

    def take(self, samples: int, passes: int) -> int:
        """See `Batches`: refuses what was not drawn, by its number of samples."""
        waiting = list(self._waiting)
        if len(waiting) < passes:
            raise PrivacyValueError(
                f"a step on {samples} samples without a draw of its own: no batch is left that the data loader from "
                "make_private has drawn, and that no step has used yet. Under Poisson sampling each step is accounted as one "
                "draw of that loader. Iterate over the loader that make_private returned, not over the one that was passed "
                "to it (a framework that keeps a loader of its own has to be given the returned one), and make one step for "
                "each of its batches. For batches that come from elsewhere pass poisson_sampling=False, and a DataLoader of "
                "their size"
            )
        runs = (waiting[start : start + passes] for start in range(len(waiting) - passes + 1))
        run = next((run for run in runs if sum(draw.samples for draw in run) == samples), None)
        if run is None:
            sizes = [draw.samples for draw in waiting[:5]]
            raise PrivacyValueError(
                f"this step is on {samples} samples, but {_has(sizes)}. Under Poisson sampling each step is accounted as one "
                "such batch, in which each sample is once. Call backward() on the whole batch, and step(); "
                "BatchMemoryManager of opacus.utils.batch_memory_manager splits large ones (do not skip a part of one). Where "
                "samples are units of several records, give the criterion the unit of each. "
                "Generated or public samples beside those of the batch: as many as there are, with their losses added, "
                "criterion(a, y) + criterion(b, z)"
            )
        if any(draw.samples == 0 and draw.epoch == self._under_way for draw in waiting[: waiting.index(run[0])]):
            raise PrivacyValueError(
                "a batch without samples was drawn, and skipped. It has a step as well, of noise alone, or else it would "
                "show that nobody was in it. Call backward() and step() on each batch of the loader"
            )
        while self._waiting.popleft() is not run[-1]:
            pass
        self._under_way = None if self._waiting else run[-1].epoch
        return waiting[-1].number


def _has(sizes: Sequence[int]) -> str:
    if len(sizes) == 1:
        return f"the batch that the data loader from make_private has drawn for it has {sizes[0]}"
    listed = ", ".join(map(str, sizes))
    return f"the batches that the data loader from make_private has drawn, and no step has used, have {listed}"
