"""Products with several matrices at once, whose rows are not counted by the first axis alone.

In ``grouped_mm(rows, weight, offs=ends)`` rows are sorted by experts. Where they are dealt out to their samples, the offsets
hold no longer, so the tap keeps the expert of each row instead. In ``bmm(rows, weight)`` the first axis counts matrices, and the
second rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opacus_fgc.per_sample import Outer, PerSampleGradient, Routed
from opacus_fgc.taps.graph import leaf_of_view
from opacus_fgc.taps.operation_samplers import Op, OpSampler
from opacus_fgc.taps.tap import Call


def experts_of_rows(rows: Tensor, weight: Tensor, offs: Tensor | None = None, **options: Any) -> Tensor | None:
    """The expert of each row, shape ``(rows,)``; None if it is another product. Past the last offset there is none.

    Args:
        rows: shape ``(rows, d)``.
        weight: shape ``(experts, d, p)``.
        offs: where the rows of each expert end.
        options: further ones.
    """
    if offs is None or rows.dim() != 2 or weight.dim() != 3 or options.get("bias") is not None:
        return None
    return torch.searchsorted(offs, torch.arange(len(rows), device=offs.device, dtype=offs.dtype), right=True)


def _by_expert(op: Op, call: Call, backprops: Tensor) -> dict[Tensor, PerSampleGradient]:
    (weight,) = op.shared.values()
    rows, experts = call.activations
    # What a kernel leaves in rows of no expert may be anything.
    nobodys = (experts >= len(weight)).unsqueeze(1)
    left, right = rows.to(backprops.dtype).conj().masked_fill(nobodys, 0), backprops.masked_fill(nobodys, 0)
    index = experts.clamp(max=len(weight) - 1).unsqueeze(1)
    left, right = left.unsqueeze(1), right.unsqueeze(1)
    leaf, swapped = leaf_of_view(weight) or (weight, False)
    if leaf.shape != (weight.mT if swapped else weight).shape:
        leaf, swapped = weight, False
    return {leaf: Routed(index, *((right, left) if swapped else (left, right)), leaf.shape)}


BY_EXPERT = OpSampler(_by_expert, "rows by expert")
"""For `grouped_mm`."""


def _by_matrix(op: Op, call: Call, backprops: Tensor) -> dict[Tensor, PerSampleGradient]:
    (weight,) = op.shared.values()
    left, right = (side.unsqueeze(2) for side in (call.activations[0].to(backprops.dtype).conj(), backprops))
    leaf, swapped = leaf_of_view(weight) or (weight, False)
    return {leaf: Outer(*((right, left) if swapped else (left, right)), leaf.shape)}


BY_MATRIX = OpSampler(_by_matrix, "matrices")
"""For `bmm`, with the rows of its input and output first, shape ``(rows, matrices, *)``."""
