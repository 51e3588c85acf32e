"""What users do by mistake is refused, by name and with what to do, or comes out right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import PrivacyEngine
from opacus_fgc.privacy_engine import MODES
from tests.case import Apply
from tests.reference import reference
from tests.test_exact import assert_equal

B, C = 8, 0.5


class Run:
    """A private run on a small model, without noise unless it is said."""

    def __init__(
        self,
        mode: str,
        model: nn.Module | None = None,
        poisson: bool = False,
        noise: float = 0.0,
        batches: int = 1,
        **options: Any,
    ):
        torch.manual_seed(0)
        self.model = model or nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3))
        self.x, self.y = torch.randn(B, 4), torch.randint(3, (B,))
        data = TensorDataset(self.x.repeat(batches, 1), self.y.repeat(batches))
        params = [param for param in self.model.parameters() if param.requires_grad]
        self.engine = PrivacyEngine(accountant="rdp")
        self.poisson = poisson
        self.module, self.optimizer, self.criterion, self.loader = self.engine.make_private(
            module=self.model,
            optimizer=torch.optim.SGD(params, lr=0.1),
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(data, batch_size=B),
            noise_multiplier=noise,
            max_grad_norm=C,
            poisson_sampling=poisson,
            grad_sample_mode=mode,
            **options,
        )

    def loss(self) -> Any:
        if self.poisson:
            x, _ = next(iter(self.loader))  # all samples, at a sampling rate of 1
            assert torch.equal(x, self.x)
        return self.criterion(self.module(self.x), self.y)

    def steps(self) -> int:
        return sum(steps for _, _, steps in self.engine.accountant.history)

    def sums(self) -> list[Tensor]:
        return [param.summed_grad.clone() for param in self.model.parameters()]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("poisson", [False, True])
def test_zero_grad_is_forgotten(mode: str, poisson: bool) -> None:
    run = Run(mode, poisson=poisson)
    run.loss().backward()
    run.optimizer.step()
    before = [param.clone() for param in run.model.parameters()]

    def next_step() -> None:
        run.loss().backward()
        run.optimizer.step()

    with pytest.raises(ValueError, match=r"optimizer\.zero_grad\(\)"):
        next_step()
    assert all(map(torch.equal, before, run.model.parameters()))
    assert run.steps() == 1


def test_step_twice(mode: str) -> None:
    run = Run(mode, noise=1.0)
    run.loss().backward()
    run.optimizer.step()
    before = [param.clone() for param in run.model.parameters()]
    with pytest.raises(ValueError, match="haven't been cleared"):
        run.optimizer.step()
    run.optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"step\(\) without a clipped gradient"):
        run.optimizer.step()
    assert all(map(torch.equal, before, run.model.parameters()))
    assert run.steps() == 1


def norm_of_many_positions() -> nn.Module:
    """What is kept of its first pass is all that the sum needs, so no second pass frees the graph."""
    return Apply(lambda m, x: m.norm(x[:, None].expand(-1, 50, -1)).mean(1), norm=nn.LayerNorm(4))


@pytest.mark.parametrize("keep_graph", [False, True])
def test_backward_twice_on_one_loss(mode: str, keep_graph: bool) -> None:
    run = Run(mode, norm_of_many_positions() if keep_graph else None)
    loss = run.loss()
    loss.backward()
    sums = run.sums()
    with pytest.raises(RuntimeError, match=r"second (backward|time)"):
        loss.backward()
    assert all(map(torch.equal, sums, run.sums()))


def test_two_losses_of_one_forward(mode: str) -> None:
    run = Run(mode, norm_of_many_positions())
    output = run.module(run.x)
    a, b = run.criterion(output, run.y), run.criterion(output, run.y.flip(0))
    a.backward()
    with pytest.raises(RuntimeError, match=r"Add the losses and call backward\(\) once|second time"):
        b.backward()


def test_two_forwards_and_then_two_backwards(mode: str) -> None:
    """Of different batches, as some loops have it, and accounted as two."""
    run = Run(mode, nn.Linear(4, 3), batches=4)
    z = torch.randn(B, 4)
    first, second = run.loss(), run.criterion(run.module(z), run.y)
    first.backward()
    second.backward()
    oracles = [reference(run.model, nn.CrossEntropyLoss(), (x,), run.y, B).clipped_sum(C) for x in (run.x, z)]
    for name, param in run.model.named_parameters():
        assert_equal(param.summed_grad, oracles[0][name] + oracles[1][name], name)
    run.optimizer.step()
    # One step at twice the rate.
    ((_, sample_rate, steps),) = run.engine.accountant.history
    assert (sample_rate, steps) == (2 / 4, 1)


def test_two_views_of_a_batch(mode: str) -> None:
    """A sample's gradient is that of all its views together, clipped once."""
    run = Run(mode, nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    views = run.x, run.x + torch.randn(B, 4)
    both = Apply(lambda m, a, b: torch.stack([m.inner(a), m.inner(b)], 1), inner=run.model)
    oracle = reference(
        both, lambda output, y: sum(nn.functional.cross_entropy(output[:, i], y) for i in (0, 1)), views, run.y, B
    )
    losses = [run.criterion(run.module(view), run.y) for view in views]
    (losses[0] + losses[1]).backward()
    assert_equal(run.module.per_sample_gradient_norms, oracle.total_norm(), "norms")
    for name, wanted in oracle.clipped_sum(C).items():
        assert_equal(both.get_parameter(name).summed_grad, wanted, name)


def test_eval_mode_is_that_of_the_layers(mode: str) -> None:
    run = Run(mode)
    run.module.eval()
    oracle = reference(run.model, nn.CrossEntropyLoss(), (run.x,), run.y, B)
    run.loss().backward()
    for name, wanted in oracle.clipped_sum(C).items():
        assert_equal(run.model.get_parameter(name).summed_grad, wanted, name)


def test_forward_without_gradients(mode: str) -> None:
    run = Run(mode)
    with torch.no_grad():
        loss = run.loss()
    with pytest.raises(RuntimeError, match="does not depend on any trainable layer"):
        loss.backward()
    with pytest.raises(ValueError, match=r"step\(\) without a clipped gradient"):
        run.optimizer.step()


def test_evaluation_between_forward_and_backward(mode: str) -> None:
    """A forward without gradients leaves nothing in the step."""
    run = Run(mode, nn.Linear(4, 3))
    oracle = reference(run.model, nn.CrossEntropyLoss(), (run.x,), run.y, B)
    loss = run.loss()
    with torch.no_grad():
        run.module(torch.randn(3, 4))
    loss.backward()
    for name, wanted in oracle.clipped_sum(C).items():
        assert_equal(run.model.get_parameter(name).summed_grad, wanted, name)


def test_parameter_group_of_something_else(mode: str) -> None:
    run = Run(mode)
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(7))]})
    run.loss().backward()
    with pytest.raises(ValueError, match=r"one of shape \(7,\) that the model does not have"):
        run.optimizer.step()


