"""From a criterion to one loss a sample, whose ``backward()`` leaves the clipped sum of the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping as OpacusLoss
from torch import Tensor

from opacus_fgc._compat.opacus import wrapped_model
from opacus_fgc.backward import Backward, book_keeping, double_backward
from opacus_fgc.certificates.batch import Batch, unit_numbers
from opacus_fgc.criterion.reduction import check_criterion
from opacus_fgc.criterion.sample_losses import SampleLosses, by_unit
from opacus_fgc.errors import PrivacyValueError
from opacus_fgc.grad_sample_module import GradSampleHooksFastGradientClipping
from opacus_fgc.optimizer import DPOptimizerFastGradientClipping
from opacus_fgc.private_loss import DPTensorFastGradientClipping

MODES: dict[str, Backward] = {"ghost": double_backward, "ghost_bk": book_keeping}
"""How each ``grad_sample_mode`` that this package serves gets the clipped sum; all others are Opacus' own."""

NAMES = {"ghost_fsdp": "ghost", "ghost_tp": "ghost"}
"""Opacus' names for "ghost" by how a model is laid out over processes, which shows from the model."""


class DPLossFastGradientClipping(OpacusLoss):
    """A criterion that returns one loss a sample, as a `DPTensorFastGradientClipping`.

    Args:
        module: the wrapped model, or the hooks on it.
        optimizer: the private optimizer; it is attached to the module.
        criterion: a criterion with a ``reduction`` (any of ``torch.nn``'s), a function (any of ``torch.nn.functional``'s), or any
            callable, batch first.
        loss_reduction: how the losses within a sample are reduced, "mean" or "sum", as the criterion's own ``reduction``
            says. It has to be the same on the module and the optimizer.
        backward: how the clipped sum is computed.
        of_units: whether a sample is a unit of several records, so that each call has to say whose they are.

    Raises:
        ValueError: if the reductions or the clipping norms differ, or the criterion cannot be called.
    """

    def __init__(
        self,
        module: GradSampleHooksFastGradientClipping,
        optimizer: DPOptimizerFastGradientClipping,
        criterion: Callable[..., Tensor],
        loss_reduction: str = "mean",
        backward: Backward = double_backward,
        of_units: bool = False,
    ) -> None:
        check_criterion(criterion, loss_reduction, list(wrapped_model(module).parameters()))
        for owner, reduction in (("module", module.loss_reduction), ("optimizer", optimizer.loss_reduction)):
            if reduction != loss_reduction:
                raise ValueError(
                    f"loss_reduction is {loss_reduction!r}, that of the {owner} {reduction!r}; give all the same"
                )
        optimizer.attach(module)
        # Not Opacus' constructor: it writes a `reduction` into criteria that have none, and then trusts in it.
        self.module = module
        self.optimizer = optimizer
        self.criterion = criterion
        self.loss_reduction = loss_reduction
        self.clipped_backward = backward
        self.of_units = of_units
        self._calls = 0

    @property
    def criterion(self) -> Callable[..., Any]:
        """The criterion."""
        return self._losses.criterion

    @criterion.setter
    def criterion(self, criterion: Callable[..., Any]) -> None:
        self._losses = SampleLosses(criterion)

    @contextmanager
    def _aside(self, inputs: Any) -> Iterator[None]:
        """A context for trying the criterion: the model, if it calls that, is not tapped, and comes out as it was."""
        with self.module.hooks_set(False), self.module.undisturbed(wrapped_model(self.module), inputs):
            yield

    def __call__(
        self, *args: Any, shape: Sequence[int] | None = None, unit: Any = None, **kwargs: Any
    ) -> DPTensorFastGradientClipping:
        """Evaluates the criterion.

        Args:
            *args: what the criterion takes.
            shape: for losses of flattened tokens, ``(N * T,)``: the shape ``(N, T, ...)`` before flattening.
            unit: where several records are one sample, of a user say, or views of a picture: whose each of them is, by whole
                numbers of shape ``(N,)`` or other hashable values.
            **kwargs: what the criterion takes by keyword.

        Returns:
            One loss a sample: what the criterion gives for that sample alone. See `criterion.SampleLosses`. With ``unit`` one a
            unit: the mean, or sum, of those of its records.

        Raises:
            ValueError: if the criterion cannot be evaluated by sample, or mixes samples; or if it is not told whose records
                these are, and they are of units.
        """
        if self.of_units and unit is None and torch.is_grad_enabled():
            raise PrivacyValueError(
                "the records of the data set have units (make_private(unit=...)), and the criterion was not told whose those of "
                "this batch are. Have the data set give each record its unit, and call criterion(output, target, unit=...); "
                "an evaluation goes without under torch.no_grad()"
            )
        self._calls += 1
        packed = self._losses.packed(args, kwargs)
        losses = self._losses(
            args,
            kwargs,
            reduction=self.loss_reduction,
            shape=shape,
            packed=packed is not None,
            batch_first=self.module.batch_first,
            due=self.module.certification.schedule.is_due_at(self._calls),
            aside=partial(self._aside, (args, kwargs)),
            model=wrapped_model(self.module),
        )
        packed = None if packed is None else packed.cpu()
        if unit is None:
            batch = Batch(len(losses), packed=packed)
        else:
            unit = unit_numbers(unit, len(losses))
            losses = by_unit(losses, unit, self.loss_reduction)
            if packed is not None:
                packed, unit = unit[packed], None
            elif len(unit) > 1 and self.module.record.batch_size_seen == 1:
                # One row, whose positions are the records.
                packed, unit = unit, None
            batch = Batch(len(losses), unit, packed)
        return DPTensorFastGradientClipping(
            self.module, self.optimizer, losses, self.loss_reduction, self.clipped_backward, batch=batch
        )
