"""A private loss is the tensor that scripts take it for; what would go past the clipping is an error."""

from __future__ import annotations

import copy
import inspect
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opacus_fgc import DPTensorFastGradientClipping
from opacus_fgc.planner import MEMORY, KeepPolicy
from opacus_fgc.privacy_engine import MODES
from tests.reference import reference
from tests.test_exact import assert_equal
from tests.test_loss import D, N, wrapped

PLAIN = nn.CrossEntropyLoss()


class Step:
    """A model, a batch, the private loss of it and the same by torch."""

    def __init__(self, mode: str = "ghost", reduction: str = "mean") -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, D))
        self.x, self.y = torch.randn(N, 4), torch.randint(D, (N,))
        plain = nn.CrossEntropyLoss(reduction=reduction)
        self.oracle = reference(self.model, plain, (self.x,), self.y, N)
        self.plain = plain(self.model(self.x), self.y)
        self.module, self.criterion = wrapped(self.model, plain, reduction, backward=MODES[mode])
        self.output = self.module(self.x)
        self.loss: Any = self.criterion(self.output, self.y)

    def check(self, factor: float = 1.0) -> None:
        gradients = {name: gradient * factor for name, gradient in self.oracle.gradients.items()}
        clipped = type(self.oracle)(gradients, self.oracle.losses).clipped_sum(0.05)
        for name, param in self.model.named_parameters():
            assert_equal(param.summed_grad, clipped[name], name)
            assert param.grad is None


SHOWN: dict[str, Callable[[Any], Any]] = {
    "item": lambda loss: loss.item(),
    "float": lambda loss: float(loss) if isinstance(loss, DPTensorFastGradientClipping) else loss.item(),
    "int": lambda loss: int(loss) if isinstance(loss, DPTensorFastGradientClipping) else int(loss.item()),
    "format": lambda loss: f"{loss:.4f}",
    "format-of-item": lambda loss: f"{loss.item():.4f}",
    "shape": lambda loss: loss.shape,
    "size": lambda loss: loss.size(),
    "dim": lambda loss: loss.dim(),
    "ndim": lambda loss: loss.ndim,
    "numel": lambda loss: loss.numel(),
    "dtype": lambda loss: loss.dtype,
    "device": lambda loss: loss.device,
    "requires_grad": lambda loss: loss.requires_grad,
    "grad_fn": lambda loss: loss.grad_fn is not None,
    "is_leaf": lambda loss: loss.is_leaf,
    "is_tensor": torch.is_tensor,
    "is_floating_point": lambda loss: loss.is_floating_point(),
    "bool": bool,
    "less": lambda loss: loss < 1e3,
    "greater": lambda loss: loss < 1e3,
    "equal": lambda loss: loss == loss.detach(),
    "max": lambda loss: max(loss.detach(), 0.0),
    "isnan": lambda loss: loss.isnan(),
    "torch.isnan": torch.isnan,
    "torch.isfinite": torch.isfinite,
    "torch.isinf": torch.isinf,
    "numpy": lambda loss: loss.detach().cpu().numpy().item(),
    "tolist": lambda loss: loss.tolist(),
    "stack": lambda loss: torch.stack([loss, 2 * loss]).detach(),
    "stack-of-detached": lambda loss: torch.stack([loss.detach(), loss.detach()]).mean(),
    "exp": lambda loss: torch.exp(loss.detach()),
    "perplexity": lambda loss: torch.exp(loss).item(),
    "sum-of-items": lambda loss: sum([loss.item(), loss.item()]),
    "running": lambda loss: torch.zeros(()).add_(loss.detach()),
    "detach": lambda loss: loss.detach().clone().float(),
    "data": lambda loss: loss.data,
    "copy": lambda loss: copy.copy(loss).item(),
    "deepcopy": lambda loss: copy.deepcopy(loss.detach()),
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)).item(),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", SHOWN)
def test_it_shows_what_a_plain_loss_shows(name: str, reduction: str) -> None:
    step = Step(reduction=reduction)
    private, plain = (SHOWN[name](loss) for loss in (step.loss, step.plain))
    if isinstance(plain, Tensor):
        torch.testing.assert_close(private, plain)
        assert not isinstance(private, DPTensorFastGradientClipping)
    else:
        assert private == (pytest.approx(plain) if isinstance(plain, float) else plain)


def test_copies_are_of_the_number() -> None:
    step = Step()
    for other in (
        copy.copy(step.loss),
        copy.deepcopy(step.loss),
        pickle.loads(pickle.dumps({"loss": step.loss}))["loss"],
    ):
        assert type(other) is Tensor
        assert not other.requires_grad
        assert_equal(other, step.plain.detach(), "copy")


def accumulated(loss: Any) -> Any:
    total = 0
    for _ in range(2):
        total += loss
    return total


def in_place(loss: Any) -> Any:
    loss *= 6
    loss /= 2
    loss += 1
    loss -= 1
    return loss


