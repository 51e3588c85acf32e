"""What is checked: copies of a user's model, criterion and batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from opacus_fgc._compat.pytree import tree_leaves, tree_map_only
from opacus_fgc.taps.tap import tensors_in


@dataclass(frozen=True)
class Subject:
    """What is checked, of which copies are made.

    Attributes:
        model: the user's model.
        hooks: handles of Opacus' hooks on it.
        criterion: the user's criterion.
        inputs: what the model is called with.
        target: what it is to learn.
        batch_size: number of samples in these.
        batch_first: whether the batch is the first axis of the inputs, or the second.
        reduction: of the loss, "mean" or "sum".
        trained: names of the parameters that are compared; all others are frozen in the copies.
        dtype: of the copies; None for the model's own.
        eval_mode: whether the copies are put into eval mode.
        notes: what has to be said of all this.
    """

    model: nn.Module
    hooks: Sequence[Any]
    criterion: Callable[..., Any]
    inputs: Any
    target: Any
    batch_size: int
    batch_first: bool
    reduction: str
    trained: frozenset[str]
    dtype: torch.dtype | None
    eval_mode: bool = False
    notes: tuple[str, ...] = ()

    def copies(self) -> tuple[nn.Module, Callable[..., Any]]:
        """A copy of the model, without Opacus' hooks, and one of the criterion."""
        # The hooks hold what wraps the model, so they are replaced by something else in the copy before they are removed from it.
        memo: dict[int, Any] = {id((hook.hooks_dict_ref() or {}).get(hook.id)): ... for hook in self.hooks}
        memo.pop(id(None), None)
        try:
            # Together, for a criterion that has the model in it.
            model, criterion, hooks = copy.deepcopy((self.model, self.criterion, list(self.hooks)), memo)
        except Exception as error:
            raise ValueError(
                f"the model or the criterion cannot be copied, and all is done on copies: {error}. A tensor that is "
                "left from a forward may be in it; check it as it is when it is made"
            ) from error
        for hook in hooks:
            hook.remove()
        vars(model).pop("autograd_grad_sample_hooks", None)
        for part in (model, criterion):
            if self.dtype is not None and isinstance(part, nn.Module):
                part.to(self.dtype)
        for name, param in model.named_parameters():
            if name not in self.trained:
                param.requires_grad_(False)
        return (model.eval() if self.eval_mode else model), criterion

    def batch(self, samples: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """A copy of some samples: positional and keyword arguments of the model, and the target."""
        inputs = self._some(self.inputs, samples, (0,) if self.batch_first else (1, 0))
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        return args if isinstance(args, tuple) else (args,), kwargs, self._some(self.target, samples, (0,))

    def _some(self, tree: Any, samples: Sequence[int], axes: Sequence[int]) -> Any:
        def rows(tensor: Tensor) -> Tensor:
            axis = next((axis for axis in axes if tensor.dim() > axis and tensor.shape[axis] == self.batch_size), None)
            index = torch.tensor(samples, device=tensor.device)
            tensor = tensor.detach().clone() if axis is None else tensor.detach().index_select(axis, index)
            return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

        return tree_map_only(Tensor, rows, tree)

    def loss(self, model: nn.Module, criterion: Callable[..., Any], samples: Sequence[int]) -> Tensor:
        """The user's own loss, shape ``()``."""
        args, kwargs, target = self.batch(samples)
        loss = criterion(model(*args, **kwargs), target)
        if not isinstance(loss, Tensor):
            raise ValueError(f"the criterion returns {type(loss).__name__}, not a tensor")
        return getattr(loss, self.reduction)() if loss.dim() else loss


def samples_in(inputs: Any, target: Any) -> int:
    """How many samples there are in a batch, by its inputs or its target."""
    if any(isinstance(leaf, PackedSequence) for leaf in tree_leaves(inputs, is_leaf=_is_packed)):
        raise NotImplementedError(
            "samples cannot be picked from a PackedSequence; check a model that packs its inputs itself"
        )
    tensors = [tensor for tensor in tensors_in(target) if tensor.dim() > 0]
    if not tensors:
        raise ValueError("the target has no tensor with a batch axis, so the number of samples is not known")
    return len(tensors[0])


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedSequence)
