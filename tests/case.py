"""What a case of the tests is: a module, an input, a target and a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

N = 5


def floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape)


def tokens(high: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(high, (n, *shape))


def squares(reduction: str) -> nn.Module:
    return nn.MSELoss(reduction=reduction)


def classes(reduction: str) -> nn.Module:
    return nn.CrossEntropyLoss(reduction=reduction)


@dataclass
class Case:
    """One row.

    Attributes:
        id: name in the test's output.
        module: makes the model.
        inputs: one function of the batch size for each positional argument.
        target: function of the batch size; zeros like the output (a regression) if None.
        loss: makes the criterion from a reduction.
        batch_first: as for `make_private`; inputs have their batch second if not.
        covers: layer types of `NORM_SAMPLERS` that this is the case of.
        functorch: whether torch.func can do this model as well.
        empty: whether the model's own forward takes an empty batch.
    """

    id: str
    module: Callable[[], nn.Module]
    inputs: list[Callable[[int], Any]]
    target: Callable[[int], Tensor] | None = None
    loss: Callable[[str], nn.Module] = squares
    batch_first: bool = True
    covers: list[type[nn.Module] | str] = field(default_factory=list)
    functorch: bool = True
    empty: bool = True

    def make(self, n: int = N, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...], Tensor]:
        """Model, inputs and target, the same ones for the same seed."""
        torch.manual_seed(seed)
        model = self.module()
        inputs = tuple(make(n) for make in self.inputs)
        if not self.batch_first:
            inputs = tuple(value.transpose(0, 1) for value in inputs)
        if self.target is not None:
            return model, inputs, self.target(n)
        with torch.no_grad():
            return model, inputs, torch.randn_like(model(*inputs))


def two_passes_by_hand(wrapper: Any, losses: Tensor) -> None:
    """The loop of those who clip without our criterion, on one loss a sample."""
    losses.mean().backward(retain_graph=True)
    coef = wrapper.get_clipping_coef()
    wrapper.disable_hooks()
    (coef * losses).sum().backward()
    wrapper.enable_hooks()


class Apply(nn.Module):
    """A model from children and a function of them and the inputs."""

    def __init__(self, function: Callable, **children: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def tied(module: nn.Module, parent: str, name: str, source: str) -> nn.Module:
    module.get_submodule(parent).register_parameter(name, module.get_parameter(source))
    return module


class Square(torch.autograd.Function):
    """Hides what is done with a parameter from whoever watches operations."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return x * x * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return gradient * 2 * x * scale, (gradient * x * x).reshape(-1, *scale.shape).sum(0)

    generate_vmap_rule = True
