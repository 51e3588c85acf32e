"""Samples that touch each other, rows of unknown samples, gradients that are not linear: proven or refused."""

from __future__ import annotations

import random
import warnings
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_fgc import PrivacyEngine
from opacus_fgc.certificates.backprops import draws_that_tell, weights
from opacus_fgc.certificates.batch import Batch
from opacus_fgc.certificates.independence import replacements
from opacus_fgc.certificates.model_state import ModelState, restored
from opacus_fgc.certificates.samples import Replacement, batch_size, mapped
from opacus_fgc.certificates.schedule import Schedule
from opacus_fgc.certificates.sketch import sketch
from opacus_fgc.loss import DPLossFastGradientClipping
from opacus_fgc.planner import MEMORY, NOTHING
from opacus_fgc.privacy_engine import MODES
from tests.case import Apply, two_passes_by_hand
from tests.reference import reference
from tests.test_loss import wrapped
from tests.test_refused import Product
from tests.test_rows_with_owners import assert_clipped

N, D = 6, 4

both_modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(params=[False, True], ids=["kept", "second-pass"])
def large_layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away the room in which "ghost" keeps what small layers need, so that it goes through backward twice."""
    if request.param:
        monkeypatch.setattr(MEMORY, "ghost", NOTHING)


def squares(output: Tensor) -> Tensor:
    return output.flatten(1).square().sum(1)


def attempt(mode: str, model: nn.Module, batch: Any, criterion: Any = squares, steps: int = 1) -> None:
    torch.manual_seed(0)
    module, private = wrapped(model, criterion, backward=MODES[mode])
    for _ in range(steps):
        private(module(batch)).backward()
        private.optimizer.zero_grad()


# The model


class Net(nn.Module):
    """Two layers, and what a test does between them."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(D, 5), nn.Linear(5, 2), between
        self.calls = 0
        self.memory: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.between(self, self.first(x)).tanh())


def nearest(net: Net, h: Tensor) -> Tensor:
    """A graph of neighbours, which needs more than two samples to work at all."""
    near = torch.cdist(h, h).topk(4, largest=False).indices
    return h[near].mean(1)


def momentum(net: Net, h: Tensor) -> Tensor:
    before, net.memory = net.memory, h.detach().mean(0)
    return h if before is None else h + before


def momentum_in_a_tuple(net: Net, h: Tensor) -> Tensor:
    before, net.memory = net.memory, (1, h.detach().mean(0))
    return h if before is None else h + before[1]


def momentum_in_an_object(net: Net, h: Tensor) -> Tensor:
    before, net.memory = net.memory, SimpleNamespace(last=h.detach().mean(0))
    return h if before is None else h + before.last


def queue(net: Net, h: Tensor) -> Tensor:
    net.memory = [] if net.memory is None else net.memory
    net.memory.append(h.detach())
    return h - torch.cat(net.memory[-2:-1] or [torch.zeros_like(h[:1])]).mean(0)


MIXING: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "mean": lambda net, h: h - h.mean(0),
    "mean-without-a-gradient": lambda net, h: h - h.mean(0).detach(),
    "weakly": lambda net, h: h + 5e-4 * h.mean(0),
    "weakly-without-a-gradient": lambda net, h: h + 1e-9 * h.mean(0).detach(),
    "largest-of-the-batch": lambda net, h: h / h.detach().abs().amax(),
    "median": lambda net, h: torch.where(h > h.median(0).values, h, 0.1 * h),
    "batch-norm-of-no-parameters": lambda net, h: F.batch_norm(h, None, None, training=True),
    "neighbours": nearest,
    "only-in-larger-batches": lambda net, h: h - h.mean(0) if len(h) >= 4 else h,
    "only-while-training": lambda net, h: h - h.mean(0) if net.training else h,
    "only-later": lambda net, h: h - h.mean(0) if net.calls > 3 else h,
    "with-random-numbers": lambda net, h: 0.7 * h + 0.3 * h[torch.randperm(len(h))],
    "with-numbers-of-python": lambda net, h: h.roll(random.randrange(1, len(h)), 0).detach() + h,
    "one-neighbour": lambda net, h: h + h.roll(1, 0).detach(),
    "a-way-for-the-whole-batch": lambda net, h: (
        net.first(net.first.weight[:, 0].expand(len(h), 5)[:, :D]) + h if h.mean() > 0 else h
    ),
    "state-of-the-batch-before": momentum,
    "state-in-a-tuple": momentum_in_a_tuple,
    "state-in-an-object": momentum_in_an_object,
    "queue-of-batches": queue,
}


