"""One loss a sample, which is the reduced loss for all but ``backward()``."""

from __future__ import annotations

from typing import Any

import torch
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping as OpacusTensor
from torch import Tensor
from torch.distributed.tensor import DTensor

from opacus_fgc._compat.overrides import DisableTorchFunctionSubclass
from opacus_fgc._compat.pytree import tree_map_only
from opacus_fgc.argument_checks import check_loss_reduction
from opacus_fgc.backward import Backward, double_backward
from opacus_fgc.certificates.batch import Batch
from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyRuntimeError
from opacus_fgc.grad_sample_module import GradSampleHooksFastGradientClipping
from opacus_fgc.loss_arithmetic import Arithmetic
from opacus_fgc.optimizer import DPOptimizerFastGradientClipping

_NOT_CLIPPED = (
    "torch's own backward came to a private loss, and what it computes would not be clipped: by torch.autograd.grad, through a "
    "function of the loss, or through a sum with a plain one. Call backward() on the private loss itself. Losses can be added, "
    "subtracted, and multiplied or divided by numbers or by one weight a sample; add several by sum([first, second]), not by "
    "torch.stack. Other functions belong into the criterion, which can return one loss a sample"
)


_NO_LEAF = torch.zeros((), device="cpu", requires_grad=True)


class _NotClipped(torch.autograd.Function):
    """What a private loss is for torch's own backward: an end, since what comes behind would not be clipped."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, value: Tensor) -> Tensor:
        """Returns the value, as one with a gradient."""
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Refuses."""
        raise PrivacyRuntimeError(_NOT_CLIPPED)


_LINEAR = {
    "add": "add",
    "sub": "sub",
    "subtract": "sub",
    "mul": "mul",
    "multiply": "mul",
    "div": "truediv",
    "divide": "truediv",
    "true_divide": "truediv",
}
"""Torch's functions of two arguments by the operator that they are."""

_OF_EACH = ("to", "cpu", "cuda", "float", "double", "half", "bfloat16", "clone", "contiguous", "neg", "negative")
"""Torch's functions that are the same of one loss a sample as of their mean or sum."""

_OF_ONE_NUMBER = ("mean", "sum", "squeeze", "requires_grad_")
"""Torch's functions that leave one number, and its graph, as it is."""

_HOOKS = ("register_hook", "retain_grad", "register_post_accumulate_grad_hook")


