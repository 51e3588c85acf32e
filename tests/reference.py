"""The oracle: the dullest possible code. One sample at a time, plain autograd, clip, add up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def sample(tree: Any, n: int, axis: int = 0) -> Any:
    """Sample ``n`` of every tensor in a tree, as a batch of one."""
    return tree_map(lambda leaf: leaf.narrow(axis, n, 1) if isinstance(leaf, Tensor) else leaf, tree)


@dataclass
class Reference:
    """What per-sample clipping has to give.

    Attributes:
        gradients: per-sample gradients of each trainable parameter by name, ``(N, *shape)``.
        losses: each sample's loss, ``(N,)``.
    """

    gradients: dict[str, Tensor]
    losses: Tensor

    def _with_an_axis(self) -> dict[str, Tensor]:
        return {name: gradient.unsqueeze(-1) for name, gradient in self.gradients.items()}

    def norms(self) -> dict[str, Tensor]:
        return {name: gradient.flatten(1).norm(dim=1) for name, gradient in self._with_an_axis().items()}

    def total_norm(self) -> Tensor:
        return torch.stack(list(self.norms().values())).norm(dim=0)

    def clipped_sum(self, max_grad_norm: float) -> dict[str, Tensor]:
        total = {name: gradient.new_zeros(gradient.shape[1:]) for name, gradient in self.gradients.items()}
        for n, norm in enumerate(self.total_norm()):
            coef = 1.0 if norm <= max_grad_norm else max_grad_norm / norm
            for name, gradient in self.gradients.items():
                total[name] += coef * gradient[n]
        return total


def reference(
    model: nn.Module, criterion: Callable, inputs: Any, target: Any, batch_size: int, batch_axis: int = 0
) -> Reference:
    """Runs a copy of the model on each sample by itself.

    ``inputs`` is a tuple of arguments for the model, whose samples are counted by ``batch_axis``; the target's by axis 0.
    """
    model = copy.deepcopy(model)
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    losses = []
    for n in range(batch_size):
        loss = criterion(model(*sample(inputs, n, batch_axis)), sample(target, n))
        assert loss.dim() == 0
        gradients = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for (name, param), gradient in zip(params.items(), gradients, strict=True):
            row = torch.zeros_like(param) if gradient is None else gradient
            rows[name].append(row.to_dense() if row.layout != torch.strided else row)
        losses.append(loss.detach())
    gradients = {
        name: torch.stack(row) if row else params[name].new_zeros(0, *params[name].shape) for name, row in rows.items()
    }
    return Reference(gradients, torch.stack(losses) if losses else torch.zeros(0))
