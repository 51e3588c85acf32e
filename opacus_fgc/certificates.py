"""Certificates: proofs, from the definition, of whose each row is, and that no sample touches another's.

*Backward.* Under loss weights ``w``, one a sample, the backprops of a row of sample ``n`` are ``w[n]`` times what they are
under ones, and only then. Powers of two commute with rounding, so that this holds to the bit. It tells of the model, the
criterion and all that is between them. *Forward.* With some samples of a batch replaced, in the same shapes, modes and random
states, nothing that is computed for the others changes. That is what neighbouring data sets are.
"""

from __future__ import annotations

import functools
import math
import random
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyValueError
from opacus_fgc.model_state import ModelState
from opacus_fgc.per_sample.precision import full_precision
from opacus_fgc.samples import Replacement

REPEATS = 8
"""How often a pass is run again to see whether it is deterministic."""

ROUNDINGS = 64
"""How many roundings of a sum of sizes may differ, where sums are added up in another order each time."""

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
"""What says nothing about a model whose forward fails with it."""

EXPONENTS = tuple(exponent for exponent in range(-12, 13) if exponent)
"""Of the powers of two that losses are weighted with."""

FEW_EXPONENTS = (1, 2, 3)
"""The same for float16, most of whose range backprops need for themselves."""

# How many elements are worked on at once: on a CPU as many as its caches hold.
_CHUNK, _LARGE_CHUNK = 2**18, 2**24


