"""What it takes to add something: for a layer one function, for a clipping rule one class (a form: see `test_per_sample.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import NORM_SAMPLERS, PrivacyEngine, register_norm_sampler
from opacus_fgc.clipping import RULES, FlatClipping
from opacus_fgc.loss import MODES
from opacus_fgc.norm_samplers import Arranged
from opacus_fgc.per_sample import Dense, Outer
from tests.case import Apply, Case, Square, floats
from tests.reference import reference
from tests.test_exact import WAYS, assert_equal, expected, private

N, D, C = 8, 4, 0.5


class Mixer(nn.Module):
    """A layer that nobody knows: each position times a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


CASE = Case("mixer", lambda: nn.Sequential(Mixer(), nn.ReLU(), Mixer()), [floats(3, D)])


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_is_one_function_and_one_case(way: str) -> None:
    calls: list[int] = []

    @register_norm_sampler(Mixer)
    def mixer(layer: Mixer, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Outer]:
        calls.append(len(backprops))
        return {layer.weight: Outer(activations[0], backprops, layer.weight.shape)}

    try:
        oracle = expected(CASE, "mean")
        max_grad_norm = oracle.total_norm().median().item()
        model, _, _ = private(CASE, "wrapped", "mean", max_grad_norm, **WAYS[way])
    finally:
        del NORM_SAMPLERS[Mixer]
    assert bool(calls) is (way != "functorch")
    clipped = oracle.clipped_sum(max_grad_norm)
    for name, param in model.named_parameters():
        assert_equal(param._norm_sample, oracle.norms()[name], name)
        assert_equal(param.summed_grad, clipped[name], name)


class Both(nn.Module):
    """A layer with two outputs, of which one has its batch second; its operations are in C, out of sight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return Square.apply(x, self.weight), Square.apply(2 * x, self.weight).transpose(0, 1)


def arrange_both(layer: Both, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, Tensor]) -> Arranged:
    outputs = [output[0], output[1].transpose(0, 1)]
    return Arranged(args, outputs, lambda tapped: (tapped[0], tapped[1].transpose(0, 1)))


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("way", ["ghost", "ghost_bk"])
def test_a_layer_of_several_outputs(way: str, used: tuple[int, ...]) -> None:
    case = Case(
        "both",
        lambda: Apply(lambda m, x: sum([m.a(x)[0], m.a(x)[1].transpose(0, 1)][i] for i in used), a=Both()),
        [floats(3, D)],
    )

    @register_norm_sampler(Both, arrange=arrange_both)
    def both(layer: Both, activations: list[Tensor], backprops: list[Tensor]) -> dict[nn.Parameter, Dense]:
        (x,) = activations
        return {layer.weight: Dense((x.square() * (backprops[0] + 4 * backprops[1])).sum(1))}

    try:
        oracle = expected(case, "mean")
        max_grad_norm = oracle.total_norm().median().item()
        model, _, _ = private(case, "wrapped", "mean", max_grad_norm, certify="always", **WAYS[way])
    finally:
        del NORM_SAMPLERS[Both]
    assert_equal(model.a.weight.summed_grad, oracle.clipped_sum(max_grad_norm)["a.weight"], "clipped sum")


class Normalized(FlatClipping):
    """Every gradient is scaled to nearly the clipping norm, also a small one (Bu et al. 2023, arXiv:2206.07136)."""

    def __init__(self, max_grad_norm: float, gamma: float = 0.01) -> None:
        super().__init__(max_grad_norm)
        self.gamma = gamma

    def coefficients(self, norms: Tensor) -> Tensor:
        return self.max_grad_norm / (norms + self.gamma)


@pytest.mark.parametrize("mode", MODES)
def test_a_clipping_rule_is_one_class(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "normalized", Normalized)
    torch.manual_seed(0)
    model, x, y = nn.Linear(D, 3), torch.randn(N, D), torch.randint(3, (N,))
    oracle = reference(model, nn.CrossEntropyLoss(), (x,), y, N)
    module, _, criterion, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=N),
        noise_multiplier=0.0,
        max_grad_norm=C,
        poisson_sampling=False,
        grad_sample_mode=mode,
        clipping="normalized",
        gamma=0.5,
    )
    criterion(module(x), y).backward()
    factors = C / (oracle.total_norm() + 0.5)
    for name, param in model.named_parameters():
        wanted = torch.einsum("n,n...->...", factors, oracle.gradients[name])
        assert_equal(param.summed_grad, wanted, name)
