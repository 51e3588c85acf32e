"""The backward certificate: each row that a tap sees belongs to the sample that it is taken for, and to no other."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opacus_fgc.certificates.sketch import REPEATS, differ, owners, raise_on_all_ranks, rounded, sketch
from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyValueError

EXPONENTS = tuple(exponent for exponent in range(-12, 13) if exponent)
"""Of the powers of two that losses are weighted with."""

FEW_EXPONENTS = (1, 2, 3)
"""The same for float16, most of whose range backprops need for themselves."""


# Backward


class Output(NamedTuple):
    """One output of a tapped call."""

    call: Any
    place: int


class Backprops:
    """What the taps of a step were shown in one backward pass, as sketches, in the order in which backward came to them.

    Attributes:
        sketches: of the backprops of each output.
        half: whether there is float16 among them, whose range is too small for rounding to be that of all numbers.
    """

    def __init__(self) -> None:
        self.sketches: dict[Output, Tensor] = {}
        self.half = False

    def see(self, call: Any, backprops: Sequence[Tensor]) -> None:
        """Notes the backprops of the outputs of one call."""
        self.half |= call.autocast == (True, torch.float16)
        self.half |= any(backprop.dtype is torch.float16 for backprop in backprops)
        for place, backprop in enumerate(backprops):
            if backprop.dim() > call.batch_axis:
                self.sketches[Output(call.key, place)] = sketch(backprop, call.batch_axis)


def weights(size: int, draws: int, generator: random.Random, exponents: Sequence[int] = EXPONENTS) -> list[Tensor]:
    """Powers of two, one for each sample, float64 of shape ``(N,)`` each; so many draws of them.

    Several draws are digits: as long as they can, they give no two samples the same ones.
    """
    base = len(exponents)
    # Distinct numbers, whose digits are the exponents.
    numbers = generator.sample(range(base**draws), min(size, base**draws))
    numbers += [generator.randrange(base**draws) for _ in range(size - len(numbers))]
    digits = [[exponents[number // base**draw % base] for number in numbers] for draw in range(draws)]
    return [
        torch.tensor([2.0**exponent for exponent in of_draw], dtype=torch.float64, device="cpu") for of_draw in digits
    ]


def draws_that_tell(size: int) -> int:
    """How many draws of weights tell all samples apart."""
    return max(1, math.ceil(math.log(max(size, 2), len(EXPONENTS))))


Pass = Callable[[Tensor], Backprops]
"""A backward pass to the taps under loss weights, shape ``(N,)``."""


def check_owners(
    size: int,
    draw: Callable[[Sequence[int]], list[Tensor]],
    run: Pass,
    plain: Backprops | None,
    describe: Callable[[Any], str],
    on_all_ranks: Callable[[bool], bool],
) -> None:
    """Proves that each row that a tap sees belongs to the sample that it is taken for, and to no other.

    Args:
        size: number of samples.
        draw: gives weights with some exponents; see `weights`.
        run: runs a backward pass.
        plain: what came of one under ones, if there was one.
        describe: what to call a call's layer in errors.
        on_all_ranks: whether something holds on all ranks that have to run as many passes as each other.

    Raises:
        NotImplementedError: if a row belongs to another sample, to several, or has a gradient that is not linear in the loss.
        ValueError: if there are more losses than rows.
    """
    ones = torch.ones(size, dtype=torch.float64, device="cpu")
    plain = run(ones) if plain is None else plain
    draws = draw(FEW_EXPONENTS if plain.half else EXPONENTS)
    weighted = [run(weights) for weights in draws]
    suspects = _wrong_rows(size, draws, plain, weighted, None)
    if on_all_ranks(not suspects):
        return
    # Kernels that are not deterministic, and numbers too small to be rounded as others are, do not tell.
    noise = _noise(plain, [run(ones) for _ in range(REPEATS)])
    noises = [_noise(one, [run(weights) for _ in range(REPEATS)]) for one, weights in zip(weighted, draws, strict=True)]
    suspects = _wrong_rows(size, draws, plain, weighted, (noise, noises))
    several = run(8 * ones)
    error = _owner_error(size, draws, plain, weighted, several, noise, suspects[0], describe) if suspects else None
    raise_on_all_ranks(error, on_all_ranks)


def _owner_error(
    size: int,
    draws: list[Tensor],
    plain: Backprops,
    weighted: list[Backprops],
    several: Backprops,
    noise: _Noise,
    suspect: tuple[Output, list[int]],
    describe: Callable[[Any], str],
) -> Exception:
    key, rows = suspect
    layer, of_ones = describe(key.call), plain.sketches[key]
    of_eights = several.sketches.get(key, of_ones)
    if _is_beyond(of_eights - 8 * of_ones, 8 * of_ones, plain.half, 16 * noise.allowed(key, of_ones)).any():
        return PrivacyNotImplementedError(
            f"{layer} gets a gradient that is not linear in the loss: for 8 times the loss it is not 8 times as large. "
            "Between this layer and the loss there is a gradient hook, or an autograd.Function with a backward of its "
            "own, that clamps, normalizes or the like, so that clipping a sample's loss does not clip its gradient. "
            "Remove it: each sample's gradient is clipped as a whole anyway"
        )
    belongs = _owners_found(draws, of_ones, [one.sketches.get(key, of_ones) for one in weighted])
    if belongs is not None and len(belongs) == size:
        return PrivacyNotImplementedError(
            f"{layer}: its rows are not samples, in the order of their losses: row {rows[0]} belongs to the loss of "
            f"sample {belongs[rows[0]]}. Something selects, regroups, sorts or shifts samples before or after this "
            f"layer. Keep rows and losses in the order of the batch, one row a sample. {PADDING}"
        )
    if belongs is not None:
        return PrivacyNotImplementedError(
            f"{layer}: its rows are not samples: it was called on {len(belongs)} rows for {size} samples, and they do not "
            f"follow each other sample by sample, as many for each: row {rows[0]} belongs to sample {belongs[rows[0]]}. {PADDING}"
        )
    if size > len(of_ones) and size % len(of_ones) == 0:
        return PrivacyValueError(
            f"{layer}: its rows are not samples: it was called on {len(of_ones)} rows, and there are {size} losses. "
            f"{TOKENS}. If the batch lies on another axis there, let it lie on the first (see batch_first). {PADDING}"
        )
    if len(of_ones) % size:
        return PrivacyNotImplementedError(
            f"{layer}: its rows are not samples: it was called on {len(of_ones)} rows for {size} samples, and several of "
            "these have a part in one row. If the batch lies on another axis there, let it lie on the first (see batch_first). "
            f"{PADDING}"
        )
    return PrivacyNotImplementedError(
        f"{layer} gets a gradient of several samples in one row (row {rows[0]}), so something mixes samples: the "
        "model, the criterion, or what is between this layer and the loss (a batch norm, a mean, a similarity or a "
        "shift over the batch; negatives from the batch; a term of the whole batch in each loss); or its rows are not "
        "samples (check batch_first). Then no sample has a gradient of its own. Let each sample's loss depend on that "
        "sample alone"
    )


PADDING = (
    "Where samples have different numbers of rows (layer(x[mask]), tokens that are routed, graphs in one batch), pad "
    "them to the same number and use a mask. Where a batch is torch.cat of several views, call the layer once for each "
    "view, or put the views on an axis of their own in the model's forward, (N, K, ...)"
)
"""What to do about layers whose rows are not the samples, or the same number of rows for each."""

TOKENS = "If the losses are those of flattened tokens, call the criterion with shape=(batch size, tokens, ...)"
"""What to do about more losses than rows."""


_SMALLEST = 2.0**-100
"""Sums of sizes below which rounding is not that of larger numbers; they are nothing beside any clipping norm."""


def _is_beyond(difference: Tensor, scale: Tensor, half: bool, allowed: Tensor) -> Tensor:
    """In which rows a difference is more than what is allowed, and than rounding where numbers are too small, or float16."""
    size = scale[:, 2:].nan_to_num()
    # Much of what float16 has to hold lies below its smallest normal number.
    tolerance = (size * 2.0**-3).clamp(min=2.0**-10) if half else torch.zeros_like(size)
    difference = difference.nan_to_num().abs()
    return (difference > tolerance + _SMALLEST).any(1) & (difference > allowed).any(1)


def _wrong_rows(
    size: int,
    draws: list[Tensor],
    plain: Backprops,
    weighted: list[Backprops],
    noises: tuple[_Noise, list[_Noise]] | None,
) -> list[tuple[Output, list[int]]]:
    """The outputs of which some rows are not what they have to be, and these rows."""
    result = []
    for key, of_ones in plain.sketches.items():
        expected = owners(len(of_ones), size, key.call.samples)
        if expected is None:
            if len(of_ones) and bool((of_ones[:, 2] != 0).any()):
                result.append((key, list(range(len(of_ones)))))
            continue
        bad = torch.zeros(len(of_ones), dtype=torch.bool, device="cpu")
        for place, (draw, one) in enumerate(zip(draws, weighted, strict=True)):
            factor = draw[expected].to(of_ones)[:, None]
            wanted, got = of_ones * factor, one.sketches.get(key, torch.zeros_like(of_ones))
            wrong = differ(wanted, got)
            if noises is not None:
                allowed = noises[0].allowed(key, of_ones) * factor + noises[1][place].allowed(key, got)
                wrong &= _is_beyond(got - wanted, wanted, plain.half, allowed)
            bad |= wrong.cpu()
        if bad.any():
            result.append((key, bad.nonzero().flatten().tolist()))
    return result


class _Noise(NamedTuple):
    """By how much passes that should be the same differ, a number for each of the columns."""

    of: dict[Output, Tensor]
    deterministic: bool

    def allowed(self, key: Output, rows: Tensor) -> Tensor:
        """By how much sketches of rows may differ from what they should be; shape ``(rows, 1)`` or ``(rows, 3)``."""
        if self.deterministic:
            return torch.zeros_like(rows[:, 2:])
        return 8 * self.of.get(key, 0) + rounded(rows)


def _noise(first: Backprops, others: Sequence[Backprops]) -> _Noise:
    of = {
        key: torch.stack(
            [(value - other.sketches.get(key, value)).nan_to_num().abs().amax(0, keepdim=True) for other in others]
        ).amax(0)
        for key, value in first.sketches.items()
        if len(value)
    }
    return _Noise(of, not any(bool(value.any()) for value in of.values()))


def _owners_found(draws: list[Tensor], plain: Tensor, weighted: list[Tensor]) -> list[int] | None:
    """The sample that each row belongs to by its ratios; None if a row has none. Rows of zeros are taken for sample 0's."""
    found = torch.ones(len(plain), len(draws[0]), dtype=torch.bool, device=plain.device)
    for draw, one in zip(draws, weighted, strict=True):
        scaled = plain[:, None] * draw.to(plain)[:, None]
        found &= ((scaled == one[:, None]) | (scaled.isnan() & one[:, None].isnan())).all(2)
    return found.int().argmax(1).tolist() if found.any(1).all() else None