class DPTensorFastGradientClipping(Arithmetic, OpacusTensor, Tensor):
    """One loss a sample; it is the reduced loss, a tensor of one number, and its ``backward()`` clips.

    It adds, subtracts, multiplies and divides with numbers, with tensors without a gradient (weights of the samples, shape
    ``(N,)``), and with others of its kind. ``mean``, ``sum``, ``to``, ``float`` and the like give a private loss again. All other
    functions of torch's give what they give for the number; torch's backward through these is an error, since it would not clip.
    Copies (``copy``, ``pickle``) are of the number.

    Args:
        module: the wrapped model, or the hooks on it.
        optimizer: the optimizer from the same `make_private`.
        loss_per_sample: shape ``(N,)``.
        loss_reduction: "mean" or "sum": what the number is.
        backward: how the clipped sum is computed.
        loss_scale: what the losses are multiplied with in `backward`; see `GradScaler`.
        batch: which samples the rows of the batch are of; each row is one if None.

    Raises:
        ValueError: if there is not one value a sample, or the reduction has no meaning.
    """

    module: GradSampleHooksFastGradientClipping
    optimizer: DPOptimizerFastGradientClipping
    loss_per_sample: Tensor
    loss_reduction: str

    def __new__(
        cls,
        module: GradSampleHooksFastGradientClipping,
        optimizer: DPOptimizerFastGradientClipping,
        loss_per_sample: Tensor,
        loss_reduction: str = "mean",
        backward: Backward = double_backward,
        loss_scale: float = 1.0,
        batch: Batch | None = None,
    ) -> DPTensorFastGradientClipping:
        """Makes the number that the loss is."""
        check_loss_reduction(loss_reduction)
        if loss_per_sample.dim() != 1:
            raise ValueError(
                f"the loss has shape {tuple(loss_per_sample.shape)}; it has to be one value a sample, shape (N,)"
            )
        value = getattr(loss_per_sample.detach(), loss_reduction)()
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if loss_per_sample.requires_grad:
            with torch.enable_grad():
                value = _NotClipped.apply(_NO_LEAF, value)
        return value.as_subclass(cls)

    def __init__(
        self,
        module: GradSampleHooksFastGradientClipping,
        optimizer: DPOptimizerFastGradientClipping,
        loss_per_sample: Tensor,
        loss_reduction: str = "mean",
        backward: Backward = double_backward,
        loss_scale: float = 1.0,
        batch: Batch | None = None,
    ) -> None:
        super().__init__(module, optimizer, loss_per_sample, loss_reduction)
        self._backward = backward
        self.loss_scale = loss_scale
        self.batch = Batch(len(loss_per_sample)) if batch is None else batch

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What a function of torch's gives for the loss; see the class."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.autograd.backward:
            return _backward_of_all(*args, **kwargs)
        if func is torch.autograd.grad:
            raise PrivacyRuntimeError(_NOT_CLIPPED)
        loss = args[0] if args and isinstance(args[0], cls) else None
        if loss is not None and func is Tensor.backward:
            return loss.backward(*args[1:], **kwargs)
        if loss is not None and name in _HOOKS:
            raise NotImplementedError(
                f"{name} of a private loss would be called with no gradient: backward() goes by one loss a sample. "
                "Hooks on the model's outputs are called"
            )
        if loss is not None and name in _OF_ONE_NUMBER and len(args) == 1:
            return loss
        if loss is not None and name in _OF_EACH:
            return loss._with(func(loss.loss_per_sample, *args[1:], **kwargs))
        if loss is not None and name.endswith("_") and not name.endswith("__"):
            raise PrivacyNotImplementedError(
                f"{name} would change a private loss in place, and not the losses of the samples; write loss = loss + ..., "
                "loss = loss * ... and the like"
            )
        if name in _LINEAR and len(args) == 2 and not kwargs:
            if loss is not None:
                return getattr(loss, f"__{_LINEAR[name]}__")(args[1])
            if name not in ("div", "divide", "true_divide"):
                return getattr(args[1], f"__r{_LINEAR[name]}__")(args[0])
        args, kwargs = tree_map_only(cls, cls._number, (args, kwargs))
        return func(*args, **kwargs)

    def _number(self) -> Tensor:
        with DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def backward(
        self,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """Adds the sum of the clipped per-sample gradients to the parameters' ``summed_grad``, for `optimizer.step()`.

        Args:
            gradient: a number that the loss is multiplied with.
            retain_graph: whether the graph may be gone through once more, by a plain loss; a private one would count every
                sample twice.
            create_graph: not supported.
            inputs: not supported.

        Raises:
            NotImplementedError: if some layer's per-sample gradients have no meaning or no known form, or for an argument.
            ValueError: if the loss, the model or the data are such that the sum would not be private; the text says what
                to do.
            RuntimeError: if the loss does not depend on the wrapped model.
        """
        if create_graph:
            raise PrivacyNotImplementedError(
                "create_graph=True: a clipped sum has no gradient of its own, since clipping and noise are no part of "
                "the graph. Leave it out"
            )
        if inputs is not None:
            raise NotImplementedError(
                "inputs=...: a private loss gives all trainable parameters of the wrapped model their part of one clipped "
                "gradient. Freeze what is not to be trained (requires_grad_(False)) before make_private"
            )
        if gradient is not None:
            if isinstance(gradient, Tensor) and (gradient.numel() != 1 or gradient.requires_grad):
                raise ValueError(
                    f"gradient has shape {tuple(gradient.shape)}; it is one number, by which the loss is multiplied. For one "
                    "weight a sample write (loss * weights).backward()"
                )
            (self * float(gradient)).backward(retain_graph=retain_graph)
            return
        self.module.record.batch = self.batch
        self._backward(self.module, self.loss_per_sample, self.loss_scale, bool(retain_graph))

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __format__(self, format_spec: str) -> str:
        return format(self.item(), format_spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().clone()

    def _with(self, loss_per_sample: Tensor) -> DPTensorFastGradientClipping:
        if loss_per_sample.shape != self.loss_per_sample.shape:
            raise ValueError(
                f"the result has shape {tuple(loss_per_sample.shape)}, the loss {tuple(self.loss_per_sample.shape)}; combine "
                "losses with numbers, with one weight a sample, or with losses of the same samples"
            )
        return DPTensorFastGradientClipping(
            self.module,
            self.optimizer,
            loss_per_sample,
            self.loss_reduction,
            self._backward,
            self.loss_scale,
            self.batch,
        )

    def scaled(self, loss_scale: float) -> DPTensorFastGradientClipping:
        """The same loss, whose gradients are computed as ``loss_scale`` times what they are, and divided by it."""
        loss = self._with(self.loss_per_sample)
        loss.loss_scale = loss_scale
        return loss


def _backward_of_all(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """``torch.autograd.backward`` where a private loss is among the tensors."""
    losses = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    factors = [grad_tensors] if grad_tensors is None or isinstance(grad_tensors, Tensor) else list(grad_tensors)
    plain = [loss for loss in losses if not isinstance(loss, DPTensorFastGradientClipping)]
    if plain or any(factor is not None for factor in factors):
        raise NotImplementedError(
            "torch.autograd.backward takes private losses alone, without grad_tensors; call backward() on each loss"
        )
    sum(losses).backward(retain_graph=retain_graph, create_graph=create_graph, inputs=inputs)  # type: ignore[union-attr]
