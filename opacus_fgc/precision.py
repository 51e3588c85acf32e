"""The precision in which norms are computed: an underestimated norm is a privacy violation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widens half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def without_float16(tensor: Tensor) -> Tensor:
    """Widens float16, whose range is too small for what clipping coefficients and scaled losses do to backprops."""
    return tensor.float() if tensor.dtype is torch.float16 else tensor


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast, also in a backward that is called under it."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """A context without autocast, in which products of float32 are of float32, not of TF32 or bfloat16."""
    reduced = [(setting, value, full) for setting, value, full in _settings() if value not in (full, "none")]
    for setting, _, full in reduced:
        setting(full)
    try:
        with without_autocast(device):
            yield
    finally:
        for setting, value, _ in reduced:
            setting(value)


def _settings() -> Iterator[tuple[Callable[[str], None], str, str]]:
    """How torch multiplies float32: what sets it, its value, and that of full precision."""
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    for backend in backends:
        if hasattr(backend, "fp32_precision"):
            yield partial(setattr, backend, "fp32_precision"), backend.fp32_precision, "ieee"
        else:  # torch before 2.9
            yield torch.set_float32_matmul_precision, torch.get_float32_matmul_precision(), "highest"
