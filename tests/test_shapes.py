"""Whatever the shapes, empty and single batches included, the result is the oracle's."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.case import Case, floats, tokens
from tests.test_exact import MATRIX, WAYS, assert_equal, expected, private

SMALL = st.integers(1, 5)
OPTIONS = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def check(case: Case, n: int, way: str = "ghost") -> None:
    oracle = expected(case, "mean", n)
    max_grad_norm = (oracle.total_norm().median().item() if n else 0) or 1.0
    model, wrapper, _ = private(case, "wrapped", "mean", max_grad_norm, n, **WAYS[way])
    assert wrapper.per_sample_gradient_norms.shape == (n,)
    assert_equal(wrapper.per_sample_gradient_norms, oracle.total_norm(), "norms")
    clipped = oracle.clipped_sum(max_grad_norm)
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert_equal(param.summed_grad, clipped[name], f"clipped sum of {name}")


@pytest.mark.slow
@pytest.mark.parametrize("n", [0, 1, 2])  # the last as many as in the trial before the first forward
@pytest.mark.parametrize("case, way", MATRIX)
def test_small_batches(case: Case, way: str, n: int) -> None:
    if n == 0 and not case.empty:
        # Torch itself does not take it, but for Fourier transforms since 2.15.
        try:
            case.make(0)
        except (IndexError, RuntimeError, ValueError):
            return
        assert case.id.startswith("fourier")
    check(case, n, way)


@OPTIONS
@given(n=st.integers(0, 4), leading=st.lists(SMALL, max_size=3), d=SMALL, p=SMALL, bias=st.booleans())
def test_linear(n: int, leading: list[int], d: int, p: int, bias: bool) -> None:
    check(Case("linear", lambda: nn.Linear(d, p, bias), [floats(*leading, d)]), n)


@st.composite
def convolution_cases(draw: st.DrawFn) -> Case:
    """A convolution of any kind."""
    axes, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    channels_in, channels_out = (groups * draw(st.integers(1, 2)) for _ in range(2))

    def numbers(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * axes))

    kernel, stride, dilation = numbers(1, 3), numbers(1, 2), numbers(1, 2)
    padding = draw(st.sampled_from([numbers(0, 2), "valid"] + (["same"] if stride == (1,) * axes else [])))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return Case(
        "convolution",
        lambda: layer(channels_in, channels_out, kernel, stride, padding, dilation, groups, padding_mode=mode),
        [floats(channels_in, *numbers(5, 7))],
    )


@OPTIONS
@given(n=st.integers(0, 3), case=convolution_cases())
def test_convolution(n: int, case: Case) -> None:
    check(case, n)


@OPTIONS
# Of a table of one row there is no other token that a sample could be replaced by.
@given(n=st.integers(0, 4), shape=st.lists(SMALL, max_size=2), rows=st.integers(2, 5), d=SMALL, data=st.data())
def test_embedding(n: int, shape: list[int], rows: int, d: int, data: st.DataObject) -> None:
    padding = data.draw(st.none() | st.integers(0, rows - 1))
    check(Case("embedding", lambda: nn.Embedding(rows, d, padding_idx=padding), [tokens(rows, *shape)]), n)


@OPTIONS
@given(
    n=st.integers(0, 4), leading=st.lists(SMALL, max_size=2), shape=st.lists(st.integers(2, 4), min_size=1, max_size=2)
)
def test_layer_norm(n: int, leading: list[int], shape: list[int]) -> None:
    check(Case("layer-norm", lambda: nn.LayerNorm(shape), [floats(*leading, *shape)]), n)
