"""From a criterion to one loss a sample, whose ``backward()`` leaves the clipped sum of the gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping as OpacusLoss
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping as OpacusTensor
from torch import Tensor

from opacus_fgc.checks import check_loss_reduction
from opacus_fgc.grad_sample_module import GradSampleHooksFastGradientClipping
from opacus_fgc.optimizer import DPOptimizerFastGradientClipping
from opacus_fgc.planner import MEMORY, Keep

Backward = Callable[[GradSampleHooksFastGradientClipping, Tensor], None]


def double_backward(module: GradSampleHooksFastGradientClipping, loss_per_sample: Tensor) -> None:
    """Ghost clipping: one backward pass for the norms, one for the clipped sum (Li et al. 2022, arXiv:2110.05679).

    What the first pass can keep in little room is spared the second; see `planner.Memory`.

    Args:
        module: the wrapped model, or the hooks on it.
        loss_per_sample: one loss a sample, shape ``(N,)``.
    """
    _clipped_backward(module, loss_per_sample, MEMORY.ghost)


def book_keeping(module: GradSampleHooksFastGradientClipping, loss_per_sample: Tensor) -> None:
    """Book-keeping: one backward pass, whose activations and backprops give both the norms and the clipped sum.

    Bu et al. 2023, arXiv:2210.00038.

    Args:
        module: the wrapped model, or the hooks on it.
        loss_per_sample: one loss a sample, shape ``(N,)``.
    """
    _clipped_backward(module, loss_per_sample, MEMORY.ghost_bk)


def _clipped_backward(module: GradSampleHooksFastGradientClipping, loss_per_sample: Tensor, keep: Keep) -> None:
    module.check_accumulation()
    coef = module.clipping.coefficients(module.first_pass(loss_per_sample, keep))
    module.add_to_clipped_sum(module.clipped_gradients(coef, loss_per_sample))


class DPTensorFastGradientClipping(OpacusTensor):
    """One loss a sample; looks like the reduced loss, and its ``backward()`` clips.

    Adds, subtracts, multiplies and divides with numbers, with tensors without a gradient (weights of the samples, shape
    ``(N,)``), and with others of its kind.

    Args:
        module: the wrapped model, or the hooks on it.
        optimizer: the optimizer from the same `make_private`.
        loss_per_sample: shape ``(N,)``.
        loss_reduction: "mean" or "sum": what `item` and `detach` show.
        backward: how the clipped sum is computed.
    """

    def __init__(
        self,
        module: GradSampleHooksFastGradientClipping,
        optimizer: DPOptimizerFastGradientClipping,
        loss_per_sample: Tensor,
        loss_reduction: str = "mean",
        backward: Backward = double_backward,
    ) -> None:
        check_loss_reduction(loss_reduction)
        if loss_per_sample.dim() != 1:
            raise ValueError(
                f"the loss has shape {tuple(loss_per_sample.shape)}; it has to be one value a sample, shape (N,)"
            )
        super().__init__(module, optimizer, loss_per_sample, loss_reduction)
        self._backward = backward

    def backward(self) -> None:
        """Adds the sum of the clipped per-sample gradients to the parameters' ``summed_grad``, for `optimizer.step()`.

        Raises:
            NotImplementedError: if some layer's per-sample gradients have no meaning or no known form.
            ValueError: if the loss, the model or the data are such that the sum would not be private; the text says what
                to do.
            RuntimeError: if the loss does not depend on the wrapped model.
        """
        self._backward(self.module, self.loss_per_sample)

    def _with(self, loss_per_sample: Tensor) -> DPTensorFastGradientClipping:
        if loss_per_sample.shape != self.loss_per_sample.shape:
            raise ValueError(
                f"the result has shape {tuple(loss_per_sample.shape)}, the loss {tuple(self.loss_per_sample.shape)}; combine "
                "losses with numbers, with one weight a sample, or with losses of the same samples"
            )
        return DPTensorFastGradientClipping(
            self.module, self.optimizer, loss_per_sample, self.loss_reduction, self._backward
        )

    def _operand(self, other: Any) -> Any:
        if isinstance(other, OpacusTensor):
            if other.loss_reduction != self.loss_reduction:
                raise ValueError(
                    f"losses of different reductions: {self.loss_reduction!r} and {other.loss_reduction!r}"
                )
            return other.loss_per_sample
        if isinstance(other, Tensor) and other.requires_grad:
            raise ValueError(
                "a tensor with a gradient cannot be combined with a private loss, since it has no share for each sample; "
                "compute it with a criterion from make_private, or put penalties on weights into the optimizer"
            )
        return other

    def __add__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._with(self.loss_per_sample + self._operand(other))

    def __radd__(self, other: Any) -> DPTensorFastGradientClipping:
        return self + other

    def __sub__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._with(self.loss_per_sample - self._operand(other))

    def __rsub__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._with(self._operand(other) - self.loss_per_sample)

    def __mul__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._with(self.loss_per_sample * self._operand(other))

    def __rmul__(self, other: Any) -> DPTensorFastGradientClipping:
        return self * other

    def __truediv__(self, other: Any) -> DPTensorFastGradientClipping:
        return self._with(self.loss_per_sample / self._operand(other))

    def __neg__(self) -> DPTensorFastGradientClipping:
        return self._with(-self.loss_per_sample)


class DPLossFastGradientClipping(OpacusLoss):
    """A criterion that returns one loss a sample, as a `DPTensorFastGradientClipping`.

    Args:
        module: the wrapped model, or the hooks on it.
        optimizer: the private optimizer; it is attached to the module.
        criterion: a criterion with a ``reduction`` (any of ``torch.nn``'s), a function that takes ``reduction=`` (any of
            ``torch.nn.functional``'s), or a callable that returns unreduced losses, batch first.
        loss_reduction: how the losses within a sample are reduced, "mean" or "sum", as the criterion's own ``reduction``
            says. It has to be the same on the module and the optimizer.
        backward: how the clipped sum is computed.

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
    ) -> None:
        check_criterion(criterion, loss_reduction)
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

    def __call__(self, *args: Any, shape: Sequence[int] | None = None, **kwargs: Any) -> DPTensorFastGradientClipping:
        """Evaluates the criterion.

        Args:
            *args: what the criterion takes.
            shape: for losses of flattened tokens, ``(N * T,)``: the shape ``(N, T, ...)`` before flattening.
            **kwargs: what the criterion takes by keyword.

        Returns:
            One loss a sample. With reduction "mean" positions whose target is the criterion's ``ignore_index`` do not
            count.

        Raises:
            ValueError: if the criterion's result has no value for each sample.
        """
        losses = self._unreduced(*args, **kwargs)
        if not isinstance(losses, Tensor) or losses.dim() == 0:
            raise ValueError(
                "the criterion returned one value for the whole batch. It has to give each sample its own loss: use a "
                "criterion with a `reduction` attribute or argument, or return unreduced losses of shape (N,)"
            )
        counted = self._counted(losses, args, kwargs)
        if shape is not None:
            losses, counted = losses.reshape(shape[0], shape[1]), counted.reshape(shape[0], shape[1])
        return DPTensorFastGradientClipping(
            self.module, self.optimizer, self._per_sample(losses, counted), self.loss_reduction, self.clipped_backward
        )

    def _unreduced(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self.criterion, "reduction"):
            if takes_reduction(self.criterion):
                kwargs["reduction"] = "none"
            return self.criterion(*args, **kwargs)
        reduction = self.criterion.reduction
        self.criterion.reduction = "none"
        try:
            return self.criterion(*args, **kwargs)
        finally:
            self.criterion.reduction = reduction

    def _counted(self, losses: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Which of the losses count in a mean: those whose target is not to be ignored."""
        ignore_index = getattr(self.criterion, "ignore_index", None)
        target = kwargs.get("target", args[1] if len(args) > 1 else None)
        if ignore_index is None or not isinstance(target, Tensor) or target.shape != losses.shape:
            return torch.ones_like(losses, dtype=torch.bool)
        return target != ignore_index

    def _per_sample(self, losses: Tensor, counted: Tensor) -> Tensor:
        if losses.dim() == 1:
            return losses
        sums = losses.flatten(1).sum(1)
        return sums if self.loss_reduction == "sum" else sums / counted.flatten(1).sum(1).clamp(min=1)


def takes_reduction(criterion: Callable[..., Any]) -> bool:
    """Whether a criterion without a ``reduction`` attribute has an argument of that name."""
    try:
        return "reduction" in inspect.signature(criterion).parameters
    except (TypeError, ValueError):
        return False


def check_criterion(criterion: object, loss_reduction: str) -> None:
    """Raises a ValueError if no private loss can be made of a criterion."""
    check_loss_reduction(loss_reduction)
    if not callable(criterion):
        raise ValueError(f"the criterion is {criterion!r}, which cannot be called")
    reduction = getattr(criterion, "reduction", loss_reduction)
    if reduction != loss_reduction:
        raise ValueError(
            f"the criterion's reduction is {reduction!r}, loss_reduction {loss_reduction!r}; give both the same"
        )
