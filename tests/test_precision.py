"""Autocast and models in half precision: norms in float32, and near the oracle of the same precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from opacus_fgc import NORM_SAMPLERS, GradSampleModuleFastGradientClipping, register_norm_sampler
from opacus_fgc.per_sample import Outer
from opacus_fgc.privacy_engine import MODES
from tests.case import Apply
from tests.operation_cases import HandWrittenRMSNorm, Own, prompt, vision_transformer
from tests.reference import reference

N = 5
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layers": (lambda: nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3)), (4, 8)),
    "operations": (vision_transformer, (1, 4, 4)),
    "own-norm": (lambda: nn.Sequential(nn.Linear(8, 8), HandWrittenRMSNorm(8, True), nn.Linear(8, 3)), (4, 8)),
    "prompt": (lambda: Own(prompt, {"p": (2, 4)}, project=nn.Linear(4, 4), head=nn.Linear(4, 2)), (3, 4)),
    "recurrent": (
        lambda: Apply(
            lambda m, x: m.b(m.a(x)[0])[0], a=nn.RNN(8, 6, 2, batch_first=True), b=nn.GRU(6, 4, batch_first=True)
        ),
        (5, 8),
    ),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), (4, 8)),
}


def loss_of(output: Tensor) -> Tensor:
    return output.float().square().flatten(1).sum(1)


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "whole"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_near_the_oracle(name: str, mode: str, dtype: torch.dtype, whole: bool) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = (
        make().to(dtype if whole else torch.float32),
        torch.randn(N, *shape, dtype=dtype if whole else torch.float32),
    )
    with torch.autocast("cpu", dtype, enabled=not whole):
        oracle = reference(model, lambda output, _: loss_of(output).sum(), (x,), x, N)
        norms = oracle.total_norm().float()
        wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=norms.median().item())
        losses = loss_of(wrapped(x))
    MODES[mode](wrapped, losses)

    assert wrapped.per_sample_gradient_norms.dtype == torch.float32
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(wrapped.per_sample_gradient_norms, norms, rtol=tolerance, atol=0)
    clipped = oracle.clipped_sum(wrapped.max_grad_norm)
    scale = max(gradient.abs().max().item() for gradient in clipped.values())
    for path, param in model.named_parameters():
        assert param.summed_grad.dtype == torch.float32
        torch.testing.assert_close(param.summed_grad, clipped[path].float(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_grad_norm", [1e-12, 1e-6, 1e6, 1e38])
def test_clipping_norms_at_both_ends(max_grad_norm: float, mode: str) -> None:
    """Contributions are within the bound, and reach it where they are clipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).float()
    x = torch.randn(N, 4, 8, dtype=torch.float32)
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=max_grad_norm)
    for one in x.split(1):
        norm = reference(model, lambda output, _: loss_of(output).sum(), (one,), one, 1).total_norm().item()
        MODES[mode](wrapped, loss_of(wrapped(one)))
        contribution = torch.cat([param.summed_grad.double().flatten() for param in model.parameters()]).norm().item()
        assert contribution == pytest.approx(min(norm, max_grad_norm), rel=1e-5)
        assert contribution <= max_grad_norm * (1 + 1e-6)
        for param in model.parameters():
            param.summed_grad = None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30, 1e-12, 1e12])
def test_sizes_of_gradients(size: float, mode: str) -> None:
    """Gradients of 0, denormal ones, tiny and large ones."""
    torch.manual_seed(0)
    model = nn.Linear(8, 3).float()
    x = torch.randn(N, 4, 8, dtype=torch.float32)
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0)
    losses = (size * wrapped(x)).flatten(1).sum(1)
    MODES[mode](wrapped, losses)
    oracle = reference(model, lambda output, _: (size * output).sum(), (x,), x, N)
    # Squares of 1e-20 and less vanish; such a sample is far below any clipping norm.
    torch.testing.assert_close(wrapped.per_sample_gradient_norms, oracle.total_norm(), rtol=1e-5, atol=1e-18)
    for path, wanted in oracle.clipped_sum(1.0).items():
        torch.testing.assert_close(
            model.get_parameter(path).summed_grad, wanted, rtol=1e-5, atol=max(1e-44, 1e-6 * size)
        )


@pytest.mark.parametrize("mode", MODES)
def test_norms_that_overflow_are_refused(mode: str) -> None:
    model = nn.Linear(8, 3).float()
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0)
    losses = (1e30 * wrapped(torch.ones(N, 8, dtype=torch.float32))).sum(1)
    with pytest.raises(ValueError, match=f"{N} of {N} samples have inf or NaN"):
        MODES[mode](wrapped, losses)


@pytest.mark.parametrize("max_grad_norm", [1e-13, 1e39])
def test_clipping_norms_out_of_range(max_grad_norm: float) -> None:
    with pytest.raises(ValueError, match="cannot be told in float32"):
        GradSampleModuleFastGradientClipping(nn.Linear(2, 2), max_grad_norm=max_grad_norm)


class Precision:
    """What torch is told about products of float32."""

    OLD = not hasattr(torch.backends.cuda.matmul, "fp32_precision")

    @classmethod
    def now(cls) -> str:
        return torch.get_float32_matmul_precision() if cls.OLD else torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize("mode", MODES)
def test_norms_are_not_of_reduced_products(mode: str) -> None:
    """Whatever the user has chosen for the model, which is in force again afterwards."""

    class Layer(nn.Linear):
        pass

    seen = []

    @register_norm_sampler(Layer)
    def sampler(layer: Layer, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Outer]:
        seen.append(Precision.now())
        return {layer.weight: Outer(backprops, activations[0], layer.weight.shape)}

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    chosen = Precision.now()
    try:
        wrapped = GradSampleModuleFastGradientClipping(Layer(4, 4, bias=False))
        MODES[mode](wrapped, loss_of(wrapped(torch.randn(N, 3, 4))))
        assert set(seen) == {"highest" if Precision.OLD else "ieee"}
        assert Precision.now() == chosen != seen[0]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        del NORM_SAMPLERS[Layer]
        torch.set_float32_matmul_precision(before)
