"""Every causal language model of the installed transformers, tiny and unpatched, against the oracle; see `docs/sweep.md`.

``python -m tests.sweep`` writes the table; with names of classes it prints the rows of these alone.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from opacus_fgc import (
    DPLossFastGradientClipping,
    DPOptimizerFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyRuntimeError, PrivacyValueError
from opacus_fgc.privacy_engine import MODES
from tests.reference import reference

N, LENGTH, VOCABULARY = 4, 8, 61
TOLERANCE, IN_FLOAT32 = 1e-10, 1e-5
TABLE = Path(__file__).parent.parent / "docs" / "sweep.md"
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")

WIDTH, HEADS = 32, 4
TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "embedding_dim", "emb_dim"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "hidden_size_per_layer_input", "lru_width"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 48),
    **dict.fromkeys(("dff", "d_inner", "ffn_hidden_size", "dim_ff", "feed_forward_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "dim_head"), 8),
    **dict.fromkeys(("kv_channels", "swa_head_dim", "swa_v_head_dim", "index_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(
        ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "moe_num_shared_experts"), 1
    ),
    **dict.fromkeys(("num_dense_layers", "moe_layer_start_index", "num_shared_experts", "zero_expert_num"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "conv_kernel", "mamba_d_conv"), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_topk", "mamba_d_head"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("sliding_window", "attention_window_size", "chunk_size", "mamba_chunk_size"), 4),
    **dict.fromkeys(("eos_token_id", "bos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("linear_num_heads", "n_mamba_heads"), 2),
    **dict.fromkeys(("linear_head_dim", "mamba_dt_rank"), 8),
    **dict.fromkeys(("num_expert_group", "num_codebooks"), 1),
    "mamba_n_heads": 8,
    "qk_head_dim": 16,
    "hidden_size_global": WIDTH,
    "encoder_hash_byte_group_vocab": 50,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "is_decoder": True,
    "use_cache": False,
}
"""What fields of these names are to be, where a configuration has them."""

# Of other fields, None says that there is no such thing.
OF_NONE = ("head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "pad_token_id")

BY_KIND: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note": {"per_layer_config": {}},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        **{"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (2, 4), "hash_seed": 0, "num_buckets": 2},
        **{"lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4},
    },
    "roc_bert": {"shape_vocab_size": 50, "pronunciation_vocab_size": 50},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4},
        **{"attention_hidden_size": 64, "attention_head_dim": 16},
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the configurations of some kinds need besides."""

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": HEADS},
    {"num_kv_shared_layers": 0, "num_hidden_layers": 6},
    {"hidden_size_per_layer_input": 0},
    {"head_dim": None, "num_key_value_heads": HEADS, "num_kv_heads": HEADS},
    {"num_hidden_layers": 4, "n_layer": 4, "num_layers": 4},
    {"num_hidden_layers": 6},
    {"num_hidden_layers": 3},
    {"num_hidden_layers": 8},
    {"head_dim": 16, "hidden_size": 64, "num_hidden_layers": 4},
    {"num_hidden_layers": None, "num_layers": None, "n_layer": None},
]
"""What is tried in turn, until a model can be made of it and runs."""


def _fields(config: Any, variant: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that are to be other ones than it has."""
    fields = {}
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        wanted = {**TINY, **variant}.get(name)
        if isinstance(value, float) and re.search(r"drop(out|path|_path)?(_|$)|pdrop|jitter|layerdrop|_prob", name):
            fields[name] = 0.0
        elif wanted is not None and (value is None or isinstance(value, (int, bool))) and (value or wanted):
            fields.update({} if value is None and name not in OF_NONE else {name: wanted})
        elif isinstance(value, transformers.PreTrainedConfig):
            fields[name] = {**_fields(value, variant), "model_type": value.model_type}
    return fields


class Called(nn.Module):
    """A model that is called with tokens alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Any:
        return self.model(input_ids=tokens)


def _tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (N, LENGTH))


def _losses(output: Any, tokens: Tensor) -> Tensor:
    """One value a sample: the mean over the tokens that are to be foreseen."""
    logits = output.logits[:, :-1].transpose(1, 2)
    return nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(1)


class NotBuiltError(Exception):
    """No tiny model of a class runs."""