@both_modes
@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_samples_are_refused(name: str, mode: str) -> None:
    torch.manual_seed(1)
    with pytest.raises((NotImplementedError, ValueError), match="sample"):
        attempt(mode, Net(MIXING[name]), torch.randn(N, D), steps=8)


@both_modes
def test_rows_that_are_alike_hide_nothing(mode: str) -> None:
    batch = torch.randn(1, D).expand(N, D).clone()
    with pytest.raises(NotImplementedError, match="mixes samples"):
        attempt(mode, Net(MIXING["mean-without-a-gradient"]), batch)


@both_modes
def test_a_look_in_eval_mode_certifies_nothing(mode: str) -> None:
    module, private = wrapped(Net(MIXING["only-while-training"]), squares, backward=MODES[mode])
    module.eval()
    # The next pass would be due at 16 only.
    for _ in range(5):
        private(module(torch.randn(N, D))).backward()
        private.optimizer.zero_grad()
    module.train()
    with pytest.raises(NotImplementedError, match="mixes samples"):
        private(module(torch.randn(N, D))).backward()


@both_modes
def test_a_layer_that_is_called_for_the_first_time(mode: str) -> None:
    """It is looked at then, at whatever pass that is."""
    net = Apply(
        lambda m, x: m.b(m.a(x) - m.a(x).detach().mean(0)) if m.late else m.a(x), a=nn.Linear(D, D), b=nn.Linear(D, 2)
    )
    net.late = False
    module, private = wrapped(net, squares, backward=MODES[mode])
    for _ in range(5):
        private(module(torch.randn(N, D))).backward()
        private.optimizer.zero_grad()
    net.late = True
    with pytest.raises(NotImplementedError, match=r"layer 'b' \(Linear\) gives a sample another value.*mixes samples"):
        private(module(torch.randn(N, D))).backward()


@both_modes
@pytest.mark.parametrize("training", [False, True], ids=["forward-in-eval", "forward-in-training"])
def test_the_mode_is_that_of_the_forward(training: bool, mode: str) -> None:
    """Not of the moment at which the loss goes backward, which stands again afterwards."""
    module, private = wrapped(Net(MIXING["only-while-training"]), squares, backward=MODES[mode])
    module.train(training)
    loss = private(module(torch.randn(N, D)))
    module.train(not training)
    if training:
        with pytest.raises(NotImplementedError, match="mixes samples"):
            loss.backward()
    else:
        loss.backward()
    assert all(layer.training is not training for layer in module.modules())


@both_modes
@pytest.mark.parametrize("name", ["mean-without-a-gradient", "mean"])
def test_mixing_under_autocast(name: str, mode: str) -> None:
    """Backward is outside of the context that the forward was in; the precision is that of the forward."""
    for between, mixing in ((MIXING[name], True), (HARMLESS["in-place"], False)):
        module, private = wrapped(Net(between).float(), squares, backward=MODES[mode])
        with torch.autocast("cpu", torch.bfloat16):
            loss = private(module(torch.randn(N, D, dtype=torch.float32)).float())
        if mixing:
            with pytest.raises(NotImplementedError, match="mixes samples"):
                loss.backward()
        else:
            loss.backward()


