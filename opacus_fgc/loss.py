"""From a criterion to one loss a sample, whose ``backward()`` leaves the clipped sum of the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping as OpacusLoss
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping as OpacusTensor
from torch import Tensor

from opacus_fgc.checks import check_loss_reduction
from opacus_fgc.criterion import check_criterion, loss_per_sample
from opacus_fgc.grad_sample_module import GradSampleHooksFastGradientClipping
from opacus_fgc.optimizer import DPOptimizerFastGradientClipping
from opacus_fgc.planner import MEMORY, Keep

Backward = Callable[[GradSampleHooksFastGradientClipping, Tensor, float], None]


def double_backward(
    module: GradSampleHooksFastGradientClipping, loss_per_sample: Tensor, loss_scale: float = 1.0
) -> None:
    """Ghost clipping: one backward pass for the norms, one for the clipped sum (Li et al. 2022, arXiv:2110.05679).

    What the first pass can keep in little room is spared the second; see `planner.Memory`.

    Args:
        module: the wrapped model, or the hooks on it.
        loss_per_sample: one loss a sample, shape ``(N,)``.
        loss_scale: see `GradSampleHooksFastGradientClipping.first_pass`.
    """
    _clipped_backward(module, loss_per_sample, loss_scale, MEMORY.ghost)


def book_keeping(module: GradSampleHooksFastGradientClipping, loss_per_sample: Tensor, loss_scale: float = 1.0) -> None:
    """Book-keeping: one backward pass, whose activations and backprops give both the norms and the clipped sum.

    Bu et al. 2023, arXiv:2210.00038.

    Args:
        module: the wrapped model, or the hooks on it.
        loss_per_sample: one loss a sample, shape ``(N,)``.
        loss_scale: see `GradSampleHooksFastGradientClipping.first_pass`.
    """
    _clipped_backward(module, loss_per_sample, loss_scale, MEMORY.ghost_bk)


def _clipped_backward(
    module: GradSampleHooksFastGradientClipping, loss_per_sample: Tensor, loss_scale: float, keep: Keep
) -> None:
    module.check_accumulation()
    coef = module.coefficients(module.first_pass(loss_per_sample, keep, loss_scale))
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
        loss_scale: what the losses are multiplied with in `backward`; see `GradScaler`.
    """

    def __init__(
        self,
        module: GradSampleHooksFastGradientClipping,
        optimizer: DPOptimizerFastGradientClipping,
        loss_per_sample: Tensor,
        loss_reduction: str = "mean",
        backward: Backward = double_backward,
        loss_scale: float = 1.0,
    ) -> None:
        check_loss_reduction(loss_reduction)
        if loss_per_sample.dim() != 1:
            raise ValueError(
                f"the loss has shape {tuple(loss_per_sample.shape)}; it has to be one value a sample, shape (N,)"
            )
        super().__init__(module, optimizer, loss_per_sample, loss_reduction)
        self._backward = backward
        self.loss_scale = loss_scale

    def backward(self) -> None:
        """Adds the sum of the clipped per-sample gradients to the parameters' ``summed_grad``, for `optimizer.step()`.

        Raises:
            NotImplementedError: if some layer's per-sample gradients have no meaning or no known form.
            ValueError: if the loss, the model or the data are such that the sum would not be private; the text says what
                to do.
            RuntimeError: if the loss does not depend on the wrapped model.
        """
        self._backward(self.module, self.loss_per_sample, self.loss_scale)

    def _with(self, loss_per_sample: Tensor) -> DPTensorFastGradientClipping:
        if loss_per_sample.shape != self.loss_per_sample.shape:
            raise ValueError(
                f"the result has shape {tuple(loss_per_sample.shape)}, the loss {tuple(self.loss_per_sample.shape)}; combine "
                "losses with numbers, with one weight a sample, or with losses of the same samples"
            )
        return DPTensorFastGradientClipping(
            self.module, self.optimizer, loss_per_sample, self.loss_reduction, self._backward, self.loss_scale
        )

    def scaled(self, loss_scale: float) -> DPTensorFastGradientClipping:
        """The same loss, whose gradients are computed as ``loss_scale`` times what they are, and divided by it."""
        loss = self._with(self.loss_per_sample)
        loss.loss_scale = loss_scale
        return loss

    def _operand(self, other: Any) -> Any:
        if isinstance(other, OpacusTensor):
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
        criterion: a criterion with a ``reduction`` (any of ``torch.nn``'s), a function (any of ``torch.nn.functional``'s), or any
            callable, batch first.
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
            One loss a sample: what the criterion gives for that sample alone. See `criterion.loss_per_sample`.

        Raises:
            ValueError: if the criterion cannot be evaluated by sample.
        """
        losses = loss_per_sample(self.criterion, self.loss_reduction, args, kwargs, shape, self.module.batch_first)
        return DPTensorFastGradientClipping(
            self.module, self.optimizer, losses, self.loss_reduction, self.clipped_backward
        )
