"""Heads that are called on `HeadRows`: what a tap on such a call needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.norm_samplers.head import SHARDED, are_head_rows
from opacus_fgc.taps.assignment import Facts
from opacus_fgc.taps.lookup import Registered, Sampler


def note_head(
    module: nn.Module, args: tuple[Any, ...], sampler: Sampler, params: Iterable[Any], facts: Facts, batch_first: bool
) -> None:
    """Notes which FSDP module has the weights of a layer that was called on `HeadRows`.

    Args:
        module: the layer.
        args: the positional arguments of the call; on anything else there is nothing to note.
        sampler: the layer's sampler.
        params: its parameters, as the optimizer has them.
        facts: what is known of the model.
        batch_first: of the wrapped model.

    Raises:
        NotImplementedError: if its per-sample gradients would not be right.
    """
    if not are_head_rows(args):
        return
    if not batch_first:
        raise PrivacyNotImplementedError(
            "ChunkedCausalLMLoss takes hidden states with the batch first, and the model was wrapped with batch_first=False. "
            "Have the model take and give the batch first, or take CausalLMLoss"
        )
    if any(isinstance(param, DTensor) for param in map(facts.unsharded.of, params)):
        raise PrivacyNotImplementedError(SHARDED)
    if not isinstance(sampler, Registered):
        raise PrivacyNotImplementedError(
            "ChunkedCausalLMLoss: the head is served by torch.func (force_functorch=True), which cannot repeat its call. "
            "Leave force_functorch out, or take CausalLMLoss"
        )
    if facts.layout.reshards:
        facts.heads[module] = facts.layout.fsdp.owners[module]
