"""No sample contributes more than C (1 + 1e-6), as stored: long rows, half precision, terms that cancel, squares that vanish."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from opacus_fgc import GradSampleModuleFastGradientClipping, planner
from opacus_fgc.clipping import FlatClipping
from opacus_fgc.norm_samplers.normalization import _default_eps
from opacus_fgc.optimizer import DPOptimizerFastGradientClipping
from opacus_fgc.per_sample import Convolution, Dense, Outer, PerSampleGradient, Rows, Sum
from opacus_fgc.per_sample.precision import factor_norms, full_precision, reduced_operations, row_norms
from opacus_fgc.planner import NormMethod
from opacus_fgc.privacy_engine import MODES
from tests.case import Apply

BOUND = 1 + 1e-6
HALF = (torch.float16, torch.bfloat16)
HALF_IDS = ("float16", "bfloat16")
both_modes = pytest.mark.parametrize("mode", MODES)
in_half = pytest.mark.parametrize("dtype", HALF, ids=HALF_IDS)


# Norms


@pytest.mark.parametrize("length", [1, 511, 1024, 1025, 4096, 2**16 + 3, 2**20 + 1, 2**24])
@pytest.mark.parametrize("kind", ["random", "equal", "complex"])
def test_rows_of_any_length(kind: str, length: int) -> None:
    torch.manual_seed(length)
    rows = torch.randn(1, length, dtype=torch.complex64 if kind == "complex" else torch.float32)
    if kind == "equal":
        rows = torch.full_like(rows, 0.31)
    exact = torch.linalg.vector_norm(rows.to(torch.cdouble if kind == "complex" else torch.double)).item()
    assert row_norms(rows).item() == pytest.approx(exact, rel=1e-6 if kind == "equal" else 2e-7)
    assert row_norms(rows).dtype == torch.float32


def test_rows_of_no_elements() -> None:
    assert torch.equal(row_norms(torch.zeros(3, 0)), torch.zeros(3))
    assert row_norms(torch.zeros(0, 5000)).shape == (0,)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-3, 1.0, 1e20, 1e37])
@pytest.mark.parametrize("length", [3, 20_000])
def test_norms_of_factors(length: int, size: float) -> None:
    rows = torch.rand(2, length, dtype=torch.float32) * size
    torch.testing.assert_close(factor_norms(rows).double(), rows.double().norm(dim=1), rtol=1e-6, atol=0)


LONG = 2**24
LONG_FORMS: dict[str, Callable[[], PerSampleGradient]] = {
    "dense": lambda: Dense(torch.randn(1, LONG)),
    "complex": lambda: Dense(torch.randn(1, LONG // 2, dtype=torch.complex64)),
    "closed": lambda: Outer(torch.randn(1, 1, LONG), torch.randn(1, 1, 1), torch.Size((LONG, 1))),
    "gram": lambda: Outer(torch.randn(1, 2, LONG), torch.randn(1, 2, 1), torch.Size((LONG, 1))),
    "equal, gram": lambda: Outer(torch.full((1, 4, 2**18), 0.31), torch.full((1, 4, 3), 0.7), torch.Size((2**18, 3))),
    "many positions": lambda: Outer(torch.rand(1, 2**18, 5), torch.rand(1, 2**18, 4), torch.Size((5, 4))),
    "formed": lambda: Outer(torch.randn(1, 3, 4096), torch.randn(1, 3, 4096), torch.Size((4096, 4096))),
    "rows": lambda: Rows(torch.arange(2**18).flip(0).unsqueeze(0), torch.randn(1, 2**18, 64), torch.Size((2**18, 64))),
    "equal rows": lambda: Rows(
        torch.arange(2**18).unsqueeze(0), torch.full((1, 2**18, 4), 0.1), torch.Size((2**18, 4))
    ),
    "sum": lambda: Sum([Dense(torch.randn(1, 2**22, 1)), LONG_FORMS["short rows"]()]),
    "short rows": lambda: Rows(torch.zeros(1, 1, dtype=torch.int64), torch.randn(1, 1, 1), torch.Size((2**22, 1))),
    "kernel": lambda: Convolution(
        torch.randn(1, 1024, 5, 5), torch.randn(1, 512, 3, 3), torch.Size((512, 1024, 3, 3)), (1, 1), (0, 0), (1, 1), 1
    ),
}


@pytest.mark.parametrize("name", LONG_FORMS)
def test_long_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm is that of what is released, in whatever way it is computed."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    if name in ("formed", "many positions"):
        monkeypatch.setattr(planner, "cheapest", lambda options: NormMethod.FORMED)
    if name == "kernel":
        monkeypatch.setattr(planner, "cheapest", lambda options: NormMethod.FORMED)
    form = LONG_FORMS[name]()
    released = form.weighted_sum(torch.ones(1))
    exact = released.to(torch.cdouble if released.is_complex() else torch.double).norm().item()
    assert form.norm().item() == pytest.approx(exact, rel=1e-6)


def test_norms_of_many_parameters() -> None:
    """The total norm, too, is right where it has many terms."""
    module = GradSampleModuleFastGradientClipping(nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(5000)]))
    for param in module.parameters():
        param._norm_sample = torch.full((2,), 0.1, dtype=torch.float32)
    expected = torch.full((2,), math.sqrt(5000) * torch.tensor(0.1, dtype=torch.float32).item())
    torch.testing.assert_close(module.get_norm_sample().double(), expected, rtol=5e-7, atol=0)


# The bound, for all forms


def scaled(shape: tuple[int, ...], dtype: torch.dtype, exponent: int) -> Tensor:
    wide = torch.complex64 if dtype.is_complex else torch.float32
    return (torch.randn(shape, dtype=wide) * 2.0**exponent).to(dtype)


def cancelling(left: Tensor, right: Tensor, left_over: float) -> None:
    """Has each second position take away most of the one before it."""
    pairs = left.shape[1] // 2 * 2
    left[:, 1:pairs:2] = left[:, 0:pairs:2]
    right[:, 1:pairs:2] = -right[:, 0:pairs:2] * (1 - left_over)


@st.composite
def forms(draw: st.DrawFn) -> PerSampleGradient:
    dtype = draw(st.sampled_from([torch.float32, torch.float32, *HALF, torch.complex64]))
    n, positions = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 8, 33]))
    p, d = draw(st.sampled_from([1, 2, 17, 64])), draw(st.sampled_from([1, 3, 40]))
    reach = 60 if dtype in (torch.float32, torch.complex64) else 8
    exponent = draw(st.integers(-reach, reach))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    left, right = scaled((n, positions, p), dtype, exponent), scaled((n, positions, d), dtype, -exponent)
    left_over = draw(st.sampled_from([None, None, 1e-3, 0.02, 0.2]))
    if left_over is not None:
        cancelling(left, right, left_over)
    shape = torch.Size((p, d))
    outer = Outer(left, right, shape)
    rows = Rows(torch.randint(p, (n, positions)), scaled((n, positions, d), dtype, draw(st.integers(-3, 3))), shape)
    dense = Dense(scaled((n, p, d), dtype, draw(st.integers(-3, 3))))
    groups = 2 if p % 2 == 0 else 1
    convolution = Convolution(
        scaled((n, 2 * groups, positions + 2), dtype, -exponent),
        scaled((n, p, positions), dtype, exponent),
        torch.Size((p, 2, 3)),
        (1,),
        (0,),
        (1,),
        groups,
    )
    kinds = {"outer": outer, "rows": rows, "dense": dense, "convolution": convolution}
    kinds["sum"] = Sum([outer, rows, dense]) if outer.left.shape[1] else dense
    return kinds[draw(st.sampled_from(sorted(kinds)))]


@settings(max_examples=300, deadline=None)
@given(form=forms(), way=st.sampled_from(list(NormMethod)), share=st.floats(1e-3, 1))
def test_contributions(form: PerSampleGradient, way: NormMethod, share: float) -> None:
    """What is stored of one sample alone has at most the clipping norm, which is a share of its norm."""
    cheapest = planner.cheapest
    planner.cheapest = lambda options: way if way in options else cheapest(options)
    try:
        with full_precision(torch.device("cpu")):
            norms = form.norm()
            assert norms.dtype == torch.float32
            max_grad_norm = max(1e-12, share * norms.max().item())
            coef = FlatClipping(max_grad_norm).coefficients(norms)
            for n in range(form.batch_size):
                stored = form.select(slice(n, n + 1)).weighted_sum(coef[n : n + 1])
                assert stored.dtype in (torch.float32, torch.complex64)
                wide = stored.to(torch.cdouble if stored.is_complex() else torch.double)
                assert wide.norm().item() <= max_grad_norm * BOUND
    finally:
        planner.cheapest = cheapest


@pytest.mark.parametrize("elements", [1, 3, 16])
def test_few_elements_that_cancel_by_chance(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands of samples the sums of some nearly vanish, and what is released is not rounded as the norm was."""
    monkeypatch.setattr(planner, "cheapest", lambda options: NormMethod.FORMED)
    torch.manual_seed(0)
    form = Outer(torch.randn(4000, 33, 1).float(), torch.randn(4000, 33, elements).float(), torch.Size((1, elements)))
    norms = form.norm()
    exact = (form.left.double().mT @ form.right.double()).flatten(1).norm(dim=1)
    # Roundings are of the size of the terms, up to 40 here, and not of what is left of them.
    torch.testing.assert_close(norms.double(), exact, rtol=0, atol=1e-4)
    for n in range(len(norms)):
        coef = FlatClipping(1e-3).coefficients(norms[n : n + 1])
        released = form.select(slice(n, n + 1)).weighted_sum(coef)
        assert released.double().norm().item() <= 1e-3 * BOUND


