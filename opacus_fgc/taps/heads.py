"""Heads that are called on `HeadRows`: what a tap on such a call needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.norm_samplers.head import SHARDED, HeadRows
from opacus_fgc.taps.lookup import Registered, Sampler


def is_head(args: tuple[Any, ...], sampler: Sampler, params: Iterable[Tensor], batch_first: bool) -> bool:
    """Whether a layer was called on `HeadRows`.

    Args:
        args: the positional arguments of the call.
        sampler: the layer's sampler.
        params: its parameters, as it sees them.
        batch_first: of the wrapped model.

    Raises:
        NotImplementedError: if it was, and its per-sample gradients would not be right.
    """
    if not args or not isinstance(args[0], HeadRows):
        return False
    if not batch_first:
        raise PrivacyNotImplementedError(
            "ChunkedCausalLMLoss takes hidden states with the batch first, and the model was wrapped with batch_first=False. "
            "Have the model take and give the batch first, or take CausalLMLoss"
        )
    if any(isinstance(param, DTensor) for param in params):
        raise PrivacyNotImplementedError(SHARDED)
    if not isinstance(sampler, Registered):
        raise PrivacyNotImplementedError(
            "ChunkedCausalLMLoss: the head is served by torch.func (force_functorch=True), which cannot repeat its call. "
            "Leave force_functorch out, or take CausalLMLoss"
        )
    return True
