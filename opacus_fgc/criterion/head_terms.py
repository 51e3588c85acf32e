"""What the logits of a head are the sum of: one linear layer, and the adapters of LoRA that may be on it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opacus_fgc._compat.distributed import gather_for_loss
from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.norm_samplers.head import SHARDED
from opacus_fgc.norm_samplers.linear import linear
from opacus_fgc.norm_samplers.registry import norm_sampler_of
from opacus_fgc.taps.lookup import Registered, find_sampler


class HeadTerm(NamedTuple):
    """A linear layer whose output is a part of the logits.

    Attributes:
        hidden: what it is applied to, shape ``(N, T, d)``.
        layer: the layer.
    """

    hidden: Tensor
    layer: nn.Linear

    @property
    def is_trained(self) -> bool:
        """Whether it has a trainable parameter."""
        return any(param.requires_grad for param in self.layer.parameters())

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Rows and weights whose products add up to its output, its bias a weight of ones."""
        weight, bias = self.layer.weight, self.layer.bias
        if bias is None:
            return [(self.hidden, weight)]
        ones = torch.ones_like(self.hidden[..., :1], requires_grad=False)
        return [(self.hidden, weight), (ones, bias.unsqueeze(1))]


def base_of(head: Any) -> nn.Linear:
    """The linear layer that a head is, or that its adapters are on.

    Args:
        head: what the loss was given.

    Raises:
        TypeError: if it is no linear layer, nor one with adapters that are known here.
        NotImplementedError: if it is trained and not served by the norm sampler of linear layers, or is sharded and not to be
            made whole.
    """
    base = head.base_layer if _is_lora(head) else head
    linear_layer = isinstance(base, nn.Linear)
    if not linear_layer or type(base).forward is not nn.Linear.forward or "forward" in vars(base):
        adapted = " Leave the head out of the adapter's target_modules." if hasattr(head, "base_layer") else ""
        if hasattr(head, "modules_to_save"):
            adapted = " Give the trained layer in it (model.lm_head.modules_to_save['default'])."
        raise TypeError(
            f"ChunkedCausalLMLoss: the head is a {type(head).__name__}{' with a forward of its own' * linear_layer}; it has "
            f"to be a torch.nn.Linear (model.lm_head), whose logits are computed in chunks, or LoRA of peft on one.{adapted} "
            "CausalLMLoss takes the logits of any head"
        )
    if isinstance(head, FSDPModule) and base is head:
        gather_for_loss(head)
    for layer in (base, *_adapters(head)):
        _check(layer)
    return base


def terms_of(head: Any, hidden: Tensor) -> list[HeadTerm]:
    """What the logits of all tokens but the last are the sum of; the linear layer first.

    Args:
        head: what `base_of` was called on.
        hidden: what it is applied to, shape ``(N, T, d)``.
    """
    base: nn.Linear = head.base_layer if _is_lora(head) else head
    if issubclass(type(base), FSDPModule):
        hidden = hidden.to(base.weight.dtype)  # as FSDP does to what its modules are called on
    terms = [HeadTerm(hidden[:, :-1], base)]
    for name in _active(head):
        down, up = head.lora_A[name], head.lora_B[name]
        rows = down(head.lora_dropout[name](hidden.to(down.weight.dtype)))
        # That layer sees all tokens, as packed samples have them.
        terms.append(HeadTerm(rows[:, :-1] * head.scaling[name], up))
    return terms


def _is_lora(head: Any) -> bool:
    """Whether a head is peft's linear layer with LoRA on it, and no subclass or patch of it."""
    kind = next((one for one in type(head).__mro__ if not issubclass(one, FSDPModule)), object)
    return (kind.__module__, kind.__qualname__) == ("peft.tuners.lora.layer", "Linear") and "forward" not in vars(head)


def _active(head: Any) -> list[str]:
    """The names of the adapters that add to a head's output."""
    if not _is_lora(head) or head.disable_adapters:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def _adapters(head: Any) -> list[nn.Linear]:
    """The layers of these that give logits.

    Raises:
        NotImplementedError: if they do something else than plain LoRA.
    """
    if not _is_lora(head):
        return []
    names = _active(head)
    if head.merged:
        raise PrivacyNotImplementedError(
            "ChunkedCausalLMLoss: the adapters of the head are merged into its weight, where they are not trained. Call "
            "unmerge_adapter() on the model first"
        )
    variants = getattr(head, "lora_variant", {}).keys() | {
        name for name, used in getattr(head, "use_dora", {}).items() if used
    }
    for name in names:
        up = head.lora_B[name]
        if name in variants or type(up).forward is not nn.Linear.forward or up.bias is not None:
            raise PrivacyNotImplementedError(
                f"ChunkedCausalLMLoss: the adapter {name!r} on the head is another kind of LoRA (DoRA, lora_bias=True and the "
                "like), whose logits are not computed in chunks. Take plain LoRA (LoraConfig without these), leave the head out "
                "of target_modules, or take CausalLMLoss"
            )
    return [head.lora_B[name] for name in names]


def _check(layer: nn.Linear) -> None:
    if isinstance(layer.weight, DTensor):
        raise PrivacyNotImplementedError(SHARDED)
    if any(param.requires_grad for param in layer.parameters()) and not _is_served(layer):
        raise PrivacyNotImplementedError(
            f"ChunkedCausalLMLoss: the head, a {type(layer).__name__}, is trained, and is not one that the norm sampler of "
            "torch.nn.Linear serves: it has a parametrization, or a registered norm sampler. Take a plain torch.nn.Linear, "
            "freeze the head, or take CausalLMLoss"
        )


def _is_served(layer: nn.Linear) -> bool:
    registered = (norm_sampler_of(base) for base in type(layer).__mro__)
    function = next(one for one in registered if one is not None)
    return function is linear and isinstance(find_sampler(layer), Registered)
