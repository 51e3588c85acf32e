"""The forward certificate: with some samples replaced, nothing that is computed for the others changes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from opacus_fgc.certificates.batch import Batch
from opacus_fgc.certificates.comparison import Comparison
from opacus_fgc.certificates.observations import Forward, Run, Seen
from opacus_fgc.certificates.ownership import Owned
from opacus_fgc.certificates.samples import Replacement
from opacus_fgc.certificates.sketch import OUT_OF_MEMORY, REPEATS, differ, raise_on_all_ranks
from opacus_fgc.errors import PrivacyNotImplementedError


def replacements(
    batch: Batch,
    axis: int,
    shared: set[str],
    owned: Mapping[str, Owned | None],
    generator: random.Random,
    enlarge: bool,
    signs: Sequence[int],
) -> list[list[Replacement]]:
    """Half of the samples replaced by others: for each sign what is tried in turn, until a forward can be compared.

    Where features are enlarged they are the same samples, by the same ones, for each sign: a statistic of the batch that is large
    for one is small for the other, and one of them is on the other side of whatever number it may be compared with. Where they
    are not, the other half is replaced for the other sign, so that the largest of the batch is not the same for one of them.
    A sign of 0 is for the other half, as it is.

    Args:
        batch: which samples the rows of the batch are of.
        axis: the axis that counts them.
        shared: paths of inputs that are known to have no samples in them.
        owned: whose the rows of inputs are, by their paths, where these are not the samples in order; None where they stay.
        generator: chooses the samples.
        enlarge: whether features may be enlarged, so that what is an index then fails with an error, and does no more.
        signs: of the enlarged features; or which half.
    """
    size = batch.size
    half = sorted(generator.sample(range(size), max(1, size // 2))) if size else []
    other = [place for place in range(size) if place not in half] or half
    # One and the same in the place of all, so that what is computed over the batch changes.
    in_half, in_other = (generator.choice(places or [0]) for places in (half, other))

    def of_sign(sign: int) -> list[Replacement]:
        first = sign > 0 or (enlarge and sign < 0)
        chosen, source = (half, in_other) if first else (other, in_half)
        larger = ((sign * 1024.0, True), (sign * 1024.0, False)) if enlarge and sign else ()
        return [
            Replacement(batch, chosen, [source] * len(chosen), axis, factor, every, vectors, shared, owned)
            for factor, every in (*larger, (1.0, False))
            for vectors in (True, False)
        ]

    return [of_sign(sign) for sign in signs if sign or enlarge]


def check_independence(
    name: str,
    tries: Sequence[Replacement],
    run: Run,
    comparison: Comparison,
    on_all_ranks: Callable[[bool], bool],
    recorded: Forward | None = None,
) -> None:
    """Proves that nothing that a forward computes for a sample depends on another one.

    Args:
        name: what to call the model in errors.
        tries: replacements of samples; the first one with which the forward does the same on tensors of the same shapes counts.
        run: runs the forward.
        comparison: says what is the same for samples that are not replaced.
        on_all_ranks: whether something holds on all ranks that have to run as many forwards as each other.
        recorded: what the user's own forward came by. Where that shows no difference, one forward is enough.

    Raises:
        NotImplementedError: if something of a sample depends on another, or it cannot be told.
    """
    if on_all_ranks(recorded is not None):
        assert recorded is not None
        if _agree(recorded, tries[0], run, comparison, on_all_ranks):
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
        if other is not None:
            comparison = comparison.with_routed(first, other)
        why = failed if other is None else _incomparable(first, other, replacement, comparison)
        if on_all_ranks(not why):
            assert other is not None
            if on_all_ranks(not _rounds_otherwise(first, other, replacement, comparison)):
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
    suspects = comparison.changed(first, other, replacement)
    if not on_all_ranks(not suspects):
        # Kernels that are not deterministic tell by how much.
        again = [run(None, None) for _ in range(REPEATS)]
        if all(comparison.structure(one) == comparison.structure(first) for one in again):
            suspects = comparison.changed(first, other, replacement, comparison.differences(first, again))
        raise_on_all_ranks(_mixing_error(suspects[0], replacement) if suspects else None, on_all_ranks)
    _compare_states(name, first, other, run, comparison, on_all_ranks)
    if not on_all_ranks(not replacement.masks):
        _compare_masks(first, replacement, run, comparison, on_all_ranks)


def _agree(
    recorded: Forward,
    replacement: Replacement,
    run: Run,
    comparison: Comparison,
    on_all_ranks: Callable[[bool], bool],
) -> bool:
    """Whether a forward with samples replaced does what the user's own did, to the bit; where not, why is to be seen."""
    other, _ = _tried(run, replacement)
    same = (
        other is not None
        and not _incomparable(recorded, other, replacement, comparison)
        and not comparison.changed(recorded, other, replacement)
        and not recorded.after.differs_from(other.after)
        and not replacement.masks
    )
    return on_all_ranks(same)


