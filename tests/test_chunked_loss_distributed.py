"""`ChunkedCausalLMLoss` over several processes gives what one process gives, where the head is in shards too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from opacus_fgc import CausalLMLoss, ChunkedCausalLMLoss
from opacus_fgc.planner import MEMORY, KeepPolicy
from tests.distributed_cases import C, ddp, needs_fsdp, part, private, tensor_parallel, weights
from tests.ranks import Ranks, ranks, refused_on_all_ranks
from tests.reference import reference

pytestmark = pytest.mark.slow  # several processes

T, D, V = 7, 6, 19


@pytest.fixture(scope="module", params=[2, 4])
def group(request) -> Iterator[Ranks]:
    with ranks(request.param) as processes:
        yield processes


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(V, D), nn.LayerNorm(D)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, D)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


class Hidden(nn.Module):
    """Tokens to hidden states; the head is called outside of it."""

    def __init__(self, tied: bool = False, bias: bool = True, frozen: str = "") -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(D, V, bias=bias)
        if tied:
            self.head.weight = self.body.embedding.weight
        if frozen:
            self.get_submodule(frozen).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.head(self.model(x))


def root(model: nn.Module, **options: Any) -> nn.Module:
    return fully_shard(model, **options)


def blocks(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.body.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def copies(model: nn.Module) -> nn.Module:
    return blocks(
        model, mesh=init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copy", "shard"))
    )


def head_too(model: nn.Module, **options: Any) -> nn.Module:
    fully_shard(model.head, **options)
    return blocks(model, **options)


def apart(model: nn.Module) -> nn.Module:
    """As where a model of Hugging Face's body is called, and not the model."""
    fully_shard(model.body)
    fully_shard(model.head)
    return model


def with_the_norm(model: nn.Module) -> nn.Module:
    fully_shard([model.body.norm, model.head])
    return blocks(model)


def with_the_embedding(model: nn.Module) -> nn.Module:
    fully_shard([model.body.embedding, model.head])
    return blocks(model)


def steps(
    wrap: Callable,
    mode: str,
    tolerance: float = 1e-10,
    criterion: Callable = ChunkedCausalLMLoss,
    evaluate: bool = False,
    kept: float = 1 / 6,
    model: nn.Module | None = None,
    **options: Any,
) -> None:
    """Steps by the loss in chunks, the second from where the first went."""
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance, check_dtype=False)
    MEMORY.temporary = 4 * 3 * V
    MEMORY.ghost = KeepPolicy(share=kept)
    x = torch.randint(V, (11, T))
    y = x.clone()
    y[0, 4:], y[1, :3], y[2] = -100, -100, -100
    plain = Hidden(**options) if model is None else model
    model = wrap(copy.deepcopy(plain))
    trained = [param for param in model.parameters() if param.requires_grad]
    module, optimizer, loss, _ = private(
        model,
        x,
        y,
        criterion=criterion(),
        grad_sample_mode=mode,
        any_batch=True,
        certify="always",
        optimizer=torch.optim.SGD(trained, lr=1.0),
    )
    head = getattr(model, "module", model).head
    ranks_of_data = module.layout.data_ranks
    own = partial(part, rank=module.layout.data_rank, size=ranks_of_data)
    for _ in range(2):
        expected = reference(Logits(plain), CausalLMLoss(), (x,), y, len(x))
        before = weights(module)
        if evaluate:
            with torch.no_grad():
                loss(module(own(x)), head, own(y))
        optimizer.zero_grad()
        value = loss(module(own(x)), head, own(y))
        value.backward()
        close(value.loss_per_sample.detach(), own(expected.losses))
        close(module.per_sample_gradient_norms, own(expected.total_norm()))
        optimizer.step()
        after = weights(module)
        clipped = {name.removeprefix("model."): gradient for name, gradient in expected.clipped_sum(C).items()}
        assert clipped.keys() == {name for name, param in plain.named_parameters() if param.requires_grad}
        for name, exact in clipped.items():
            moved = (before[name] - after[name]) * optimizer.expected_batch_size * ranks_of_data
            close(moved, exact, msg=partial("{}: {}".format, name))
        for name, param in plain.named_parameters():
            param.data.copy_(after[name])


