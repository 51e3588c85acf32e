"""Tiny configurations: which fields of a configuration are to be other ones than it has."""

from __future__ import annotations

import re
from typing import Any

import transformers

VOCABULARY, WIDTH, HEADS = 61, 32, 4
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
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "text_vocab_size", "src_vocab_size", "tgt_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_topk", "mamba_d_head"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(
        ("sliding_window", "attention_window_size", "attention_window", "chunk_size", "mamba_chunk_size"), 4
    ),
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

LISTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("depths", "depth", "stage_num_blocks", "num_block_repeats"), (1,)),
    **dict.fromkeys(("num_heads", "num_attention_heads"), (2,)),
    **dict.fromkeys(("hidden_sizes", "embed_dims", "embed_dim"), (32, 64)),
    **dict.fromkeys(("conv_dim", "tdnn_dim"), (16,)),
    "attention_window": (4,),
}
"""What fields that are lists are to begin with; the last is repeated."""

BY_TYPE: dict[str, dict[str, Any]] = {
    "bit": {"num_groups": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "cvt": {"depth": [1, 2, 3], "drop_path_rate": [0.0, 0.0, 0.0]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8},
    "deberta-v2": {
        **{"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4, "share_att_key": True},
        **{"max_relative_positions": 8, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    },
    "dots3_note": {"per_layer_config": {}},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "esm": {"vocab_size": VOCABULARY},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 8},
    "fun_asr_nano": {
        "adaptor_config": {
            **{"hidden_size": WIDTH, "intermediate_size": 8, "num_attention_heads": HEADS},
            "projector_hidden_size": WIDTH,
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "hgnet_v2": {
        **{"stage_in_channels": [48, 32, 32, 32], "stage_out_channels": [32] * 4, "stage_mid_channels": [16] * 4},
        **{"hidden_sizes": [32] * 4},
    },
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "luke": {"entity_vocab_size": 50, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8},
    "mobilevitv2": {"patch_size": 2},
    "nemotron": {"num_key_value_heads": 2},
    "perceiver": {
        **{"num_latents": 8, "num_self_attends_per_block": 1, "num_self_attention_heads": 2},
        **{"num_cross_attention_heads": 1, "image_size": 8},
    },
    "reformer": {
        **{"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (2, 4), "hash_seed": 0, "num_buckets": 2},
        **{"lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4},
    },
    "roc_bert": {"shape_vocab_size": 50, "pronunciation_vocab_size": 50},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "swinv2": {"image_size": 64},
    "textnet": {"hidden_sizes": [32] * 5, "stem_out_channels": 32},
    "voxtral": {"audio_token_id": 2},
    "wav2vec2-bert": {"vocab_size": VOCABULARY},
    "wav2vec2-conformer": {"vocab_size": VOCABULARY},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4},
        **{"attention_hidden_size": 64, "attention_head_dim": 16},
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the configurations of some types of model need besides."""

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


def tiny_fields(config: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that are to be other ones than it has."""
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        want = {**TINY, **wanted}.get(name)
        if isinstance(value, float) and re.search(
            r"drop(out|path|_path)?(_|$)|pdrop|jitter|layerdrop|_prob|vae_std", name
        ):
            fields[name] = 0.0
        elif isinstance(value, (list, tuple)) and name in LISTS:
            first = LISTS[name][: len(value)]
            fields[name] = [*first, *first[-1:] * (len(value) - len(first))]
        elif want is not None and (value is None or isinstance(value, (int, bool))) and (value or want):
            fields.update({} if value is None and name not in OF_NONE else {name: want})
        elif isinstance(value, transformers.PreTrainedConfig):
            fields[name] = {**tiny_fields(value, wanted), "model_type": value.model_type}
    return fields
