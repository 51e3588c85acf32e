"""Models that were compiled before they were wrapped."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from opacus_fgc import GradSampleModuleFastGradientClipping
from opacus_fgc.privacy_engine import MODES
from tests.operation_cases import vision_transformer
from tests.reference import reference

N = 5
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layers": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)), (4,)),
    "operations": (vision_transformer, (1, 4, 4)),
}


# Dynamo's own, while it looks at its inputs.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def of_blocks(model: nn.Module) -> nn.Module:
    for child in model.children():
        child.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize(
    "compiled", [lambda model: torch.compile(model, backend="aot_eager"), of_blocks], ids=["whole", "blocks"]
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_equals_oracle(name: str, mode: str, compiled: Callable[[nn.Module], nn.Module]) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make(), torch.randn(N, *shape)
    oracle = reference(model, lambda output, _: output.square().sum(), (x,), x, N)
    max_grad_norm = oracle.total_norm().median().item()
    wrapped = GradSampleModuleFastGradientClipping(compiled(model), max_grad_norm=max_grad_norm)
    clipped = oracle.clipped_sum(max_grad_norm)
    # The first forward is not compiled, since it is watched.
    for _ in range(3):
        MODES[mode](wrapped, wrapped(x).square().flatten(1).sum(1))
        sums: dict[str, Tensor] = {name: param.summed_grad for name, param in model.named_parameters()}
        for path, wanted in clipped.items():
            torch.testing.assert_close(sums[path], wanted, rtol=1e-10, atol=1e-10)
        wrapped.clipped_sum.passes = 0
        for param in model.parameters():
            param.summed_grad = None


def test_setting_of_torch_is_given_back() -> None:
    """The one that a second backward through compiled layers needs; the last one that needs it gives it back."""
    gc.collect()  # the models of other tests
    before = torch._functorch.config.donated_buffer
    assert before
    models = [GradSampleModuleFastGradientClipping(of_blocks(nn.Sequential(nn.Linear(2, 2)))) for _ in range(2)]
    assert not torch._functorch.config.donated_buffer
    models[0].to_standard_module()
    models[0].cleanup()
    assert not torch._functorch.config.donated_buffer
    models[1].cleanup()
    assert torch._functorch.config.donated_buffer == before
    GradSampleModuleFastGradientClipping(nn.Linear(2, 2))
    assert torch._functorch.config.donated_buffer == before
    del models
    dropped = GradSampleModuleFastGradientClipping(of_blocks(nn.Sequential(nn.Linear(2, 2))))
    assert not torch._functorch.config.donated_buffer
    del dropped
    gc.collect()
    assert torch._functorch.config.donated_buffer == before


def as_a_whole(wrapped: nn.Module) -> nn.Module:
    return torch.compile(wrapped, backend="aot_eager")


def in_place(wrapped: nn.Module) -> nn.Module:
    wrapped.compile(backend="eager")
    return wrapped


def its_blocks(wrapped: nn.Module) -> nn.Module:
    of_blocks(wrapped._module)
    return wrapped


@pytest.mark.parametrize("compiled", [as_a_whole, in_place, its_blocks])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_compiled_after_it_was_wrapped(name: str, mode: str, compiled: Callable[[nn.Module], nn.Module]) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make(), torch.randn(N, *shape)
    oracle = reference(model, lambda output, _: output.square().sum(), (x,), x, N)
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=oracle.total_norm().median().item())
    forward = compiled(wrapped)
    for _ in range(2):
        MODES[mode](wrapped, forward(x).square().flatten(1).sum(1))
        for path, wanted in oracle.clipped_sum(wrapped.max_grad_norm).items():
            param = model.get_parameter(path)
            torch.testing.assert_close(param.summed_grad, wanted, rtol=1e-10, atol=1e-10)
            param.summed_grad = None
        wrapped.clipped_sum.passes = 0
