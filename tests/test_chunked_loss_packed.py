"""`ChunkedCausalLMLoss` on sequences that are packed into one row equals the oracle on each sequence alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import CausalLMLoss, ChunkedCausalLMLoss, PrivacyEngine
from opacus_fgc.loss import MODES
from opacus_fgc.planner import MEMORY, KeepPolicy
from tests.test_chunked_loss import Largest

D, V = 6, 19


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two tokens, and tiles of a few."""
    monkeypatch.setattr(MEMORY, "temporary", 4 * 2 * V)


class Model(nn.Module):
    """Each position sees the mean of those before it in its sequence."""

    def __init__(self, tied: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.embedding, self.up, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        sequence = (position_ids[0] == 0).cumsum(0)
        seen = ((sequence[:, None] == sequence).tril()).to(self.up.weight.dtype)
        return torch.tanh(self.up((seen / seen.sum(1, keepdim=True)) @ self.embedding(x)))


def private(model: nn.Module, mode: str, max_grad_norm: float, **options: Any) -> tuple[Any, Any]:
    module, _, criterion, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1),
        criterion=ChunkedCausalLMLoss(),
        data_loader=DataLoader(TensorDataset(torch.zeros(8, 1)), batch_size=4),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **options,
    )
    return module, criterion


def packed(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and positions; some tokens do not count, and of long sequences' the first ones."""
    x = torch.randint(V, (1, sum(lengths)))
    y, positions = x.clone(), torch.cat([torch.arange(0), *map(torch.arange, lengths)])[None]
    y[:, ::5] = -100
    return x, y, positions


def oracle(
    model: nn.Module, x: Tensor, y: Tensor, lengths: tuple[int, ...], owners: list[int] | None = None
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The losses and gradients of samples: of each sequence alone, or the mean of those of one owner."""
    model, losses = copy.deepcopy(model), []
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for tokens, labels in zip(x[0].split(lengths), y[0].split(lengths), strict=True):
        hidden = model(tokens[None], torch.arange(len(tokens))[None])
        losses.append(CausalLMLoss()(model.head(hidden), labels[None]))
    if owners is not None:
        own = [
            [loss for loss, one in zip(losses, owners, strict=True) if one == owner] for owner in range(max(owners) + 1)
        ]
        losses = [torch.stack(several).mean() for several in own]
    gradients = [
        dict(
            zip(
                params,
                torch.autograd.grad(
                    loss, list(params.values()), allow_unused=True, materialize_grads=True, retain_graph=True
                ),
                strict=True,
            )
        )
        for loss in losses
    ]
    return torch.stack(losses).detach(), gradients


def assert_right(
    model: nn.Module, module: Any, loss: Any, losses: Tensor, gradients: list[dict[str, Tensor]], norm: float
) -> None:
    close = {"rtol": 1e-10, "atol": 1e-10}
    norms = torch.stack([torch.stack([one.norm() for one in each.values()]).norm() for each in gradients])
    torch.testing.assert_close(loss.loss_per_sample.detach(), losses, **close)
    torch.testing.assert_close(module.per_sample_gradient_norms, norms, **close)
    for name in gradients[0]:
        wanted = sum(
            min(1.0, norm / max(own.item(), 1e-9)) * one[name] for own, one in zip(norms, gradients, strict=True)
        )
        torch.testing.assert_close(model.get_parameter(name).summed_grad, wanted, **close)


LENGTHS = [(5, 3, 7, 4), (4, 4, 4), (1, 6, 1), (9,), (1, 1, 1, 1), (2,), (30, 2, 2, 2, 2, 2)]


@pytest.mark.parametrize("certify", ["always", "thinning"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_oracle(tied: bool, bias: bool, mode: str, certify: str) -> None:
    torch.manual_seed(0)
    model, norm = Model(tied, bias), 0.4
    module, criterion = private(model, mode, norm, certify=certify)
    for lengths in LENGTHS:
        x, y, positions = packed(lengths)
        losses, gradients = oracle(model, x, y, lengths)
        criterion.optimizer.zero_grad()
        loss = criterion(module(x, positions), model.head, y, position_ids=positions)
        loss.backward()
        assert_right(model, module, loss, losses, gradients, norm)


def assert_step_is_right(model: Model, mode: str, lengths: tuple[int, ...]) -> None:
    module, criterion = private(model, mode, 0.4)
    x, y, positions = packed(lengths)
    losses, gradients = oracle(model, x, y, lengths)
    loss = criterion(module(x, positions), model.head, y, positions)
    loss.backward()
    assert_right(model, module, loss, losses, gradients, 0.4)


@pytest.mark.parametrize("kept", [0, 100])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_kept_of_the_first_pass(tied: bool, kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MEMORY, "ghost", KeepPolicy(share=kept))
    torch.manual_seed(0)
    model, lengths = Model(tied, bias=True), (5, 3, 7, 4)
    assert_step_is_right(model, "ghost", lengths)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", ["head", "embedding", "body"])
def test_parts_are_frozen(frozen: str, mode: str) -> None:
    torch.manual_seed(0)
    model, lengths = Model(bias=True), (5, 3, 7, 4)
    for part in (model.embedding, model.up) if frozen == "body" else (model.get_submodule(frozen),):
        part.requires_grad_(False)
    assert_step_is_right(model, mode, lengths)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("owners", [[0, 0, 1, 1, 1], [0, 1, 0, 1, 2], [0, 0, 0, 0, 0]])
def test_units(owners: list[int], tied: bool, mode: str) -> None:
    """Sequences of one user are one sample."""
    torch.manual_seed(0)
    model, lengths = Model(tied, bias=True), (5, 3, 7, 4, 6)
    module, criterion = private(model, mode, 0.4)
    for _ in range(2):
        x, y, positions = packed(lengths)
        losses, gradients = oracle(model, x, y, lengths, owners)
        criterion.optimizer.zero_grad()
        loss = criterion(module(x, positions), model.head, y, positions, unit=owners)
        loss.backward()
        assert_right(model, module, loss, losses, gradients, 0.4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_privacy(reduction: str) -> None:
    torch.manual_seed(0)
    model = Model(bias=True)
    for lengths in LENGTHS:
        x, y, positions = packed(lengths)
        results = []
        for loss in (ChunkedCausalLMLoss(reduction=reduction), CausalLMLoss(reduction=reduction)):
            hidden = model(x, positions)
            value = (
                loss(hidden, model.head, y, positions)
                if isinstance(loss, ChunkedCausalLMLoss)
                else loss(model.head(hidden), y, positions)
            )
            gradients = torch.autograd.grad(value.square().sum(), list(model.parameters()))
            results.append([value.detach(), *gradients])
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


class Alone(Model):
    """Each position sees itself."""

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        return torch.tanh(self.up(self.embedding(x)))


@pytest.mark.parametrize("certify", ["always", "never"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:certify='never'")
def test_a_long_sequence_among_short_ones(mode: str, tied: bool, certify: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is padded, and no logits of the long one are held."""
    tokens, lengths = 256, (64, *[2] * 30)
    monkeypatch.setattr(MEMORY, "temporary", 4 * tokens * 8)
    torch.manual_seed(0)
    model = Alone(tied)
    model.embedding, model.head = nn.Embedding(tokens, D), nn.Linear(D, tokens, bias=False)
    if tied:
        model.head.weight = model.embedding.weight
    module, criterion = private(model, mode, 0.4, certify=certify)
    x, y, positions = packed(lengths)
    losses, gradients = oracle(model, x, y, lengths)
    with Largest() as largest:
        loss = criterion(module(x, positions), model.head, y, positions)
        loss.backward()
    assert_right(model, module, loss, losses, gradients, 0.4)
    assert largest.elements < 64 * tokens / 2


def test_positions_that_are_none() -> None:
    model = Model()
    x, y, positions = packed((3, 4))
    with pytest.raises(ValueError, match="one after another in one row"):
        ChunkedCausalLMLoss()(model(x, positions), model.head, y, positions[:, 1:].expand(2, -1))
    with pytest.raises(ValueError, match="each token has a place"):
        ChunkedCausalLMLoss()(model(x, positions), model.head, y, positions[:, :-1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_model_of_transformers(tied: bool, mode: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=37, tie_word_embeddings=tied, use_cache=False, **sizes)
    model, lengths = transformers.LlamaForCausalLM(config).double().train(), (5, 3, 7, 4)
    alone, norm = copy.deepcopy(model), 0.3
    module, criterion = private(model, mode, norm)
    sequences = [torch.randint(37, (length,)) for length in lengths]
    batch = transformers.DataCollatorWithFlattening()([{"input_ids": sequence.tolist()} for sequence in sequences])
    wanted = {name: torch.zeros_like(param) for name, param in alone.named_parameters()}
    for sequence in sequences:
        loss = CausalLMLoss()(alone(input_ids=sequence[None]), sequence[None])
        gradients = torch.autograd.grad(loss, list(alone.parameters()))
        total = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        for name, gradient in zip(wanted, gradients, strict=True):
            wanted[name] += min(1.0, norm / total) * gradient
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    hidden = module.model(**inputs).last_hidden_state
    criterion(hidden, module.lm_head, batch["labels"], batch["position_ids"]).backward()
    for name, param in model.named_parameters():
        # Rotary embeddings are computed in float32, and round otherwise in another length.
        torch.testing.assert_close(param.summed_grad, wanted[name], rtol=1e-5, atol=1e-7)
