"""Models and loops whose per-sample gradients would come out wrong are refused, by the layer's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opacus_fgc import GradSampleModuleFastGradientClipping, register_norm_sampler
from opacus_fgc.loss import Backward, double_backward
from opacus_fgc.norm_samplers.registry import NORM_SAMPLERS
from opacus_fgc.per_sample import Dense
from opacus_fgc.privacy_engine import MODES
from tests.case import Apply
from tests.cases import ScaleByOwn
from tests.operation_cases import Own
from tests.test_loss import wrapped

N = 4


def backward(model: nn.Module, *inputs: Any, how: Backward = double_backward) -> None:
    """A clipped backward pass with a sum of squares as each sample's loss."""
    module, criterion = wrapped(model, lambda output: output.flatten(1).square().sum(1), backward=how)
    # The table is made before the tests' dtype is set.
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    criterion(module(*inputs)).backward()


class Mixing(nn.Module):
    """A batch norm by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) * self.weight


class Rolling(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, 0) * self.weight


class Averaging(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).mean()


class Product(torch.autograd.Function):
    """An operation of somebody's own, which nothing can look into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, backprop: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return backprop * weight, (backprop * x).sum(0)


class Hidden(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight) * torch.rand_like(x)


class Doubled(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return 2 * value if name == "weight" else value


class Joining(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.weight[None], x])


CASES = {
    "a-mean-of-the-batch": (
        lambda: Apply(lambda m, x: x - m.a(x).mean(0), a=nn.Linear(3, 3)),
        [torch.ones(N, N, 3)],
        NotImplementedError,
        r"layer 'a' \(Linear\) gets a gradient of several samples in one row .* its rows are not samples \(check batch_first\)",
    ),
    "no-batch": (
        lambda: Apply(lambda m, x: m.a(x[0]) + x, a=nn.Linear(3, 3)),
        [torch.ones(N, 3)],
        NotImplementedError,
        r"layer 'a' \(Linear\): its rows are not samples",
    ),
    "convolution-without-batch": (
        lambda: Apply(lambda m, x: m.a(x[0]).expand(N, -1, -1, -1), a=nn.Conv2d(N, 3, 3)),
        [torch.ones(N, N, 5, 5)],
        NotImplementedError,
        r"layer 'a' \(Conv2d\): its rows are not samples",
    ),
    "embedding-by-frequency": (
        lambda: nn.Embedding(5, 3, scale_grad_by_freq=True),
        [torch.ones(N, 2, dtype=torch.long)],
        NotImplementedError,
        "scale_grad_by_freq",
    ),
    "embedding-bag-max": (
        lambda: nn.EmbeddingBag(5, 3, mode="max"),
        [torch.ones(N, 2, dtype=torch.long)],
        NotImplementedError,
        "mode 'max'",
    ),
    "layer-that-mixes-samples": (
        lambda: Apply(lambda m, x: m.a(x), a=Mixing()),
        [torch.arange(12.0).reshape(N, 3)],
        NotImplementedError,
        "mixes samples",
    ),
    "layer-that-permutes-samples": (
        lambda: Apply(lambda m, x: m.a(x), a=Rolling()),
        [torch.arange(12.0).reshape(N, 3)],
        NotImplementedError,
        "mixes samples",
    ),
    "mean-over-the-batch": (
        lambda: Apply(lambda m, x: x + m.a(x), a=Averaging()),
        [torch.arange(12.0).reshape(N, 3)],
        NotImplementedError,
        "mixes samples",
    ),
    "mixed-samples-and-dropout": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(), Rolling(), nn.Dropout()),
        [torch.arange(12.0).reshape(N, 3)],
        NotImplementedError,
        r"layer '0' \(Linear\): its rows are not samples, in the order of their losses",
    ),
    "mixed-samples-without-parameters": (
        lambda: Apply(lambda m, x: m.a(x - x.mean(0)), a=nn.Linear(3, 3)),
        [torch.arange(12.0).reshape(N, 3)],
        NotImplementedError,
        "mixes samples",
    ),
    "parameter-hidden-from-everything-with-random-numbers": (
        lambda: nn.Sequential(nn.Linear(3, 3), Hidden()),
        [torch.ones(N, 3)],
        NotImplementedError,
        r"layer '1' \(Hidden\).*draws random numbers",
    ),
    "parameter-behind-a-property": (
        lambda: nn.Sequential(Doubled(3, 3)),
        [torch.ones(N, 3)],
        NotImplementedError,
        r"layer '0' \(Doubled\) gives another tensor than its parameter when asked for 'weight'",
    ),
    "parameter-joined-along-the-batch": (
        lambda: Apply(lambda m, x: m.a(x)[1:], a=Joining()),
        [torch.ones(N, 3)],
        NotImplementedError,
        "none of its inputs has a row for each of the 4 samples",
    ),
    "expanded-in-a-model-of-one-batch-size": (
        lambda: Own(
            lambda m, x: torch.cat([m.a(x.view(N, 2, 3)), m.p.expand(N, -1, -1)], 1),
            {"p": (1, 1, 3)},
            a=nn.Linear(3, 3),
        ),
        [torch.ones(N, 2, 3)],
        NotImplementedError,
        "Whether they are samples cannot be told",
    ),
    "reentrant-checkpointing": (
        lambda: Apply(
            lambda m, x: m.b(checkpoint(m.a, m.b(x), use_reentrant=True)), a=nn.Linear(3, 3), b=nn.Linear(3, 3)
        ),
        [torch.ones(N, 3)],
        NotImplementedError,
        "use_reentrant=False",
    ),
    "no-layer-in-the-loss": (
        lambda: Apply(lambda m, x: x.clone(), a=nn.Linear(3, 3)),
        [torch.ones(N, 3)],
        RuntimeError,
        "does not depend on any trainable layer",
    ),
    "no-trainable-layer-in-the-loss": (
        lambda: Apply(lambda m, x: x.clone().requires_grad_(), a=nn.Linear(3, 3)),
        [torch.ones(N, 3)],
        RuntimeError,
        "does not depend on any trainable layer",
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, mode: str) -> None:
    make, inputs, error, message = CASES[name]
    with pytest.raises(error, match=message):
        backward(make(), *inputs, how=MODES[mode])


