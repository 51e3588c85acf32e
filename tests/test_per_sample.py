"""The forms: norm, weighted sum and inner product are those of the gradients they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from opacus_fgc import (
    NORM_SAMPLERS,
    DPLossFastGradientClipping,
    DPOptimizerFastGradientClipping,
    GradSampleModuleFastGradientClipping,
    per_sample,
    planner,
    register_norm_sampler,
)
from opacus_fgc.per_sample import Convolution, Dense, NormOnly, Outer, Parts, PerSampleGradient, Routed, Rows, Sum

N, ROWS, COLUMNS = 4, 6, 5
SHAPE = torch.Size((ROWS, COLUMNS))


def outer(positions: int, dtype: torch.dtype = torch.float64) -> Outer:
    left, right = torch.randn(N, positions, ROWS, dtype=dtype), torch.randn(N, positions, COLUMNS, dtype=dtype)
    return Outer(left, right, SHAPE)


def rows(positions: int) -> Rows:
    return Rows(torch.randint(ROWS, (N, positions)), torch.randn(N, positions, COLUMNS), SHAPE)


class Diagonal(PerSampleGradient):
    """A form with the least that a form writes: gradients that are zero off a diagonal."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values  # (N, COLUMNS)
        self.shape = SHAPE
        self.batch_size = len(values)

    @property
    def elements(self) -> int:
        return self.values.numel()

    def materialize(self) -> torch.Tensor:
        return torch.nn.functional.pad(torch.diag_embed(self.values), (0, 0, 0, ROWS - COLUMNS))

    def select(self, samples: slice | torch.Tensor) -> Diagonal:
        return Diagonal(self.values[samples])


FORMS = {
    "diagonal": lambda: Diagonal(torch.randn(N, COLUMNS)),
    "dense": lambda: Dense(torch.randn(N, *SHAPE)),
    "outer-0": lambda: outer(0),
    "outer-1": lambda: outer(1),
    "outer-gram": lambda: outer(2),
    "outer-product": lambda: outer(9),
    "outer-grouped": lambda: Outer(torch.randn(N, 2, 3, 3), torch.randn(N, 2, 3, COLUMNS), SHAPE),
    "rows": lambda: rows(8),
    "rows-1": lambda: rows(1),
    "rows-0": lambda: rows(0),
    "sum": lambda: Sum([outer(3), rows(4), Dense(torch.randn(N, *SHAPE))]),
}
COUNTS, OTHER_COUNTS = torch.tensor([2, 0, 7, 3]), torch.tensor([0, 1, 1, 6])  # rows of each sample


def runs(make: Callable[[int], PerSampleGradient], counts: torch.Tensor = COUNTS) -> per_sample.Ragged:
    """Sums over runs of rows; ``make`` gives the form of so many rows."""
    summed = per_sample.sum_over_runs(make(int(counts.sum())), counts)
    assert isinstance(summed, per_sample.Ragged)
    return summed


def outer_rows(count: int, positions: int = 1) -> Outer:
    return Outer(torch.randn(count, positions, ROWS), torch.randn(count, positions, COLUMNS), SHAPE)


def table_rows(count: int) -> Rows:
    return Rows(torch.randint(ROWS, (count, 1)), torch.randn(count, 1, COLUMNS), SHAPE)


FORMS |= {
    "runs-of-outer": lambda: runs(outer_rows),
    "runs-of-outer-long": lambda: runs(outer_rows, torch.tensor([1, 300, 0, 40])),
    "runs-of-outer-positions": lambda: runs(lambda count: outer_rows(count, 3)),
    "runs-of-rows": lambda: runs(table_rows),
    "runs-of-diagonals": lambda: runs(lambda count: Diagonal(torch.randn(count, COLUMNS))),
    "runs-of-two": lambda: per_sample.add([runs(outer_rows), runs(outer_rows, OTHER_COUNTS)]),
    "runs-of-two-types": lambda: per_sample.add([runs(outer_rows), runs(table_rows)]),
}
PAIRS = [pair for pair in itertools.product(FORMS, FORMS) if "outer-grouped" not in pair and "sum" not in pair]

EXPERTS, SHAPE_OF_EXPERTS = 3, torch.Size((3, *SHAPE))


def routed(positions: int) -> Routed:
    index = torch.randint(EXPERTS, (N, positions))
    return Routed(index, torch.randn(N, positions, ROWS), torch.randn(N, positions, COLUMNS), SHAPE_OF_EXPERTS)