def built(kind: str, name: str, experts: str | None, dtype: torch.dtype) -> nn.Module:
    """A tiny model of a class that runs and has gradients."""
    try:
        config_class = transformers.AutoConfig.for_model(kind).__class__
        model_class = getattr(transformers, name)
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {error}") from error
    failures = []
    for variant in VARIANTS:
        torch.manual_seed(0)
        try:
            config = config_class(**_fields(config_class(), variant) | BY_KIND.get(kind, {}))
            if model_class.config_class is not config_class:
                config = next(
                    (one for one in vars(config).values() if isinstance(one, model_class.config_class)), config
                )
            options = {} if experts is None else {"experts_implementation": experts}
            model = model_class._from_config(config, **options).to(dtype).train()
            for module in model.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.p = 0.0
            if sum(param.numel() for param in model.parameters()) > 10**7:
                raise NotBuiltError(f"more than {10**7} parameters")
            # Some keep tensors from a forward, and cannot be copied then.
            tokens, copied = _tokens(), copy.deepcopy(model)
            _losses(copied(input_ids=tokens), tokens).sum().backward()
            # All weights matter: those that begin at 0 would let nothing come through.
            with torch.no_grad():
                for param in model.parameters():
                    if param.requires_grad and param.is_floating_point():
                        param.add_(0.02 * torch.randn_like(param))
            return model
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
    raise NotBuiltError(failures[0])


class InFloat32(TorchFunctionMode):
    """Notes whether something with a gradient is computed in float32."""

    found = False

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.dtype == torch.float32 and output.requires_grad:
            self.found = True
        return output


class InDouble(TorchFunctionMode):
    """Computes in double precision what models compute in float32 whatever their dtype, so that all differences show."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda leaf: torch.float64 if leaf is torch.float32 else leaf, (args, kwargs or {}))
        return args[0].double() if func is Tensor.float else func(*args, **kwargs)


class Row(NamedTuple):
    """A row of the table."""

    name: str
    experts: str
    result: str
    why: str = ""


def difference(model: nn.Module, mode: str) -> float:
    """By how much the clipped gradients of two steps are not the oracle's, beside the largest norm."""
    wrapper: Any = None
    worst, plain = 0.0, Called(copy.deepcopy(model))
    for _ in range(2):
        tokens = _tokens()
        oracle = reference(plain, lambda *args: _losses(*args).sum(), (tokens,), tokens, N)
        norms = oracle.total_norm()
        max_grad_norm = norms.median().item()
        if wrapper is None:
            wrapper = GradSampleModuleFastGradientClipping(model, max_grad_norm=max_grad_norm)
            optimizer = DPOptimizerFastGradientClipping(
                torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1),
                noise_multiplier=0.0,
                max_grad_norm=max_grad_norm,
                expected_batch_size=N,
            )
            criterion = DPLossFastGradientClipping(wrapper, optimizer, _losses, backward=MODES[mode])
        wrapper.max_grad_norm = max_grad_norm
        criterion(wrapper(input_ids=tokens), tokens).backward()
        clipped, scale = oracle.clipped_sum(max_grad_norm), norms.max()
        differences = [(wrapper.per_sample_gradient_norms - norms).abs().max() / scale]
        for path, param in model.named_parameters():
            if param.requires_grad:
                differences.append((param.summed_grad - clipped[f"model.{path}"]).norm() / scale)
        worst = max(worst, torch.stack(differences).max().item())
        optimizer.zero_grad()
    return worst


def _row(kind: str, name: str, experts: str | None) -> Row:
    dtypes = [torch.float32] if experts == "grouped_mm" else [torch.float64, torch.float32]
    shown = experts or ""
    failures = []
    for dtype in dtypes:
        torch.set_default_dtype(dtype)
        try:
            model = built(kind, name, experts, dtype)
            break
        except NotBuiltError as error:
            failures.append(str(error))
    else:
        return Row(name, shown, "not built", failures[0])
    with InFloat32() as watch:
        copy.deepcopy(model)(input_ids=_tokens())
    whole = dtype == torch.float64 and not watch.found
    runs = [(mode, nullcontext(), TOLERANCE if whole else IN_FLOAT32) for mode in MODES]
    if dtype == torch.float64 and watch.found:
        runs += [(mode, InDouble(), TOLERANCE) for mode in MODES]
    worst = 0.0
    for mode, context, tolerance in runs:
        try:
            with context:
                found = difference(copy.deepcopy(model), mode)
        except (PrivacyNotImplementedError, PrivacyValueError, PrivacyRuntimeError, NotImplementedError) as error:
            return Row(name, shown, "refused", str(error))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            return Row(name, shown, "error", why + (", in double" if isinstance(context, InDouble) else ""))
        if not found <= tolerance:
            return Row(name, shown, "wrong", f"{mode}: off by {found:.1e}")
        worst = found if tolerance < IN_FLOAT32 and runs[0][2] == IN_FLOAT32 else max(worst, found)
    return Row(name, shown, "exact", f"{worst:.0e}" + (" in float32" if dtype == torch.float32 else ""))


