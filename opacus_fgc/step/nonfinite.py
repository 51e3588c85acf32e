"""What is done about samples with inf or NaN in their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from opacus_fgc.argument_checks import check_nonfinite
from opacus_fgc.clipping import FlatClipping, count_not_finite
from opacus_fgc.distributed.mesh import local
from opacus_fgc.errors import PrivacyValueError
from opacus_fgc.step.record import Record


class NonFinitePolicy:
    """Samples with inf or NaN in their gradients are refused, or dropped: they count for nothing.

    Args:
        how: "error" or "drop".

    Attributes:
        dropped: how many samples were dropped so far.
    """

    def __init__(self, how: str) -> None:
        check_nonfinite(how)
        self.how, self.dropped = how, 0

    def coefficients(self, norms: Tensor, clipping: FlatClipping, record: Record, names: Mapping[Any, str]) -> Tensor:
        """Clipping coefficients; 0 for samples that are dropped, which the record then leaves out.

        Args:
            norms: the norms of the samples' gradients, shape ``(N,)``.
            clipping: the clipping rule.
            record: the state of the step.
            names: the names of parameters.

        Raises:
            ValueError: if a norm is inf or NaN, unless such samples are to be dropped.
        """
        bad = count_not_finite(norms)
        if not bad:
            return clipping.coefficients(norms)
        if self.how == "error":
            raise PrivacyValueError(
                f"the gradients of {bad} of {len(norms)} samples have inf or NaN in them, which no factor can clip; it shows "
                f"first in {_where(record, names)}. Remove these samples from the data, lower the learning rate if the "
                "weights have diverged, or pass nonfinite='drop', with which such samples contribute nothing"
            )
        self.dropped += bad
        finite = torch.isfinite(norms)
        record.sums.samples = finite
        coef = torch.zeros_like(norms)
        coef[finite] = clipping.coefficients(norms[finite])
        return coef


def _where(record: Record, names: Mapping[Any, str]) -> str:
    if record.first_not_finite:
        return f"forward, in the input of {record.first_not_finite}"
    if record.looking:
        return "the loss, while the inputs of all trainable layers are finite"
    if record.losses is not None and not is_finite([record.losses]):
        return "the loss, or in forward; a step on a CPU tells in which layer"
    first = next(param for param, norm in record.measured() if not is_finite([norm]))
    return f"backward, in the gradient of {names[first]}"


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether tensors, or what this rank has of them, have neither inf nor NaN in them."""
    return all(bool(torch.isfinite(local(tensor)).all()) for tensor in tensors)
