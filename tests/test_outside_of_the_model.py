"""What a private loss goes through and would not train: refused by name, with a way that works."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import PrivacyEngine
from opacus_fgc.privacy_engine import MODES
from tests.reference import reference
from tests.test_exact import assert_equal
from tests.test_loss import wrapped

N = 6
OUTSIDE = "outside of the wrapped model"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def private(model: nn.Module, criterion: Any, mode: str):
    return wrapped(model, criterion, backward=MODES[mode])


def discriminator() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1), nn.Flatten(0))


def test_prompt(mode: str) -> None:
    for prompt in (nn.Parameter(torch.zeros(4)), torch.zeros(N, 4, requires_grad=True)):
        module, criterion = private(nn.Linear(4, 3), nn.CrossEntropyLoss(), mode)
        loss = criterion(module(torch.randn(N, 4) + prompt), torch.randint(3, (N,)))
        with pytest.raises(ValueError, match=OUTSIDE + r".*\(\d?,? ?4,?\).*a prompt"):
            loss.backward()
        assert prompt.grad is None


def test_prompt_in_the_module(mode: str) -> None:
    """What the error says to do."""

    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt, self.layer = nn.Parameter(torch.zeros(4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.prompt)

    model, x, y = Prompted(), torch.randn(N, 4), torch.randint(3, (N,))
    oracle = reference(model, F.cross_entropy, (x,), y, N)
    module, criterion = private(model, nn.CrossEntropyLoss(), mode)
    criterion(module(x), y).backward()
    assert_equal(model.prompt.summed_grad, oracle.clipped_sum(0.05)["prompt"], "prompt")


def test_weights_between_model_and_loss(mode: str) -> None:
    head = nn.Linear(3, 3)
    module, criterion = private(nn.Linear(4, 3), nn.CrossEntropyLoss(), mode)
    x, y = torch.randn(N, 4), torch.randint(3, (N,))
    with pytest.raises(ValueError, match=OUTSIDE + r".*\(3, 3\)"):
        criterion(head(module(x)), y).backward()
    criterion(head.requires_grad_(False)(module(x)), y).backward()


def test_generator_by_the_private_criterion(mode: str) -> None:
    """Its loss goes through the discriminator, whose criterion gives gradients to the discriminator alone."""
    generator = nn.Linear(3, 4)
    module, criterion = private(discriminator(), nn.BCEWithLogitsLoss(), mode)
    fake = generator(torch.randn(N, 3))
    with pytest.raises(ValueError, match="by the plain criterion"):
        criterion(module(fake), torch.ones(N)).backward()
    criterion(module(fake.detach()), torch.ones(N)).backward()


@pytest.mark.parametrize("poisson", [False, True])
def test_generator_by_the_plain_criterion(mode: str, poisson: bool) -> None:
    """What the error says to do: the generator moves as by torch, and the discriminator is left to its own step."""
    plain, generator, model = nn.BCEWithLogitsLoss(), nn.Linear(3, 4), discriminator()
    data = torch.randn(24, 4)
    critic, optimizer, criterion, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=plain,
        data_loader=DataLoader(TensorDataset(data), batch_size=12),
        noise_multiplier=0.0,
        max_grad_norm=0.05,
        poisson_sampling=poisson,
        grad_sample_mode=mode,
    )
    of_generator = torch.optim.SGD(generator.parameters(), lr=0.1)
    for (real,) in loader:
        n, twin = len(real), Pair(copy.deepcopy(model.state_dict()))
        fake = generator(torch.randn(n, 3))
        before = [param.detach().clone() for param in model.parameters()]
        both = partial(two_losses, plain)
        oracle = reference(twin, both, (real, fake.detach()), real, n).clipped_sum(0.05)
        optimizer.zero_grad()
        (criterion(critic(real), torch.ones(n)) + criterion(critic(fake.detach()), torch.zeros(n))).backward()
        optimizer.step()
        for (name, param), old in zip(model.named_parameters(), before, strict=True):
            assert_equal(param.detach(), old - 0.1 * oracle[f"model.{name}"] / 12, name)
        twin = Pair(copy.deepcopy(model.state_dict()))
        expected = torch.autograd.grad(
            plain(twin.model(fake), torch.ones(n)), [*generator.parameters()], retain_graph=True
        )
        optimizer.zero_grad()
        of_generator.zero_grad()
        plain(critic(fake), torch.ones(n)).backward()
        for param, gradient in zip(generator.parameters(), expected, strict=True):
            assert_equal(param.grad, gradient, "generator")
        of_generator.step()


class Pair(nn.Module):
    """A discriminator on a real sample and a made one."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = discriminator()
        self.model.load_state_dict(state)

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        return torch.stack([self.model(real), self.model(fake)], 1)


def two_losses(criterion: Callable, output: Tensor, _: Tensor) -> Tensor:
    return criterion(output[:, 0], torch.ones(1)) + criterion(output[:, 1], torch.zeros(1))


