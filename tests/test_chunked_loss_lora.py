"""`ChunkedCausalLMLoss` with LoRA of peft on the head equals the oracle on logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import CausalLMLoss, ChunkedCausalLMLoss, PrivacyEngine
from opacus_fgc.loss import MODES
from opacus_fgc.planner import MEMORY, KeepPolicy
from tests.reference import reference
from tests.test_chunked_loss import Largest

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

N, T, D, V = 5, 7, 6, 19


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two tokens, and tiles of a few."""
    monkeypatch.setattr(MEMORY, "temporary", 4 * 2 * V)


class Model(nn.Module):
    """Tokens to hidden states, or with ``logits`` to logits."""

    def __init__(self, bias: bool = False, tokens: int = V) -> None:
        super().__init__()
        self.embedding, self.up, self.head = nn.Embedding(tokens, D), nn.Linear(D, D), nn.Linear(D, tokens, bias=bias)
        self.logits = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(self.embedding(x)))
        return self.head(hidden) if self.logits else hidden


def adapted(*targets: str, adapters: tuple[str, ...] = ("default",), bias: bool = False, **options: Any) -> Any:
    """A model with LoRA, and the model inside of it."""
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(targets), init_lora_weights=False, **options)
    model = peft.get_peft_model(Model(bias, options.pop("tokens", V)), config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    if len(adapters) > 1:
        model.base_model.set_adapter(list(adapters))
    return model, model.get_base_model()


def private(model: nn.Module, mode: str, max_grad_norm: float, **options: Any) -> tuple[Any, Any]:
    module, _, criterion, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1),
        criterion=ChunkedCausalLMLoss(),
        data_loader=DataLoader(TensorDataset(torch.zeros(N, 1)), batch_size=N),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **options,
    )
    return module, criterion


