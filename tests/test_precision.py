"""Autocast and models in half precision: norms in float32, and near the oracle of the same precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from opacus_fgc import GradSampleModuleFastGradientClipping
from opacus_fgc.privacy_engine import MODES
from tests.operation_cases import HandWrittenRMSNorm, Own, prompt, vision_transformer
from tests.reference import reference

N = 5
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layers": (lambda: nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3)), (4, 8)),
    "operations": (vision_transformer, (1, 4, 4)),
    "own-norm": (lambda: nn.Sequential(nn.Linear(8, 8), HandWrittenRMSNorm(8, True), nn.Linear(8, 3)), (4, 8)),
    "prompt": (lambda: Own(prompt, {"p": (2, 4)}, project=nn.Linear(4, 4), head=nn.Linear(4, 2)), (3, 4)),
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
        assert param.summed_grad.dtype == param.dtype
        torch.testing.assert_close(param.summed_grad, clipped[path], rtol=tolerance, atol=tolerance * scale)
