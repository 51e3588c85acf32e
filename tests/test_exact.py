"""Every case, by every entry, equals the oracle: norms of every parameter, clipped sum, loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opacus_fgc import (
    NORM_SAMPLERS,
    DPLossFastGradientClipping,
    DPOptimizerFastGradientClipping,
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
from opacus_fgc.loss import book_keeping, double_backward
from tests.case import Case, N, two_passes_by_hand
from tests.operation_cases import CASES
from tests.reference import Reference, reference

ENTRIES = {"wrapped": GradSampleModuleFastGradientClipping, "hooks": GradSampleHooksFastGradientClipping}
WAYS = {
    "ghost": {},
    "ghost_bk": {"backward": book_keeping},
    "fast-gradient-clipping_bk": {"use_ghost_clipping": False, "backward": book_keeping},
    "fast-gradient-clipping": {"use_ghost_clipping": False},
    "functorch": {"force_functorch": True},
}
MATRIX = [
    pytest.param(case, way, id=f"{case.id}-{way}")
    for case in CASES
    for way in WAYS
    if case.functorch or way != "functorch"
]


OF_THE_TABLE = set(map(id, CASES))
ORACLES: dict[tuple[int, str, int], Reference] = {}


def expected(case: Case, reduction: str, n: int = N) -> Reference:
    """What the oracle gives; of a case of the table once for all ways, since model and data are the same ones each time."""
    key = id(case), reduction, n
    if key in ORACLES:
        return ORACLES[key]
    model, inputs, target = case.make(n)
    oracle = reference(model, case.loss(reduction), inputs, target, n, 0 if case.batch_first else 1)
    if id(case) in OF_THE_TABLE:
        ORACLES[key] = oracle
    return oracle


def private(case: Case, entry: str, reduction: str, max_grad_norm: float, n: int = N, **options):
    """Model and wrapper after a clipped backward pass, and the loss."""
    backward = options.pop("backward", double_backward)
    model, inputs, target = options.pop("made", None) or case.make(n)
    wrapper = ENTRIES[entry](
        model, batch_first=case.batch_first, loss_reduction=reduction, max_grad_norm=max_grad_norm, **options
    )
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(params, lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        expected_batch_size=n,
        loss_reduction=reduction,
    )
    criterion = DPLossFastGradientClipping(wrapper, optimizer, case.loss(reduction), reduction, backward)
    loss = criterion((wrapper if entry == "wrapped" else model)(*inputs), target)
    loss.backward()
    return model, wrapper, loss


def assert_equal(actual: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("reduction", ["mean", pytest.param("sum", marks=pytest.mark.slow)])
@pytest.mark.parametrize("entry", ["wrapped", pytest.param("hooks", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case, way", MATRIX)
def test_equals_oracle(case: Case, way: str, entry: str, reduction: str) -> None:
    oracle = expected(case, reduction)
    # Between the norms, so that some samples are clipped and some are not.
    max_grad_norm = oracle.total_norm().median().item()
    model, wrapper, loss = private(case, entry, reduction, max_grad_norm, **WAYS[way])

    clipped = oracle.clipped_sum(max_grad_norm)
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert_equal(param._norm_sample, oracle.norms()[name], f"norms of {name}")
            assert_equal(param.summed_grad, clipped[name], f"clipped sum of {name}")
        assert param.grad is None
    assert_equal(wrapper.per_sample_gradient_norms, oracle.total_norm(), "norms")
    assert_equal(loss.loss_per_sample.detach(), oracle.losses, "losses")
    assert_equal(loss.detach(), getattr(oracle.losses, reduction)(), "loss")


@pytest.mark.parametrize("entry", ["wrapped", pytest.param("hooks", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_two_passes_by_hand(case: Case, entry: str) -> None:
    """The low-level protocol, without our criterion, gives the same."""
    oracle = expected(case, "mean")
    max_grad_norm = oracle.total_norm().median().item()
    model, inputs, target = case.make()
    wrapper = ENTRIES[entry](model, batch_first=case.batch_first, max_grad_norm=max_grad_norm)
    output = (wrapper if entry == "wrapped" else model)(*inputs)
    batch_axis = 0 if case.batch_first else 1
    criterion = case.loss("mean")
    loss = torch.stack([criterion(output.narrow(batch_axis, n, 1), target.narrow(0, n, 1)) for n in range(N)])
    two_passes_by_hand(wrapper, loss)

    clipped = oracle.clipped_sum(max_grad_norm)
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert_equal(param._norm_sample, oracle.norms()[name], f"norms of {name}")
            assert_equal(param.summed_grad, clipped[name], f"clipped sum of {name}")


@pytest.mark.parametrize("way", ["ghost", "ghost_bk"])
@pytest.mark.parametrize("case", [case for case in CASES if case.covers], ids=lambda case: case.id)
def test_another_default_device_changes_nothing(case: Case, way: str) -> None:
    """As where torch's default device is a GPU, and a model is on the CPU, or the other way round."""
    oracle = expected(case, "mean")
    max_grad_norm = oracle.total_norm().median().item()
    made = case.make()
    with torch.device("meta"):
        model, _, _ = private(case, "wrapped", "mean", max_grad_norm, made=made, **WAYS[way])
    clipped = oracle.clipped_sum(max_grad_norm)
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert_equal(param.summed_grad, clipped[name], f"clipped sum of {name}")


def test_norms_are_not_taken_under_autocast() -> None:
    torch.manual_seed(0)
    module = GradSampleModuleFastGradientClipping(nn.Linear(16, 12, dtype=torch.float32))
    x = torch.randn(N, 3, 16, dtype=torch.float32)
    loss = module(x).square().flatten(1).sum(1)
    oracle = reference(module._module, lambda output, _: output.square().sum(), (x,), x, N)
    with torch.autocast("cpu", torch.bfloat16):
        norms = module.first_pass(loss)
    torch.testing.assert_close(norms, oracle.total_norm(), rtol=1e-5, atol=0)


def test_hooks_that_are_put_on_anew() -> None:
    """What was learned about a model by forwards of no consequence is not forgotten with them."""
    case = next(case for case in CASES if case.id == "own-expanded-over-samples-and-positions")
    oracle = expected(case, "sum")
    model, wrapper, _ = private(case, "wrapped", "sum", 1.0)
    wrapper.remove_hooks()
    wrapper.add_hooks()
    _, inputs, target = case.make()
    losses = torch.stack(
        [case.loss("sum")(row[None], y[None]) for row, y in zip(wrapper(*inputs), target, strict=True)]
    )
    torch.testing.assert_close(wrapper.first_pass(losses), oracle.total_norm(), rtol=1e-10, atol=1e-10)


def test_every_norm_sampler_has_a_case() -> None:
    covered = {layer for case in CASES for layer in case.covers}
    assert covered == set(NORM_SAMPLERS)