def assert_right(model: Any, inner: Any, mode: str, **options: Any) -> None:
    x = torch.randint(V, (N, T))
    y = x.clone()
    y[0, 4:], y[1, :3], y[2] = -100, -100, -100
    inner.logits = True
    oracle = reference(model, CausalLMLoss(), (x,), y, N)
    inner.logits = False
    norm = oracle.total_norm().median().item()
    module, criterion = private(model, mode, norm, **options)
    for _ in range(2):
        criterion.optimizer.zero_grad()
        loss = criterion(module(x), inner.head, y)
        loss.backward()
        close = {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(loss.loss_per_sample.detach(), oracle.losses, **close)
        torch.testing.assert_close(module.per_sample_gradient_norms, oracle.total_norm(), **close)
        wanted = oracle.clipped_sum(norm)
        for name, param in model.named_parameters():
            if param.requires_grad:
                torch.testing.assert_close(param.summed_grad, wanted[name], **close, msg=name)


TARGETS = [("head",), ("up", "head"), ("embedding", "up", "head")]


@pytest.mark.parametrize("certify", ["always", "thinning"])
@pytest.mark.parametrize("wrap_model", [True, False], ids=["wrapped", "hooks"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
def test_equals_oracle(targets: tuple[str, ...], bias: bool, mode: str, wrap_model: bool, certify: str) -> None:
    torch.manual_seed(0)
    model, inner = adapted(*targets, bias=bias)
    if wrap_model:
        assert_right(model, inner, mode, certify=certify)
    else:
        x = torch.randint(V, (N, T))
        inner.logits = True
        oracle = reference(model, CausalLMLoss(), (x,), x, N)
        inner.logits = False
        _, criterion = private(model, mode, 0.1, certify=certify, wrap_model=False)
        criterion(model(x), inner.head, x).backward()
        for name, gradient in oracle.clipped_sum(0.1).items():
            torch.testing.assert_close(model.get_parameter(name).summed_grad, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_several_adapters(mode: str) -> None:
    torch.manual_seed(0)
    model, inner = adapted("up", "head", adapters=("one", "two"))
    for name, param in model.named_parameters():
        param.requires_grad_("lora" in name)
    assert_right(model, inner, mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_layer_below_is_trained_too(mode: str) -> None:
    torch.manual_seed(0)
    model, inner = adapted("head", bias=True)
    for param in model.parameters():
        param.requires_grad_(True)
    assert_right(model, inner, mode)


@pytest.mark.parametrize("kept", [0, 100])
def test_what_is_kept_of_the_first_pass(kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MEMORY, "ghost", KeepPolicy(share=kept))
    torch.manual_seed(0)
    model, inner = adapted("up", "head", bias=True)
    assert_right(model, inner, "ghost")


@pytest.mark.parametrize("mode", MODES)
def test_disabled_adapters_add_nothing(mode: str) -> None:
    torch.manual_seed(0)
    model, inner = adapted("up", "head")
    inner.head.enable_adapters(False)
    for param in inner.head.parameters():
        param.requires_grad_(False)
    assert_right(model, inner, mode)


@pytest.mark.parametrize("mode", MODES)
def test_logits_are_never_held(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, length, size = 256, 64, 3
    monkeypatch.setattr(MEMORY, "temporary", 4 * tokens * length // 8)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["up", "head"], init_lora_weights=False)
    model = peft.get_peft_model(Model(tokens=tokens), config)
    module, criterion = private(model, mode, 1.0, certify="always")
    x = torch.randint(tokens, (size, length))
    with Largest() as largest:
        criterion(module(x), model.get_base_model().head, x).backward()
    assert largest.elements < length * tokens / 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_privacy(reduction: str) -> None:
    torch.manual_seed(0)
    model, inner = adapted("up", "head", bias=True)
    params = [param for param in model.parameters() if param.requires_grad]
    x = torch.randint(V, (N, T))
    actual = ChunkedCausalLMLoss(reduction=reduction)(model(x), inner.head, x)
    inner.logits = True
    wanted = CausalLMLoss(reduction=reduction)(model(x), x)
    results = [[value, *torch.autograd.grad(value.square().sum(), params)] for value in (actual, wanted)]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


# What is refused


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "bias"])
def test_other_kinds_are_refused(options: dict[str, bool]) -> None:
    _, inner = adapted("head", bias=True, **options)
    with pytest.raises(NotImplementedError, match="another kind of LoRA"):
        ChunkedCausalLMLoss()(torch.randn(N, T, D), inner.head, torch.randint(V, (N, T)))


def test_merged_adapters_are_refused() -> None:
    model, inner = adapted("head")
    model.merge_adapter()
    with pytest.raises(NotImplementedError, match="unmerge_adapter"):
        ChunkedCausalLMLoss()(torch.randn(N, T, D), inner.head, torch.randint(V, (N, T)))


def test_adapters_of_other_kinds_are_refused() -> None:
    model = peft.get_peft_model(Model(), peft.IA3Config(target_modules=["head"], feedforward_modules=[]))
    with pytest.raises(TypeError, match="Leave the head out of the adapter's target_modules"):
        ChunkedCausalLMLoss()(torch.randn(N, T, D), model.get_base_model().head, torch.randint(V, (N, T)))


@pytest.mark.parametrize("mode", MODES)
def test_models_with_the_batch_second_are_refused(mode: str) -> None:
    model, inner = adapted("head")
    module, criterion = private(model, mode, 1.0, batch_first=False)
    x = torch.randint(V, (N, T))
    with pytest.raises(NotImplementedError, match="batch_first=False"):
        criterion(module(x.T).transpose(0, 1), inner.head, x).backward()


@pytest.mark.parametrize("mode", MODES)
def test_a_head_that_is_trained_beside_adapters(mode: str) -> None:
    torch.manual_seed(0)
    model, inner = adapted("up", modules_to_save=["head"])
    x = torch.randint(V, (N, T))
    inner.logits = True
    oracle = reference(model, CausalLMLoss(), (x,), x, N)
    inner.logits = False
    norm = oracle.total_norm().median().item()
    module, criterion = private(model, mode, norm)
    with pytest.raises(TypeError, match="Give the trained layer in it"):
        criterion(module(x), inner.head, x)
    criterion(module(x), inner.head.modules_to_save["default"], x).backward()
    for name, gradient in oracle.clipped_sum(norm).items():
        torch.testing.assert_close(model.get_parameter(name).summed_grad, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_packed_sequences_and_units(mode: str) -> None:
    torch.manual_seed(0)
    model, inner = adapted("up", "head", bias=True)
    lengths, owners, norm = (5, 3, 7, 4, 6), [0, 1, 0, 1, 2], 0.2
    x = torch.randint(V, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for unit in (None, owners):
        inner.logits = True
        losses = [CausalLMLoss()(model(tokens[None]), tokens[None]) for tokens in x[0].split(lengths)]
        if unit is not None:
            of_each = [[loss for loss, one in zip(losses, owners, strict=True) if one == owner] for owner in range(3)]
            losses = [torch.stack(several).mean() for several in of_each]
        gradients = [torch.autograd.grad(loss, list(params.values()), retain_graph=True) for loss in losses]
        inner.logits = False
        norms = [torch.stack([gradient.norm() for gradient in own]).norm() for own in gradients]
        module, criterion = private(model, mode, norm)
        criterion(module(x), inner.head, x, positions, unit=unit).backward()
        torch.testing.assert_close(module.per_sample_gradient_norms, torch.stack(norms), rtol=1e-10, atol=1e-10)
        for place, param in enumerate(params.values()):
            wanted = sum(min(1.0, norm / float(one)) * own[place] for one, own in zip(norms, gradients, strict=True))
            torch.testing.assert_close(param.summed_grad, wanted, rtol=1e-10, atol=1e-10)
        module.cleanup() if hasattr(module, "cleanup") else module.remove_hooks()
        for param in params.values():
            param.summed_grad = None