STILL_PRIVATE: dict[str, tuple[Callable[[Any], Any], float]] = {
    "mean": (lambda loss: loss.mean(), 1.0),
    "sum": (lambda loss: loss.sum(), 1.0),
    "torch.mean": (torch.mean, 1.0),
    "torch.sum": (torch.sum, 1.0),
    "cpu": (lambda loss: loss.cpu(), 1.0),
    "to-device": (lambda loss: loss.to("cpu"), 1.0),
    "to-dtype": (lambda loss: loss.to(torch.float64), 1.0),
    "double": (lambda loss: loss.double(), 1.0),
    "clone": (lambda loss: loss.clone(), 1.0),
    "squeeze": (lambda loss: loss.squeeze(), 1.0),
    "requires_grad_": (lambda loss: loss.requires_grad_(), 1.0),
    "accumulation-steps": (lambda loss: loss / 4, 0.25),
    "divided-by-a-tensor": (lambda loss: loss / torch.tensor(4.0), 0.25),
    "scaled": (lambda loss: torch.tensor(2.0) * loss, 2.0),
    "by-a-parameter": (lambda loss: nn.Parameter(torch.tensor(2.0), requires_grad=False) * loss, 2.0),
    "torch.mul": (lambda loss: torch.mul(loss, 2), 2.0),
    "torch.add": (lambda loss: torch.add(torch.tensor(1.0), loss), 1.0),
    "method-div": (lambda loss: loss.div(2), 0.5),
    "torch.sub": (lambda loss: torch.sub(1, loss), -1.0),
    "negative": (lambda loss: torch.neg(loss), -1.0),
    "sum-of-a-list": (lambda loss: sum([loss, loss]), 2.0),
    "accumulated": (accumulated, 2.0),
    "in-place-operators": (in_place, 3.0),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STILL_PRIVATE)
def test_it_stays_private(name: str, mode: str) -> None:
    step = Step(mode)
    function, factor = STILL_PRIVATE[name]
    loss = function(step.loss)
    assert isinstance(loss, DPTensorFastGradientClipping)
    shown, plain = loss.item(), function(step.plain).item()
    assert shown == pytest.approx(plain)
    loss.backward()
    step.check(factor)


LOST: dict[str, Callable[[Any], Any]] = {
    "square": lambda loss: loss**2,
    "sqrt": torch.sqrt,
    "log": lambda loss: loss.log(),
    "abs": lambda loss: (loss - 0.1).abs(),
    "inverse": lambda loss: 1 / loss,
    "stack": lambda loss: torch.stack([loss, loss]).mean(),
    "where": lambda loss: torch.where(loss.isnan(), torch.zeros(()), loss),
    "maximum": lambda loss: torch.maximum(loss, torch.zeros(())),
    "added-to-a-running-total": lambda loss: torch.zeros(()).add_(loss),
    "view": lambda loss: loss.view(1),
    "add-with-alpha": lambda loss: torch.add(loss, 1.0, alpha=2),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOST)
def test_backward_of_functions_of_it_is_an_error(name: str, mode: str) -> None:
    step = Step(mode)
    function = LOST[name]
    result = function(step.loss)
    torch.testing.assert_close(result.detach(), function(step.plain).detach())
    with pytest.raises(RuntimeError, match=r"Call backward\(\) on the private loss itself"):
        result.backward()
    with pytest.raises(RuntimeError, match=r"Call backward\(\) on the private loss itself"):
        torch.autograd.grad(step.loss, list(step.model.parameters()))
    assert all(param.grad is None for param in step.model.parameters())
    step.loss.backward()
    step.check()


@pytest.mark.parametrize("change", ["add_", "mul_", "div_", "zero_"])
def test_changes_in_place_are_refused(change: str) -> None:
    loss = Step().loss
    with pytest.raises(NotImplementedError, match=r"write loss = loss \+"):
        getattr(loss, change)(*([2.0] if change != "zero_" else []))


@pytest.mark.parametrize("hook", ["register_hook", "retain_grad"])
def test_hooks_on_it_are_refused(hook: str) -> None:
    loss = Step().loss
    with pytest.raises(NotImplementedError, match="one loss a sample"):
        getattr(loss, hook)(*([print] if hook == "register_hook" else []))


@pytest.mark.parametrize("operation", [operator.add, operator.sub, operator.mul])
def test_what_has_a_gradient_is_public_or_has_a_criterion(operation: Callable) -> None:
    step = Step()
    for both in ((step.loss, step.plain), (step.plain, step.loss)):
        with pytest.raises(ValueError, match="register_step_pre_hook"):
            operation(*both)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_public_term_by_a_hook(mode: str, reduction: str) -> None:
    """What the error says to do: a proximal term comes to the gradient after the noise."""
    step = Step(mode, reduction)
    start = [param.detach() + 1 for param in step.model.parameters()]
    before = [param.detach().clone() for param in step.model.parameters()]
    optimizer = step.criterion.optimizer

    def proximal(*_: Any) -> None:
        for param, there in zip(step.model.parameters(), start, strict=True):
            param.grad += 0.1 * (param.detach() - there)

    optimizer.original_optimizer.register_step_pre_hook(proximal)
    step.loss.backward()
    optimizer.step()
    clipped = step.oracle.clipped_sum(0.05)
    for (name, param), there, old in zip(step.model.named_parameters(), start, before, strict=True):
        gradient = clipped[name] / (N if reduction == "mean" else 1) + 0.1 * (old - there)
        assert_equal(param.detach(), old - 0.1 * gradient, name)


# backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("backward", "factor"),
    [
        (lambda loss: Tensor.backward(loss), 1.0),
        (lambda loss: loss.backward(None, True), 1.0),
        (lambda loss: loss.backward(torch.tensor(2.0)), 2.0),
        (lambda loss: loss.backward(gradient=torch.ones(1)), 1.0),
    ],
)
def test_ways_to_call_backward(backward: Callable, factor: float, mode: str) -> None:
    step = Step(mode)
    backward(step.loss)
    step.check(factor)


ASKS = "has_torch_function" in inspect.getsource(torch.autograd.backward)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("losses", "factor"), [(lambda loss: loss, 1.0), (lambda loss: [loss, loss], 2.0)])
def test_backward_by_function(losses: Callable, factor: float, mode: str) -> None:
    step = Step(mode)
    if not ASKS:  # older torch
        with pytest.raises(RuntimeError, match=r"Call backward\(\) on the private loss itself"):
            torch.autograd.backward(losses(step.loss))
        return
    torch.autograd.backward(losses(step.loss))
    step.check(factor)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"create_graph": True}, NotImplementedError, "no gradient of its own"),
        ({"inputs": []}, NotImplementedError, "Freeze what is not to be trained"),
        ({"gradient": torch.ones(N)}, ValueError, r"\(loss \* weights\)"),
    ],
)
def test_arguments_without_a_meaning(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Step().loss.backward(**options)


def test_backward_of_private_and_plain_losses_together() -> None:
    step = Step()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"[Cc]all backward\(\) on"):
        torch.autograd.backward([step.loss, step.plain])


def test_losses_of_two_private_models() -> None:
    with pytest.raises(ValueError, match="two private models"):
        Step().loss + Step().loss


def test_validation() -> None:
    """Without a graph it is a number."""
    step = Step()
    with torch.no_grad():
        loss = step.criterion(step.module(step.x), step.y)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(step.plain.item())
    with pytest.raises(RuntimeError, match="does not depend on any trainable layer"):
        loss.backward()


# Whether the graph is left


@pytest.fixture(params=[None, KeepPolicy(), KeepPolicy(share=100.0)], ids=["as it is", "two passes", "one pass"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(MEMORY, "ghost", request.param)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("room")
def test_graph_is_used_up(mode: str) -> None:
    step = Step(mode)
    step.loss.backward()
    for plain in (step.output.sum(), step.output[0, 0]):
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(plain, step.module._module[0].weight)
    step.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("room")
def test_graph_is_retained(mode: str) -> None:
    """Plain losses may go through it, and leave what was clipped as it is; a private one would count each sample twice."""
    step = Step(mode)
    weight = step.model[0].weight
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(step.model(step.x), step.y), weight)
    output = step.module(step.x)
    step.criterion(output, step.y).backward(retain_graph=True)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(PLAIN(output, step.y), weight, retain_graph=True)
        assert_equal(gradient, expected, "plain gradient")
    step.check()
    with pytest.raises(RuntimeError, match=r"a second backward\(\) through one forward"):
        step.criterion(output, step.y).backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("room")
def test_graph_that_is_retained_past_the_next_forward(mode: str) -> None:
    """What a plain loss does to an old graph does not come into the next step."""
    step = Step(mode)
    step.loss.backward(retain_graph=True)
    step.criterion.optimizer.zero_grad()
    loss = step.criterion(step.module(step.x), step.y)
    torch.autograd.grad(step.output.sum(), step.model[0].weight)
    loss.backward()
    step.check()
    assert_equal(step.module.per_sample_gradient_norms, step.oracle.total_norm(), "norms")


@pytest.mark.parametrize("mode", MODES)
def test_plain_loss_first(mode: str) -> None:
    """A plain loss that goes through the graph before the private one, as for an attack on the data, leaves that as it is."""
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, D)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x.flatten(0, 1)).tanh().view(*x.shape[:2], -1)
            return self.last(hidden).mean(1)

    model, x, y = Tokens(), torch.randn(N, 3, 4), torch.randint(D, (N,))
    oracle = reference(model, PLAIN, (x,), y, N)
    module, criterion = wrapped(model, PLAIN, backward=MODES[mode])
    output = module(x)
    torch.autograd.grad(PLAIN(output, y), model.first.weight, retain_graph=True)
    criterion(output, y).backward()
    for name, param in model.named_parameters():
        assert_equal(param.summed_grad, oracle.clipped_sum(0.05)[name], name)


def test_scaler_of_torch() -> None:
    """It would scale what is clipped."""
    with pytest.raises(TypeError, match=r"use opacus_fgc\.GradScaler"):
        torch.amp.GradScaler("cpu").scale(Step().loss)
