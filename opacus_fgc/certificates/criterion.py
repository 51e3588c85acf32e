"""Whether a criterion's losses are of one sample each: tried on the user's own batch, from the definition.

Torch's criteria are known; these are for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opacus_fgc.certificates.entrances import RandomStates
from opacus_fgc.certificates.sketch import OUT_OF_MEMORY
from opacus_fgc.criterion.arguments import Arguments
from opacus_fgc.errors import PrivacyValueError

Evaluate = Callable[[Any, Arguments], Tensor]

_ELEMENTS, _SAMPLES = 2**24, 8
"""Where gradients are compared, outputs of more elements are taken as they are, and of the first samples, so many at least."""

_WHAT_TO_DO = (
    "Then no sample has a loss, and a gradient, of its own (contrastive losses, in-batch negatives, hard-example mining, "
    "weights "
    "or scales that are computed over the batch). Take those from constants, or from the sample itself; what shares one "
    "value among all samples, such as class weights, is given by functools.partial or as an attribute"
)


def check_independent_losses(copies: Callable[[], Any], evaluate: Evaluate, arguments: Arguments) -> bool:
    """Replaces samples by others, and compares the losses of those that stay: to the bit, since all shapes are the same.

    Every two samples are told apart: of one pair of them the one stays and the other is replaced, by the sample with the largest
    loss or by that with the smallest, which moves what is computed over the batch most.

    Args:
        copies: gives the criterion as it is now.
        evaluate: gives one loss a sample, shape ``(N,)``, from a criterion and arguments.
        arguments: the user's, of two samples at least.

    Returns:
        True: it can always be compared.

    Raises:
        ValueError: if a loss depends on another sample, on earlier batches, or is another in each run.
    """
    everyone = torch.arange(arguments.size, device="cpu")

    def losses(source: Tensor, criterion: Any = None) -> Tensor:
        with same_random_numbers(arguments.device):
            taken = arguments.taken(source)
            return evaluate(copies() if criterion is None else criterion, taken).detach().cpu()

    with torch.set_grad_enabled(_needs_graph(lambda: losses(everyone))):
        _compare_losses(copies, losses, everyone)
    return True


def _needs_graph(run: Callable[[], Any]) -> bool:
    """Whether something has to run with gradients, which take memory."""
    for with_gradients in (False, True):
        try:
            with torch.set_grad_enabled(with_gradients):
                run()
            return with_gradients
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            failure = error
    raise PrivacyValueError(
        "the criterion cannot be run again on the same batch to see whether its losses are of one sample each: "
        f"{failure}. Have it compute with its arguments alone"
    ) from failure


def _compare_losses(copies: Callable[[], Any], losses: Callable[..., Tensor], everyone: Tensor) -> None:
    before = losses(everyone)
    if not _same(before, losses(everyone)).all():
        raise PrivacyValueError(
            "the criterion gives other losses for the same batch and the same random numbers, so that it cannot be "
            "known whether they are of one sample each. Let it keep nothing from call to call, and use deterministic "
            "functions (torch.use_deterministic_algorithms(True) finds others)"
        )
    largest, smallest = before.nan_to_num(-torch.inf).argmax(), before.nan_to_num(torch.inf).argmin()
    for bit in range((len(everyone) - 1).bit_length()):
        first = (everyone >> bit) % 2 == 0
        for stays, other in ((first, largest), (~first, smallest), (first, smallest), (~first, largest)):
            after = losses(torch.where(stays, everyone, other))
            if (stays & ~_same(before, after)).any():
                raise PrivacyValueError(
                    "the criterion's loss of a sample depends on the other samples of the batch: it changes when others are "
                    f"replaced. {_WHAT_TO_DO}"
                )
    _check_memory(copies, lambda criterion, source: losses(source, criterion), everyone, largest)


def _check_memory(
    copies: Callable[[], Any], losses: Callable[[Any, Tensor], Tensor], everyone: Tensor, other: Tensor
) -> None:
    """Refuses a criterion whose losses depend on what it was called on before."""
    after_one, after_other = copies(), copies()
    losses(after_one, everyone)
    losses(after_other, other.expand_as(everyone))
    if not _same(losses(after_one, everyone), losses(after_other, everyone)).all():
        raise PrivacyValueError(
            "the criterion's losses depend on the batches before (a queue of negatives, a running mean), whose samples would "
            "move later sums without a bound. Let it keep nothing of the data from call to call"
        )


def check_reduced_loss(copies: Callable[[], Any], evaluate: Evaluate, arguments: Arguments) -> bool:
    """Compares what a criterion gives for the batch with what it gives for each sample by itself.

    The batch's value has to be a weighted sum of the samples' (a mean; one over tokens, or with class weights): its gradient by
    the outputs of sample ``n`` is ``a[n] >= 0`` times that of the sample's own loss. Other outputs have to leave ``a`` as it is,
    and other samples the ratios of those that stay.

    Args:
        copies: gives the criterion as it is now.
        evaluate: gives one loss a sample, shape ``(N,)``, from a criterion and arguments.
        arguments: the user's, of two samples at least.

    Returns:
        Whether it could be compared. It cannot where nothing requires a gradient, or the batch itself gives inf or NaN.

    Raises:
        ValueError: if the value is no such sum, draws random numbers, or is not finite for one sample.
    """
    if not arguments.with_gradient():
        return False
    elements = sum(leaf.numel() for leaf in arguments.with_gradient()) // arguments.size
    some = max(_SAMPLES, _ELEMENTS // max(elements, 1))
    large = elements * arguments.size > _ELEMENTS
    if some < arguments.size:
        arguments = arguments.taken(torch.arange(some, device="cpu"))
    for dtype in (None,) if large else (torch.float64, torch.float32, None):
        try:
            return _compare_reduced(copies, evaluate, arguments, dtype)
        except OUT_OF_MEMORY:
            raise
        except (RuntimeError, TypeError) as error:
            # A criterion may have tensors of one type with it.
            failure = error
    raise PrivacyValueError(
        f"the criterion cannot be run again on the same batch to see what a sample counts in it: {failure}. Have it compute "
        "with its arguments alone, or return one loss for each sample (reduction='none')"
    ) from failure


def _compare_reduced(
    copies: Callable[[], Any], evaluate: Evaluate, arguments: Arguments, dtype: torch.dtype | None
) -> bool:
    everyone = torch.arange(arguments.size, device="cpu")
    types = [leaf.dtype for leaf in arguments.with_gradient()] if dtype is None else [dtype]
    tolerance = max(torch.finfo(one).eps for one in types) ** 0.5
    counts = _counts(copies, evaluate, arguments.taken(everyone, dtype=dtype), tolerance)
    if counts is None:
        return False
    other_outputs = arguments.taken(everyone.roll(1), only_with_gradient=True, dtype=dtype)
    _compare_counts(counts, _counts(copies, evaluate, other_outputs, tolerance), tolerance, "outputs of the others")
    for stays in (everyone % 2 == 0, everyone % 2 == 1):
        other = int(stays.nonzero()[0])
        others = arguments.taken(torch.where(stays, everyone, other), dtype=dtype)
        after = _counts(copies, evaluate, others, tolerance)
        if after is not None:
            known = stays & counts.isfinite() & after.isfinite()
            first, second = (values[known] / values[known].sum() for values in (counts, after))
            _compare_counts(first, second, tolerance, "rest of the batch")

    def value(criterion: Any, source: Tensor) -> Tensor:
        args, kwargs = arguments.taken(source).whole()
        with same_random_numbers(arguments.device):
            return criterion(*args, **kwargs).detach().reshape(1).cpu()

    _check_memory(copies, value, everyone, everyone[0])
    return True


def _compare_counts(first: Tensor, second: Tensor | None, tolerance: float, what: str) -> None:
    if second is None:
        return
    known = first.isfinite() & second.isfinite()
    scale = first[known].abs().max().item() if known.any() else 0.0
    if ((first - second)[known].abs() > min(100 * tolerance, 0.5) * scale).any():
        raise _not_of_samples(f"what a sample counts in it depends on the {what}")


def _not_of_samples(why: str) -> ValueError:
    return PrivacyValueError(
        f"the criterion's value for the batch is no weighted sum of what it gives for each sample by itself: {why}. "
        f"{_WHAT_TO_DO}. If each sample does have a loss of its own, have the criterion return one loss for each sample "
        "(reduction='none')"
    )


def _counts(copies: Callable[[], Any], evaluate: Evaluate, taken: Arguments, tolerance: float) -> Tensor | None:
    """What each sample counts in the criterion's value for a batch, shape ``(N,)``; NaN for one that has no gradient.

    None if the batch is not finite.
    """
    args, kwargs = taken.whole()
    with same_random_numbers(taken.device):
        value, again = (copies()(*args, **kwargs).reshape(()) for _ in range(2))
        if not torch.isfinite(value):
            return None
        if not torch.isclose(value, again, rtol=tolerance, atol=0.0):
            raise PrivacyValueError(
                "the criterion draws random numbers, or is another in each run, so that its value for the batch cannot be "
                "compared with those of the samples by themselves. Have it return one loss for each sample (reduction='none')"
            )
        alone = evaluate(copies(), taken)
    own, whole = (_rows_of_gradients(total, taken) for total in (alone.sum(), value))
    if not torch.isfinite(whole).all():
        return None
    if not (torch.isfinite(alone).all() and torch.isfinite(own).all()):
        raise _not_of_samples("for a sample by itself it is inf or NaN, and for the batch it is not")
    own_norms, norms = own.norm(dim=1), whole.norm(dim=1)
    # Where nothing is left but rounding, there is no ratio.
    least = 0.0 if tolerance < 1e-6 else 32 * tolerance**2
    known = own_norms > max(tolerance * own_norms.max().item(), least)
    counts = torch.where(known, (whole * own).sum(1) / own_norms.square(), torch.nan)
    rest = (whole - counts.nan_to_num(0.0)[:, None] * own).norm(dim=1)
    bound = tolerance * torch.where(known, norms, norms.max()) + max(1e3 * tolerance**2 * norms.max().item(), least)
    largest = counts.nan_to_num(0.0).abs().max()
    if (rest > bound + tolerance * largest * own_norms).any() or (counts < -tolerance * largest).any():
        raise _not_of_samples("its gradient by the outputs of a sample is another")
    values = alone.detach()
    if (values[~known] == 0).all():
        total = (counts * values)[known].sum()
        size = (counts * values)[known].abs().sum() + value.detach().abs()
        if (total - value.detach()).abs() > 10 * tolerance * size:
            raise _not_of_samples("the gradients are those of such a sum, and the value is another")
    return counts.detach().cpu()


def _rows_of_gradients(total: Tensor, taken: Arguments) -> Tensor:
    """The gradient of a number by all that has rows and a gradient, shape ``(N, elements)``."""
    leaves = taken.with_gradient()
    if total.requires_grad:
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    else:
        gradients = tuple(map(torch.zeros_like, leaves))
    axes = [place.axis for place in taken.places if taken.leaves[place.leaf].requires_grad]
    parts = [gradient.movedim(axis, 0).reshape(taken.size, -1) for gradient, axis in zip(gradients, axes, strict=True)]
    return torch.cat([part.to(parts[0].device) for part in parts], 1)


def _same(first: Tensor, second: Tensor) -> Tensor:
    return (first == second) | (first.isnan() & second.isnan())


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """A context after which all random generators are as before, so that the next one draws the same numbers."""
    states = RandomStates([device] if device.type == "cuda" else [])
    try:
        yield
    finally:
        states.restore()