@pytest.mark.parametrize("positions", [1, 2, 3, 40])
@pytest.mark.parametrize("small", [1e-24, 1e-30])
def test_sides_that_vanish(small: float, positions: int) -> None:
    """Squares of one side are 0 in float32, the gradient is of an ordinary size; and padding costs nothing."""
    torch.manual_seed(0)
    left = torch.randn(3, positions, 5, dtype=torch.float32) * small
    right = torch.randn(3, positions, 4, dtype=torch.float32) / small * 1e-6
    left[1], right[1] = 0, right[1] * small
    form = Outer(left, right, torch.Size((5, 4)))
    exact = (left.double().mT @ right.double()).flatten(1).norm(dim=1)
    torch.testing.assert_close(form.norm().double(), exact, rtol=1e-5, atol=0)
    # One position of a sample that has ordinary ones.
    if positions > 1:
        left[0, 1:], right[0, 1:] = torch.randn(positions - 1, 5).float(), torch.randn(positions - 1, 4).float() * 1e-6
        exact = (left.double().mT @ right.double()).flatten(1).norm(dim=1)
        torch.testing.assert_close(form.norm().double(), exact, rtol=1e-5, atol=0)


# The bound, for models


class Difference(nn.Module):
    """A layer on two positions that take each other away but for a small part."""

    def __init__(self, left_over: float) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 48, bias=False)
        self.left_over = left_over

    def forward(self, x: Tensor) -> Tensor:
        both = self.layer(torch.stack([x, (1 - self.left_over) * x], 1))
        return both[:, 0] - both[:, 1]


