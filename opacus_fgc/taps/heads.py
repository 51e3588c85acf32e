"""Heads that are called on `HeadRows`: what a tap on such a call needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opacus_fgc._compat.autograd import in_backward
from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.norm_samplers.head import SHARDED, are_head_rows
from opacus_fgc.taps.assignment import Facts
from opacus_fgc.taps.lookup import Registered, Sampler


class OfLayer(Protocol):
    """What is known of a tapped layer."""

    @property
    def sampler(self) -> Sampler:
        """What computes its per-sample gradients."""

    @property
    def params(self) -> Mapping[str, Any]:
        """Its parameters by name, as the optimizer has them."""


def note_head(
    module: nn.Module, tapped: OfLayer, args: tuple[Any, ...], outermost: bool, facts: Facts, batch_first: bool
) -> None:
    """Notes which FSDP module has the weights of a layer that was called on `HeadRows`, or where FSDP sees nothing of it.

    Args:
        module: the layer.
        tapped: what is known of it.
        args: the positional arguments of the call.
        outermost: whether it was called by none of the model's modules.
        facts: what is known of the model.
        batch_first: of the wrapped model.

    Raises:
        NotImplementedError: if it was called on `HeadRows`, and its per-sample gradients would not be right.
    """
    if not are_head_rows(args):
        if outermost and facts.layout.reshards and not in_backward() and not isinstance(module, FSDPModule):
            facts.heads[module] = facts.layout.fsdp.owners[module]
        return
    if args[0].others and not batch_first:
        raise PrivacyNotImplementedError(
            "ChunkedCausalLMLoss: the head has an adapter, whose first layer gets hidden states with the batch first, and the "
            "model was wrapped with batch_first=False. Have the model take and give the batch first, leave the head out of the "
            "adapter's target_modules, or take CausalLMLoss"
        )
    if any(isinstance(param, DTensor) for param in map(facts.unsharded.of, tapped.params.values())):
        raise PrivacyNotImplementedError(SHARDED)
    if not isinstance(tapped.sampler, Registered):
        raise PrivacyNotImplementedError(
            "ChunkedCausalLMLoss: the head is served by torch.func (force_functorch=True), which cannot repeat its call. "
            "Leave force_functorch out, or take CausalLMLoss"
        )
    if facts.layout.reshards:
        facts.heads[module] = facts.layout.fsdp.owners[module]