def sketch(value: Tensor, axis: int) -> Tensor:
    """Three numbers that tell each row of a tensor from others, shape ``(rows, 3)``: two weighted sums, and one of sizes.

    They are of the tensor's dtype, float32 at least. They are multiplied by a power of two, exactly, if the row is. The same
    rows of tensors of the same shape have the same ones.
    """
    if isinstance(value, DTensor):
        value = value.full_tensor()
    rows = value.detach().movedim(axis, 0)
    rows = torch.view_as_real(rows.resolve_conj()) if rows.is_complex() else rows
    rows = rows.reshape(len(rows), math.prod(rows.shape[1:]))
    if rows.dtype in (torch.float32, torch.float64):
        dtype = rows.dtype
    else:
        # Whole numbers may need float64.
        dtype = torch.float32 if rows.is_floating_point() or rows.device.type == "mps" else torch.float64
    at_once = _CHUNK if rows.device.type == "cpu" else _LARGE_CHUNK
    with full_precision(rows.device):
        weights = _weights(rows.shape[1], dtype, rows.device)
        return torch.cat(
            [_sums(part.to(dtype), weights) for part in rows.split(max(1, at_once // max(1, rows.shape[1])))]
        )


def _sums(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.cat([rows @ weights.mT, rows.abs().sum(1, keepdim=True)], 1)


@functools.lru_cache(maxsize=16)
def _weights(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Two weights for each place, shape ``(2, size)``: multiples of irrational numbers, which are spread evenly."""
    places = torch.arange(1, size + 1, dtype=torch.float64, device="cpu")
    weights = [(places * ratio).frac() + 0.5 for ratio in ((math.sqrt(5) - 1) / 2, math.sqrt(2) - 1)]
    # In this order a product with rows takes a fifth of the time.
    return torch.stack(weights).to(device, dtype)


def forget_weights() -> None:
    """Gives up what sketches keep from one to the next, which may be as large as a row."""
    _weights.cache_clear()


def _differ(first: Tensor, second: Tensor) -> Tensor:
    """In which rows two sketches differ; shape ``(rows,)``."""
    return ~((first == second) | (first.isnan() & second.isnan())).all(1)


def owners(rows: int, size: int, samples: Tensor | None = None) -> Tensor | None:
    """Which sample each row is taken to belong to; None if there is no saying.

    Args:
        rows: how many rows there are.
        size: how many samples.
        samples: the samples of the first rows, where they are known.
    """
    if samples is not None:
        return samples[:rows].cpu()
    if size == 0 or rows % size:
        return None
    return torch.arange(size, device="cpu").repeat_interleave(rows // size)


# When


@dataclass
class Schedule:
    """When certificates are made: at first, whenever something is new, and again at passes that thin out.

    Args:
        how: "always": in each backward pass; "thinning": whenever something structural is new, and again when there have been
            four times as many passes as at the last time (at first twice as many); "never".

    Attributes:
        passes: how many backward passes there were.
    """

    how: str = "thinning"
    passes: int = 0
    _next: int = 1
    _largest: int = 1
    _certified: set[Hashable] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.how not in ("always", "thinning", "never"):
            raise ValueError(f"certify is {self.how!r}; it is 'always', 'thinning' or 'never'")
        if self.how == "never":
            warnings.warn(
                "certify='never': nothing proves that each row that a layer works on belongs to one sample, nor that "
                "what is computed for a sample depends on that sample alone. If the model or the criterion mixes "
                "samples, one of them can move the clipped sum by any multiple of max_grad_norm, and nobody will notice",
                stacklevel=4,
            )

    def is_due(self, size: int, structure: Hashable) -> bool:
        """Whether a pass, which is counted by this, needs certificates.

        Args:
            size: number of its samples.
            structure: what is equal for passes that the same certificate is for.
        """
        if self.how == "never" or size == 0:
            return False
        self.passes += 1
        new = size > self._largest or structure not in self._certified
        return self.how == "always" or new or self.passes >= self._next

    def is_due_at(self, count: int) -> bool:
        """Whether what is counted by ``count``, and for which nothing can be new, is due."""
        return self.how == "always" or (self.how == "thinning" and count & (count - 1) == 0)

    @property
    def is_expected(self) -> bool:
        """Whether the next pass is due whatever it is like."""
        return self.how != "never" and (self.how == "always" or self.passes + 1 >= self._next)

    def is_new(self, structure: Hashable) -> bool:
        """Whether there is no certificate for such passes yet."""
        return structure not in self._certified

    def made(self, size: int, structure: Hashable) -> None:
        """Notes that certificates were made."""
        self._next = (2 if self.passes < 4 else 4) * self.passes
        if size > 1:
            # A batch of one says nothing of how samples touch each other.
            self._largest = max(self._largest, size)
            self._certified.add(structure)


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


def raise_on_all_ranks(error: Exception | None, on_all_ranks: Callable[[bool], bool]) -> None:
    """Raises an error, or another one if there is one on another rank."""
    if on_all_ranks(error is None):
        return
    raise error or PrivacyNotImplementedError("another rank refuses the model; see its error")


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
            wrong = _differ(wanted, got)
            if noises is not None:
                allowed = noises[0].allowed(key, of_ones) * factor + noises[1][place].allowed(key, got)
                wrong &= _is_beyond(got - wanted, wanted, plain.half, allowed)
            bad |= wrong.cpu()
        if bad.any():
            result.append((key, bad.nonzero().flatten().tolist()))
    return result


def _rounded(sketches: Tensor) -> Tensor:
    return ROUNDINGS * torch.finfo(sketches.dtype).eps * sketches[:, 2:].nan_to_num()


class _Noise(NamedTuple):
    """By how much passes that should be the same differ, a number for each of the columns."""

    of: dict[Output, Tensor]
    deterministic: bool

    def allowed(self, key: Output, rows: Tensor) -> Tensor:
        """By how much sketches of rows may differ from what they should be; shape ``(rows, 1)`` or ``(rows, 3)``."""
        if self.deterministic:
            return torch.zeros_like(rows[:, 2:])
        return 8 * self.of.get(key, 0) + _rounded(rows)


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


# Forward


class Seen(NamedTuple):
    """What is kept of a tensor that a forward came by.

    Attributes:
        key: the layer that has it; None for what the model returned.
        name: what to call it.
        shape: of the tensor.
        sketches: its rows along each axis that may count samples, with their number.
        samples: the samples of its rows, where they are known.
        eps: of its dtype, or of that which autocast has it computed in.
    """

    key: Any
    name: str
    shape: torch.Size
    sketches: list[Tensor]
    samples: Tensor | None = None
    eps: float = 0.0


class Observations:
    """What a forward comes by, in order, as sketches instead of the tensors themselves.

    Args:
        size: number of samples.

    Attributes:
        seen: what it came by so far.
    """

    def __init__(self, size: int) -> None:
        self.seen: list[Seen] = []
        self._size = size
        self._last: Callable[[], Tensor | None] = lambda: None

    def of(self, outputs: Sequence[Tensor], model: nn.Module) -> Forward:
        """What the forward came by in all.

        Args:
            outputs: what the model returned.
            model: the model, whose state is taken.
        """
        for tensor in outputs:
            axes = [axis for axis in range(tensor.dim()) if tensor.shape[axis] == self._size]
            self.look_at(None, "what the model returns", tensor, axes)
        return Forward(self.seen, ModelState(model), self._size)

    def look_at(self, key: Any, name: str, value: Tensor, axes: Sequence[int], samples: Tensor | None = None) -> None:
        """Keeps of a tensor what `check_independence` compares.

        Args:
            key: the layer that has it; None for what the model returned.
            name: what to call it.
            value: the tensor.
            axes: the axes that may count samples.
            samples: the samples of its rows, where they are known.
        """
        if value is self._last():
            # Layers that are called on one tensor, as those of queries, keys and values are, come after each other.
            self.seen.append(self.seen[-1]._replace(key=key, name=name))
            return
        self._last = weakref.ref(value)
        axes = [axis for axis in axes if axis < value.dim()]
        device = value.device.type
        dtypes = [value.dtype, *([torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else [])]
        eps = max(torch.finfo(dtype).eps if dtype.is_floating_point else 0.0 for dtype in dtypes)
        self.seen.append(Seen(key, name, value.shape, [sketch(value, axis) for axis in axes], samples, eps))


class Forward(NamedTuple):
    """What a forward came by, and the state that it left.

    Attributes:
        seen: what it came by.
        after: the state.
        size: the number of samples that the axes of what the model returned were chosen by.
    """

    seen: list[Seen]
    after: ModelState
    size: int


Run = Callable[[Replacement | None, ModelState | None], Forward]
"""Runs a forward again, on the batch as it is or with samples replaced, from the state that there is or from another."""


def replacements(
    size: int, axis: int, shared: set[str], generator: random.Random, enlarge: bool, signs: Sequence[int]
) -> list[list[Replacement]]:
    """Half of the samples replaced by others: for each sign what is tried in turn, until a forward can be compared.

    Where features are enlarged they are the same samples, by the same ones, for each sign: a statistic of the batch that is large
    for one is small for the other, and one of them is on the other side of whatever number it may be compared with. Where they
    are not, the other half is replaced for the other sign, so that the largest of the batch is not the same for one of them.

    Args:
        size: number of samples.
        axis: the axis that counts them.
        shared: paths of inputs that are known to have no samples in them.
        generator: chooses the samples.
        enlarge: whether features may be enlarged, so that what is an index then fails with an error, and does no more.
        signs: of the enlarged features; or which half.
    """
    half = sorted(generator.sample(range(size), max(1, size // 2))) if size else []
    other = [place for place in range(size) if place not in half] or half
    # One and the same in the place of all, so that what is computed over the batch changes.
    in_half, in_other = (generator.choice(places or [0]) for places in (half, other))

    def of_sign(sign: int) -> list[Replacement]:
        first = enlarge or sign > 0
        chosen, source = (half, in_other) if first else (other, in_half)
        larger = ((sign * 1024.0, True), (sign * 1024.0, False)) if enlarge else ()
        return [
            Replacement(size, chosen, [source] * len(chosen), axis, factor, every, vectors, shared)
            for factor, every in (*larger, (1.0, False))
            for vectors in (True, False)
        ]

    return [of_sign(sign) for sign in signs]


def check_independence(
    name: str,
    tries: Sequence[Replacement],
    run: Run,
    certified: Callable[[Any], bool],
    on_all_ranks: Callable[[bool], bool],
    recorded: Forward | None = None,
) -> None:
    """Proves that nothing that a forward computes for a sample depends on another one.

    Args:
        name: what to call the model in errors.
        tries: replacements of samples; the first one with which the forward does the same on tensors of the same shapes counts.
        run: runs the forward.
        certified: of which layers the rows count: those that the loss depends on.
        on_all_ranks: whether something holds on all ranks that have to run as many forwards as each other.
        recorded: what the user's own forward came by. Where that shows no difference, one forward is enough.

    Raises:
        NotImplementedError: if something of a sample depends on another, or it cannot be told.
    """
    if on_all_ranks(recorded is not None):
        assert recorded is not None
        if _agree(recorded, tries[0], run, certified, on_all_ranks):
            return
    first, why = _tried(run, None)
    raise_on_all_ranks(
        PrivacyNotImplementedError(
            f"{name}: whether samples touch each other cannot be told: the forward cannot be run again: {why}"
        )
        if first is None
        else None,
        on_all_ranks,
    )
    assert first is not None
    for replacement in tries:
        other, failed = _tried(run, replacement)
        why = failed if other is None else _incomparable(first, other, replacement)
        if on_all_ranks(not why):
            assert other is not None
            if on_all_ranks(not _rounds_otherwise(first, other, replacement, certified)):
                break
            continue
        # Another number of rows may come of lengths among the inputs, and failures of values that have no meaning.
        if not on_all_ranks(bool(failed) or replacement.vectors):
            other = None
            break
    if other is None or why:
        raise PrivacyNotImplementedError(
            f"{name}: whether samples touch each other cannot be told: {why or 'it cannot be told on another rank'}. "
            "Nothing may depend on the other samples of a batch: not which layers are called, nor on what shapes. "
            "Pass the batch in tensors (in tuples, lists, dicts, dataclasses) that have one row a sample"
        )
    suspects = _changed(first, other, replacement, certified, None)
    if not on_all_ranks(not suspects):
        # Kernels that are not deterministic tell by how much.
        again = [run(None, None) for _ in range(REPEATS)]
        if all(_structure(one) == _structure(first) for one in again):
            suspects = _changed(first, other, replacement, certified, _differences(first, again))
        raise_on_all_ranks(_mixing_error(suspects[0], replacement) if suspects else None, on_all_ranks)
    _compare_states(name, first, other, run, certified, on_all_ranks)
    if not on_all_ranks(not replacement.masks):
        _compare_masks(first, replacement, run, certified, on_all_ranks)


def _agree(
    recorded: Forward,
    replacement: Replacement,
    run: Run,
    certified: Callable[[Any], bool],
    on_all_ranks: Callable[[bool], bool],
) -> bool:
    """Whether a forward with samples replaced does what the user's own did, to the bit; where not, why is to be seen."""
    other, _ = _tried(run, replacement)
    same = (
        other is not None
        and not _incomparable(recorded, other, replacement)
        and not _changed(recorded, other, replacement, certified, None)
        and not recorded.after.differs_from(other.after)
        and not replacement.masks
    )
    return on_all_ranks(same)


def _compare_masks(
    first: Forward,
    replacement: Replacement,
    run: Run,
    certified: Callable[[Any], bool],
    on_all_ranks: Callable[[bool], bool],
) -> None:
    """The same with other masks. Models ask whether a mask masks anything, and run other kernels then, that round otherwise."""
    shorter = replace(replacement, shorten=True)
    other, _ = _tried(run, shorter)
    error = None
    if other is not None and _structure(first) == _structure(other):
        suspects = _changed(first, other, shorter, certified, _rounding(first))
        error = _mixing_error(suspects[0], shorter) if suspects else None
    raise_on_all_ranks(error, on_all_ranks)


def _rounds_otherwise(
    first: Forward, other: Forward, replacement: Replacement, certified: Callable[[Any], bool]
) -> bool:
    """Whether other lengths of samples have rows computed in other groups, which round otherwise; what is more is mixing."""
    if not replacement.numbers or not _changed(first, other, replacement, certified, None):
        return False
    return not _changed(first, other, replacement, certified, _rounding(first))


def _rounding(forward: Forward) -> list[list[Tensor]]:
    """What other kernels may make of rows, for each tensor and axis."""
    return [[2**6 * one.eps * sketch[:, 2:].nan_to_num() for sketch in one.sketches] for one in forward.seen]


def _tried(run: Run, replacement: Replacement | None) -> tuple[Forward | None, str]:
    try:
        return run(replacement, None), ""
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        on = "when samples are replaced by others of the batch" if replacement is not None else "on the same batch"
        return None, f"the forward fails {on}: {type(error).__name__}: {error}"


def _incomparable(first: Forward, other: Forward, replacement: Replacement) -> str:
    """Why two forwards cannot be compared; nothing if they can."""
    if not replacement.replaced and replacement.size:
        if replacement.opaque:
            return f"what is in {', '.join(sorted(replacement.opaque))} does not show"
        return f"none of its inputs has a row for each of the {replacement.size} samples"
    if _structure(first) != _structure(other):
        return "with samples replaced by others of the batch, other layers are called, or on other shapes"
    return ""


def _structure(forward: Forward) -> list[Any]:
    samples = [None if one.samples is None else tuple(one.samples.tolist()) for one in forward.seen]
    return [(one.key, one.shape, order) for one, order in zip(forward.seen, samples, strict=True)]


def _differences(first: Forward, others: Sequence[Forward]) -> list[list[Tensor]]:
    """By how much forwards that should be the same differ, a number for each tensor, axis and column, and rounding if they do."""
    differences = [
        [
            torch.stack([(a - other.seen[place].sketches[axis]).nan_to_num().abs() for other in others])
            .amax(0)
            .amax(0, keepdim=True)
            if len(a)
            else a
            for axis, a in enumerate(one.sketches)
        ]
        for place, one in enumerate(first.seen)
    ]
    if not any(bool(difference.any()) for of_one in differences for difference in of_one):
        return differences
    return [
        [difference + _rounded(a) / 8 if len(a) else a for difference, a in zip(of_one, one.sketches, strict=True)]
        for of_one, one in zip(differences, first.seen, strict=True)
    ]


def _mixing_error(where: Seen, replacement: Replacement) -> NotImplementedError:
    return PrivacyNotImplementedError(
        f"{where.name} gives a sample another value when other samples of the batch are replaced, so the model mixes "
        "samples (by a batch norm, or a mean or a shift over the batch or over ranks; in training mode, with random "
        "numbers, or without a gradient). Then no sample has a gradient of its own. Let what is computed for a sample "
        f"depend on that sample alone. (Taken for samples: {', '.join(sorted(replacement.replaced))}.)"
    )


def _changed(
    first: Forward,
    other: Forward,
    replacement: Replacement,
    certified: Callable[[Any], bool],
    noise: list[list[Tensor]] | None,
) -> list[Seen]:
    """What is not the same for samples that were not replaced."""
    result = []
    for place, (one, two) in enumerate(zip(first.seen, other.seen, strict=True)):
        if one.key is not None and not certified(one.key):
            continue
        # Of what a model returns any axis may count the samples.
        wrong = [
            _kept_rows_differ(a, b, replacement, one.samples, None if noise is None else noise[place][axis])
            for axis, (a, b) in enumerate(zip(one.sketches, two.sketches, strict=True))
            if one.key is not None or len(a) == replacement.size
        ]
        if wrong and all(wrong):
            result.append(one)
    return result


def _kept_rows_differ(
    first: Tensor, second: Tensor, replacement: Replacement, samples: Tensor | None, noise: Tensor | None
) -> bool:
    expected = owners(len(first), replacement.size, samples)
    if expected is None and len(first) != 1:
        # Nobody knows whose these rows are; backward refuses them.
        return False
    # One row is shared by the batch.
    chosen = torch.tensor(replacement.chosen, device="cpu")
    kept = torch.ones(1, dtype=torch.bool, device="cpu") if expected is None else ~torch.isin(expected, chosen)
    kept = kept.to(first.device)
    a, b = first[kept], second[kept]
    differ = _differ(a, b)
    if noise is not None:
        allowed = noise[kept] if len(noise) == len(first) else noise
        differ &= ((a - b).nan_to_num().abs() > 8 * allowed).any(1)
    return bool(differ.any())


def _compare_states(
    name: str,
    first: Forward,
    other: Forward,
    run: Run,
    certified: Callable[[Any], bool],
    on_all_ranks: Callable[[bool], bool],
) -> None:
    """Refuses data in buffers, and data in attributes that the next forward depends on."""
    differ = first.after.differs_from(other.after)
    buffers = sorted(differ & (first.after.buffers | other.after.buffers))
    error = None
    if buffers:
        error = PrivacyNotImplementedError(
            f"{name} changes its buffers {', '.join(buffers)} in forward, by what it is called on. They may carry one "
            "sample's data to another's output, and leave with the model without noise. Replace the layer "
            "(opacus.validators.ModuleValidator.fix does so for batch norms), or keep the data out of its buffers"
        )
    raise_on_all_ranks(error, on_all_ranks)
    if on_all_ranks(not differ):
        return
    one, two = run(None, first.after), run(None, other.after)
    same = _structure(one) == _structure(two) and not any(
        bool(_differ(a, b).any())
        for x, y in zip(one.seen, two.seen, strict=True)
        if x.key is None or certified(x.key)
        for a, b in zip(x.sketches, y.sketches, strict=True)
    )
    if not same:
        error = PrivacyNotImplementedError(
            f"{name} keeps what it computes from a batch in {', '.join(sorted(differ))}, and its next forward depends on "
            "that, so that it mixes samples of several batches. Reset it before each forward, or pass it as an argument"
        )
    raise_on_all_ranks(error, on_all_ranks)