def contribution(wrapped: GradSampleModuleFastGradientClipping) -> float:
    trained = [param for param in wrapped.parameters() if param.requires_grad]
    return torch.cat([param.summed_grad.double().flatten() for param in trained]).norm().item()


def drop(wrapped: GradSampleModuleFastGradientClipping) -> None:
    for param in wrapped.parameters():
        param.summed_grad = None


@both_modes
def test_two_positions_that_cancel(mode: str) -> None:
    torch.manual_seed(0)
    for left_over in (0.3, 0.1, 0.03, 0.01, 1e-3):
        for _ in range(10):
            wrapped = GradSampleModuleFastGradientClipping(Difference(left_over).float(), max_grad_norm=1e-5)
            loss = wrapped(torch.randn(1, 48, dtype=torch.float32)).square().sum(1)
            MODES[mode](wrapped, loss)
            assert 0.99e-5 < contribution(wrapped) <= 1e-5 * BOUND
            drop(wrapped)


SMALL_MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 10)), (24,)),
    "norms": (lambda: nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40), nn.GELU(), nn.Linear(40, 10)), (7, 24)),
    "rms": (lambda: nn.Sequential(nn.Linear(24, 40), nn.RMSNorm(40), nn.Linear(40, 10)), (7, 24)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)),
        (3, 6, 6),
    ),
    "bilinear": (lambda: Twice(nn.Bilinear(24, 24, 10)), (24,)),
    "recurrent": (
        lambda: Apply(
            lambda m, x: m.gru(m.rnn(x)[0])[0],
            rnn=nn.RNN(24, 12, batch_first=True),
            gru=nn.GRU(12, 10, batch_first=True),
        ),
        (7, 24),
    ),
}


