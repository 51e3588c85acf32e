"""The precision in which norms are computed: an underestimated norm is a privacy violation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


# The dtypes whose rounding is not small against a privacy guarantee, and what takes their place.
_WIDENED = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}

# Rows up to the first length are summed at once, longer ones in pieces of the second.
_SHORT, _PIECE = 1024, 512


def is_half(tensor: Tensor) -> bool:
    """Whether a tensor is in half precision."""
    return tensor.dtype in _WIDENED


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, or what takes the place of half precision."""
    return _WIDENED.get(dtype, dtype)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widens half precision."""
    return tensor.to(widened(tensor.dtype))


def real_parts(tensor: Tensor) -> Tensor:
    """A complex tensor as one of real numbers, two for each along the last axis; a real one as it is."""
    return torch.view_as_real(tensor.resolve_conj()).flatten(-2) if tensor.is_complex() else tensor


def widest(tensor: Tensor) -> Tensor:
    """In float64, in which no square of a float32 number vanishes or overflows; on MPS, which has none, as it is."""
    return tensor if tensor.device.type == "mps" else tensor.double()


def row_norms(rows: Tensor) -> Tensor:
    """L2 norms along the last axis, right to a few roundings however long it is.

    `torch.linalg.vector_norm` adds up squares one after the other, in a few sums. What is added is rounded to the size of what is
    there: in float32 on a CPU the norm of ``2**24`` random numbers comes out 6e-4 too small, that of equal ones up to 1.5e-2. The
    norm of the norms of short pieces has neither error, and takes the same time. (Over complex numbers torch is 80 times
    slower than over their parts.)

    Squares that are smaller than the smallest number vanish, so a norm may come out too small by ``1e-19 * sqrt(K)`` in
    float32, which is nothing against the least clipping norm. Where a norm is a factor of another one, see `per_sample.Outer`.

    Args:
        rows: shape ``(*, K)``, of any floating or complex dtype.

    Returns:
        Norms, shape ``(*)``, real, float32 or wider.
    """
    rows = real_parts(at_least_float32(rows))
    length = rows.shape[-1]
    if length <= _SHORT:
        return torch.linalg.vector_norm(rows, dim=-1)
    whole = length - length % _PIECE
    pieces = torch.linalg.vector_norm(rows[..., :whole].unflatten(-1, (-1, _PIECE)), dim=-1)
    if whole < length:
        tail = torch.linalg.vector_norm(rows[..., whole:], dim=-1, keepdim=True)
        pieces = torch.cat([pieces, tail], -1)
    return row_norms(pieces)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast, also in a backward that is called under it."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """A context without autocast, in which products of float32 are of float32, not of TF32 or bfloat16."""
    reduced = [setting for setting in _settings() if setting.is_reduced]
    for setting in reduced:
        setting.set(setting.full)
    try:
        with without_autocast(device):
            yield
    finally:
        for setting in reduced:
            setting.set(setting.value)


def reduced_operations(device: torch.device) -> set[str]:
    """Which operations on float32 round more than float32 does on a device: "matmul", "conv"."""
    return {setting.operation for setting in _settings() if setting.is_reduced and setting.device == device.type}


class _Setting(NamedTuple):
    """How torch multiplies float32 in an operation on a type of device.

    Attributes:
        device: the type.
        operation: "matmul" or "conv".
        set: sets it.
        value: what it is.
        full: its value for full precision.
    """

    device: str
    operation: str
    set: Callable[[Any], None]
    value: Any
    full: Any

    @property
    def is_reduced(self) -> bool:
        return self.value not in (self.full, "none")


def _settings() -> Iterator[_Setting]:
    backends = torch.backends
    modules: dict[str, dict[str, Any]] = {
        "cuda": {"matmul": backends.cuda.matmul, "conv": getattr(backends.cudnn, "conv", None)},
        "cpu": {name: getattr(backends.mkldnn, name, None) for name in ("matmul", "conv")},
    }
    for device, operations in modules.items():
        for operation, module in operations.items():
            if hasattr(module, "fp32_precision"):
                set_precision = partial(setattr, module, "fp32_precision")
                yield _Setting(device, operation, set_precision, module.fp32_precision, "ieee")
            elif operation == "matmul":  # torch before 2.9
                precision = torch.get_float32_matmul_precision()
                yield _Setting(device, operation, torch.set_float32_matmul_precision, precision, "highest")
            elif device == "cuda":
                allowed = backends.cudnn.allow_tf32
                yield _Setting(device, operation, partial(setattr, backends.cudnn, "allow_tf32"), allowed, False)
