"""Sums, differences and multiples of private losses, sample by sample."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from opacus_fgc.certificates.batch import Batch
from opacus_fgc.errors import PrivacyValueError


class Arithmetic:
    """A private loss that is combined with numbers, with one weight a sample, and with others of the same samples."""

    module: Any
    batch: Batch
    loss_per_sample: Tensor
    loss_reduction: str

    def _with(self, loss_per_sample: Tensor) -> Any:
        raise NotImplementedError

    def _operand(self, other: Any) -> Any:
        if isinstance(other, Arithmetic):
            if other.module is not self.module:
                raise ValueError(
                    "losses of two private models; each has an optimizer and a noise of its own, so call backward() on each"
                )
            if other.loss_reduction != self.loss_reduction:
                raise ValueError(
                    f"losses of different reductions: {self.loss_reduction!r} and {other.loss_reduction!r}"
                )
            if other.loss_per_sample.shape != self.loss_per_sample.shape:
                raise ValueError(
                    f"losses of different batches, of {len(self.loss_per_sample)} and {len(other.loss_per_sample)} samples, "
                    "so that they are not one loss a sample. Beside a batch of the private loader take as many generated "
                    "samples as it has (torch.randn(len(x), ...)), or as many public ones"
                )
            if not other.batch.is_as(self.batch):
                raise PrivacyValueError(
                    "losses whose samples are not the same: their records' units (or the sequences that are packed) come in "
                    "another order, or are others. Give the criterion the same unit, or position_ids, for both"
                )
            return other.loss_per_sample
        if isinstance(other, Tensor) and other.requires_grad:
            raise PrivacyValueError(
                "a tensor with a gradient cannot be combined with a private loss, since it has no share for each "
                "sample. What is of the data comes from a criterion of make_private. What is not (a proximal term, a "
                "penalty on weights) is public: its gradient is added after the noise, by a hook that "
                "optimizer.original_optimizer.register_step_pre_hook(hook) calls in each step, as in `param.grad += "
                "gradient` (of the mean loss, with loss_reduction='mean')"
            )
        return other

    def __add__(self, other: Any) -> Any:
        return self._with(self.loss_per_sample + self._operand(other))

    def __radd__(self, other: Any) -> Any:
        return self + other

    def __sub__(self, other: Any) -> Any:
        return self._with(self.loss_per_sample - self._operand(other))

    def __rsub__(self, other: Any) -> Any:
        return self._with(self._operand(other) - self.loss_per_sample)

    def __mul__(self, other: Any) -> Any:
        caller = sys._getframe(1).f_code
        if caller.co_name == "scale" and "grad_scaler" in caller.co_filename:
            raise TypeError(
                "torch's GradScaler scales a loss before it is clipped, and skips steps by what the data is, which no noise "
                "covers; use opacus_fgc.GradScaler"
            )
        return self._with(self.loss_per_sample * self._operand(other))

    def __rmul__(self, other: Any) -> Any:
        return self * other

    def __truediv__(self, other: Any) -> Any:
        return self._with(self.loss_per_sample / self._operand(other))

    def __neg__(self) -> Any:
        return self._with(-self.loss_per_sample)

    # In place there are but names to change.
    __iadd__, __isub__, __imul__, __itruediv__ = __add__, __sub__, __mul__, __truediv__