MODES = ["ghost", "ghost_bk"]


@needs_fsdp
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrap", [root, blocks, copies])
def test_a_head_in_the_outermost_module(group, wrap, tied, mode):
    group(steps, wrap, mode, tied=tied)


@needs_fsdp
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap", [head_too, apart, with_the_norm, partial(head_too, reshard_after_forward=2)])
def test_a_head_of_its_own(group, wrap, mode):
    group(steps, wrap, mode)


@needs_fsdp
@pytest.mark.parametrize("mode", MODES)
def test_a_head_with_the_embedding(group, mode):
    group(steps, with_the_embedding, mode, tied=True)


@needs_fsdp
@pytest.mark.parametrize("kept", [0, 100])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrap", [blocks, head_too])
def test_what_is_kept_of_the_first_pass(group, wrap, tied, kept):
    if not (tied and wrap is head_too):
        group(steps, wrap, "ghost", tied=tied, kept=kept)


@needs_fsdp
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", ["head", "body"])
@pytest.mark.parametrize("wrap", [blocks, head_too])
def test_parts_are_frozen(group, wrap, frozen, mode):
    group(steps, wrap, mode, frozen=frozen)


@needs_fsdp
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap", [blocks, head_too])
def test_a_model_that_was_evaluated_before(group, wrap, mode):
    group(steps, wrap, mode, evaluate=True)


def function() -> Any:
    """A criterion that is tried on its samples, as it is not known to keep them apart."""
    loss = ChunkedCausalLMLoss(reduction="none")
    return lambda hidden, head, labels: 1.0 * loss(hidden, head, labels)


@needs_fsdp
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap", [blocks, head_too])
def test_within_a_function(group, wrap, mode):
    group(steps, wrap, mode, criterion=function)


@needs_fsdp
@pytest.mark.parametrize("mode", MODES)
def test_options_of_fsdp(group, mode):
    group(steps, partial(head_too, offload_policy=CPUOffloadPolicy(pin_memory=False)), mode)
    group(steps, partial(blocks, offload_policy=CPUOffloadPolicy(pin_memory=False)), mode, tied=True)


@needs_fsdp
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap", [blocks, head_too])
def test_mixed_precision(group, wrap, mode):
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)
    group(steps, partial(wrap, mp_policy=policy), mode, 1e-4)


LENGTHS = (5, 3, 7, 4, 1, 2, 6, 3)


