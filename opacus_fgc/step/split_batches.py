"""Batches that come in parts, as Opacus' `BatchMemoryManager` splits them: parts are summed, and the last one steps."""

from __future__ import annotations

from opacus_fgc.errors import PrivacyValueError
from opacus_fgc.noise.noisy_optimizer import NoisyOptimizer
from opacus_fgc.step.clipped_sum import ClippedSum


class SplitBatches(NoisyOptimizer):
    """An optimizer that keeps the clipped sum until all parts of a batch came, and gives it up where one is missing."""

    # How many parts of batches were drawn, and not stepped on, at the first of them.
    _most_signals: int | None = None

    def _check_signals(self) -> None:
        """Raises a PrivacyValueError if a part of a split batch had no step: its signal would be taken for the next one's."""
        waiting = len(self._step_skip_queue)
        if not waiting or self._most_signals is None:
            # Workers, and some loops, draw so far ahead.
            self._most_signals = waiting or None
        elif waiting > self._most_signals:
            del self._step_skip_queue[: waiting - self._most_signals + 1]  # this part's as well
            self._drop_clipped_sum()
            raise PrivacyValueError(
                "a part of a batch that was split was drawn, and skipped, so that its other parts are not the batch that was "
                "drawn. Under BatchMemoryManager call backward() and step() on every part, also on one without samples"
            )

    def drop_unfinished(self) -> None:
        """Gives up what skipped steps have summed so far, as where a loop breaks off within a batch."""
        self._step_skip_queue.clear()
        self._most_signals = None
        if self._is_last_step_skipped:
            self._drop_clipped_sum()

    def _drop_clipped_sum(self) -> None:
        self._is_last_step_skipped = False
        if self.module is None:
            return
        # Of all that were clipped: a parameter may come to the optimizer later, and must not bring the sums of past steps.
        for param in self.module.trainable_parameters:
            param.summed_grad = None
        self.module.clipped_sum = ClippedSum()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients, and the clipped sum unless the last step was skipped to go on summing.

        Args:
            set_to_none: whether ``p.grad`` becomes None, as with torch, rather than 0. Of what is None a step need not look
                whether it is 0, for which a GPU has to be waited for.
        """
        super().zero_grad(set_to_none)
        if not self._is_last_step_skipped:
            self._drop_clipped_sum()
        elif self.module is not None:
            self.module.clipped_sum.passes = 0