def by_the_mean_length(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return m.a(x * mask.unsqueeze(2)).sum(1) / mask.sum(1).double().mean()


def by_own_length(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return m.a(x * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)


@both_modes
@pytest.mark.parametrize("whole", [False, True], ids=["lengths", "nothing-is-masked"])
def test_mixing_by_masks_alone(whole: bool, mode: str) -> None:
    mask = (torch.arange(5) < torch.tensor([5, 2, 3, 1, 4, 2])[:, None]).long()
    batch = torch.randn(N, 5, D), torch.ones_like(mask) if whole else mask
    module, private = wrapped(Apply(by_own_length, a=nn.Linear(D, 2)), squares, backward=MODES[mode])
    private(module(*batch)).backward()
    module, private = wrapped(Apply(by_the_mean_length, a=nn.Linear(D, 2)), squares, backward=MODES[mode])
    with pytest.raises(NotImplementedError, match="mixes samples"):
        private(module(*batch)).backward()


HARMLESS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "dropout": lambda net, h: F.dropout(h, 0.3),
    "noise": lambda net, h: h + torch.randn_like(h),
    "one-number-for-the-batch": lambda net, h: h * torch.rand(()),
    "counter": lambda net, h: h * net.calls,
    "memo": lambda net, h: setattr(net, "memory", {"last": [h.detach().mean(0)], "loss": h.mean().item()}) or h,
    "in-place": lambda net, h: h.mul_(2).relu_(),
    "gradient-in-forward": lambda net, h: h * torch.autograd.grad(h.square().sum(), h, create_graph=True)[0],
    "python-numbers": lambda net, h: h * random.random(),
    "numpy-numbers": lambda net, h: h * np.random.rand(),
}


@both_modes
@pytest.mark.parametrize("name", HARMLESS)
def test_models_that_do_not_are_served(name: str, mode: str, large_layers: None) -> None:
    """Whatever they draw, count or remember; and nothing of the user's state changes."""
    torch.manual_seed(0)
    module, private = wrapped(Net(HARMLESS[name]), squares, backward=MODES[mode])
    x = torch.randn(N, D)
    for step in range(1, 6):
        loss = private(module(x))
        states = torch.get_rng_state(), random.getstate()
        kept = ModelState(module._module)
        loss.backward()
        assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
        assert not kept.differs_from(ModelState(module._module))
        assert module._module.calls == step
        private.optimizer.zero_grad()


# The loss, and what is between it and the model


def in_batch_negatives(z: Tensor) -> Tensor:
    return F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")


MIXING_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "in-batch-negatives": in_batch_negatives,
    "divided-by-the-mean": lambda z: squares(z) / squares(z).mean(),
    "one-for-all": lambda z: squares(z).mean().expand(len(z)),
    "regrouped": lambda z: squares(torch.cat([z[::2], z[1::2]])),
    "sorted": lambda z: squares(z).sort().values,
    "a-term-of-the-batch": lambda z: squares(z) + z.mean(),
}


@both_modes
@pytest.mark.parametrize("name", MIXING_LOSSES)
def test_losses_that_mix_samples_are_refused(name: str, mode: str, large_layers: None) -> None:
    """Also where the criterion itself gets one loss a sample."""
    torch.manual_seed(0)
    module, private = wrapped(nn.Linear(D, 3), lambda losses: losses, backward=MODES[mode])
    with pytest.raises(NotImplementedError, match=r"mixes samples|its rows are not samples"):
        private(MIXING_LOSSES[name](module(torch.randn(N, D)))).backward()


@both_modes
def test_a_term_that_the_criterion_brings_along(mode: str, large_layers: None) -> None:
    net = Net(lambda net, h: setattr(net, "memory", h.square().mean()) or h)
    with pytest.raises(NotImplementedError, match="mixes samples"):
        attempt(mode, net, torch.randn(N, D), criterion=lambda output: squares(output) + net.memory)


# Gradients that are not linear


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-1e-4, 1e-4)


def hooked(hook: Callable[[Tensor], Tensor]) -> Callable[[Net, Tensor], Tensor]:
    def between(net: Net, h: Tensor) -> Tensor:
        if h.requires_grad:
            h.register_hook(hook)
        return h

    return between


