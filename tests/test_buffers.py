"""Buffers that take up data are refused, others are left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opacus_fgc import GradSampleModuleFastGradientClipping
from opacus_fgc.privacy_engine import MODES
from tests.case import Apply, N
from tests.reference import Reference
from tests.test_loss import wrapped


class Averaged(nn.Linear):
    """Remembers the data in a buffer."""

    def __init__(self, how: Callable[[Any, Tensor], None]) -> None:
        super().__init__(3, 3)
        self.register_buffer("average", torch.zeros(3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.how(self, x)
        return super().forward(x)


def in_place(layer: Any, x: Tensor) -> None:
    layer.average += x.mean(0)


def replaced(layer: Any, x: Tensor) -> None:
    layer.average = layer.average + x.mean(0)


def added(layer: Any, x: Tensor) -> None:
    if not hasattr(layer, "last"):
        layer.register_buffer("last", x.mean(0))


def after_the_first_step(layer: Any, x: Tensor) -> None:
    layer.steps = getattr(layer, "steps", 0) + 1
    if layer.steps > 20:
        layer.average += x.mean(0)


class Watching(nn.Module):
    """Has a buffer and no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.largest = torch.maximum(self.largest, x.detach().abs().max())
        return x


REFUSED = {
    "in-place": (lambda: Averaged(in_place), "average"),
    "replaced": (lambda: Averaged(replaced), "average"),
    "added": (lambda: Averaged(added), "last"),
    "of-a-child": (lambda: nn.Sequential(nn.Linear(3, 3), Averaged(in_place)), "1.average"),
    "without-parameters": (lambda: nn.Sequential(nn.Linear(3, 3), Watching()), "1.largest"),
    "frozen": (lambda: nn.Sequential(nn.Linear(3, 3), Averaged(in_place).requires_grad_(False)), "1.average"),
    "later-on": (lambda: Averaged(after_the_first_step), "average"),
}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", REFUSED)
def test_buffers_that_take_up_data(name: str, batch_size: int) -> None:
    make, path = REFUSED[name]
    module, criterion = wrapped(make(), nn.MSELoss())

    def steps() -> None:
        for _ in range(30):
            x = torch.randn(batch_size, 3)
            criterion(module(x), x).backward()
            criterion.optimizer.zero_grad()

    with pytest.raises(NotImplementedError, match=f"changes its buffers {path} in forward"):
        steps()


def test_running_statistics_are_refused_at_once_when_strict() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(NotImplementedError, match=r"layer '1' \(BatchNorm1d\).*running statistics"):
        GradSampleModuleFastGradientClipping(model)
    assert GradSampleModuleFastGradientClipping(model, strict=False)


class Counting(nn.Linear):
    """Counts its forwards, in a buffer that is replaced."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return super().forward(x)


class CountingInPlace(nn.Linear):
    """Uses its counter, which autograd keeps for backward."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) * self.count


class Growing(nn.Linear):
    """Keeps a table that grows with the length of the sequences."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_buffer("table", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) < x.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype).cos()
        return super().forward(x) * self.table[: x.shape[1], None]


class BuiltOnce(nn.Linear):
    """Makes a table in its first forward, and knows so by an attribute that is no buffer."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.built = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.built:
            self.register_buffer("table", torch.arange(3.0).cos())
            self.built = True
        return super().forward(x) * self.table


class Scaled(nn.Linear):
    """Has a constant buffer in a trainable layer, as the embedding of Gemma does."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


ALLOWED = {
    "counter": Counting,
    "counter-in-place": CountingInPlace,
    "table-that-grows": Growing,
    "table-that-is-built-once": BuiltOnce,
    "constant": Scaled,
    "spectral-norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
    "spectral-norm-and-dropout": lambda: Apply(
        lambda m, x: m.b(m.a(x)), a=nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), b=nn.Dropout(0.0)
    ),
    "spectral-norm-by-hooks": lambda: nn.utils.spectral_norm(nn.Linear(3, 3)),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALLOWED)
def test_buffers_without_data(name: str, mode: str) -> None:
    """Two steps, each of which equals the oracle from the same buffers on; our own forwards leave no trace in them."""
    torch.manual_seed(0)
    model = ALLOWED[name]()
    plain = copy.deepcopy(model)
    module, criterion = wrapped(model, nn.MSELoss(), max_grad_norm=0.5, backward=MODES[mode])
    for length in (2, 4):
        x, y = torch.randn(N, length, 3), torch.randn(N, length, 3)
        gradients: dict[str, list[Tensor]] = {path: [] for path, _ in plain.named_parameters()}
        losses = []
        for n in range(N):
            one = copy.deepcopy(plain)
            losses.append(nn.functional.mse_loss(one(x[n : n + 1]), y[n : n + 1]))
            losses[-1].backward()
            for path, param in one.named_parameters():
                assert param.grad is not None
                gradients[path].append(param.grad)
        with torch.no_grad():
            plain(x)
        oracle = Reference({path: torch.stack(rows) for path, rows in gradients.items()}, torch.stack(losses))
        criterion(module(x), y).backward()
        torch.testing.assert_close(module.per_sample_gradient_norms, oracle.total_norm(), rtol=1e-10, atol=1e-10)
        for path, wanted in oracle.clipped_sum(0.5).items():
            torch.testing.assert_close(model.get_parameter(path).summed_grad, wanted, rtol=1e-10, atol=1e-10)
        criterion.optimizer.zero_grad()
        for (path, buffer), (_, wanted) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
            torch.testing.assert_close(buffer, wanted, msg=lambda text, path=path: f"{path}: {text}")
