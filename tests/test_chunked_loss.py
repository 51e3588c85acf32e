"""`ChunkedCausalLMLoss` equals the oracle on logits, holds no logits of all tokens, and refuses what it cannot do."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from opacus_fgc import (
    CausalLMLoss,
    ChunkedCausalLMLoss,
    GradSampleModuleFastGradientClipping,
    GradScaler,
    PrivacyEngine,
    register_norm_sampler,
)
from opacus_fgc.clipping import FlatClipping
from opacus_fgc.criterion import head_terms
from opacus_fgc.loss import MODES
from opacus_fgc.norm_samplers import NORM_SAMPLERS
from opacus_fgc.norm_samplers.head import HeadRows
from opacus_fgc.per_sample import Dense, Outer, PerSampleGradient, Rows, TiledOuter, add
from opacus_fgc.per_sample.logit_gradients import NOT_COUNTED, LogitGradients, Term, spans_of
from opacus_fgc.planner import MEMORY, KeepPolicy, NormMethod
from opacus_fgc.taps import heads
from tests.case import two_passes_by_hand
from tests.reference import reference

N, T, D, V = 5, 7, 6, 19


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two tokens, and tiles of five."""
    monkeypatch.setattr(MEMORY, "temporary", 4 * 2 * V)


class LanguageModel(nn.Module):
    """Tokens to hidden states, or with ``logits`` to logits."""

    def __init__(self, tied: bool = False, bias: bool = False, logits: bool = False, tokens: int = V) -> None:
        super().__init__()
        self.embedding, self.up, self.head = nn.Embedding(tokens, D), nn.Linear(D, D), nn.Linear(D, tokens, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight
        self.logits = logits

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(self.embedding(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x)) if self.logits else self.hidden(x)


def frozen(*names: str, **options: bool) -> LanguageModel:
    model = LanguageModel(**options)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], LanguageModel]] = {
    "plain": LanguageModel,
    "bias": lambda: LanguageModel(bias=True),
    "tied": lambda: LanguageModel(tied=True),
    "tied-bias": lambda: LanguageModel(tied=True, bias=True),
    "frozen-head": lambda: frozen("head.weight", "head.bias", bias=True),
    "frozen-weight": lambda: frozen("head.weight", bias=True),
    "frozen-bias": lambda: frozen("head.bias", bias=True),
    "head-alone": lambda: frozen("embedding.weight", "up.weight", "up.bias"),
}


def data() -> tuple[Tensor, Tensor]:
    """Tokens and labels: some left out, and in one sample all."""
    x = torch.randint(V, (N, T))
    y = x.clone()
    y[0, 4:], y[1, :3], y[2] = -100, -100, -100
    return x, y


def private(model: nn.Module, criterion: Any, max_grad_norm: float, **options: Any) -> tuple[Any, Any, Any]:
    module, optimizer, criterion, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1),
        criterion=criterion,
        data_loader=DataLoader(TensorDataset(torch.zeros(N, 1)), batch_size=N),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        poisson_sampling=False,
        **options,
    )
    return module, optimizer, criterion