class Twice(nn.Module):
    """A layer that takes its input twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


def small_loss(output: Tensor) -> Tensor:
    targets = torch.zeros(len(output), dtype=torch.int64)
    return F.cross_entropy(output.float().reshape(len(output), -1, 10).mean(1), targets, reduction="none")


@pytest.fixture(params=["nothing kept", "as it is"])
def keep(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With nothing kept of the first pass, ghost clipping has a second one for all parameters."""
    if request.param == "nothing kept":
        monkeypatch.setattr(planner.MEMORY, "ghost", planner.NOTHING)
    return


@pytest.mark.every(3)
@pytest.mark.usefixtures("keep")
@pytest.mark.parametrize("autocast", [False, True], ids=["whole", "autocast"])
@in_half
@both_modes
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_one_sample_in_half_precision(name: str, mode: str, dtype: torch.dtype, autocast: bool) -> None:
    make, shape = SMALL_MODELS[name]
    for seed in range(5):
        torch.manual_seed(seed)
        model = make().to(torch.float32 if autocast else dtype)
        wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=0.013)
        x = torch.randn(1, *shape).to(torch.float32 if autocast else dtype)
        with torch.autocast("cpu", dtype, enabled=autocast):
            loss = small_loss(wrapped(x))
        MODES[mode](wrapped, loss)
        assert all(param.summed_grad.dtype == torch.float32 for param in wrapped.parameters())
        assert 0.999 * 0.013 < contribution(wrapped) <= 0.013 * BOUND


@pytest.mark.usefixtures("keep")
@in_half
@both_modes
def test_one_more_sample_in_half_precision(mode: str, dtype: torch.dtype) -> None:
    """In a sum of many, in one batch and over several, a step of the sum would be more than the clipping norm."""
    model = nn.Linear(512, 1, bias=False).to(dtype)
    model.weight.data.zero_()
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=2.0)

    def total(*batches: int) -> Tensor:
        for size in batches:
            loss = (wrapped(torch.ones(size, 512, dtype=dtype)) + 3.0).square().sum(1)
            MODES[mode](wrapped, loss)
        total = model.weight.summed_grad.double()
        drop(wrapped)
        return total

    assert (total(130, 131) - total(130, 130)).norm().item() == pytest.approx(2.0, rel=1e-4)
    assert (total(*[20] * 12, 18, 2, 1) - total(*[20] * 12, 18, 2)).norm().item() == pytest.approx(2.0, rel=1e-4)


@both_modes
def test_reduced_products_of_float32(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user has chosen products that round more, the clipped sum is not made of such."""
    monkeypatch.setattr(planner.MEMORY, "ghost", planner.NOTHING)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert "matmul" in reduced_operations(torch.device("cpu"))
        with full_precision(torch.device("cpu")):
            assert "matmul" not in reduced_operations(torch.device("cpu"))
        torch.manual_seed(0)
        wrapped = GradSampleModuleFastGradientClipping(SMALL_MODELS["mlp"][0]().float(), max_grad_norm=0.01)
        forbidden = "opacus_fgc.step.weighted_pass.gradients_of"
        monkeypatch.setattr(forbidden, lambda *_: pytest.fail("torch itself computes gradients"))
        MODES[mode](wrapped, small_loss(wrapped(torch.randn(1, 24, dtype=torch.float32))))
        assert contribution(wrapped) <= 0.01 * BOUND
    finally:
        torch.set_float32_matmul_precision(before)
    assert "matmul" not in reduced_operations(torch.device("cpu"))


@in_half
def test_two_passes_by_hand_are_refused_in_half_precision(dtype: torch.dtype) -> None:
    wrapped = GradSampleModuleFastGradientClipping(nn.Linear(4, 10).to(dtype))
    small_loss(wrapped(torch.randn(3, 4).to(dtype))).mean().backward(retain_graph=True)
    assert wrapped.get_norm_sample().shape == (3,)
    with pytest.raises(NotImplementedError, match="half precision and autocast"):
        wrapped.get_clipping_coef()


class FrozenInHalf(nn.Module):
    """As an adapter on a frozen base: what is trained is in float32, and so is what it is called on."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(24, 32).float(), nn.Linear(32, 10).float()
        self.base = nn.Linear(32, 32).to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.base(x.to(self.base.weight.dtype)).float())