OF_EXPERTS = {
    "parts": lambda: Parts({0: outer(3), 2: Dense(torch.randn(N, *SHAPE))}, SHAPE_OF_EXPERTS),
    "parts-1": lambda: Parts({1: outer(1)}, SHAPE_OF_EXPERTS),
    "routed": lambda: routed(9),
    "routed-1": lambda: routed(1),
    "routed-0": lambda: routed(0),
    "rows-of-matrices": lambda: Rows(torch.randint(EXPERTS, (N, 4)), torch.randn(N, 4, *SHAPE), SHAPE_OF_EXPERTS),
    "dense-experts": lambda: Dense(torch.randn(N, *SHAPE_OF_EXPERTS)),
    "outer-by-matrix": lambda: Outer(
        torch.randn(N, EXPERTS, 2, ROWS), torch.randn(N, EXPERTS, 2, COLUMNS), SHAPE_OF_EXPERTS
    ),
}
PAIRS += itertools.product(OF_EXPERTS, OF_EXPERTS)
FORMS |= OF_EXPERTS


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> PerSampleGradient:
    torch.manual_seed(0)
    return FORMS[request.param]()


def test_norm(form: PerSampleGradient) -> None:
    expected = form.materialize().flatten(1).norm(dim=1)
    torch.testing.assert_close(form.norm(), expected)


def test_weighted_sum(form: PerSampleGradient) -> None:
    coef = torch.rand(N)
    expected = sum(c * gradient for c, gradient in zip(coef, form.materialize(), strict=True))
    torch.testing.assert_close(form.weighted_sum(coef), expected)


@pytest.mark.parametrize("first, second", PAIRS)
def test_sum_of_two(first: str, second: str) -> None:
    torch.manual_seed(0)
    a, b = FORMS[first](), FORMS[second]()
    total = a.materialize() + b.materialize()
    added = per_sample.add([a, b])
    torch.testing.assert_close(added.materialize(), total)
    torch.testing.assert_close(added.norm(), total.flatten(1).norm(dim=1))
    torch.testing.assert_close(added.weighted_sum(torch.ones(N)), total.sum(0))
    torch.testing.assert_close(a.inner(b), (a.materialize() * b.materialize()).flatten(1).sum(1))


def test_forms_of_one_type_become_one() -> None:
    assert isinstance(per_sample.add([outer(2), outer(3), outer(1)]), Outer)
    assert isinstance(per_sample.add([rows(2), rows(3)]), Rows)
    assert len(per_sample.add([outer(2), rows(3), outer(1), rows(1)]).terms) == 2


