"""Copies of a wrapped model, and what a file has of it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from opacus_fgc._compat.opacus import norm_sample
from opacus_fgc.certificates.schedule import Certification
from opacus_fgc.step.nonfinite import NonFinitePolicy


class Copies:
    """A wrapped model that is copied and stored without anything of a step, which is private."""

    _module: nn.Module
    _nonfinite: NonFinitePolicy
    certification: Certification

    def __getstate__(self) -> dict[str, Any]:
        """What a file has of it: the model, and what it was made with; nothing of a step, which is private."""
        model = self._module
        own = {
            id(param): nn.Parameter(param.detach(), param.requires_grad) for param in self._with_private_attributes()
        }
        if own:
            # The same tensors under other parameters.
            tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
            model = copy.deepcopy(model, {**tensors, **own})
        return self._state(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with hooks and state of its own."""
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self._state(self._module), memo))
        return other

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Wraps the model anew."""
        own = dict(state["own"])
        dropped = own.pop("dropped")
        self.__init__(state["model"], strict=False, **state["arguments"])  # type: ignore[misc]
        self._nonfinite.dropped = dropped
        self.__dict__.update(own)

    def _state(self, model: nn.Module) -> dict[str, Any]:
        arguments = (
            "batch_first",
            "loss_reduction",
            "force_functorch",
            "max_grad_norm",
            "use_ghost_clipping",
            "nonfinite",
        )
        own = {
            name: getattr(self, name) for name in ("clipping", "dropped", "hooks_enabled", "grad_accumulation_allowed")
        }
        if isinstance(self, nn.Module):
            own["training"] = self.training
        given = {**{name: getattr(self, name) for name in arguments}, "certify": self.certification.schedule.how}
        return {"model": model, "arguments": given, "own": own}

    def _with_private_attributes(self) -> list[Any]:
        return [
            param
            for param in self._module.parameters()
            if getattr(param, "summed_grad", None) is not None or norm_sample(param) is not None
        ]
