"""States of models and optimizers that are sharded over ranks, as one process has them: for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opacus_fgc._compat.pytree import tree_map_only
from opacus_fgc.distributed.mesh import sharded_like


class WholeState:
    """Gives and takes the state of a model or an optimizer with whole tensors, as in one process.

    What one number of ranks saved so, another number can go on from. Every rank has to take part in all calls.

    Args:
        owner: a model, or an optimizer, some of whose tensors are DTensors.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def state_dict(self, **kwargs: Any) -> Any:
        """The owner's state, all of it, on every rank; DTensors as whole tensors on the CPU.

        Args:
            **kwargs: arguments of the owner's own ``state_dict``.
        """
        return tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), self._owner.state_dict(**kwargs))

    def load_state_dict(self, state: Mapping[str, Any], **kwargs: Any) -> Any:
        """Takes up what `state_dict` gave, on whatever number of ranks.

        Args:
            state: the state, with whole tensors.
            **kwargs: arguments of the owner's own ``load_state_dict``.
        """
        sharded = self._of_model(state) if isinstance(self._owner, nn.Module) else self._of_optimizer(state)
        return self._owner.load_state_dict(sharded, **kwargs)

    def _of_model(self, state: Mapping[str, Any]) -> dict[str, Any]:
        own = self._owner.state_dict()
        return {name: sharded_like(own[name], value) if name in own else value for name, value in state.items()}

    def _of_optimizer(self, state: Mapping[str, Any]) -> dict[str, Any]:
        params = list(chain.from_iterable(group["params"] for group in self._owner.param_groups))
        places = chain.from_iterable(group["params"] for group in state["param_groups"])
        param_at = dict(zip(places, params, strict=True))

        def shard(param: Any, value: Any) -> Any:
            # Counters of steps and the like have no shape of a parameter.
            return sharded_like(param, value) if isinstance(value, Tensor) and value.shape == param.shape else value

        shards = {
            place: {name: shard(param_at[place], value) for name, value in values.items()}
            for place, values in state["state"].items()
        }
        return {**state, "state": shards}
