"""Which form the per-sample gradients of each type of layer have: one function a layer, one table of all."""

from __future__ import annotations

from opacus_fgc.norm_samplers import activation, conv, embedding, linear, normalization, recurrent, sequence_bias
from opacus_fgc.norm_samplers.registry import NORM_SAMPLERS, Arranged, NormSampler, register_norm_sampler

__all__ = [
    "NORM_SAMPLERS",
    "Arranged",
    "NormSampler",
    "activation",
    "conv",
    "embedding",
    "linear",
    "normalization",
    "recurrent",
    "register_norm_sampler",
    "sequence_bias",
]
