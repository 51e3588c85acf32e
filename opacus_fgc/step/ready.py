"""Whether there is a clipped sum that a step can be made with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from opacus_fgc._compat.opacus import check_processed_flag, wrapped_model
from opacus_fgc.distributed.mesh import local
from opacus_fgc.errors import PrivacyValueError
from opacus_fgc.grad_sample_module import GradSampleHooksFastGradientClipping


def check_ready(module: GradSampleHooksFastGradientClipping, params: Sequence[Any], max_grad_norm: float) -> None:
    """Raises a ValueError unless each parameter has a clipped sum that no step has used, and no other gradient.

    Args:
        module: the wrapped model.
        params: the parameters of the optimizer.
        max_grad_norm: the norm that the sum has to be clipped to.
    """
    module.clipped_sum.check_norm(max_grad_norm)
    if not params:
        raise ValueError("none of the optimizer's parameters is trainable, so this step would train nothing")
    names = {param: name for name, param in wrapped_model(module).named_parameters()}
    missing = [
        names.get(param, f"one of shape {tuple(param.shape)} that the model does not have")
        for param in params
        if getattr(param, "summed_grad", None) is None
    ]
    if missing:
        raise PrivacyValueError(
            f"parameters of the optimizer without a clipped gradient: {', '.join(missing)}. They came to it after the "
            "model was wrapped, or were cleared; wrap model and optimizer anew"
        )
    for param in params:
        check_processed_flag(param.summed_grad)
    plain = [names[param] for param in _with_gradient(params)]
    if plain:
        raise PrivacyValueError(
            f"not clipped is the gradient in p.grad of {', '.join(plain[:5])}{' and others' if len(plain) > 5 else ''}: "
            "it comes of a plain backward(), or was written there, and step() would drop it. Call optimizer.zero_grad() "
            "before backward() if it is not wanted. A gradient that is public (of public or generated data, or of a "
            "penalty on weights) is added after the noise: compute it by torch.autograd.grad, outside of the private "
            "step, and add it in a hook, optimizer.original_optimizer.register_step_pre_hook(lambda optimizer, args, "
            "kwargs: ...), to p.grad"
        )


def _with_gradient(params: Iterable[Any]) -> list[Any]:
    """The parameters that have a gradient that is not zero."""
    present = [param for param in params if param.grad is not None]
    if not present:
        return []
    # Looked at once, since a GPU has to be waited for.
    flags = [_any(local(param.grad)) for param in present]
    found = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return [param for param, flag in zip(present, found, strict=True) if flag]


def _any(gradient: Tensor) -> Tensor:
    return (gradient if gradient.layout == torch.strided else gradient.coalesce().values()).any()