NONLINEAR = {
    "clamped": hooked(lambda g: g.clamp(-1e-4, 1e-4)),
    "normalized": hooked(lambda g: g / g.norm(dim=1, keepdim=True)),
    "signs": hooked(torch.sign),
    "normalized-over-the-batch": hooked(lambda g: g / g.norm()),
    "function": lambda net, h: Clamped.apply(h),
}


@both_modes
@pytest.mark.parametrize("name", NONLINEAR)
def test_gradients_that_are_not_linear_are_refused(name: str, mode: str, large_layers: None) -> None:
    with pytest.raises(NotImplementedError, match=r"layer 'first' \(Linear\) gets a gradient that is not linear"):
        attempt(mode, Net(NONLINEAR[name]), torch.randn(N, D))


@both_modes
@pytest.mark.parametrize("size", [1, N])
def test_linear_hooks_are_served(mode: str, size: int, large_layers: None) -> None:
    model, x = Net(hooked(lambda g: 3 * g)), torch.randn(size, D)
    oracle = reference(model, lambda output, _: squares(output).sum(), (x,), torch.zeros(size), size)
    module, private = wrapped(model, squares, backward=MODES[mode])
    private(module(x)).backward()
    for name, wanted in oracle.clipped_sum(0.05).items():
        torch.testing.assert_close(module._module.get_parameter(name).summed_grad, wanted, rtol=1e-10, atol=1e-10)


class Unsteady(torch.autograd.Function):
    """Rounds otherwise each time, here and there, as kernels do that add up in any order."""

    chance = random.Random(0)

    @classmethod
    def rounded(cls, value: Tensor) -> Tensor:
        value = value.clone()
        if cls.chance.random() < 0.8:
            place = cls.chance.randrange(value.numel())
            value.view(-1)[place] *= 1 + cls.chance.choice((-1, 1)) * torch.finfo(value.dtype).eps
        return value

    @staticmethod
    def forward(ctx: Any, value: Tensor, way: str) -> Tensor:
        ctx.way = way
        return Unsteady.rounded(value) if way == "forward" else value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Unsteady.rounded(gradient) if ctx.way == "backward" else gradient, None


@both_modes
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_kernels_that_round_otherwise_each_time_are_served(way: str, mode: str, large_layers: None) -> None:
    for seed in range(20):
        Unsteady.chance = random.Random(seed)
        attempt(mode, Net(lambda net, h: Unsteady.apply(h, way)), torch.randn(N, D), steps=2)


@both_modes
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("name", ["mean", "weakly", "weakly-without-a-gradient", "largest-of-the-batch"])
def test_such_kernels_hide_no_mixing(name: str, way: str, mode: str, large_layers: None) -> None:
    for seed in range(5):
        Unsteady.chance = random.Random(seed)
        with pytest.raises(NotImplementedError, match=r"mixes samples|of several samples"):
            attempt(mode, Net(lambda net, h: Unsteady.apply(MIXING[name](net, h), way)), torch.randn(N, D))


@both_modes
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_are_refused(register: str, mode: str) -> None:
    model = nn.Sequential(nn.Linear(D, 3), nn.Linear(3, 2))
    module, private = wrapped(model, squares, backward=MODES[mode])
    getattr(model[1].weight, register)(lambda gradient: None)
    with pytest.raises(ValueError, match=r"1.weight has a gradient hook"):
        private(module(torch.randn(N, D))).backward()


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight)


@both_modes
def test_a_parameter_hidden_from_everything(mode: str) -> None:
    model, x = nn.Sequential(nn.Linear(D, 3), Hidden()), torch.randn(N, D)
    oracle = reference(model, lambda output, _: squares(output).sum(), (x,), torch.zeros(N), N)
    module, private = wrapped(model, squares, backward=MODES[mode])
    private(module(x)).backward()
    for name, wanted in oracle.clipped_sum(0.05).items():
        torch.testing.assert_close(module._module.get_parameter(name).summed_grad, wanted, rtol=1e-10, atol=1e-10)


# Rows


def masked(net: Any, x: Tensor, mask: Tensor) -> Tensor:
    hidden = torch.zeros(*mask.shape, 3)
    hidden[mask] = net.a(x[mask])
    return hidden.tanh().sum(1)


