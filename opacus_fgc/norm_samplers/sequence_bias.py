"""Opacus' ``SequenceBias``, which `opacus.layers.DPMultiheadAttention` uses for ``add_bias_kv``."""

from __future__ import annotations

from opacus.layers.dp_multihead_attention import SequenceBias
from torch import Tensor, nn

from opacus_fgc.norm_samplers.registry import register_norm_sampler
from opacus_fgc.per_sample import Dense, PerSampleGradient


@register_norm_sampler(SequenceBias)
def sequence_bias(
    layer: SequenceBias, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, PerSampleGradient]:
    """The bias is the last element of every sequence."""
    return {layer.bias: Dense(backprops[:, -1])}
