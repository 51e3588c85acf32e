"""What goes silently wrong in the ghost mode of Opacus 1.6.0 comes out right here, or is refused.

One test for each of the cases that are known. Those which are a matter of one layer's numbers are rows of `tests.cases`
as well (padding index, padding modes, channels-last); here they are what a user does.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.schedulers import ExponentialGradClip
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import PrivacyEngine
from opacus_fgc.privacy_engine import MODES
from tests.reference import reference

B, C = 8, 1.0


def make_private(model: nn.Module, x: Tensor, y: Tensor, criterion: Any, **options: Any):
    """Engine, model, optimizer and criterion, without noise and sampling."""
    engine = PrivacyEngine(accountant="rdp")
    defaults = dict(noise_multiplier=0.0, max_grad_norm=C, poisson_sampling=False)
    module, optimizer, criterion, _ = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=options.pop("batch_size", len(x) // 2)),
        criterion=criterion,
        **{**defaults, **options},
    )
    return engine, module, optimizer, criterion


@pytest.fixture(params=MODES)
def private(request: pytest.FixtureRequest) -> Any:
    return partial(make_private, grad_sample_mode=request.param)


def clipped_sum_is_right(private: Any, model: nn.Module, criterion: Any, plain: Any, x: Tensor, y: Tensor) -> None:
    oracle = reference(model, plain, (x,), y, len(x))
    _, module, optimizer, criterion = private(model, x, y, criterion)
    criterion(module(x), y).backward()
    total = torch.cat([param.summed_grad.flatten() for param in model.parameters()])
    expected = torch.cat([gradient.flatten() for gradient in oracle.clipped_sum(C).values()])
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)
    assert total.norm() <= len(x) * C * (1 + 1e-6)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.BCEWithLogitsLoss()])
def test_losses_of_shape_b_1(private: Any, criterion: nn.Module) -> None:
    clipped_sum_is_right(private, nn.Linear(4, 1), criterion, criterion, 9 * torch.randn(B, 4), torch.rand(B, 1))


def test_criterion_without_reduction(private: Any) -> None:
    x, y = 9 * torch.randn(B, 4), torch.randint(3, (B,))
    clipped_sum_is_right(private, nn.Linear(4, 3), F.cross_entropy, F.cross_entropy, x, y)
    own = lambda output, target: F.cross_entropy(output, target)
    clipped_sum_is_right(private, nn.Linear(4, 3), own, own, x, y)


def test_backward_of_a_plain_loss(private: Any) -> None:
    x, y = torch.randn(B, 4), torch.randint(3, (B,))
    _, module, optimizer, _ = private(nn.Linear(4, 3), x, y, nn.CrossEntropyLoss())
    before = module._module.weight.clone()
    nn.CrossEntropyLoss()(module(x), y).backward()
    with pytest.raises(ValueError, match="criterion from make_private"):
        optimizer.step()
    assert torch.equal(module._module.weight, before)


def test_two_backwards_before_a_step(private: Any) -> None:
    x, y = torch.randn(B, 4), torch.randint(3, (B,))
    model = nn.Linear(4, 3)
    engine, module, optimizer, criterion = private(model, x, y, nn.CrossEntropyLoss(), noise_multiplier=1.0)
    for part in (slice(None, B // 2), slice(B // 2, None)):
        criterion(module(x[part]), y[part]).backward()
    oracle = reference(model, nn.CrossEntropyLoss(), (x,), y, B)
    torch.testing.assert_close(model.weight.summed_grad, oracle.clipped_sum(C)["weight"])
    optimizer.step()
    assert engine.accountant.history == [(1.0, 2 * 0.5, 1)]


def test_two_backwards_before_a_step_under_poisson_sampling(private: Any) -> None:
    x, y = torch.randn(B, 4), torch.randint(3, (B,))
    _, module, _, criterion = private(nn.Linear(4, 3), x, y, nn.CrossEntropyLoss(), poisson_sampling=True)
    criterion(module(x), y).backward()
    with pytest.raises(ValueError, match="BatchMemoryManager"):
        criterion(module(x), y).backward()


def test_clip_scheduler(private: Any) -> None:
    x, y = 9 * torch.randn(B, 4), torch.randint(3, (B,))
    model = nn.Linear(4, 3)
    _, module, optimizer, criterion = private(model, x, y, nn.CrossEntropyLoss())
    ExponentialGradClip(optimizer, gamma=0.1).step()
    criterion(module(x), y).backward()
    oracle = reference(model, nn.CrossEntropyLoss(), (x,), y, B)
    torch.testing.assert_close(model.weight.summed_grad, oracle.clipped_sum(0.1 * C)["weight"])


def test_layer_that_is_skipped_in_the_next_step(private: Any) -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
            self.skip = False

        def forward(self, x: Tensor) -> Tensor:
            return self.second(x if self.skip else self.first(100 * x))

    model, x, y = Skipping(), torch.randn(B, 4), torch.randint(3, (B,))
    _, module, optimizer, criterion = private(model, x, y, nn.CrossEntropyLoss(), batch_size=B)
    for skip in (False, True, False):
        model.skip = skip
        oracle = reference(model, nn.CrossEntropyLoss(), (x,), y, B)
        optimizer.zero_grad()
        criterion(module(x), y).backward()
        torch.testing.assert_close(module.per_sample_gradient_norms, oracle.total_norm())
        assert (model.first.weight._norm_sample.abs().max() == 0) == skip
        optimizer.step()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_sample_that_is_not_finite(private: Any, bad: float) -> None:
    x, y = torch.randn(B, 4), torch.randint(3, (B,))
    x[2] = bad
    _, module, optimizer, criterion = private(nn.Linear(4, 3), x, y, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="1 of 8 samples"):
        criterion(module(x), y).backward()
    with pytest.raises(ValueError, match=r"step\(\) without a clipped gradient"):
        optimizer.step()
    assert torch.isfinite(module._module.weight).all()


def test_embedding_with_padding_index(private: Any) -> None:
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 3))
    plain = nn.CrossEntropyLoss()
    clipped_sum_is_right(private, model, plain, plain, torch.randint(5, (B, 3)), torch.randint(3, (B,)))


@pytest.mark.parametrize("option, reason", [("scale_grad_by_freq", "whole batch"), ("max_norm", "renormalizes")])
def test_embeddings_that_mix_samples(private: Any, option: str, reason: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 4, **{option: True}), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randint(5, (B, 3)), torch.randint(3, (B,))
    _, module, _, criterion = private(model, x, y, nn.CrossEntropyLoss())
    with pytest.raises(NotImplementedError, match=f"layer '0' \\(Embedding\\).*{option}.*{reason}"):
        criterion(module(x), y).backward()


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_convolution_with_padding_mode(private: Any, mode: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), nn.Flatten(), nn.Linear(75, 3))
    plain = nn.CrossEntropyLoss()
    clipped_sum_is_right(private, model, plain, plain, torch.randn(B, 2, 5, 5), torch.randint(3, (B,)))


def test_channels_last(private: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(27, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(B, 4, 5, 5).to(memory_format=torch.channels_last)
    plain = nn.CrossEntropyLoss()
    clipped_sum_is_right(private, model, plain, plain, x, torch.randint(3, (B,)))


def test_empty_batch_through_flatten(private: Any) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 3))
    x, y = torch.randn(B, 2, 5, 5), torch.randint(3, (B,))
    _, module, optimizer, criterion = private(model, x, y, nn.CrossEntropyLoss())
    criterion(module(x[:0]), y[:0]).backward()
    optimizer.step()