@both_modes
def test_unpadded_rows_belong_to_their_samples(mode: str) -> None:
    """Also at a pass that is not due, and though there are as many rows as in a batch of samples of one length."""
    module, private = wrapped(Apply(masked, a=nn.Linear(D, 3)), squares, backward=MODES[mode])
    x = torch.randn(4, 5, D)
    even, uneven = (torch.arange(5) < torch.tensor(lengths)[:, None] for lengths in ([3, 3, 3, 3], [2, 4, 5, 1]))
    for _ in range(5):
        private(module(x, even)).backward()
        private.optimizer.zero_grad()
    assert_clipped(module, private, x, uneven)


def routed(net: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    out = torch.zeros(len(tokens), 3)
    for place, expert in enumerate((net.a, net.b)):
        mine = ((tokens[:, 0] > 0).long() == place).nonzero().flatten()
        out = out.index_add(0, mine, expert(tokens[mine]))
    return out.view(*x.shape[:2], 3).tanh().mean(1)


@both_modes
def test_routed_tokens_belong_to_their_samples(mode: str) -> None:
    model = Apply(routed, a=nn.Linear(D, 3), b=nn.Linear(D, 3))
    module, private = wrapped(model, squares, backward=MODES[mode])
    x = torch.randn(4, 2, D)
    x[..., 0] = torch.tensor([1.0, -1.0])
    for _ in range(5):
        private(module(x)).backward()
        private.optimizer.zero_grad()
    x[..., 0] = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, -1.0]])
    assert_clipped(module, private, x)


LOOPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "of-features": lambda m, x: torch.cat([m.b(h) for h in m.a(x).split(1)]),
    "of-inputs": lambda m, x: m.b(torch.cat([m.a(x[n : n + 1]) for n in range(len(x))])),
    "of-rows-without-a-batch": lambda m, x: torch.stack([m.b(m.a(row)) for row in x]),
    "by-vmap": lambda m, x: m.b(torch.func.vmap(m.a)(x)),
}


@both_modes
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_over_the_samples(name: str, mode: str) -> None:
    """A row by itself is not taken for an input that the batch shares."""
    model = Apply(LOOPS[name], a=nn.Linear(D, 3), b=nn.Linear(3, 2))
    module, private = wrapped(model, squares, backward=MODES[mode])
    assert_clipped(module, private, torch.randn(N, D))


@both_modes
def test_views_that_follow_each_other_sample_by_sample_are_right(mode: str) -> None:
    """No row of the inputs is a sample; the loss says whose each is."""
    model, views = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(N, 3, D)
    oracle = reference(model, lambda output, _: output.square().sum(), (views,), torch.zeros(N), N)
    module, private = wrapped(model, lambda losses: losses, backward=MODES[mode])
    private(module(views.flatten(0, 1)).square().sum(1).view(N, 3).sum(1)).backward()
    for name, wanted in oracle.clipped_sum(0.05).items():
        torch.testing.assert_close(module._module.get_parameter(name).summed_grad, wanted, rtol=1e-10, atol=1e-10)


# Entrances


@dataclass
class Inputs:
    x: Tensor


def of_dataclass(net: Net, x: Tensor) -> Any:
    return net(Inputs(x))


ENTRANCES: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Tensor], Any]]] = {
    "positional": (lambda batch: batch, lambda net, x: net(x)),
    "keyword": (lambda batch: batch, lambda net, x: net(batch=x)),
    "tuple": (lambda batch: batch[0], lambda net, x: net((x, 3))),
    "dict": (lambda batch: batch["x"], lambda net, x: net({"x": x})),
    "mapping": (lambda batch: batch["x"], lambda net, x: net(UserDict(x=x))),
    "dataclass": (lambda batch: batch.x, lambda net, x: net(Inputs(x))),
    "list-of-samples": (torch.stack, lambda net, x: net(list(x))),
    "children": (lambda batch: batch, lambda net, x: net.head(net.body(x))),
    "method": (lambda batch: batch, lambda net, x: getattr(net, "_module", net).steps(x)),
}