@pytest.mark.usefixtures("keep")
@in_half
@both_modes
def test_one_sample_through_a_frozen_layer_in_half_precision(mode: str, dtype: torch.dtype) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        wrapped = GradSampleModuleFastGradientClipping(FrozenInHalf(dtype), max_grad_norm=0.013)
        MODES[mode](wrapped, small_loss(wrapped(torch.randn(1, 24, dtype=torch.float32))))
        assert 0.999 * 0.013 < contribution(wrapped) <= 0.013 * BOUND


@in_half
def test_two_passes_by_hand_are_refused_through_half_precision(dtype: torch.dtype) -> None:
    wrapped = GradSampleModuleFastGradientClipping(FrozenInHalf(dtype))
    losses = small_loss(wrapped(torch.randn(3, 24, dtype=torch.float32)))
    losses.mean().backward(retain_graph=True)
    with pytest.raises(NotImplementedError, match="half precision and autocast"):
        wrapped.get_clipping_coef() * losses


@pytest.mark.parametrize("secure", [False, True], ids=["torch", "secure"])
@in_half
@both_modes
def test_a_step_in_half_precision(mode: str, dtype: torch.dtype, secure: bool) -> None:
    """Noise is added to the sum in float32; the gradient has the parameter's dtype."""
    model = nn.Linear(3, 10).to(dtype)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=4,
        secure_mode=secure,
    )
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0)
    optimizer.attach(wrapped)
    dtypes = []
    add = optimizer.with_noise
    optimizer.with_noise = lambda values, std: dtypes.append(values.dtype) or add(values, std)
    MODES[mode](wrapped, small_loss(wrapped(torch.randn(4, 3).to(dtype))))
    optimizer.step()
    assert set(dtypes) == {torch.float32}
    assert all(param.grad.dtype == dtype for param in model.parameters())


