"""Sketches: three numbers that tell a row of a tensor from others, and commute with powers of two."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.per_sample.precision import full_precision

REPEATS = 8
"""How often a pass is run again to see whether it is deterministic."""

ROUNDINGS = 64
"""How many roundings of a sum of sizes may differ, where sums are added up in another order each time."""

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
"""What says nothing about a model whose forward fails with it."""

# How many elements are worked on at once: on a CPU as many as its caches hold.
_CHUNK, _LARGE_CHUNK = 2**18, 2**24

# Longer rows are taken in pieces, since weights take as much memory as a row.
_PIECE = 2**17


def sketch(value: Tensor, axis: int) -> Tensor:
    """Three numbers that tell each row of a tensor from others, shape ``(rows, 3)``: two weighted sums, and one of sizes.

    They are of the tensor's dtype, float32 at least. They are multiplied by a power of two, exactly, if the row is. The same
    rows of tensors of the same shape have the same ones.
    """
    if isinstance(value, DTensor):
        value = value.full_tensor()
    rows = value.detach().movedim(axis, 0)
    rows = torch.view_as_real(rows.resolve_conj()) if rows.is_complex() else rows
    rows = rows.reshape(len(rows), math.prod(rows.shape[1:]))
    if rows.dtype in (torch.float32, torch.float64):
        dtype = rows.dtype
    else:
        # Whole numbers may need float64.
        dtype = torch.float32 if rows.is_floating_point() or rows.device.type == "mps" else torch.float64
    at_once = _CHUNK if rows.device.type == "cpu" else _LARGE_CHUNK
    with full_precision(rows.device):
        return torch.cat([_sums(part.to(dtype)) for part in rows.split(max(1, at_once // max(1, rows.shape[1])))])


def _sums(rows: Tensor) -> Tensor:
    return torch.cat([_weighted(rows), rows.abs().sum(1, keepdim=True)], 1)


def _weighted(rows: Tensor) -> Tensor:
    """Two weighted sums of each row, shape ``(rows, 2)``; of long rows those of its pieces, weighted themselves."""
    whole = rows.shape[1] - rows.shape[1] % _PIECE
    if rows.shape[1] <= _PIECE:
        return rows @ _weights(rows.shape[1], rows.dtype, rows.device).mT
    pieces = rows[:, :whole].unflatten(1, (-1, _PIECE)) @ _weights(_PIECE, rows.dtype, rows.device).mT
    pieces = torch.cat([pieces, _weighted(rows[:, whole:]).unsqueeze(1)], 1)
    return (pieces * _weights(pieces.shape[1], rows.dtype, rows.device).mT).sum(1)


@functools.lru_cache(maxsize=16)
def _weights(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Two weights for each place, shape ``(2, size)``: multiples of irrational numbers, which are spread evenly."""
    places = torch.arange(1, size + 1, dtype=torch.float64, device="cpu")
    weights = [(places * ratio).frac() + 0.5 for ratio in ((math.sqrt(5) - 1) / 2, math.sqrt(2) - 1)]
    # In this order a product with rows takes a fifth of the time.
    return torch.stack(weights).to(device, dtype)


def forget_weights() -> None:
    """Gives up what sketches keep from one to the next."""
    _weights.cache_clear()


def differ(first: Tensor, second: Tensor) -> Tensor:
    """In which rows two sketches differ; shape ``(rows,)``."""
    return ~((first == second) | (first.isnan() & second.isnan())).all(1)


def raise_on_all_ranks(error: Exception | None, on_all_ranks: Callable[[bool], bool]) -> None:
    """Raises an error, or another one if there is one on another rank."""
    if on_all_ranks(error is None):
        return
    raise error or PrivacyNotImplementedError("another rank refuses the model; see its error")


def rounded(sketches: Tensor) -> Tensor:
    """By how much sketches may differ where sums are added up in another order; shape ``(rows, 1)``."""
    return ROUNDINGS * torch.finfo(sketches.dtype).eps * sketches[:, 2:].nan_to_num()