@pytest.mark.parametrize("uses", [1, 2, 4])
def test_sum_over_uses(form: PerSampleGradient, uses: int) -> None:
    expected = form.materialize().unflatten(0, (-1, uses)).sum(1)
    torch.testing.assert_close(form.sum_over_uses(uses).materialize(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_of_tiny_and_of_cancelling_rows(dtype: torch.dtype) -> None:
    """What vanishes in a Gram matrix, and what is left of terms that cancel, is found by the gradients."""
    left, right = torch.randn(12, 1, ROWS), torch.randn(12, 1, COLUMNS)
    left[:2] *= 1e-25
    right[:2] *= 1e20
    left[6:8], right[6:8] = -left[4:6] * (1 + 1e-3), right[4:6]
    counts = torch.tensor([2, 0, 2, 4, 4])
    form = per_sample.sum_over_runs(Outer(left.to(dtype), right.to(dtype), SHAPE), counts)
    products = left.to(dtype)[:, 0, :, None].double() * right.to(dtype)[:, 0, None].double()
    exact = torch.stack([part.sum(0).norm() for part in products.split(counts.tolist())])
    norms = form.norm()
    assert norms.dtype is torch.float32
    # Never below; above by what rounding may have added to terms of which a thousandth is left.
    assert (norms.double() >= (1 - 1e-6) * exact).all()
    torch.testing.assert_close(norms.double(), exact, rtol=2e-3, atol=0.0)


def test_a_new_form_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS["diagonal"]()
    gradients, coef = form.materialize(), torch.rand(N)
    monkeypatch.setattr(planner.MEMORY, "temporary", 1)
    torch.testing.assert_close(form.norm(), gradients.flatten(1).norm(dim=1))
    torch.testing.assert_close(form.weighted_sum(coef), torch.einsum("n,npd->pd", coef, gradients))


def test_a_new_form_serves_a_layer() -> None:
    """A form of three methods, given by one function for a layer, has the norms and clipped sum of plain autograd."""

    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(SHAPE))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight.diagonal()

    def scale_norm_sampler(layer, activations, backprops):
        return {layer.weight: Diagonal(activations[0] * backprops)}

    torch.manual_seed(0)
    layer, x = Scale(), torch.randn(N, COLUMNS)
    one_by_one = [torch.autograd.grad(layer(row[None]).square().sum(), layer.weight)[0] for row in x]
    norms = torch.stack(one_by_one).flatten(1).norm(dim=1)
    max_grad_norm = norms.median().item()
    expected = sum(g * min(1.0, max_grad_norm / n.item()) for g, n in zip(one_by_one, norms, strict=True))

    class SquaredError(torch.nn.Module):
        reduction = "none"

        def forward(self, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return (outputs - target).square().sum(1)

    register_norm_sampler(Scale)(scale_norm_sampler)
    try:
        module = GradSampleModuleFastGradientClipping(layer, max_grad_norm=max_grad_norm, loss_reduction="sum")
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(layer.parameters(), lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=max_grad_norm,
            expected_batch_size=N,
            loss_reduction="sum",
        )
        criterion = DPLossFastGradientClipping(module, optimizer, SquaredError(), loss_reduction="sum")
        criterion(module(x), torch.zeros_like(x)).backward()
    finally:
        del NORM_SAMPLERS[Scale]
    torch.testing.assert_close(module.get_norm_sample(), norms)
    torch.testing.assert_close(layer.weight.summed_grad, expected)


@pytest.mark.parametrize("positions", [2, 9])
def test_slices_change_nothing(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    form = outer(positions)
    expected = form.norm()
    monkeypatch.setattr(planner.MEMORY, "temporary", 1)
    torch.testing.assert_close(form.norm(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("positions", [1, 2, 9])
def test_norms_of_half_precision_are_float32(positions: int, dtype: torch.dtype) -> None:
    form = outer(positions, dtype)
    exact = Outer(form.left.double(), form.right.double(), SHAPE)
    assert form.norm().dtype == torch.float32
    torch.testing.assert_close(form.norm().double(), exact.norm(), rtol=1e-5, atol=0)


def test_norms_do_not_overflow_half_precision() -> None:
    left, right = torch.full((1, 2, 3), 6e4, dtype=torch.float16), torch.full((1, 2, 4), 6e4, dtype=torch.float16)
    assert torch.isfinite(Outer(left, right, torch.Size((3, 4))).norm()).all()


def test_plain_norms_cannot_be_added() -> None:
    form = NormOnly(torch.rand(N), SHAPE)
    for impossible in (form.materialize, lambda: form.weighted_sum(torch.ones(N)), lambda: form.inner(form)):
        with pytest.raises(NotImplementedError, match="returns norms only"):
            impossible()
    with pytest.raises(NotImplementedError, match="returns norms only"):
        per_sample.add([form, form])


def test_select(form: PerSampleGradient) -> None:
    gradients = form.materialize()
    mask = torch.tensor([True, False, False, True])
    torch.testing.assert_close(form.select(mask).materialize(), gradients[mask])
    torch.testing.assert_close(form.select(slice(1, 3)).materialize(), gradients[1:3])
    assert not form.select(mask & ~mask).weighted_sum(torch.rand(0)).any()


CANCELLING = {
    "gram": lambda left, right: Outer(left, right, torch.Size((60, 50))),
    "patches": lambda left, right: Convolution(
        right.mT.contiguous(), left.mT.contiguous(), torch.Size((60, 50, 1)), (1,), (0,), (1,), 1
    ),
    "sum": lambda left, right: Sum([Outer(left, right, torch.Size((60, 50))), Dense(left.new_zeros(N, 60, 50))]),
    "tied": lambda left, right: Sum([Outer(left[:, ::2], right[:, ::2], torch.Size((60, 50))), TiedHalf(left, right)]),
}


class TiedHalf(Dense):
    """The other half of the terms, stored."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        super().__init__(left[:, 1::2].mT @ right[:, 1::2])


@pytest.mark.parametrize("left_over", [0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("name", CANCELLING)
def test_terms_that_cancel(name: str, left_over: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm is right in float32 when almost nothing of a sample's terms is left."""
    torch.manual_seed(0)
    monkeypatch.setattr(planner, "cheapest", lambda options: planner.NormMethod.GRAM)
    left = torch.randn(N, 8, 60, dtype=torch.float32)
    right = torch.randn(N, 8, 50, dtype=torch.float32)
    # Each second term takes away the one before it, but for a part; the first sample has an ordinary gradient.
    left[1:, 1::2] = left[1:, ::2]
    right[1:, 1::2] = -right[1:, ::2] * (1 - left_over)
    expected = (left.double().mT @ right.double()).flatten(1).norm(dim=1)
    norm = CANCELLING[name](left, right).norm()
    assert norm.dtype == torch.float32
    # It is an upper bound; rounding of the terms themselves, 1e-7 of each, is all that there is.
    terms = (left.double().norm(dim=2) * right.double().norm(dim=2)).norm(dim=1)
    assert (norm.double() >= (1 - 1e-6) * expected).all()
    torch.testing.assert_close(norm.double(), expected, rtol=1e-4, atol=8e-7 * terms.max().item())
