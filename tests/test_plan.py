"""The plan of a step says of every layer how its norms were computed, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from opacus.layers import DPLSTM
from torch import nn

from opacus_fgc import GradSampleModuleFastGradientClipping
from opacus_fgc.loss import book_keeping, double_backward
from tests.case import Apply
from tests.cases import ScaleByOwn, tied_language_model

N = 3


def watched(model: nn.Module, *inputs: torch.Tensor, backward=book_keeping):
    module = GradSampleModuleFastGradientClipping(model)
    with module.plan() as plan:
        backward(module, module(*inputs).flatten(1).square().sum(1))
    return module, plan


def test_a_row_for_each_layer() -> None:
    model = Apply(
        lambda m, x: m.head(m.own(m.norm(m.lstm(m.embedding(x))[0]))),
        embedding=nn.Embedding(7, 3),
        lstm=DPLSTM(3, 4, batch_first=True),
        norm=nn.LayerNorm(4),
        own=ScaleByOwn(),
        head=nn.Linear(4, 2),
    )
    module, plan = watched(model, torch.randint(7, (N, 5)))
    rows = {row.layer: row for row in plan.rows}
    assert set(rows) == {"embedding", "lstm.l0.ih", "lstm.l0.hh", "norm", "own.scale", "own.inner", "head"}
    assert {rows[name].sampler for name in rows if name != "own.scale"} == {"norm sampler"}
    assert rows["own.scale"].sampler == "batch axis"
    assert rows["own.scale"].parameters == 4 and rows["head"].parameters == 10
    assert rows["lstm.l0.hh"].shapes == f"5 times {N}x4 -> {N}x16"
    assert rows["embedding"].shapes == f"{N}x5 -> {N}x5x3"
    assert rows["embedding"].type == "Embedding" and rows["embedding"].norm_method == "sums of rows"
    assert all(row.seconds > 0 and row.memory > 0 for row in plan.rows)
    assert sum(row.seconds for row in plan.rows) < plan.seconds


def test_table_names_every_layer() -> None:
    _, plan = watched(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(N, 4))
    lines = str(plan).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["2", "0", "(all"]
    assert "share of step" in lines[0] and "product of norms" in lines[2]
    shares = [float(line.split()[-1].removesuffix("%")) for line in lines[2:]]
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_second_pass_has_a_row() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    _, plan = watched(model, torch.randn(N, 48, 64), backward=double_backward)
    assert plan.rows[-1].layer == "(second pass)"
    assert plan.rows[-1].parameters == 2 * 64 * 64


def test_grad_samplers_are_called_by_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    def scale(layer, activations, backprops):
        return {layer.factor: activations[0] * backprops}

    monkeypatch.setitem(GradSampleHooks.GRAD_SAMPLERS, Scale, scale)
    _, plan = watched(Scale(), torch.randn(N, 4))
    assert [(row.layer, row.sampler, row.norm_method) for row in plan.rows] == [
        ("", "grad sampler", "gradients as they are")
    ]


def test_tied_parameters_are_measured_once() -> None:
    _, plan = watched(tied_language_model(), torch.randint(11, (N, 4)))
    ways = {row.layer: row.norm_method for row in plan.rows}
    assert ways["head"] == "with a layer that shares its parameters"
    assert ways["embedding"] == "inner products"


def test_steps_add_up_and_results_are_the_same() -> None:
    model, x = nn.Linear(4, 3), torch.randn(N, 6, 4)
    module = GradSampleModuleFastGradientClipping(model)
    loss = lambda: module(x).square().sum((1, 2))
    book_keeping(module, loss())
    expected = model.weight.summed_grad.clone()
    with module.plan() as plan:
        for _ in range(2):
            book_keeping(module, loss())
    assert len(plan.rows) == 1
    torch.testing.assert_close(model.weight.summed_grad, 3 * expected)


def test_nothing_is_watched_outside() -> None:
    module, plan = watched(nn.Linear(4, 3), torch.randn(N, 4))
    before = plan.seconds, plan.rows[0].seconds
    book_keeping(module, module(torch.randn(N, 4)).square().sum(1))
    assert (plan.seconds, plan.rows[0].seconds) == before


def test_a_failed_step_ends_the_watch() -> None:
    module = GradSampleModuleFastGradientClipping(nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match="does not depend"), module.plan() as plan:
        book_keeping(module, torch.zeros(N))
    book_keeping(module, module(torch.randn(N, 4)).square().sum(1))
    assert plan.rows == []
