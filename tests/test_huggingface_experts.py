"""Mixtures of experts of transformers, under each of its implementations, equal the oracle; in both modes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from opacus_fgc.privacy_engine import MODES

pytest.importorskip("transformers")

import transformers

from tests.sweep.building import IMPLEMENTATIONS, built, has_experts
from tests.sweep.measuring import IN_FLOAT32, TOLERANCE, InDouble, difference
from tests.sweep.tasks import TASKS

# Their own deprecations are not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

MODELS = {
    "afmoe": "AfmoeForCausalLM",
    "aria_text": "AriaTextForCausalLM",
    "cohere2_moe": "Cohere2MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "exaone_moe": "ExaoneMoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "inkling_text": "InklingForCausalLM",
    "jetmoe": "JetMoeForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
ALWAYS = {("mixtral", experts) for experts in IMPLEMENTATIONS} | {("gpt_oss", "eager")}
ROWS = [
    pytest.param(kind, experts, marks=[] if (kind, experts) in ALWAYS else pytest.mark.slow, id=f"{kind}-{experts}")
    for kind, name in MODELS.items()
    if hasattr(transformers, name)
    for experts in (IMPLEMENTATIONS if has_experts(name) else (None,))
]


@pytest.mark.parametrize("kind, experts", ROWS)
def test_equals_oracle(kind: str, experts: str | None) -> None:
    """In double precision to 1e-10, also of what the models compute in float32; torch has `grouped_mm` in float32 only."""
    single = experts == "grouped_mm"
    dtype = torch.float32 if single else torch.float64
    torch.set_default_dtype(dtype)
    subject = built(TASKS["causal-lm"], kind, MODELS[kind], experts, dtype)
    with nullcontext() if single else InDouble():
        assert difference(subject, *MODES) <= (IN_FLOAT32 if single else TOLERANCE)


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral"])
def test_what_transformers_has_in_place_of_grouped_mm(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = pytest.importorskip("transformers.integrations.moe")
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *args: False)
    subject = built(TASKS["causal-lm"], kind, MODELS[kind], "grouped_mm", torch.float64)
    with InDouble():
        assert difference(subject, *MODES) <= TOLERANCE