def _child(kind: str, name: str, experts: str | None, answer: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        answer.send(_row(kind, name, experts))
    except Exception as error:
        answer.send(Row(name, experts or "", "error", f"{type(error).__name__}: {error}"))


def has_experts(name: str) -> bool:
    """Whether a class has experts of which transformers has several implementations."""
    model_class = getattr(transformers, name)
    try:
        return bool(model_class._can_set_experts_implementation())
    except Exception:
        return False


def _tasks(names: list[str]) -> Iterator[tuple[str, str, str | None]]:
    done = set()
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if name in done or (names and name not in names):
            continue
        done.add(name)
        for experts in IMPLEMENTATIONS if has_experts(name) else (None,):
            yield kind, name, experts


def _run(tasks: list[tuple[str, str, str | None]], jobs: int, timeout: float) -> Iterator[Row]:
    """Each in a process of its own, which may fail or hang."""
    context = multiprocessing.get_context("fork")
    running: list[tuple[Any, Connection, float, tuple[str, str, str | None]]] = []
    while tasks or running:
        while tasks and len(running) < jobs:
            task = tasks.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(*task, theirs), daemon=True)
            process.start()
            theirs.close()
            running.append((process, ours, time.monotonic(), task))
        time.sleep(0.05)
        for one in list(running):
            process, answer, start, (_, name, experts) = one
            row = None
            if answer.poll():
                try:
                    row = answer.recv()
                except EOFError:
                    row = Row(name, experts or "", "error", f"the process ended with {process.exitcode}")
            elif time.monotonic() - start > timeout:
                row = Row(name, experts or "", "error", f"took more than {timeout:.0f} s")
            if row is not None:
                process.kill()
                process.join()
                running.remove(one)
                yield row


def _shortened(text: str, length: int = 160) -> str:
    text = " ".join(text.split()).replace("|", "/")
    text = re.sub(r"/\S*/(\S+\.py)", r"\1", text).replace("<", "&lt;")
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " ..."


def table(rows: list[Row]) -> str:
    """The page that shows the rows."""
    counts = Counter(row.result for row in rows)
    summary = ", ".join(f"{counts[result]} {result}" for result in ("exact", "refused", "wrong", "error", "not built"))
    lines = [
        "# Language models of transformers",
        "",
        "Every class that `AutoModelForCausalLM` knows, tiny, with random weights and without dropout: the clipped",
        "gradients of two steps in both modes, compared with one sample at a time by plain autograd. Models are not patched.",
        f"Double precision, to {TOLERANCE:.0e} of the largest norm. Many models compute parts in float32 whatever their dtype:",
        f"as they are, those are exact to {IN_FLOAT32:.0e}, as is what runs in float32 only (torch's `grouped_mm`); with these",
        f"parts in double precision too they are to {TOLERANCE:.0e}, and that difference is shown. Mixtures of experts run under",
        "each implementation of transformers.",
        "",
        f"`tox -e sweep` writes this page; here it was torch {torch.__version__.partition('+')[0]}, transformers",
        f"{transformers.__version__}.",
        "",
        f"{summary}.",
        "",
        "| Class | Experts | Result | Largest difference, or why |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row.name} | {row.experts} | {row.result} | {_shortened(row.why)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes; all without one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one class")
    options = parser.parse_args()
    rows = []
    for row in _run(list(_tasks(options.names)), options.jobs, options.timeout):
        rows.append(row)
        print(row.name, row.experts, row.result, row.why if options.names else _shortened(row.why), flush=True)
    print(Counter(row.result for row in rows))
    if not options.names:
        TABLE.write_text(
            table(sorted(rows, key=lambda row: (row.name.lower(), IMPLEMENTATIONS.index(row.experts or "eager"))))
        )


if __name__ == "__main__":
    main()