def with_logits(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.logits = True
    return other


def assert_sums(model: nn.Module, wanted: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, param in model.named_parameters():
        if param.requires_grad:
            torch.testing.assert_close(param.summed_grad, wanted[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("certify", ["always", "thinning"])
@pytest.mark.parametrize("wrap_model", [True, False], ids=["wrapped", "hooks"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_equals_oracle(name: str, mode: str, wrap_model: bool, certify: str) -> None:
    torch.manual_seed(0)
    model, (x, y) = MODELS[name](), data()
    oracle = reference(with_logits(model), CausalLMLoss(), (x,), y, N)
    norm = oracle.total_norm().median().item()
    module, optimizer, criterion = private(
        model, ChunkedCausalLMLoss(), norm, grad_sample_mode=mode, wrap_model=wrap_model, certify=certify
    )
    for _ in range(2):
        optimizer.zero_grad()
        loss = criterion((module if wrap_model else model)(x), model.head, y)
        loss.backward()
        torch.testing.assert_close(loss.loss_per_sample.detach(), oracle.losses, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(module.per_sample_gradient_norms, oracle.total_norm(), rtol=1e-10, atol=1e-10)
        assert_sums(model, oracle.clipped_sum(norm))
    assert oracle.losses[2] == module.per_sample_gradient_norms[2] == 0


@pytest.mark.parametrize("temporary", [1, 4 * D * V, 2**25])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_chunks_of_other_sizes(mode: str, tied: bool, temporary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MEMORY, "temporary", temporary)
    torch.manual_seed(0)
    model, (x, y) = LanguageModel(tied), data()
    oracle = reference(with_logits(model), CausalLMLoss(reduction="sum"), (x,), y, N)
    norm = oracle.total_norm().median().item()
    module, _, criterion = private(
        model, ChunkedCausalLMLoss(reduction="sum"), norm, grad_sample_mode=mode, loss_reduction="sum"
    )
    criterion(module(x), model.head, y).backward()
    assert_sums(model, oracle.clipped_sum(norm))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_without_privacy(name: str, reduction: str) -> None:
    torch.manual_seed(0)
    model, (x, y) = MODELS[name](), data()
    y = y.masked_fill(y == -100, 3)
    y[0, 4:] = 3
    other = with_logits(model)
    weights = torch.rand(N) if reduction == "none" else torch.ones(())
    actual = ChunkedCausalLMLoss(3, reduction)(model(x), model.head, y)
    wanted = CausalLMLoss(3, reduction)(other(x), y)
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
    (actual * weights).sum().backward()
    (wanted * weights).sum().backward()
    for (path, param), same in zip(model.named_parameters(), other.parameters(), strict=True):
        if param.requires_grad:
            torch.testing.assert_close(param.grad, same.grad, rtol=1e-10, atol=1e-10, msg=path)
    with torch.no_grad():
        torch.testing.assert_close(ChunkedCausalLMLoss(3, reduction)(model(x), model.head, y), wanted)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_several_losses_in_a_step(mode: str, tied: bool) -> None:
    """Two uses of the head in chunks, of other lengths, and one by its logits."""
    torch.manual_seed(0)
    model, (x, y) = LanguageModel(tied, bias=True), data()
    z = torch.randint(V, (N, T + 2))
    plain = CausalLMLoss()

    def three(model: nn.Module, x: Tensor) -> Tensor:
        hidden = model.hidden(x[:, :T])
        first = plain(model.head(hidden), x[:, T : 2 * T]) + 0.5 * plain(
            model.head(model.hidden(x[:, 2 * T :])), x[:, 2 * T :]
        )
        return first + F.cross_entropy(model.head(hidden[:, 0]), x[:, -1])

    class Three(LanguageModel):
        def forward(self, x: Tensor) -> Tensor:
            return three(self, x)

    together = Three(tied, bias=True)
    together.load_state_dict(model.state_dict())
    oracle = reference(together, lambda loss, _: loss, (torch.cat([x, y, z], 1),), y, N)
    norm = oracle.total_norm().median().item()
    chunked = ChunkedCausalLMLoss(reduction="none")

    def losses(hidden: Tensor, of_z: Tensor, logits: Tensor, y: Tensor, z: Tensor) -> Tensor:
        rest = 0.5 * chunked(of_z, model.head, z) + F.cross_entropy(logits, z[:, -1], reduction="none")
        return chunked(hidden, model.head, y) + rest

    module, _, criterion = private(model, losses, norm, grad_sample_mode=mode)
    hidden = module(x)
    criterion(hidden, module(z), model.head(hidden[:, 0]), y, z).backward()
    torch.testing.assert_close(module.per_sample_gradient_norms, oracle.total_norm(), rtol=1e-10, atol=1e-10)
    assert_sums(model, oracle.clipped_sum(norm))


class WithLoss(LanguageModel):
    """Its forward gives the losses of the samples."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = checkpoint(self.hidden, x, use_reentrant=False)
        return (CausalLMLoss if self.logits else ChunkedCausalLMLoss)(reduction="none")(
            *((self.head(hidden),) if self.logits else (hidden, self.head)), y
        )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_inside_of_the_model(mode: str, tied: bool) -> None:
    torch.manual_seed(0)
    model, (x, y) = WithLoss(tied, bias=True), data()
    oracle = reference(with_logits(model), lambda losses, _: losses.sum(), (x, y), y, N)
    norm = oracle.total_norm().median().item()
    module, _, criterion = private(model, lambda losses: losses, norm, grad_sample_mode=mode, certify="always")
    criterion(module(x, y)).backward()
    torch.testing.assert_close(module.per_sample_gradient_norms, oracle.total_norm(), rtol=1e-10, atol=1e-10)
    assert_sums(model, oracle.clipped_sum(norm))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_rows_in_another_order(mode: str, tied: bool) -> None:
    torch.manual_seed(0)
    model, (x, y), order = LanguageModel(tied), data(), torch.tensor([3, 0, 4, 1, 2])
    oracle = reference(with_logits(model), CausalLMLoss(), (x,), y, N)
    norm = oracle.total_norm().median().item()

    class Sorted(LanguageModel):
        def forward(self, x: Tensor) -> Tensor:
            return self.hidden(x[order])[order.argsort()]

    moved = Sorted(tied)
    moved.load_state_dict(model.state_dict())
    module, _, criterion = private(moved, ChunkedCausalLMLoss(), norm, grad_sample_mode=mode)
    criterion(module(x), module.head, y).backward()
    assert_sums(moved, oracle.clipped_sum(norm))


@pytest.mark.parametrize("certify", ["always", "thinning"])
@pytest.mark.parametrize("length", [N, T])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_a_model_with_the_batch_second(mode: str, name: str, length: int, certify: str) -> None:
    """Its hidden states have the batch second, and are turned for the loss; there may be as many tokens as samples."""
    torch.manual_seed(0)
    model, (x, y) = MODELS[name](), data()
    x, y = x[:, :length], y[:, :length]
    oracle = reference(with_logits(model), CausalLMLoss(), (x,), y, N)
    norm = oracle.total_norm().median().item()
    module, optimizer, criterion = private(
        model, ChunkedCausalLMLoss(), norm, grad_sample_mode=mode, batch_first=False, certify=certify
    )
    for _ in range(2):
        optimizer.zero_grad()
        criterion(module(x.T).transpose(0, 1), model.head, y).backward()
        torch.testing.assert_close(module.per_sample_gradient_norms, oracle.total_norm(), rtol=1e-10, atol=1e-10)
        assert_sums(model, oracle.clipped_sum(norm))


@pytest.mark.parametrize("mode", MODES)
def test_another_order_of_losses(mode: str) -> None:
    """The head is called on samples whose losses come in another order; backward finds whose its rows are."""
    torch.manual_seed(0)
    model, (x, y), order = LanguageModel(), data(), torch.tensor([3, 0, 4, 1, 2])
    oracle = reference(with_logits(model), CausalLMLoss(), (x,), y, N)
    norm, chunked = oracle.total_norm().median().item(), ChunkedCausalLMLoss(reduction="none")

    class Sorted(WithLoss):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return chunked(self.hidden(x[order]), self.head, y[order])[order.argsort()]

    moved = Sorted()
    moved.load_state_dict(model.state_dict())
    module, _, criterion = private(moved, lambda losses: losses, norm, grad_sample_mode=mode)
    criterion(module(x, y)).backward()
    assert_sums(moved, oracle.clipped_sum(norm))


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_sequences_of_few_tokens(mode: str, length: int) -> None:
    torch.manual_seed(0)
    model, x = LanguageModel(tied=True, bias=True), torch.randint(V, (N, length))
    module, _, criterion = private(model, ChunkedCausalLMLoss(), 1.0, grad_sample_mode=mode)
    loss = criterion(module(x), model.head, x)
    loss.backward()
    if length < 2:
        assert (loss.loss_per_sample == 0).all()
        assert (module.per_sample_gradient_norms == 0).all()
    else:
        oracle = reference(with_logits(model), CausalLMLoss(), (x,), x, N)
        assert_sums(model, oracle.clipped_sum(1.0))


@pytest.mark.parametrize("mode", MODES)
def test_empty_batch(mode: str) -> None:
    model = LanguageModel(tied=True, bias=True)
    module, _, criterion = private(model, ChunkedCausalLMLoss(), 1.0, grad_sample_mode=mode)
    x = torch.zeros(0, T, dtype=torch.long)
    loss = criterion(module(x), model.head, x)
    loss.backward()
    assert loss.loss_per_sample.shape == (0,)
    assert all(param.summed_grad.count_nonzero() == 0 for param in model.parameters())


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "whole"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_bfloat16(mode: str, tied: bool, whole: bool) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    model, (x, y) = LanguageModel(tied, bias=True), data()
    model = model.bfloat16() if whole else model
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        oracle = reference(with_logits(model), CausalLMLoss(), (x,), y, N)
        norms = oracle.total_norm().float()
        module, _, criterion = private(model, ChunkedCausalLMLoss(), norms.median().item(), grad_sample_mode=mode)
        loss = criterion(module(x), model.head, y)
    loss.backward()
    assert loss.loss_per_sample.dtype is module.per_sample_gradient_norms.dtype is torch.float32
    tolerance = 8 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(module.per_sample_gradient_norms, norms, rtol=tolerance, atol=0)
    clipped = oracle.clipped_sum(module.max_grad_norm)
    scale = max(gradient.abs().max().item() for gradient in clipped.values())
    for path, param in model.named_parameters():
        torch.testing.assert_close(param.summed_grad, clipped[path].float(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("mode", MODES)
def test_float16_with_a_scaler(mode: str) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    model, (x, y) = LanguageModel(bias=True), data()
    oracle = reference(with_logits(model), CausalLMLoss(), (x,), y, N)
    norm = oracle.total_norm().median().item()
    module, optimizer, criterion = private(model, ChunkedCausalLMLoss(), norm, grad_sample_mode=mode)
    scaler = GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", torch.float16):
        loss = criterion(module(x), model.head, y)
    scaler.scale(loss).backward()
    assert_sums(model, oracle.clipped_sum(norm), 1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_that_is_not_finite_is_dropped(mode: str) -> None:
    torch.manual_seed(0)
    model, (x, y) = LanguageModel(), data()
    oracle = reference(with_logits(model), CausalLMLoss(), (x,), y, N)
    norm = oracle.total_norm().median().item()

    class Broken(LanguageModel):
        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return self.hidden(x) * factor[:, None, None]

    broken = Broken()
    broken.load_state_dict(model.state_dict())
    module, _, criterion = private(broken, ChunkedCausalLMLoss(), norm, grad_sample_mode=mode, nonfinite="drop")
    factor = torch.ones(N)
    factor[1] = torch.inf
    criterion(module(x, factor), broken.head, y).backward()
    wanted = oracle.clipped_sum(norm)
    for name, gradient in oracle.gradients.items():
        wanted[name] -= gradient[1] * min(1.0, norm / oracle.total_norm()[1].item())
    assert_sums(broken, wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_a_second_pass(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is kept of the first."""
    monkeypatch.setattr(MEMORY, "ghost", KeepPolicy(share=0))
    torch.manual_seed(0)
    model, (x, y) = LanguageModel(tied, bias=True), data()
    oracle = reference(with_logits(model), CausalLMLoss(), (x,), y, N)
    norm = oracle.total_norm().median().item()
    module, _, criterion = private(model, ChunkedCausalLMLoss(), norm, grad_sample_mode="ghost")
    with module.plan() as plan:
        criterion(module(x), model.head, y).backward()
    assert (NormMethod.SUM if tied else NormMethod.TILES).value in str(plan)
    assert_sums(model, oracle.clipped_sum(norm))


# Models of transformers, as they are


def llama(tied: bool = False) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=37, tie_word_embeddings=tied, **sizes))


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=2, **dropout)
    )


def checkpointed() -> Any:
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def lora(*targets: str) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))


OF_TRANSFORMERS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-tied": lambda: llama(True),
    "llama-checkpointed": checkpointed,
    "llama-lora": lambda: lora("q_proj", "v_proj"),
    "gpt2": gpt2,
}


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x).logits


