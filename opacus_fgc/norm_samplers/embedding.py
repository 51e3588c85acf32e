"""Embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opacus_fgc.norm_samplers.registry import Forms, register_norm_sampler
from opacus_fgc.per_sample import Rows
from opacus_fgc.per_sample.precision import at_least_float32


def _refuse_mixing(layer: nn.Embedding | nn.EmbeddingBag) -> None:
    if layer.scale_grad_by_freq:
        raise NotImplementedError(
            "scale_grad_by_freq=True divides a sample's gradient by how often its tokens occur in the whole batch, so "
            "no sample has a gradient of its own; turn it off"
        )
    if layer.max_norm is not None:
        raise NotImplementedError(
            "max_norm renormalizes, during forward and without noise, those rows of the weight that occur in the "
            "batch, which tells who is in it; set it to None"
        )


@register_norm_sampler(nn.Embedding, by_row=True)
def embedding(layer: nn.Embedding, activations: list[Tensor], backprops: Tensor) -> Forms:
    """Each token adds its backprop to its row; the padding row has no gradient."""
    _refuse_mixing(layer)
    index = activations[0].reshape(len(backprops), activations[0][:1].numel())
    values = backprops.reshape(*index.shape, layer.embedding_dim)
    if layer.padding_idx is not None:
        values = values.masked_fill((index == layer.padding_idx).unsqueeze(2), 0)
    return {layer.weight: Rows(index, values, layer.weight.shape)}


def are_joined_bags(layer: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether a layer is called on bags that lie one after another, with offsets that say where each begins.

    Args:
        layer: any layer.
        tensors: what it is called on.
    """
    return isinstance(layer, nn.EmbeddingBag) and len(tensors) > 1 and tensors[0].dim() == 1


def _bags(layer: nn.EmbeddingBag, activations: list[Tensor], bags: int) -> tuple[Tensor, Tensor]:
    """The tokens of each bag and their weights, both ``(bags, S)``; short bags are filled up with weight 0."""
    index, *rest = activations
    weights = next((tensor for tensor in rest if tensor.is_floating_point()), torch.ones_like(index, dtype=torch.float))
    if index.dim() == 2:
        return index, weights
    starts = next(tensor for tensor in rest if not tensor.is_floating_point())[:bags]
    ends = torch.cat([starts[1:], starts.new_tensor([len(index)])])
    bag = torch.repeat_interleave(ends - starts)
    position = torch.arange(len(index), device=index.device) - starts[bag]
    size = int((ends - starts).max()) if bags else 0
    padded = index.new_zeros(bags, size), weights.new_zeros(bags, size)
    padded[0][bag, position] = index
    padded[1][bag, position] = weights
    return padded


@register_norm_sampler(nn.EmbeddingBag)
def embedding_bag(layer: nn.EmbeddingBag, activations: list[Tensor], backprops: Tensor) -> Forms:
    """Each token adds its bag's backprop, weighted as in the bag, to its row; one bag a sample."""
    _refuse_mixing(layer)
    if layer.mode == "max":
        raise NotImplementedError("an EmbeddingBag in mode 'max' is not supported; use 'sum' or 'mean'")
    index, weights = _bags(layer, activations, len(backprops))
    backprops = at_least_float32(backprops)  # since products of half precision would be rounded
    weights = weights.to(backprops.dtype)
    if layer.padding_idx is not None:
        weights = weights.masked_fill(index == layer.padding_idx, 0)
    if layer.mode == "mean":
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    return {layer.weight: Rows(index, weights.unsqueeze(2) * backprops.unsqueeze(1), layer.weight.shape)}
