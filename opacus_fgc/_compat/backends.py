"""The precision that backends compute in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def fp32_precision_getter(settings: Any, operation: str) -> Callable[[], str]:
    """Gives what tells ``settings.fp32_precision``, by a way that takes a tenth of the attribute's time where there is one.

    Private: ``torch._C._get_fp32_precision_getter``, and ``backend`` of the settings, torch 2.9 to 2.15.

    Args:
        settings: of one operation of a backend, such as ``torch.backends.cuda.matmul``.
        operation: that operation, "matmul" or "conv".
    """
    ask = getattr(torch._C, "_get_fp32_precision_getter", None)
    backend = "cuda" if settings is torch.backends.cuda.matmul else getattr(settings, "backend", None)
    return partial(ask, backend, operation) if ask and backend else partial(getattr, settings, "fp32_precision")
