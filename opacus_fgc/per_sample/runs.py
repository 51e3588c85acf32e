"""The norms of sums of outer products over runs of positions, which are not as long as each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opacus_fgc import planner
from opacus_fgc.per_sample.precision import GRAM_TERMS, factor_norms, least_norm, product
from opacus_fgc.per_sample.squares import Squares

# From so many positions on, a run's Gram matrices are worth a form of its own, which computes half of them.
_LONG = 256


def norms_of_runs(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    is_by_gram: Callable[[int], bool],
    alone: Callable[[int, bool], Tensor],
) -> Tensor:
    """The norm of ``sum_t left_t (x) right_t`` of each run.

    Args:
        left: of each run the left factors, shape ``(T, p)``, float32 or wider; at least one run, T may be 0.
        right: likewise the right ones, ``(T, d)``.
        is_by_gram: whether Gram matrices are the cheapest method for so many positions.
        alone: computes the norm of the how many-th run by itself; from its gradient, if that is asked for.

    Returns:
        Norms, shape ``(runs,)``.
    """
    norms = torch.zeros(len(left), dtype=left[0].dtype.to_real(), device=left[0].device)
    together = []
    for place, rows in enumerate(left):
        if len(rows) >= _LONG or (len(rows) and not is_by_gram(len(rows))):
            norms[place] = alone(place, False)
        elif len(rows):
            together.append(place)
    for part in planner.slices(len(together), max((len(left[place]) for place in together), default=0) ** 2):
        places = together[part]

        def from_gradients(doubtful: Tensor, places: list[int] = places) -> Tensor:
            return torch.stack([alone(places[n], True) for n in doubtful.nonzero().flatten().tolist()])

        squares = _gram_inner([left[place] for place in places], [right[place] for place in places])
        norms[torch.tensor(places, device=norms.device)] = squares.norm(from_gradients)
    return norms


def _gram_inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Squares:
    """``sum_ts <left_t, left_s> <right_t, right_s>`` of each run. All Gram matrices of a side are in one piece of memory."""
    device, lengths = left[0].device, [len(rows) for rows in left]
    sizes = [length**2 for length in lengths]
    grams = [_grams(side, sizes) for side in (left, right)]
    counts = torch.tensor(lengths, device=device)
    run = torch.arange(len(counts), device=device).repeat_interleave(counts)
    place = torch.arange(len(run), device=device) - (counts.cumsum(0) - counts)[run]
    diagonal = (counts.square().cumsum(0) - counts.square())[run] + place * (counts[run] + 1)
    bounds = [least_norm(side[0].shape[1], grams[0].dtype) for side in (left, right)]
    short = [gram[diagonal].real < bound**2 for gram, bound in zip(grams, bounds, strict=True)]
    small = torch.zeros(len(counts), dtype=torch.bool, device=device).index_fill(0, run[short[0] | short[1]], True)
    products = grams[0].mul_(grams[1])
    total = torch.stack([part.sum() for part in products.split(sizes)]).real
    scale = torch.stack([part.sum() for part in products.abs().split(sizes)])

    def vanished() -> Tensor:
        norms = [factor_norms(torch.cat(list(side))) for side in (left, right)]
        lost = norms[0] * norms[1] * ((norms[0] < bounds[0]) | (norms[1] < bounds[1]))
        of_runs = torch.zeros(len(counts), dtype=lost.dtype, device=device).index_add(0, run, lost)
        return ~(of_runs <= torch.finfo(total.dtype).eps * total.clamp(min=0).sqrt())

    return Squares(total, scale, small, vanished)


def _grams(side: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    grams = side[0].new_empty(sum(sizes))
    for rows, gram in zip(side, grams.split(list(sizes)), strict=True):
        whole = gram.view(len(rows), len(rows))
        if rows.shape[1] > GRAM_TERMS:
            whole.copy_(product(rows, rows.mH, GRAM_TERMS))
        else:
            torch.mm(rows, rows.mH, out=whole)
    return grams