def test_sampler_that_leaves_out_a_parameter() -> None:
    class Affine(nn.Linear):
        pass

    @register_norm_sampler(Affine)
    def incomplete(layer: Affine, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Dense]:
        return {layer.weight: Dense(backprops.unsqueeze(2) * activations[0].unsqueeze(1))}

    try:
        with pytest.raises(NotImplementedError, match=r"Affine.*'bias' of shape \(3,\)"):
            backward(nn.Sequential(Affine(3, 3)), torch.ones(N, 3))
    finally:
        del NORM_SAMPLERS[Affine]


def test_sampler_that_answers_for_a_child() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    @register_norm_sampler(Block)
    def greedy(layer: Block, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Dense]:
        return {layer.scale: Dense(backprops), layer.inner.bias: Dense(backprops)}

    try:
        with pytest.raises(ValueError, match=r"Block.*shape \(3,\) that is no parameter of its own"):
            backward(nn.Sequential(Block()), torch.ones(N, 3))
    finally:
        del NORM_SAMPLERS[Block]


def test_layer_inside_and_outside_of_a_functorch_module() -> None:
    shared = nn.Linear(4, 4)
    block = ScaleByOwn()
    block.inner = shared
    with pytest.raises(NotImplementedError, match=r"layer '0.inner' \(Linear\) is a part of layer '0' \(ScaleByOwn\)"):
        GradSampleModuleFastGradientClipping(nn.Sequential(block, shared, ScaleByOwn()), force_functorch=True)


def test_sampler_with_the_wrong_shape() -> None:
    class Affine(nn.Linear):
        pass

    @register_norm_sampler([Affine])
    def transposed(layer: Affine, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Dense]:
        return {layer.weight: Dense(activations[0].unsqueeze(2) * backprops.unsqueeze(1))}

    try:
        with pytest.raises(ValueError, match=r"shape \(3, 2\) for a parameter of shape \(2, 3\)"):
            backward(nn.Sequential(Affine(3, 2, bias=False)), torch.ones(N, 3))
    finally:
        del NORM_SAMPLERS[Affine]


def test_parameter_that_comes_to_life_after_wrapping() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    module, criterion = wrapped(model, nn.MSELoss())
    model.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="bias did not require gradients"):
        criterion(module(torch.ones(N, 3)), torch.ones(N, 2)).backward()


def test_norms_before_backward() -> None:
    module = GradSampleModuleFastGradientClipping(nn.Linear(3, 2))
    for ask in (module.get_norm_sample, module.get_clipping_coef):
        with pytest.raises(RuntimeError, match="per-sample norms"):
            ask()
    module(torch.ones(N, 3))
    with pytest.raises(RuntimeError, match="per-sample norms"):
        module.get_norm_sample()
    with pytest.raises(AttributeError, match="per_sample_gradient_norms"):
        _ = module.per_sample_gradient_norms


@pytest.mark.parametrize("mode", MODES)
def test_an_aborted_step_leaves_nothing_to_the_next(mode: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module, criterion = wrapped(model, nn.MSELoss(), backward=MODES[mode])
    x, y = torch.randn(N, 3), torch.randn(N, 2)
    criterion(module(x), y).backward()
    expected = module.per_sample_gradient_norms
    clean = [param.summed_grad.clone() for param in model.parameters()]
    criterion.optimizer.zero_grad()

    class Interrupted(Exception):
        pass

    def interrupt(gradient: Tensor) -> None:
        raise Interrupted

    output = module._module[0](x)
    output.register_hook(interrupt)
    with pytest.raises(Interrupted):
        criterion(module._module[1](output), y).backward()
    with pytest.raises(ValueError, match=r"step\(\) without a clipped gradient"):
        criterion.optimizer.step()
    module(x)
    criterion(module(x), y).backward()
    torch.testing.assert_close(module.per_sample_gradient_norms, expected)
    for param, wanted in zip(model.parameters(), clean, strict=True):
        torch.testing.assert_close(param.summed_grad, wanted)
