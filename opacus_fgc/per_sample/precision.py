"""The precision in which norms are computed: an underestimated norm is a privacy violation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opacus_fgc._compat.backends import fp32_precision_getter
from opacus_fgc.per_sample.doubts import reads_are_free

# The dtypes whose rounding is not small against a privacy guarantee, and what takes their place.
_WIDENED = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}

HALF = frozenset(_WIDENED)
"""The dtypes of half precision."""

# Rows up to the first length are summed at once, longer ones in pieces of the second.
_SHORT, _PIECE = 1024, 512

# How many terms of the inner products of a Gram matrix are added up at once; see `product`.
GRAM_TERMS = 2**11

_AS_IT_IS: AbstractContextManager = nullcontext()

# So many elements are few: wide norms of them take less time than a question.
_FEW = 2**13


def is_half(tensor: Tensor) -> bool:
    """Whether a tensor is in half precision."""
    return tensor.dtype in _WIDENED


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, or what takes the place of half precision."""
    return _WIDENED.get(dtype, dtype)


_has_autocast = cache(torch.amp.is_autocast_available)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast is on with, for a type of device; None if it is off, or not there (on "meta")."""
    enabled = _has_autocast(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widens half precision."""
    return tensor.to(_WIDENED[tensor.dtype]) if tensor.dtype in _WIDENED else tensor


def real_parts(tensor: Tensor) -> Tensor:
    """A complex tensor as one of real numbers, two for each along the last axis; a real one as it is."""
    return torch.view_as_real(tensor.resolve_conj()).flatten(-2) if tensor.is_complex() else tensor


def least_norm(length: int, dtype: torch.dtype) -> float:
    """Norms of so many elements from this on are right, however many of their squares vanish."""
    info = torch.finfo(dtype)
    return math.sqrt(length * info.tiny / info.eps)


def widest(tensor: Tensor) -> Tensor:
    """In float64, in which no square of a float32 number vanishes or overflows; on MPS, which has none, as it is."""
    if tensor.device.type == "mps":
        return at_least_float32(tensor)
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def row_norms(rows: Tensor) -> Tensor:
    """L2 norms along the last axis, right to a few roundings however long it is.

    `torch.linalg.vector_norm` adds up squares one after the other, in a few sums. What is added is rounded to the size of what is
    there: in float32 on a CPU the norm of ``2**24`` random numbers comes out 6e-4 too small, that of equal ones up to 1.5e-2. The
    norm of the norms of short pieces has neither error, and takes the same time. (Over complex numbers torch is 80 times
    slower than over their parts.)

    Squares that are smaller than the smallest number vanish, so a norm may come out too small by ``1e-19 * sqrt(K)`` in
    float32, which is nothing against the least clipping norm. Where norms are multiplied, see `factor_norms`.

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


def factor_norms(rows: Tensor) -> Tensor:
    """As `row_norms`, of what is multiplied: small norms are right, too, and no square overflows. Of any float dtype."""
    # To ask takes longer than wide norms of few elements, and of those on another device.
    if rows.numel() > _FEW and reads_are_free(rows.device):
        norms = row_norms(rows)
        smallest, largest = torch.stack(norms.aminmax()).tolist()
        if smallest >= least_norm(rows.shape[-1], norms.dtype) and largest < math.inf:
            return norms
    if rows.dtype is torch.float32 and rows.shape[-1] <= _SHORT and rows.device.type != "mps":
        return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)  # the same, by one operation
    return row_norms(widest(rows))


def product(left: Tensor, right: Tensor, terms: int) -> Tensor:
    """``left @ right``, of which no element loses what it should have, however many terms it is a sum of.

    A matrix product adds them up one after the other: in float32 on a CPU, ``2**20`` of random numbers are off by 2e-5.

    Args:
        left: shape ``(*, n, K)``.
        right: shape ``(*, K, m)``.
        terms: how many are added up at once: the fewer, the smaller the error, and the more the time.
    """
    length = left.shape[-1]
    if length <= terms:
        return left @ right
    half = -(-length // 2 // terms) * terms
    first = product(left[..., :half], right[..., :half, :], terms)
    return first.add_(product(left[..., half:], right[..., half:, :], terms))


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast, also in a backward that is called under it."""
    if autocast_dtype(device.type) is not None:
        return torch.autocast(device.type, enabled=False)
    return _AS_IT_IS


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context without autocast, in which products of float32 are of float32, not of TF32 or bfloat16."""
    # Called for every parameter, so it is kept light.
    for one in _concerning(device.type):
        if one.get() not in one.full:
            return _set_to_full(device)
    return without_autocast(device)


@contextmanager
def _set_to_full(device: torch.device) -> Iterator[None]:
    settings = [one for one in _concerning(device.type) if one.get() not in one.full]
    before = [setting.get() for setting in settings]
    for setting in settings:
        setting.set(setting.full[0])
    try:
        with without_autocast(device):
            yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.set(value)


def reduced_operations(device: torch.device) -> set[str]:
    """Which operations on float32 round more than float32 does on a device: "matmul", "conv"."""
    return {one.operation for one in _SETTINGS if one.device == device.type and one.get() not in one.full}


class _Setting(NamedTuple):
    """How torch multiplies float32 in an operation on a type of device.

    Attributes:
        device: the type.
        operation: "matmul" or "conv".
        get: gives its value.
        set: sets it.
        full: its values for full precision.
        concerns: the type of device whose results depend on it; "" for any.
    """

    device: str
    operation: str
    get: Callable[[], Any]
    set: Callable[[Any], None]
    full: tuple[Any, ...]
    concerns: str


def _settings() -> Iterator[_Setting]:
    backends = torch.backends
    modules: dict[tuple[str, str], Any] = {
        ("cuda", "matmul"): backends.cuda.matmul,
        ("cuda", "conv"): getattr(backends.cudnn, "conv", None),
        ("cpu", "matmul"): getattr(backends.mkldnn, "matmul", None),
        ("cpu", "conv"): getattr(backends.mkldnn, "conv", None),
    }
    for (device, operation), module in modules.items():
        if hasattr(module, "fp32_precision"):
            get: Any = fp32_precision_getter(module, operation)
            # Of products, torch takes the settings of one device for those of others.
            concerns = "" if operation == "matmul" else device
            yield _Setting(
                device, operation, get, partial(setattr, module, "fp32_precision"), ("ieee", "none"), concerns
            )
        elif operation == "matmul":  # torch before 2.9
            get, put = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
            yield _Setting(device, operation, get, put, ("highest",), "")
        elif device == "cuda":
            get, put = partial(getattr, backends.cudnn, "allow_tf32"), partial(setattr, backends.cudnn, "allow_tf32")
            yield _Setting(device, operation, get, put, (False,), device)


_SETTINGS = tuple(_settings())


@cache
def _concerning(device: str) -> tuple[_Setting, ...]:
    return tuple(one for one in _SETTINGS if one.concerns in ("", device))
