"""Language models of transformers on sequences that its collator packs into one row equal the oracle on each sequence alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from opacus_fgc import CausalLMLoss, PrivacyEngine
from opacus_fgc.loss import MODES

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SIZES = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def of(name: str, attention: str, **options: object) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(use_cache=False, **options)
    return getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation=attention)


def gpt2(attention: str) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=37, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False
    )
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation=attention)


def lora(attention: str) -> nn.Module:
    """The input of no trained layer is the batch itself."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(of("Llama", attention, **SIZES), config)


MODELS: dict[str, Callable[[str], nn.Module]] = {
    "gpt2": gpt2,
    "llama": lambda attention: of("Llama", attention, **SIZES),
    "qwen3": lambda attention: of("Qwen3", attention, head_dim=8, num_key_value_heads=1, **SIZES),
    "lora": lora,
    "mixtral": lambda attention: of("Mixtral", attention, num_key_value_heads=2, num_local_experts=3, **SIZES),
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.every(3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_packed(name: str, attention: str, mode: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name](attention).train()
    if name == "mixtral":
        model.set_experts_implementation("eager")  # the others take no float64
    alone, criterion, max_grad_norm = copy.deepcopy(model), CausalLMLoss(), 0.3
    collate = transformers.DataCollatorWithFlattening()
    module, optimizer, private, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1),
        criterion=CausalLMLoss(),
        data_loader=DataLoader(torch.zeros(4, 1), batch_size=4),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    for lengths in ((5, 3, 7, 4), (2, 6, 4, 7), (6, 6, 2, 5)):
        sequences = [torch.randint(37, (length,)) for length in lengths]
        alone.load_state_dict(module._module.state_dict())
        params = {name: param for name, param in alone.named_parameters() if param.requires_grad}
        total = {name: torch.zeros_like(param) for name, param in params.items()}
        for sequence in sequences:
            loss = criterion(alone(input_ids=sequence[None]), sequence[None])
            gradients = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
            for name, gradient in zip(params, gradients, strict=True):
                total[name] += min(1.0, max_grad_norm / norm) * gradient
        batch = collate([{"input_ids": sequence.tolist()} for sequence in sequences])
        optimizer.zero_grad()
        outputs = module(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        private(outputs, batch["labels"], batch["position_ids"]).backward()
        for name, wanted in total.items():
            # Rotary embeddings are computed in float32, and round otherwise in another length.
            torch.testing.assert_close(module._module.get_parameter(name).summed_grad, wanted, rtol=1e-5, atol=1e-7)
        optimizer.step()


@pytest.mark.parametrize("mode", MODES)
def test_poisson_sampling_and_dropout(mode: str) -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=37, n_embd=16, n_layer=1, n_head=2, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).train()
    texts = [{"input_ids": torch.randint(37, (length % 7 + 2,)).tolist()} for length in range(60)]
    engine = PrivacyEngine()
    module, optimizer, private, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=CausalLMLoss(),
        data_loader=DataLoader(texts, batch_size=20, collate_fn=transformers.DataCollatorWithFlattening()),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    for batch in loader:
        optimizer.zero_grad()
        outputs = module(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        private(outputs, batch["labels"], batch["position_ids"]).backward()
        optimizer.step()
    assert sum(steps for _, _, steps in engine.accountant.history) == 3
    assert module.per_sample_gradient_norms.shape == ((batch["position_ids"] == 0).sum(),)


@pytest.mark.parametrize("mode", MODES)
def test_sequences_that_see_each_other_are_refused(mode: str) -> None:
    """With a cache, transformers' models do not keep them apart."""
    model = of("Llama", "sdpa", **SIZES).train()
    model.config.use_cache = True
    module, _, private, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=CausalLMLoss(),
        data_loader=DataLoader(torch.zeros(4, 1), batch_size=4),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    sequences = [{"input_ids": torch.randint(37, (length,)).tolist()} for length in (5, 3)]
    batch = transformers.DataCollatorWithFlattening()(sequences)
    outputs = module(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    with pytest.raises(NotImplementedError, match="several of these have a part in one row"):
        private(outputs, batch["labels"], batch["position_ids"]).backward()