@in_half
@pytest.mark.parametrize("autocast", [False, True], ids=["whole", "autocast"])
def test_default_eps_of_an_rms_norm(dtype: torch.dtype, autocast: bool) -> None:
    """The one that forward took, which for small inputs is most of the norm."""
    torch.manual_seed(0)
    x = (1e-2 * torch.randn(3, 5, 16)).to(dtype)
    layer = nn.RMSNorm(16).to(torch.float32 if autocast else dtype)
    wrapped = GradSampleModuleFastGradientClipping(layer, max_grad_norm=1e6)
    with torch.autocast("cpu", dtype, enabled=autocast):
        output = wrapped(x)
    expected = torch.zeros(16)
    for n in range(3):
        with torch.autocast("cpu", dtype, enabled=autocast):
            one = layer(x[n : n + 1]).float().square().sum()
        expected += torch.autograd.grad(one, layer.weight)[0]
    MODES["ghost"](wrapped, output.float().square().flatten(1).sum(1))
    torch.testing.assert_close(layer.weight.summed_grad.double(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eps_of_full_precision_is_the_own_one(dtype: torch.dtype) -> None:
    assert _default_eps(dtype, torch.device("cpu")) == torch.finfo(dtype).eps


# Complex parameters


class Spectrum(nn.Module):
    """Complex layers between real ones."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.before, self.layer, self.shape = nn.Linear(12, 2 * math.prod(shape)), layer, shape

    def forward(self, x: Tensor) -> Tensor:
        parts = self.before(x).unflatten(-1, (*self.shape, 2))
        output = self.layer(torch.view_as_complex(parts.contiguous()))
        return torch.view_as_real(output * (1 + 2j)).flatten(1).square().sum(1, keepdim=True)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6, dtype=torch.cdouble))
        self.shift = nn.Parameter(torch.randn(6, dtype=torch.cdouble))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def complex_models() -> dict[str, Callable[[], nn.Module]]:
    return {
        "linear": lambda: Spectrum(nn.Linear(6, 4, dtype=torch.cdouble), (6,)),
        "linear-positions": lambda: Spectrum(nn.Linear(6, 4, dtype=torch.cdouble), (3, 6)),
        "linear-many-positions": lambda: Spectrum(nn.Linear(3, 2, dtype=torch.cdouble), (40, 3)),
        "linear-used-twice": lambda: Spectrum(nn.Sequential(*[nn.Linear(6, 6, dtype=torch.cdouble)] * 2), (3, 6)),
        "pointwise": lambda: Spectrum(Scale(), (3, 6)),
        "convolution": lambda: Spectrum(nn.Conv1d(3, 4, 3, padding=1, dtype=torch.cdouble), (3, 6)),
        "convolution-groups": lambda: Spectrum(nn.Conv1d(4, 4, 2, groups=2, dtype=torch.cdouble), (4, 6)),
        "transposed": lambda: Spectrum(nn.ConvTranspose1d(3, 2, 3, stride=2, dtype=torch.cdouble), (3, 6)),
    }


@both_modes
@pytest.mark.parametrize("name", complex_models())
def test_complex_layers(name: str, mode: str) -> None:
    """Gradients of complex parameters, one sample at a time by autograd, clipped and added up."""
    torch.manual_seed(0)
    model, x, max_grad_norm = complex_models()[name](), torch.randn(4, 12), 1.5
    params = dict(model.named_parameters())
    expected = {path: torch.zeros_like(param) for path, param in params.items()}
    norms = []
    for n in range(4):
        gradients = torch.autograd.grad(model(x[n : n + 1]).sum(), list(params.values()))
        norms.append(math.sqrt(sum(gradient.abs().square().sum().item() for gradient in gradients)))
        for path, gradient in zip(params, gradients, strict=True):
            expected[path] += min(1.0, max_grad_norm / norms[-1]) * gradient
    assert max(norms) > max_grad_norm
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=max_grad_norm)
    MODES[mode](wrapped, wrapped(x).sum(1))
    torch.testing.assert_close(wrapped.per_sample_gradient_norms, torch.tensor(norms), rtol=1e-10, atol=0)
    for path, param in params.items():
        torch.testing.assert_close(param.summed_grad, expected[path], rtol=1e-10, atol=1e-10)


def complex_forms() -> list[PerSampleGradient]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(3, *shape, dtype=torch.cdouble)

    shape = torch.Size((6, 5))
    return [
        Dense(draw(6, 5)),
        Outer(draw(2, 6), draw(2, 5), shape),
        Outer(draw(9, 6), draw(9, 5), shape),
        Rows(torch.randint(6, (3, 4)), draw(4, 5), shape),
        Sum([Outer(draw(3, 6), draw(3, 5), shape), Rows(torch.randint(6, (3, 4)), draw(4, 5), shape)]),
    ]


@pytest.mark.parametrize("way", [NormMethod.GRAM, NormMethod.FORMED, NormMethod.KEPT])
def test_complex_forms(way: NormMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "cheapest", lambda options: way if way in options else NormMethod.FORMED)
    torch.manual_seed(0)
    every = complex_forms()
    for form in every:
        gradients = form.materialize()
        torch.testing.assert_close(form.norm(), gradients.flatten(1).norm(dim=1))
        torch.testing.assert_close(form.weighted_sum(torch.ones(3)), gradients.sum(0))
        for other in every[:4]:
            inner = (gradients.conj() * other.materialize()).flatten(1).sum(1).real
            torch.testing.assert_close(form.inner(other), inner)


@pytest.mark.parametrize("secure", [False, True], ids=["torch", "secure"])
def test_noise_on_both_parts_of_complex_numbers(secure: bool) -> None:
    param = nn.Parameter(torch.zeros(60, 300, dtype=torch.cdouble))
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD([param], lr=0.1),
        noise_multiplier=5.0,
        max_grad_norm=2.0,
        expected_batch_size=1,
        secure_mode=secure,
    )
    values = torch.full_like(param, 1 - 2j)
    noise = optimizer.with_noise(values, 10.0) - values
    assert noise.dtype == torch.cdouble
    for part in (noise.real, noise.imag):
        assert part.std().item() == pytest.approx(10.0, rel=0.05)
    correlation = torch.corrcoef(torch.stack([noise.real.flatten(), noise.imag.flatten()]))[0, 1].item()
    assert abs(correlation) < 0.05
