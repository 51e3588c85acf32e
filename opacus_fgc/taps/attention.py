"""What `torch.nn.functional.multi_head_attention_forward` computes, of operations that can be tapped one by one.

Torch's own has its parameters used on tokens in another order than the batch's, out of sight of anything that watches operations.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: None = None,
    static_v: None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762).

    Args:
        query: shape ``(L, N, E)``.
        key: shape ``(S, N, E_k)``.
        value: shape ``(S, N, E_v)``.
        embed_dim_to_check: ``E``.
        num_heads: of which each has ``E / num_heads`` features.
        in_proj_weight: those of query, key and value in one, shape ``(3 E, E)``; unless ``use_separate_proj_weight``.
        in_proj_bias: shape ``(3 E,)``.
        bias_k: one more key for each sample, shape ``(1, 1, E)``.
        bias_v: one more value.
        add_zero_attn: whether one more key and value are 0.
        dropout_p: of the attention's weights.
        out_proj_weight: shape ``(E, E)``.
        out_proj_bias: shape ``(E,)``.
        training: whether there is dropout.
        key_padding_mask: keys not to be seen, shape ``(N, S)``; bool, or what is added to the scores.
        need_weights: whether to return the attention's weights.
        attn_mask: likewise, shape ``(L, S)`` or ``(N * num_heads, L, S)``.
        use_separate_proj_weight: whether the next three are used.
        q_proj_weight: shape ``(E, E)``.
        k_proj_weight: shape ``(E, E_k)``.
        v_proj_weight: shape ``(E, E_v)``.
        static_k: not supported.
        static_v: not supported.
        average_attn_weights: whether the returned weights are a mean over the heads.
        is_causal: says that ``attn_mask`` is causal; not needed.

    Returns:
        The output, shape ``(L, N, E)``; and the weights, shape ``(N, L, S)`` or ``(N, num_heads, L, S)``, or None.
    """
    same = query is key, key is value
    query = query.transpose(0, 1)
    key = query if same[0] else key.transpose(0, 1)
    value = key if same[1] else value.transpose(0, 1)
    if use_separate_proj_weight:
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q = F.linear(query, q_proj_weight, biases[0])  # type: ignore[arg-type]
        k = F.linear(key, k_proj_weight, biases[1])  # type: ignore[arg-type]
        v = F.linear(value, v_proj_weight, biases[2])  # type: ignore[arg-type]
    else:
        # Always by the whole weight, so that its gradient is a sum of outer products.
        projected = {id(x): F.linear(x, in_proj_weight, in_proj_bias) for x in (query, key, value)}  # type: ignore[arg-type]
        q, k, v = (projected[id(x)].chunk(3, -1)[part] for part, x in enumerate((query, key, value)))
    batch_size = len(q)
    extra = 0
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(batch_size, -1, -1)], 1)
        v = torch.cat([v, bias_v.expand(batch_size, -1, -1)], 1)
        extra += 1
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        extra += 1
    q, k, v = (side.unflatten(2, (num_heads, -1)).transpose(1, 2) for side in (q, k, v))
    mask = _mask(attn_mask, key_padding_mask, batch_size, num_heads, extra, q.dtype)
    dropout = dropout_p if training else 0.0
    weights = None
    if need_weights:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
        mixed = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    output = F.linear(mixed.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    return output.transpose(0, 1), weights


def _mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batch_size: int,
    num_heads: int,
    extra: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """What is added to the scores, ``(N or 1, num_heads or 1, L or 1, S)``; nothing for the ``extra`` keys at the end."""
    total = None
    if attn_mask is not None:
        grouped = attn_mask if attn_mask.dim() == 2 else attn_mask.view(batch_size, num_heads, *attn_mask.shape[1:])
        total = _added(grouped, dtype)
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, dtype)[:, None, None]
        total = padding if total is None else total + padding
    return total if total is None or extra == 0 else F.pad(total, (0, extra))


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
