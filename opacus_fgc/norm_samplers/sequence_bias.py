"""Opacus' ``SequenceBias``, which `opacus.layers.DPMultiheadAttention` uses for ``add_bias_kv``."""

from __future__ import annotations

from opacus.layers.dp_multihead_attention import SequenceBias
from torch import Tensor

from opacus_fgc.norm_samplers.registry import Forms, register_norm_sampler
from opacus_fgc.per_sample import Dense


@register_norm_sampler(SequenceBias)
def sequence_bias(layer: SequenceBias, activations: list[Tensor], backprops: Tensor) -> Forms:
    """The bias is the last element of every sequence."""
    return {layer.bias: Dense(backprops[:, -1])}