class Entered(nn.Module):
    def __init__(self, unpack: Callable[[Any], Tensor], mixing: bool) -> None:
        super().__init__()
        between = MIXING["mean-without-a-gradient" if mixing else "mean"] if mixing else lambda net, h: h
        self.body, self.head, self.unpack = Net(between), nn.Linear(2, 2), unpack

    def steps(self, batch: Any) -> Tensor:
        return self.head(self.body(self.unpack(batch)))

    def forward(self, batch: Any) -> Tensor:
        return self.steps(batch)


@both_modes
@pytest.mark.parametrize("mixing", [False, True], ids=["independent", "mixing"])
@pytest.mark.parametrize("name", ENTRANCES)
def test_every_entrance_is_certified(name: str, mixing: bool, mode: str) -> None:
    unpack, call = ENTRANCES[name]
    module, private = wrapped(Entered(unpack, mixing), squares, backward=MODES[mode])
    loss = private(call(module, torch.randn(N, D)))
    if not mixing:
        loss.backward()
        return
    with pytest.raises(NotImplementedError, match="mixes samples"):
        loss.backward()


class Opaque:
    """A batch that nothing can look into."""

    __slots__ = ("x",)


@both_modes
def test_a_batch_that_does_not_show_is_refused(mode: str) -> None:
    module, private = wrapped(Apply(lambda m, batch: m.a(batch.x), a=nn.Linear(D, 2)), squares, backward=MODES[mode])
    batch = Opaque()
    batch.x = torch.randn(N, D)
    with pytest.raises(NotImplementedError, match=r"\(Opaque\) does not show.*Pass the batch in tensors"):
        private(module(batch)).backward()


# Loops by hand


PAST_THE_LAYER: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "weight-used-again": lambda model, z: squares(F.linear(z, model._module[0].weight)),
    "penalty": lambda model, z: squares(z) + model._module[0].weight.square().sum(),
}


@pytest.mark.parametrize("name", PAST_THE_LAYER)
def test_two_passes_by_hand_are_looked_at(name: str) -> None:
    module, _ = wrapped(nn.Sequential(nn.Linear(D, D)), squares)
    with pytest.raises(ValueError, match=r"0.weight past the layer"):
        two_passes_by_hand(module, PAST_THE_LAYER[name](module, module(torch.randn(N, D))))


@pytest.mark.parametrize("name", MIXING_LOSSES)
def test_two_passes_by_hand_over_losses_that_mix(name: str) -> None:
    torch.manual_seed(0)
    module, _ = wrapped(nn.Linear(D, 3), squares)
    with pytest.raises(NotImplementedError, match=r"mixes samples|its rows are not samples"):
        two_passes_by_hand(module, MIXING_LOSSES[name](module(torch.randn(N, D))))


def test_the_first_pass_by_hand_is_of_the_same_losses() -> None:
    module, _ = wrapped(nn.Linear(D, 3), squares, "sum")
    losses = squares(module(torch.randn(N, D)))
    losses.mean().backward(retain_graph=True)  # where sum() was announced
    coef = module.get_clipping_coef()
    with pytest.raises(ValueError, match=r"first backward\(\) was of other losses"):
        _ = coef * losses


def test_a_second_pass_of_unknown_losses() -> None:
    module, _ = wrapped(nn.Linear(D, 3), squares)
    losses = squares(module(torch.randn(N, D)))
    losses.mean().backward(retain_graph=True)
    coef = torch.tensor(module.get_clipping_coef().tolist())
    module.disable_hooks()
    (coef * losses).sum().backward()
    with pytest.raises(ValueError, match="multiply the losses with what get_clipping_coef"):
        module.enable_hooks()


# When


def test_certificates_thin_out() -> None:
    schedule, due = Schedule(), []
    for step in range(1, 1001):
        if schedule.is_due(8, "model"):
            due.append(step)
            schedule.made(8, "model")
    assert due == [1, 2, 4, 16, 64, 256]