def frozen_first() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    return model


def test_parameter_group_of_a_part_that_was_frozen(mode: str) -> None:
    run = Run(mode, frozen_first())
    run.optimizer.add_param_group({"params": list(run.model[0].parameters())})
    run.loss().backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"0\.weight did not require gradients"):
        run.loss().backward()


def test_parameter_that_is_switched_on_between_backward_and_step(mode: str) -> None:
    run = Run(mode, frozen_first())
    run.optimizer.add_param_group({"params": list(run.model[0].parameters())})
    run.loss().backward()
    run.model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"without a clipped gradient: 0\.weight"):
        run.optimizer.step()


def test_parameter_that_is_frozen_later_stands_still(mode: str) -> None:
    run = Run(mode, noise=1.0)
    weight = run.model[0].weight
    weight.requires_grad_(False)
    before = weight.clone()
    run.loss().backward()
    run.optimizer.step()
    assert torch.equal(before, weight)
    assert not torch.equal(run.model[0].bias, torch.zeros(5))


def test_optimizer_that_has_nothing_to_train_any_more(mode: str) -> None:
    run = Run(mode)
    run.loss().backward()
    run.model.requires_grad_(False)
    with pytest.raises(ValueError, match="none of the optimizer's parameters is trainable"):
        run.optimizer.step()


@pytest.mark.parametrize("trainable", [True, False])
def test_replaced_parameters(mode: str, trainable: bool) -> None:
    run = Run(mode)
    run.model[0].weight = nn.Parameter(run.model[0].weight.detach().clone(), requires_grad=trainable)
    with pytest.raises(ValueError, match=r"0\.weight (did not require|was replaced).*anew"):
        run.loss().backward()


def test_conversion_that_replaces_parameters(mode: str) -> None:
    """``model.to(device)`` does so for some types of tensors, and wherever torch is told to."""
    run = Run(mode)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        run.model.to(torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    run.x = run.x.float()
    with pytest.raises(ValueError, match=r"0\.bias, 0\.weight"):
        run.loss().backward()


def test_replaced_layer(mode: str) -> None:
    run = Run(mode)
    run.model[3] = nn.Linear(5, 3)
    with pytest.raises(ValueError, match=r"3\.bias, 3\.weight did not require gradients, or was not there"):
        run.loss().backward()


def test_removed_layer(mode: str) -> None:
    run = Run(mode)
    run.model[0] = nn.Linear(4, 5).requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.bias, 0\.weight was replaced or removed"):
        run.loss().backward()


@pytest.mark.parametrize("owner", ["optimizer", "module"])
def test_clipping_norm_that_is_changed_before_the_step(mode: str, owner: str) -> None:
    run = Run(mode)
    run.loss().backward()
    getattr(run, owner).max_grad_norm = 2 * C
    with pytest.raises(ValueError, match=r"max_grad_norm changed from 0\.5 to 1\.0"):
        run.optimizer.step()


def test_plain_backward_first(mode: str) -> None:
    """Its gradients are not dropped without a word, and the private ones are none the worse."""
    run = Run(mode, nn.Linear(4, 3))
    oracle = reference(run.model, nn.CrossEntropyLoss(), (run.x,), run.y, B)
    nn.CrossEntropyLoss()(run.module(run.x), run.y).backward()
    run.loss().backward()
    for name, wanted in oracle.clipped_sum(C).items():
        assert_equal(run.model.get_parameter(name).summed_grad, wanted, name)
    with pytest.raises(ValueError, match=r"in p\.grad of weight, bias"):
        run.optimizer.step()
    for param in run.model.parameters():
        param.grad = None
    run.optimizer.step()
    for name, param in run.model.named_parameters():
        assert_equal(param.grad, oracle.clipped_sum(C)[name] / B, name)


def test_sums_of_several_passes_that_share_memory(mode: str) -> None:
    """Autograd gives one tensor for two parameters; each pass is added once all the same."""
    model = Apply(lambda m, x: F.linear(x, m.a.weight + m.b.weight), a=nn.Linear(4, 3, False), b=nn.Linear(4, 3, False))
    run = Run(mode, model)
    z = torch.randn(B, 4)
    oracles = [reference(run.model, nn.CrossEntropyLoss(), (x,), run.y, B).clipped_sum(C) for x in (run.x, z)]
    for x in (run.x, z):
        run.criterion(run.module(x), run.y).backward()
    for name, param in run.model.named_parameters():
        assert_equal(param.summed_grad, oracles[0][name] + oracles[1][name], name)
