"""The cases of layers that do something else with their parameters than their type does."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from tests.case import Apply, Case, floats, tokens


class Standardized(nn.Conv2d):
    """A convolution by standardized weights; its ``forward`` is torch's."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        centered = weight - weight.mean((1, 2, 3), keepdim=True)
        return super()._conv_forward(input, centered / centered.std((1, 2, 3), keepdim=True), bias)


class PositiveSlope(nn.PReLU):
    """Calls torch's ``forward`` by another name."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * self.weight.exp()


class Circular:
    """To be put in front of a convolution."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv1d(F.pad(input, (1, 1), mode="circular"), weight * 3, bias)


class CircularConv(Circular, nn.Conv1d):
    """By a class that is no module."""


class Padded(nn.Conv1d):
    """Reads another stride than it was made with."""

    @property
    def stride(self) -> tuple[int]:
        return (2,)

    @stride.setter
    def stride(self, value: tuple[int]) -> None:
        pass


def of_an_instance(make: Any) -> nn.Module:
    layer = make()
    plain = layer._conv_forward
    layer._conv_forward = MethodType(lambda self, x, weight, bias: plain(x, weight.tanh(), bias), layer)
    return layer


def with_other_forward() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.forward = MethodType(lambda self, x: F.linear(x, self.weight.exp(), self.bias), layer)
    return layer


class Put:
    """A hook that puts what it computes from parameters in the place of one."""

    def __init__(self, in_parameters: bool) -> None:
        self.in_parameters = in_parameters

    def __call__(self, layer: nn.Module, args: Any) -> None:
        weight = layer.direction * layer.scale
        (layer._parameters if self.in_parameters else vars(layer))["weight"] = weight


def taken_away(layer: nn.Module, args: Any, output: Tensor) -> None:
    layer._parameters.pop("weight", None)


def with_put_weight(in_parameters: bool) -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.direction = nn.Parameter(layer._parameters.pop("weight").detach())
    layer.scale = nn.Parameter(torch.rand(3, 1) + 0.5)
    layer.register_forward_pre_hook(Put(in_parameters))
    layer.register_forward_hook(taken_away)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer)


def changed(m: Apply, x: Tensor) -> Tensor:
    return m.b(functional_call(m.a, {name: 30 * param for name, param in m.a.named_parameters()}, (x,)).tanh())


def of_another(m: Apply, x: Tensor) -> Tensor:
    return functional_call(m.a, {"weight": m.b.weight.T}, (m.b(x).tanh(),))


def both(m: Apply, x: Tensor) -> Tensor:
    return m.a(x) + functional_call(m.a, {"weight": m.a.weight.square()}, (x,))


def negated(m: Apply, x: Tensor) -> Tensor:
    return functional_call(m.a, {name: -param for name, param in m.a.named_parameters()}, (x,))


CHANGED = [
    Case("changed-conv-forward", lambda: nn.Sequential(Standardized(2, 3, 3), nn.Tanh()), [floats(2, 5, 5)]),
    Case("changed-conv-forward-of-a-mixin", lambda: CircularConv(2, 3, 3), [floats(2, 5)]),
    Case("changed-conv-forward-of-an-instance", lambda: of_an_instance(lambda: nn.Conv1d(2, 3, 2)), [floats(2, 5)]),
    Case("changed-forward-of-an-instance", with_other_forward, [floats(3, 4)]),
    Case("changed-call", lambda: nn.Sequential(nn.Linear(4, 4), PositiveSlope()), [floats(4)], functorch=False),
    Case("changed-property", lambda: Padded(2, 3, 2), [floats(2, 6)]),
    Case("changed-by-a-hook", lambda: with_put_weight(False), [floats(3, 4)], functorch=False),
    Case("changed-by-a-hook-in-parameters", lambda: with_put_weight(True), [floats(4)], functorch=False),
    Case(
        "changed-by-functional-call",
        lambda: Apply(changed, a=nn.Linear(4, 4), b=nn.Linear(4, 3)),
        [floats(4)],
        functorch=False,
    ),
    Case("changed-in-sign", lambda: Apply(negated, a=nn.Linear(4, 4)), [floats(4)], functorch=False),
    Case("changed-and-not", lambda: Apply(both, a=nn.Linear(4, 4)), [floats(2, 4)], functorch=False),
    Case(
        "another-layers-weight",
        lambda: Apply(of_another, a=nn.Linear(3, 4), b=nn.Linear(4, 3)),
        [floats(4)],
        functorch=False,
    ),
    Case(
        "parametrized",
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(4, 4, bias=False)),
            parametrizations.orthogonal(nn.Linear(4, 4)),
            nn.Linear(4, 2),
        ),
        [floats(3, 4)],
        functorch=False,
    ),
    Case(
        "parametrized-embedding",
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Embedding(7, 4)), nn.Linear(4, 2)),
        [tokens(7, 3)],
        functorch=False,
    ),
]