def test_private_generator_through_a_private_discriminator(mode: str) -> None:
    """Each is trained by its own criterion; the other model is a constant for it."""
    critic, generator = discriminator(), nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    z, y = torch.randn(N, 3), torch.ones(N)
    both = nn.Sequential(generator, critic)
    oracle = reference(both, F.binary_cross_entropy_with_logits, (z,), y, N)
    norms = torch.stack([norm for name, norm in oracle.norms().items() if name.startswith("0.")]).norm(dim=0)
    coef = (0.05 / norms).clamp(max=1)
    of_critic, critics_criterion = private(critic, nn.BCEWithLogitsLoss(), mode)
    of_generator, generators_criterion = private(generator, nn.BCEWithLogitsLoss(), mode)
    real = torch.randn(N, 4)
    alone = reference(critic, F.binary_cross_entropy_with_logits, (real,), y, N).clipped_sum(0.05)
    for _ in range(2):
        generators_criterion.optimizer.zero_grad()
        critics_criterion.optimizer.zero_grad()
        generators_criterion(of_critic(of_generator(z)), y).backward()
        for name, param in generator.named_parameters():
            assert_equal(param.summed_grad, torch.einsum("n,n...", coef, oracle.gradients[f"0.{name}"]), name)
        assert all(getattr(param, "summed_grad", None) is None for param in critic.parameters())
        critics_criterion(of_critic(real), y).backward()
        for name, param in critic.named_parameters():
            assert_equal(param.summed_grad, alone[name], name)
    loss = critics_criterion(of_critic(of_generator(z)), y)
    with pytest.raises(ValueError, match="the criterion of the other model's own make_private"):
        loss.backward()


def test_inputs_that_require_a_gradient(mode: str) -> None:
    """They get none from a private loss, and that is said; the plain criterion gives it."""
    model, y = nn.Linear(4, 3), torch.randint(3, (N,))
    x = torch.randn(N, 4, requires_grad=True)
    oracle = reference(model, F.cross_entropy, (x.detach(),), y, N)
    module, criterion = private(model, nn.CrossEntropyLoss(), mode)
    (wanted,) = torch.autograd.grad(F.cross_entropy(module(x), y), x)
    assert wanted.abs().max() > 0
    with pytest.warns(UserWarning, match="inputs of shapes .6, 4. require a gradient"):
        criterion(module(x), y).backward()
    assert x.grad is None
    assert_equal(model.weight.summed_grad, oracle.clipped_sum(0.05)["weight"], "weight")
    moved = torch.zeros(N, 4, requires_grad=True)
    with pytest.raises(ValueError, match=OUTSIDE):
        criterion(module(x.detach() + moved), y).backward()


def test_leaves_that_the_model_makes(mode: str) -> None:
    """As adapters with activation checkpointing do, where the embedding is frozen."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer = nn.Embedding(7, 4).requires_grad_(False), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.embedding(x).requires_grad_()).mean(1)

    model, x, y = Adapted(), torch.randint(7, (N, 5)), torch.randint(3, (N,))
    oracle = reference(model, F.cross_entropy, (x,), y, N)
    module, criterion = private(model, nn.CrossEntropyLoss(), mode)
    criterion(module(x), y).backward()
    assert_equal(model.layer.weight.summed_grad, oracle.clipped_sum(0.05)["layer.weight"], "weight")


def test_leaves_that_the_model_makes_and_no_tap_stands_before(mode: str) -> None:
    """As `enable_input_require_grads` of transformers makes them, which adapters with activation checkpointing call."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer = nn.Embedding(7, 4).requires_grad_(False), nn.Linear(4, 4)

        def forward(self, x: Tensor, prompt: Tensor | None = None) -> Tensor:
            x = self.embedding(x)
            x = x if prompt is None else x + prompt
            return (x + self.layer(x)).mean(1)

    model, x, y = Residual(), torch.randint(7, (N, 5)), torch.randint(4, (N,))
    oracle = reference(model, F.cross_entropy, (x,), y, N)
    model.embedding.register_forward_hook(lambda layer, args, output: output.requires_grad_())
    module, criterion = private(model, nn.CrossEntropyLoss(), mode)
    for _ in range(2):
        criterion.optimizer.zero_grad()
        criterion(module(x), y).backward()
        assert_equal(model.layer.weight.summed_grad, oracle.clipped_sum(0.05)["layer.weight"], "weight")
    for prompt in (torch.zeros(4, requires_grad=True) + 1, nn.Parameter(torch.zeros(4))):
        criterion.optimizer.zero_grad()
        with pytest.raises(ValueError, match=OUTSIDE + r".*\(4,\)"):
            criterion(module(x, prompt), y).backward()
    outside = torch.zeros(4, requires_grad=True)
    with pytest.raises(ValueError, match=OUTSIDE + r".*\(4,\)"):
        criterion(module(x) + outside, y).backward()


def penalty(critic: Callable, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (gradient.norm(dim=1) - 1).square()


def test_gradient_inside_of_the_loss(mode: str) -> None:
    module, criterion = private(discriminator(), lambda losses: losses, mode)
    x = torch.randn(N, 4)
    with pytest.raises(NotImplementedError, match="a gradient inside of a loss"):
        criterion(module(x) + penalty(module, x)).backward()
    loss = criterion(module(x))
    loss.backward()


def test_optimizer_with_weights_of_the_criterion(mode: str) -> None:
    class Proxies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proxies = nn.Parameter(torch.randn(3, 4))

        def forward(self, features: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(features @ self.proxies.T, y)

    model, criterion = nn.Linear(4, 4), Proxies()
    with pytest.raises(ValueError, match="the criterion has weights of its own, proxies"):
        PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1),
            criterion=criterion,
            data_loader=DataLoader(TensorDataset(torch.randn(N, 4)), batch_size=2),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
        )
    assert not hasattr(model, "autograd_grad_sample_hooks")