def test_what_is_new_is_certified_at_once() -> None:
    schedule = Schedule()
    for size, structure, due in (
        (8, "a", True),
        (8, "a", True),
        (8, "a", False),
        (8, "b", True),
        (8, "b", False),
        (9, "b", True),
    ):
        assert schedule.is_due(size, structure) is due
        if due:
            schedule.made(size, structure)


def test_batches_of_one_certify_nothing_for_larger_ones() -> None:
    schedule = Schedule()
    assert schedule.is_due(1, "model")
    schedule.made(1, "model")
    assert schedule.is_due(2, "model")


@pytest.mark.parametrize("how, times", [("always", 9), ("thinning", 3), ("never", 0)])
def test_how_often(how: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(
        Schedule,
        "made",
        lambda self, size, structure, made=Schedule.made: (times_made(size), made(self, size, structure)),
    )

    def times_made(size: int) -> None:
        made.append(size)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(N, D)), batch_size=N)
    net = nn.Linear(D, 2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        module, optimizer, criterion, loader = PrivacyEngine().make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            criterion=squares,
            data_loader=loader,
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode="ghost",
            certify=how,
        )
    assert any("nothing proves" in str(warning.message) for warning in told) is (how == "never")
    for _ in range(9):
        for (x,) in loader:
            criterion(module(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(made) == times


def test_an_unknown_word_for_how_often() -> None:
    with pytest.raises(ValueError, match="certify is 'daily'"):
        Schedule("daily")


# The parts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_sketches_tell_rows_apart_and_commute_with_powers_of_two(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(7, 300).to(dtype)
    one = sketch(rows, 0)
    assert torch.equal(sketch(rows * 2.0**-5, 0), one * 2.0**-5)
    other = rows.clone()
    # About the last of the bits that a sum of so many numbers can tell.
    place, bit = {torch.bfloat16: (0, 1), torch.float64: (1, 1)}.get(dtype, (0, 2**6))
    other[3, 17:18].view(torch.int16)[place] ^= bit
    assert (sketch(other, 0) != one).any(1).tolist() == [False] * 3 + [True] + [False] * 3


@pytest.mark.parametrize("places", [(5, 9), (5, 5 + 2**17), (5, 2**18 + 3)], ids=["piece", "pieces", "tail"])
def test_sketches_of_long_rows_tell_places_apart(places: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 2**18 + 7)
    other = rows.clone()
    other[1, list(places)] = rows[1, list(reversed(places))]
    one = sketch(rows, 0)
    assert (sketch(other, 0) != one).any(1).tolist() == [False, True]
    assert torch.equal(sketch(rows * 2.0**-5, 0), one * 2.0**-5)


@pytest.mark.parametrize("size", [1, 2, 24, 25, 600])
def test_loss_weights_tell_all_samples_apart(size: int) -> None:
    drawn = torch.stack(weights(size, draws_that_tell(size), random.Random(0)))
    assert len(drawn.unique(dim=1).T) == size
    assert (drawn.log2() == drawn.log2().round()).all() and (drawn != 1).all()


def test_what_a_replacement_replaces() -> None:
    batch = {
        "features": torch.rand(4, 3),
        "tokens": torch.arange(8).view(4, 2),
        "mask": torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]]),
        "positions": torch.arange(6),
        "names": ["a", "b", "c", "d"],
    }
    replacement = Replacement(Batch(4), [1, 3], [0, 2], 0, factor=1024.0, every=False)
    other = replacement(batch)
    kept = [0, 2]
    assert torch.equal(other["features"][kept], batch["features"][kept])
    assert torch.equal(other["features"][[1, 3]], 1024 * batch["features"][kept])
    assert torch.equal(other["tokens"], batch["tokens"][[0, 0, 2, 2]])
    assert torch.equal(other["mask"], batch["mask"]) and torch.equal(other["positions"], batch["positions"])
    assert other["names"] == ["a", "a", "c", "c"]
    assert replacement.masks == {"['mask']"} and not replacement.opaque


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_replacement_keeps_the_strides(batch_first: bool) -> None:
    """Kernels are chosen by them, and another kernel rounds otherwise."""
    batch = torch.rand(4, 3, 2).transpose(0, 1)
    axis = 1 if batch_first else 0
    size = batch.shape[axis]
    other = Replacement(Batch(size), [1], [0], axis, factor=1024.0)(batch)
    assert not torch.equal(batch, other) and batch.stride() == other.stride()


