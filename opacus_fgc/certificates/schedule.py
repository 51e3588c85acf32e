"""When certificates are made."""

from __future__ import annotations

import random
import warnings
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from opacus_fgc.certificates.backprops import Backprops


@dataclass
class Schedule:
    """When certificates are made: at first, whenever something is new, and again at passes that thin out.

    Args:
        how: "always": in each backward pass; "thinning": whenever something structural is new, and again when there have been
            four times as many passes as at the last time (at first twice as many); "never".

    Attributes:
        passes: how many backward passes there were.
    """

    how: str = "thinning"
    passes: int = 0
    _next: int = 1
    _largest: int = 1
    _certified: set[Hashable] = field(default_factory=set)
    _in_order: set[Hashable] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.how not in ("always", "thinning", "never"):
            raise ValueError(f"certify is {self.how!r}; it is 'always', 'thinning' or 'never'")
        if self.how == "never":
            warnings.warn(
                "certify='never': nothing proves that each row that a layer works on belongs to one sample, nor that "
                "what is computed for a sample depends on that sample alone. If the model or the criterion mixes "
                "samples, one of them can move the clipped sum by any multiple of max_grad_norm, and nobody will notice",
                stacklevel=4,
            )

    def is_due(self, size: int, structure: Hashable) -> bool:
        """Whether a pass, which is counted by this, needs certificates.

        Args:
            size: number of its samples.
            structure: what is equal for passes that the same certificate is for.
        """
        if self.how == "never" or size == 0:
            return False
        self.passes += 1
        new = size > self._largest or structure not in self._certified
        return self.how == "always" or new or self.passes >= self._next

    def is_due_at(self, count: int) -> bool:
        """Whether what is counted by ``count``, and for which nothing can be new, is due."""
        return self.how == "always" or (self.how == "thinning" and count & (count - 1) == 0)

    @property
    def is_expected(self) -> bool:
        """Whether the next pass is due whatever it is like."""
        return self.how != "never" and (self.how == "always" or self.passes + 1 >= self._next)

    def is_new(self, structure: Hashable) -> bool:
        """Whether there is no certificate for such passes yet."""
        return structure not in self._certified

    def is_in_order(self, structure: Hashable, moved: Hashable) -> bool:
        """Whether rows that are moved by such indices are known to be the samples in order."""
        return not moved or (structure, moved) in self._in_order

    def found_in_order(self, structure: Hashable, moved: Hashable) -> None:
        """Notes that they are."""
        self._in_order.add((structure, moved))

    def made(self, size: int, structure: Hashable) -> None:
        """Notes that certificates were made."""
        self._next = (2 if self.passes < 4 else 4) * self.passes
        if size > 1:
            # A batch of one says nothing of how samples touch each other.
            self._largest = max(self._largest, size)
            self._certified.add(structure)


@dataclass
class Certification:
    """What a model does about certificates.

    Attributes:
        schedule: when they are made.
        witness: what the taps are shown in a backward pass, if it is looked at.
        certifying: whether that pass is of no other consequence.
        choices: chooses weights of losses, and samples that are replaced.
        dealt_out: the layers whose rows were not the samples in order at some time.
        by_position: those of them of which each position is a row.
    """

    schedule: Schedule
    witness: Backprops | None = None
    certifying: bool = False
    choices: random.Random | None = None
    dealt_out: set[Any] = field(default_factory=set)
    by_position: set[Any] = field(default_factory=set)
