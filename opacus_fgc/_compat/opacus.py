"""Private names of Opacus 1.6: how it draws noise, tells that a sum was used, and keeps model and norms."""

from __future__ import annotations

from typing import Any

from opacus.optimizers import optimizer
from torch import Tensor, nn

generate_noise = optimizer._generate_noise
"""Gaussian noise in the shape of a tensor. Private: ``opacus.optimizers.optimizer._generate_noise``."""

mark_as_processed = optimizer._mark_as_processed
"""Notes in a gradient that a step has used it. Private: ``opacus.optimizers.optimizer._mark_as_processed``."""

check_processed_flag = optimizer._check_processed_flag
"""Raises a ValueError if a step has used a gradient. Private: ``opacus.optimizers.optimizer._check_processed_flag``."""


def wrapped_model(wrapper: Any) -> nn.Module:
    """The model that an object of Opacus wraps, with the hooks on it as they are.

    Private: ``_module`` of ``AbstractGradSampleModule`` and ``GradSampleHooks``.

    Args:
        wrapper: the wrapped model, or the object that holds the hooks.
    """
    return wrapper._module


def norm_sample(param: Tensor) -> Any:
    """The norms of a parameter's per-sample gradients, where Opacus keeps them; None if there are none.

    Private: ``_norm_sample`` of parameters.

    Args:
        param: a parameter.
    """
    return getattr(param, "_norm_sample", None)


def set_norm_sample(param: Any, norms: Tensor | None) -> None:
    """Sets what `norm_sample` gives.

    Args:
        param: a parameter.
        norms: shape ``(N,)``; None for none.
    """
    param._norm_sample = norms