def steps_of_packed(wrap: Callable, mode: str, tied: bool) -> None:
    """Steps by the loss of packed sequences, of which each rank has some in a row."""
    MEMORY.temporary = 4 * 3 * V
    model = Hidden(tied)
    sequences = [torch.randint(V, (length,)) for length in LENGTHS]
    params = dict(model.named_parameters())
    gradients = []
    for sequence in sequences:
        loss = CausalLMLoss()(model.head(model(sequence[None])), sequence[None])
        own = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
        gradients.append(dict(zip(params, own, strict=True)))
    norms = torch.stack([torch.stack([one.norm() for one in each.values()]).norm() for each in gradients])
    x = torch.zeros(len(sequences), 1)
    module, optimizer, criterion, _ = private(
        wrap(model), x, x, criterion=ChunkedCausalLMLoss(), grad_sample_mode=mode, any_batch=True, certify="always"
    )
    size = module.layout.data_ranks
    own = partial(part, rank=module.layout.data_rank, size=size, least=1)
    before, places = weights(module), own(torch.arange(len(sequences))).tolist()
    tokens = torch.cat([sequences[place] for place in places])[None]
    positions = torch.cat([torch.arange(LENGTHS[place]) for place in places])[None]
    for _ in range(2):
        optimizer.zero_grad()
        criterion(module(tokens), model.head, tokens, positions).backward()
        torch.testing.assert_close(module.per_sample_gradient_norms, own(norms), rtol=1e-10, atol=1e-10)
    optimizer.step()
    after = weights(module)
    for name in params:
        exact = sum(
            min(1.0, C / max(float(norm), 1e-9)) * one[name] for norm, one in zip(norms, gradients, strict=True)
        )
        moved = (before[name] - after[name]) * optimizer.expected_batch_size * size
        torch.testing.assert_close(moved, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrap", [ddp, *(pytest.param(wrap, marks=needs_fsdp) for wrap in (blocks, head_too))])
def test_packed_sequences(group, wrap, tied, mode):
    if not (tied and wrap is head_too):
        group(steps_of_packed, wrap, mode, tied)


def with_lora(wrap: Callable, mode: str, targets: Sequence[str]) -> None:
    """Steps with LoRA on the head."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    plain = peft.get_peft_model(Hidden(), config).get_base_model()
    steps(wrap, mode, model=plain)


@needs_fsdp
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("targets", [["head"], ["body.blocks.0.0", "head"]])
@pytest.mark.parametrize("wrap", [root, blocks])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_an_adapter_on_the_head(group, wrap, targets, mode):
    group(with_lora, wrap, mode, targets)


@needs_fsdp
def test_a_head_of_its_own_with_an_adapter_is_refused(group):
    with refused_on_all_ranks(NotImplementedError, "the head is sharded over processes"):
        group(with_lora, head_too, "ghost", ["head"])


class OfTransformers(nn.Module):
    def __init__(self, causal: Any) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, tokens: Tensor) -> Tensor:
        return self.causal.model(input_ids=tokens).last_hidden_state


def with_transformers(mode: str, tied: bool, alone: bool) -> None:
    """One step of a model of transformers, whose body is FSDP's outermost module, or is in one that returns hidden states."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    causal = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=V, tie_word_embeddings=tied, use_cache=False, **sizes)
    )
    causal, x = causal.double().train(), torch.randint(V, (9, T))
    expected = reference(causal, lambda outputs, y: CausalLMLoss()(outputs, y), (x,), x, len(x))
    for layer in causal.model.layers:
        fully_shard(layer)
    if alone:
        model = causal
        fully_shard(causal.model)
        fully_shard(causal.lm_head)
    else:
        model = fully_shard(OfTransformers(causal))
    module, optimizer, criterion, _ = private(
        model, x, x, criterion=ChunkedCausalLMLoss(), grad_sample_mode=mode, any_batch=True
    )
    # These models' attention cannot be called on no samples.
    own, before = part(x, module.layout.data_rank, module.layout.data_ranks, least=1), weights(module)
    hidden = causal.model(input_ids=own).last_hidden_state if alone else module(own)
    criterion(hidden, causal.lm_head, own).backward()
    optimizer.step()
    after = weights(module)
    for name, exact in expected.clipped_sum(C).items():
        path = name if alone else f"causal.{name}"
        moved = (before[path] - after[path]) * optimizer.expected_batch_size * module.layout.data_ranks
        # These models do parts of their work in float32, whatever their dtype.
        torch.testing.assert_close(moved, exact, rtol=1e-5, atol=1e-6)


@needs_fsdp
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tied", "alone"), [(False, False), (True, False), (False, True)])
def test_a_model_of_transformers(group, tied, alone, mode):
    group(with_transformers, mode, tied, alone)


@needs_fsdp
def test_a_head_that_is_not_whole_is_refused(group):
    with refused_on_all_ranks(
        NotImplementedError, "the head is sharded over processes, and is no FSDP2 module of its own"
    ):
        group(steps, partial(root, reshard_after_forward=True), "ghost")


def test_tensor_parallel_is_refused(group):
    with refused_on_all_ranks(
        NotImplementedError, "the head is sharded over processes, and is no FSDP2 module of its own"
    ):
        group(steps, tensor_parallel, "ghost")