def test_where_features_are_not_enlarged_each_half_is_replaced() -> None:
    for size in range(2, 9):
        (first,), (second,) = (
            tries[:1]
            for tries in replacements(Batch(size), 0, set(), {}, random.Random(size), enlarge=False, signs=(1, -1))
        )
        assert sorted(first.chosen + second.chosen) == list(range(size))
        for replacement in (first, second):
            assert replacement.factor == 1 and not set(replacement.chosen) & set(replacement.sources)


def test_a_state_is_restored() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.zeros(2))
    model.memory, model.steps, model.generator = {"last": [torch.zeros(2)]}, 0, torch.Generator().manual_seed(3)
    first = torch.rand(1, generator=torch.Generator().manual_seed(3))
    with restored(model) as before:
        model.table += 1
        model.memory["last"][0] += 1
        model.memory["last"].append(1)
        model.steps, model.new = 5, torch.ones(3)
        torch.rand(1, generator=model.generator)
        changed = ModelState(model)
        assert changed.differs_from(before) >= {"table", "memory['last']", "memory['last'][0]", "steps", "new"}
    assert not before.differs_from(ModelState(model)) and not hasattr(model, "new")
    assert torch.equal(torch.rand(1, generator=model.generator), first)
    assert model.table._version == 0


class Quantized(nn.Parameter):
    """A weight with its scale beside it, as libraries for quantised weights have them."""


class Packing(nn.Module):
    """A layer that takes its weight to itself in the first forward, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Quantized(torch.arange(6, dtype=torch.uint8).view(2, 3), requires_grad=False)
        self.weight.state = SimpleNamespace(scale=torch.ones(2), packed=False)
        self.kept = None

    def forward(self) -> None:
        self.weight.state.scale, self.weight.state.packed = self.weight.state.scale.half() / 2, True
        self.weight.data = self.weight.data.mT.contiguous()
        self.weight.data[0] = 7
        self.weight.state, self.kept = None, (self.weight.state, self.weight.data)


def test_a_quantized_weight_is_restored() -> None:
    layer = Packing()
    weight, state, scale, place = layer.weight, layer.weight.state, layer.weight.state.scale, layer.weight.data_ptr()
    with restored(layer):
        layer()
    assert layer.weight is weight and weight.data_ptr() == place
    assert torch.equal(weight, torch.arange(6, dtype=torch.uint8).view(2, 3))
    assert weight.state is state and state.scale is scale and not state.packed and layer.kept is None


def test_a_quantized_weight_is_not_copied() -> None:
    """It is large, wherever its layer keeps it."""
    layer = Packing()
    layer()
    state = ModelState(layer)
    assert not any(isinstance(value, Tensor) and value.shape == (3, 2) for value in state.values.values())


def test_the_number_of_samples_that_inputs_show() -> None:
    assert batch_size((torch.zeros(1, 7), {"x": torch.zeros(5, 7)}), 0) == 5
    assert batch_size(([3, "text"],), 0) is None
    around: list[Any] = [torch.zeros(2, 1)]
    around.append(around)
    assert (
        mapped(around, lambda path, value: value + 1 if isinstance(value, Tensor) else NotImplemented) is NotImplemented
    )
    assert batch_size(around, 0) == 2


def test_criteria_of_make_private_are_certified() -> None:
    """The whole way, as users go it."""
    torch.manual_seed(0)
    net = Net(MIXING["weakly"])
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(N, D), torch.randn(N, 2)), batch_size=N
    )
    module, _, criterion, loader = PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        criterion=nn.MSELoss(),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode="ghost_bk",
    )
    assert isinstance(criterion, DPLossFastGradientClipping)
    ((x, y),) = loader
    with pytest.raises(NotImplementedError, match="mixes samples"):
        criterion(module(x), y).backward()