@pytest.mark.parametrize("wrap_model", [True, False], ids=["wrapped", "hooks"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OF_TRANSFORMERS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_models_of_transformers(name: str, mode: str, wrap_model: bool) -> None:
    torch.manual_seed(0)
    model = OF_TRANSFORMERS[name]().double().train()
    x = torch.randint(37, (N, T))
    y = x.clone()
    y[0, 4:] = -100
    oracle = reference(Logits(model), CausalLMLoss(), (x,), y, N)
    norm = oracle.total_norm().median().item()
    module, _, criterion = private(
        model, ChunkedCausalLMLoss(), norm, grad_sample_mode=mode, wrap_model=wrap_model, certify="always"
    )
    causal = model.get_base_model() if name == "llama-lora" else module if wrap_model else model
    body = causal.transformer if name == "gpt2" else causal.model
    criterion(body(input_ids=x).last_hidden_state, causal.lm_head, y).backward()
    # These models do parts of their work in float32, whatever their dtype.
    scale = oracle.total_norm().max().item()
    torch.testing.assert_close(module.per_sample_gradient_norms, oracle.total_norm(), rtol=1e-6, atol=0)
    wanted = oracle.clipped_sum(norm)
    for path, param in model.named_parameters():
        if param.requires_grad:
            torch.testing.assert_close(param.summed_grad, wanted[f"model.{path}"], rtol=1e-5, atol=1e-6 * scale)


# How much is held


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("certify", ["always", "never"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:certify='never'")
def test_logits_of_a_sequence_are_never_held(
    mode: str, tied: bool, certify: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tokens, length, size = 256, 64, 3
    monkeypatch.setattr(MEMORY, "temporary", 4 * tokens * length // 8)
    x = torch.randint(tokens, (size, length))
    for chunked in (True, False):
        model = LanguageModel(tied, bias=True, logits=not chunked, tokens=tokens)
        criterion = ChunkedCausalLMLoss() if chunked else CausalLMLoss()
        module, _, criterion = private(model, criterion, 1.0, grad_sample_mode=mode, certify=certify)
        with Largest() as largest:
            criterion(module(x), *((model.head,) if chunked else ()), x).backward()
        if chunked:
            assert largest.elements < length * tokens / 2
        else:
            assert largest.elements >= size * (length - 1) * tokens


# Forms


def logit_gradients(positions: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> LogitGradients:
    hidden, weight = scale * torch.randn(N * positions, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    targets = torch.randint(V, (N * positions,))
    targets[: min(2, positions)] = NOT_COUNTED
    log_sums, factor = (hidden @ weight.mT).logsumexp(1), torch.rand(N, 1, dtype=dtype)
    return LogitGradients((Term(hidden, weight),), None, targets, log_sums, spans_of([positions] * N), factor)


def tiled(positions: int) -> TiledOuter:
    return TiledOuter(logit_gradients(positions), torch.randn(N * positions, D), torch.Size((V, D)))


OTHERS: dict[str, Callable[[], PerSampleGradient]] = {
    "tiled": lambda: tiled(3),
    "rows": lambda: Rows(torch.randint(V, (N, 4)), torch.randn(N, 4, D), torch.Size((V, D))),
    "outer": lambda: Outer(torch.randn(N, 2, V), torch.randn(N, 2, D), torch.Size((V, D))),
    "dense": lambda: Dense(torch.randn(N, V, D)),
}


@pytest.mark.parametrize("positions", [0, 1, 2, 9])
def test_form(positions: int) -> None:
    torch.manual_seed(0)
    form, coef, some = tiled(positions), torch.rand(N), torch.tensor([True, False, True, True, False])
    left = form.left
    whole = torch.softmax(left.terms[0].hidden @ left.terms[0].weight.mT, 1) - F.one_hot(left.targets.clamp(min=0), V)
    whole = (left.factor.repeat_interleave(positions, 0) * whole).masked_fill(left.targets.unsqueeze(1) < 0, 0)
    whole, right = (each.unflatten(0, (N, positions)) for each in (whole, form.right))
    gradients = whole.mT @ right
    torch.testing.assert_close(form.materialize(), gradients)
    torch.testing.assert_close(form.norm(), gradients.flatten(1).norm(dim=1))
    torch.testing.assert_close(form.weighted_sum(coef), torch.tensordot(coef, gradients, 1))
    torch.testing.assert_close(form.select(some).materialize(), gradients[some])
    torch.testing.assert_close(form.select(slice(1, 3)).norm(), gradients[1:3].flatten(1).norm(dim=1))
    terms = whole.norm(dim=2) * right.norm(dim=2)
    torch.testing.assert_close(form.norm_of_terms(), terms.norm(dim=1))
    assert (form.measured().norm == form.norm()).all()


@pytest.mark.parametrize("first, second", list(itertools.product(OTHERS, repeat=2)))
def test_sum_of_two_forms(first: str, second: str) -> None:
    torch.manual_seed(0)
    a, b = OTHERS[first](), OTHERS[second]()
    if first == second == "tiled":  # of one head
        b = TiledOuter(replace(b.left, terms=(Term(b.left.terms[0].hidden, a.left.terms[0].weight),)), b.right, b.shape)
    total = a.materialize() + b.materialize()
    added = add([a, b])
    torch.testing.assert_close(added.norm(), total.flatten(1).norm(dim=1))
    torch.testing.assert_close(added.weighted_sum(torch.ones(N)), total.sum(0))
    torch.testing.assert_close(a.inner(b), (a.materialize() * b.materialize()).flatten(1).sum(1))


@pytest.mark.parametrize("second", ["", "rows", "outer"])
def test_no_sample_contributes_more_than_the_clipping_norm(second: str) -> None:
    """In float32, also where terms cancel: what is released of one sample alone, as stored."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    for scale in (1e-3, 1.0, 30.0):
        left = logit_gradients(40, torch.float32, scale)
        right = torch.randn(N * 40, D)
        form: PerSampleGradient = TiledOuter(left, right, torch.Size((V, D)))
        if second:
            # Of the same size, and but for a little the opposite.
            whole = form.materialize()
            dense = -whole + 1e-2 * torch.randn_like(whole) * whole.abs()
            index = torch.arange(V).expand(N, V)
            eye = torch.eye(V).expand(N, V, V)
            form = add(
                [form, Rows(index, dense, whole.shape[1:]) if second == "rows" else Outer(eye, dense, whole.shape[1:])]
            )
        norms = form.norm()
        coef = FlatClipping(0.5 * norms.min().item()).coefficients(norms)
        for n in range(N):
            released = form.select(slice(n, n + 1)).weighted_sum(coef[n : n + 1])
            assert released.double().norm().item() <= 0.5 * norms.min().item() * (1 + 1e-6)


def test_rows_of_one_sample() -> None:
    torch.manual_seed(0)
    form = tiled(3)
    twice = form.select(slice(0, 4))
    wanted = twice.materialize().unflatten(0, (2, 2)).sum(1)
    torch.testing.assert_close(twice.sum_over_uses(2).materialize(), wanted)
    torch.testing.assert_close(twice.sum_over_uses(2).norm(), wanted.flatten(1).norm(dim=1))


# What is refused


def test_heads_of_another_kind() -> None:
    criterion, hidden, y = ChunkedCausalLMLoss(), torch.randn(N, T, D), torch.randint(V, (N, T))
    with pytest.raises(TypeError, match="the head is a Sequential; it has to be a"):
        criterion(hidden, nn.Sequential(nn.Linear(D, V)), y)
    spectral = parametrizations.spectral_norm(nn.Linear(D, V))
    with pytest.raises(NotImplementedError, match="is trained, and is not one that the norm sampler"):
        criterion(hidden, spectral, y)
    criterion(hidden, spectral.requires_grad_(False), y)


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_with_a_forward_of_its_own(trained: bool) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    patched = nn.Linear(D, V)
    patched.forward = lambda x: 2 * F.linear(x, patched.weight)  # type: ignore[method-assign]
    for head in (Scaled(D, V), patched):
        with pytest.raises(TypeError, match="with a forward of its own"):
            ChunkedCausalLMLoss()(torch.randn(N, T, D), head.requires_grad_(trained), torch.randint(V, (N, T)))


def test_a_head_that_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_terms, "DTensor", nn.Parameter)
    with pytest.raises(NotImplementedError, match="sharded over processes"):
        ChunkedCausalLMLoss()(torch.randn(N, T, D), nn.Linear(D, V), torch.randint(V, (N, T)))


def test_a_head_whose_parameters_are_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FSDP2 has it in forward: the whole weight is there, and the optimizer's is a shard."""
    model, (x, y) = LanguageModel(), data()
    module, _, criterion = private(model, ChunkedCausalLMLoss(), 1.0, grad_sample_mode="ghost")
    monkeypatch.setattr(heads, "DTensor", nn.Parameter)
    with pytest.raises(NotImplementedError, match="sharded over processes"):
        criterion(module(x), model.head, y)


def test_functorch() -> None:
    model, (x, y) = LanguageModel(), data()
    wrapped = GradSampleModuleFastGradientClipping(model, force_functorch=True)
    with pytest.raises(NotImplementedError, match="force_functorch=True"):
        ChunkedCausalLMLoss()(wrapped(x), model.head, y)


@pytest.mark.parametrize("mode", MODES)
def test_formed_gradients(mode: str) -> None:
    """Without ghost clipping each sample's gradient is formed."""
    torch.manual_seed(0)
    model, (x, y) = LanguageModel(tied=True, bias=True), data()
    oracle = reference(with_logits(model), CausalLMLoss(), (x,), y, N)
    norm = oracle.total_norm().median().item()
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=norm, use_ghost_clipping=False)
    MODES[mode](wrapped, ChunkedCausalLMLoss(reduction="none")(wrapped(x), model.head, y))
    assert_sums(model, oracle.clipped_sum(norm))


def test_two_passes_by_hand() -> None:
    torch.manual_seed(0)
    model, (x, y) = LanguageModel(tied=True, bias=True), data()
    oracle = reference(with_logits(model), CausalLMLoss(), (x,), y, N)
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=oracle.total_norm().median().item())
    two_passes_by_hand(wrapped, ChunkedCausalLMLoss(reduction="none")(wrapped(x), model.head, y))
    assert_sums(model, oracle.clipped_sum(wrapped.max_grad_norm))


@pytest.mark.parametrize("mode", MODES)
def test_certificates_do_not_compute_the_loss_again(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = LanguageModel(), data()
    module, _, criterion = private(model, ChunkedCausalLMLoss(), 1.0, grad_sample_mode=mode, certify="always")
    calls = []
    sums = Tensor.logsumexp
    monkeypatch.setattr(Tensor, "logsumexp", lambda *args: calls.append(args) or sums(*args))
    criterion(module(x), model.head, y).backward()
    assert len(calls) == N * (T - 1) // 2  # chunks of two tokens


def test_a_registered_norm_sampler_for_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NORM_SAMPLERS, nn.Linear, NORM_SAMPLERS[nn.Linear])
    register_norm_sampler(nn.Linear)(lambda layer, activations, backprops: {})
    with pytest.raises(NotImplementedError, match="a registered norm sampler"):
        ChunkedCausalLMLoss()(torch.randn(N, T, D), nn.Linear(D, V), torch.randint(V, (N, T)))


@pytest.mark.parametrize(
    "hidden, labels", [((N, T + 1, D), (N, T)), ((T, N, D), (N, T)), ((N, T, D + 1), (N, T)), ((N, D), (N,))]
)
def test_shapes_that_do_not_fit(hidden: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="batch first"):
        ChunkedCausalLMLoss()(torch.randn(hidden), nn.Linear(D, V), torch.randint(V, labels))


@pytest.mark.parametrize("label", [V, -1])
def test_labels_that_are_no_tokens(label: int) -> None:
    y = torch.randint(V, (N, T))
    y[1, 2] = label
    with pytest.raises(ValueError, match=f"label {label} is no token of a vocabulary of {V}"):
        ChunkedCausalLMLoss()(torch.randn(N, T, D), nn.Linear(D, V), y)


def test_a_head_does_nothing_else_with_its_rows() -> None:
    rows = HeadRows.of(torch.randn(N, T, D), torch.randint(V, (N, T)), torch.randn(N, T))
    with pytest.raises(NotImplementedError, match="it has to be a plain linear layer"):
        torch.relu(rows)


@pytest.mark.parametrize("mode", MODES)
def test_a_head_outside_of_the_model(mode: str) -> None:
    model, (x, y) = LanguageModel(), data()
    module, _, criterion = private(model, ChunkedCausalLMLoss(), 1.0, grad_sample_mode=mode)
    loss = criterion(module(x), nn.Linear(D, V), y)
    with pytest.raises(ValueError, match="outside of the wrapped model"):
        loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_hidden_states_that_mix_samples(mode: str) -> None:
    class Mixing(LanguageModel):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.hidden(x)
            return hidden - hidden.mean(0)

    model, (x, y) = Mixing(), data()
    module, _, criterion = private(model, ChunkedCausalLMLoss(), 1.0, grad_sample_mode=mode)
    with pytest.raises(NotImplementedError, match="mixes samples"):
        criterion(module(x), model.head, y).backward()