def _compare_masks(
    first: Forward,
    replacement: Replacement,
    run: Run,
    comparison: Comparison,
    on_all_ranks: Callable[[bool], bool],
) -> None:
    """The same with other masks. Models ask whether a mask masks anything, and run other kernels then, that round otherwise."""
    shorter = replace(replacement, shorten=True)
    other, _ = _tried(run, shorter)
    error = None
    if other is not None and comparison.structure(first) == comparison.structure(other):
        suspects = comparison.changed(first, other, shorter, comparison.rounding(first))
        error = _mixing_error(suspects[0], shorter) if suspects else None
    raise_on_all_ranks(error, on_all_ranks)


def _rounds_otherwise(first: Forward, other: Forward, replacement: Replacement, comparison: Comparison) -> bool:
    """Whether other lengths of samples have rows computed in other groups, which round otherwise; what is more is mixing."""
    if not replacement.numbers or not comparison.changed(first, other, replacement):
        return False
    return not comparison.changed(first, other, replacement, comparison.rounding(first))


def _tried(run: Run, replacement: Replacement | None) -> tuple[Forward | None, str]:
    try:
        return run(replacement, None), ""
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        on = "when samples are replaced by others of the batch" if replacement is not None else "on the same batch"
        return None, f"the forward fails {on}: {type(error).__name__}: {error}"


def _incomparable(first: Forward, other: Forward, replacement: Replacement, comparison: Comparison) -> str:
    """Why two forwards cannot be compared; nothing if they can."""
    if not replacement.replaced and replacement.batch.size:
        if replacement.opaque:
            return f"what is in {', '.join(sorted(replacement.opaque))} does not show"
        what = "samples" if replacement.batch.unit is None else "records"
        return f"none of its inputs has a row for each of the {replacement.batch.rows} {what}"
    if comparison.structure(first) != comparison.structure(other):
        return "with samples replaced by others of the batch, other layers are called, or on other shapes"
    return ""


def _mixing_error(where: Seen, replacement: Replacement) -> NotImplementedError:
    return PrivacyNotImplementedError(
        f"{where.name} gives a sample another value when other samples of the batch are replaced, so the model mixes "
        "samples (by a batch norm, or a mean or a shift over the batch or over ranks; in training mode, with random "
        "numbers, or without a gradient). Then no sample has a gradient of its own. Let what is computed for a sample "
        f"depend on that sample alone. (Taken for samples: {', '.join(sorted(replacement.replaced))}.)"
    )


def _compare_states(
    name: str,
    first: Forward,
    other: Forward,
    run: Run,
    comparison: Comparison,
    on_all_ranks: Callable[[bool], bool],
) -> None:
    """Refuses data in buffers, and data in attributes that the next forward depends on."""
    changed = first.after.differs_from(other.after)
    buffers = sorted(changed & (first.after.buffers | other.after.buffers))
    error = None
    if buffers:
        error = PrivacyNotImplementedError(
            f"{name} changes its buffers {', '.join(buffers)} in forward, by what it is called on. They may carry one "
            "sample's data to another's output, and leave with the model without noise. Replace the layer "
            "(opacus.validators.ModuleValidator.fix does so for batch norms), or keep the data out of its buffers"
        )
    raise_on_all_ranks(error, on_all_ranks)
    if on_all_ranks(not changed):
        return
    one, two = run(None, first.after), run(None, other.after)
    same = [(x.key, x.shape) for x in one.seen] == [(y.key, y.shape) for y in two.seen] and not any(
        bool(differ(a, b).any())
        for x, y in zip(one.seen, two.seen, strict=True)
        if x.key is None or comparison.certified(x.key)
        for a, b in zip(x.sketches, y.sketches, strict=True)
    )
    if not same:
        error = PrivacyNotImplementedError(
            f"{name} keeps what it computes from a batch in {', '.join(sorted(changed))}, and its next forward depends on "
            "that, so that it mixes samples of several batches. Reset it before each forward, or pass it as an argument"
        )
    raise_on_all_ranks(error, on_all_ranks)
