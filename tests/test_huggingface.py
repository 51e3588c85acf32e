"""Models of transformers and peft, called as their users call them, equal the oracle; in both modes, wrapped and hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opacus_fgc.loss import DPLossFastGradientClipping
from opacus_fgc.optimizer import DPOptimizerFastGradientClipping
from opacus_fgc.privacy_engine import MODES
from tests.reference import Reference, reference
from tests.test_exact import ENTRIES

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# Their own deprecations are not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

N, VOCABULARY = 4, 37
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass
class Model:
    """A row: what makes the model, what it is called with, and what it is to learn."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    classes: int = VOCABULARY

    def made(self) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
        """Model, inputs and target, the same ones each time."""
        torch.manual_seed(0)
        model, inputs = self.make().double().train(), self.inputs()
        return model, inputs, self.target(inputs)

    def target(self, inputs: dict[str, Tensor]) -> Tensor:
        tokens = inputs.get("input_ids")
        return torch.randint(self.classes, (N,)) if self.classes != VOCABULARY or tokens is None else tokens


def tokens(length: int = 7) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (N, length))}


def padded_tokens() -> dict[str, Tensor]:
    mask = torch.arange(7) < torch.tensor([7, 5, 3, 6])[:, None]
    return tokens() | {"attention_mask": mask.long()}


def pixels(size: int = 8) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(N, 3, size, size)}


def of(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**options))


def llama(tied: bool = False) -> nn.Module:
    options = SIZES | {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return of("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=tied, **options)()


def lora(base: nn.Module, *targets: str) -> nn.Module:
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))


def gpt2() -> nn.Module:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return of("GPT2LMHeadModel", "GPT2Config", bos_token_id=0, eos_token_id=0, **sizes, **dropout)()


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 40} | SIZES
IMAGE = {"image_size": 8, "patch_size": 4, "num_labels": 3} | SIZES | NO_DROPOUT
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
}
OPT = {"vocab_size": VOCABULARY, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "bert": Model(
        of("BertForSequenceClassification", "BertConfig", num_labels=3, **TEXT, **NO_DROPOUT), padded_tokens, 3
    ),
    "bert-masked-lm": Model(of("BertForMaskedLM", "BertConfig", **TEXT, **NO_DROPOUT), tokens),
    "roberta": Model(
        of("RobertaForSequenceClassification", "RobertaConfig", num_labels=3, **TEXT, **NO_DROPOUT), tokens, 3
    ),
    "gpt2": Model(gpt2, tokens),
    "gpt2-checkpointed": Model(lambda: checkpointed(gpt2()), tokens),
    "gpt2-lora": Model(lambda: lora(gpt2(), "c_attn"), tokens),
    "llama": Model(llama, tokens),
    "llama-tied": Model(lambda: llama(True), padded_tokens),
    "llama-checkpointed": Model(lambda: checkpointed(llama()), tokens),
    "llama-lora": Model(lambda: lora(llama(), "q_proj", "v_proj"), tokens),
    "opt": Model(
        of("OPTForCausalLM", "OPTConfig", dropout=0.0, word_embed_proj_dim=16, max_position_embeddings=32, **OPT),
        tokens,
    ),
    "t5": Model(
        of("T5ForConditionalGeneration", "T5Config", decoder_start_token_id=0, **T5),
        lambda: (lambda row: row | {"decoder_input_ids": row["input_ids"]})(tokens()),
    ),
    "vit": Model(of("ViTForImageClassification", "ViTConfig", **IMAGE), pixels(), 3),
    "deit": Model(of("DeiTForImageClassification", "DeiTConfig", **IMAGE), pixels(), 3),
    "swin": Model(
        of("SwinForImageClassification", "SwinConfig", drop_path_rate=0.0, num_labels=3, **SWIN), pixels(16), 3
    ),
    "convnext": Model(
        of(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            **{"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "num_labels": 3},
        ),
        pixels(16),
        3,
    ),
    "swinv2": Model(
        of("Swinv2ForImageClassification", "Swinv2Config", drop_path_rate=0.0, num_labels=3, **SWIN), pixels(16), 3
    ),
    "gemma": Model(
        of(
            "GemmaForCausalLM",
            "GemmaConfig",
            **SIZES | {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
        ),
        tokens,
    ),
    "mistral": Model(
        of(
            "MistralForCausalLM",
            "MistralConfig",
            **SIZES | {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "sliding_window": 4},
        ),
        tokens,
    ),
    "qwen2": Model(
        of("Qwen2ForCausalLM", "Qwen2Config", num_key_value_heads=2, vocab_size=VOCABULARY, **SIZES), tokens
    ),
    "distilbert": Model(
        of(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            **{"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "num_labels": 3},
            **{"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
        ),
        padded_tokens,
        3,
    ),
    "mamba": Model(
        of("MambaForCausalLM", "MambaConfig", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4),
        tokens,
    ),
}


class Named(nn.Module):
    """A model whose keyword arguments are positional."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Any:
        return self.model(**dict(zip(self.names, values, strict=True)))


def loss_of(output: Any, target: Tensor) -> Tensor:
    """One value a sample: the mean over its tokens, where it has such."""
    logits = output.logits
    losses = nn.functional.cross_entropy(logits if target.dim() == 1 else logits.mT, target, reduction="none")
    return losses if losses.dim() == 1 else losses.mean(1)


@cache
def oracle_of(name: str) -> Reference:
    model, inputs, target = MODELS[name].made()
    return reference(Named(model, list(inputs)), lambda *args: loss_of(*args).sum(), tuple(inputs.values()), target, N)


@pytest.mark.parametrize("entry", ["wrapped", pytest.param("hooks", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_equals_oracle(name: str, mode: str, entry: str) -> None:
    model, inputs, target = MODELS[name].made()
    oracle = oracle_of(name)
    max_grad_norm = oracle.total_norm().median().item()

    wrapper = ENTRIES[entry](model, max_grad_norm=max_grad_norm)
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(trainable), noise_multiplier=0.0, max_grad_norm=max_grad_norm, expected_batch_size=N
    )
    criterion = DPLossFastGradientClipping(wrapper, optimizer, loss_of, backward=MODES[mode])
    criterion((wrapper if entry == "wrapped" else model)(**inputs), target).backward()

    # These models do parts of their work in float32, whatever their dtype.
    scale = oracle.total_norm().max().item()
    clipped, norms = oracle.clipped_sum(max_grad_norm), oracle.norms()
    torch.testing.assert_close(wrapper.per_sample_gradient_norms, oracle.total_norm(), rtol=1e-6, atol=0)
    for path, param in model.named_parameters():
        if param.requires_grad:
            torch.testing.assert_close(param._norm_sample, norms[f"model.{path}"], rtol=1e-5, atol=1e-6 * scale)
            torch.testing.assert_close(param.summed_grad, clipped[f"model.{path}"], rtol=1e-5, atol=1e-6 * scale)
