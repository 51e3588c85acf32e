"""The phases of a step."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """How far a step is.

    A step goes from `FORWARD` to `NORM_PASS`. What it cannot take from the norm pass it sums in a `WEIGHTED_PASS` to the taps,
    and is in its `NORM_PASS` again. The next forward begins another step; after an error there is none.
    """

    IDLE = "idle"
    """No forward ran yet, or what it left was given up."""

    FORWARD = "forward"
    """Layers are called; the step notes their uses."""

    NORM_PASS = "norm pass"
    """Backprops come, and norms are measured."""

    WEIGHTED_PASS = "weighted pass"
    """Backprops come once more, and gradients are summed."""

    @property
    def is_backward(self) -> bool:
        """Whether backward has begun, so that the next forward is another step's."""
        return self in (Phase.NORM_PASS, Phase.WEIGHTED_PASS)
