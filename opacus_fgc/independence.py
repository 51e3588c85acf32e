"""Whether a model computes what it computes for each sample from that sample alone.

Without that no sample has a gradient of its own. And the rows that a layer works on have to be samples, or to follow each other
sample by sample, or its taps would count other rows as samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from opacus_fgc.buffers import Buffers, restored
from opacus_fgc.taps import tensors_in

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
"""What says nothing about a model whose forward fails with it."""


class Seen(NamedTuple):
    """What is kept of a tensor that a forward came by.

    Attributes:
        where: what to call the place; "" for what the model returned.
        shape: of the tensor.
        axis: the axis that counts samples.
        rows: a few numbers that tell each of its rows from others, shape ``(rows, 3)``; None if there is no such axis.
        tapped: whether rows of it are counted as samples.
        tolerance: how far equal rows may lie apart, relatively.
    """

    where: str
    shape: torch.Size
    axis: int
    rows: Tensor | None
    tapped: bool
    tolerance: float = 1e-3


def look_at(where: str, value: Tensor, axis: int, tapped: bool = True) -> Seen:
    """Keeps of a tensor what `check_independence` compares: rows by norm, sum, and a weighted sum, instead of themselves."""
    if isinstance(value, DTensor):
        if any(placement.is_partial() for placement in value.placements):
            # Its rows show where its parts have been added up.
            return Seen(where, value.shape, axis, None, tapped=False)
        value = value.full_tensor()
    if value.dim() <= axis:
        return Seen(where, value.shape, axis, None, tapped)
    flat = value.detach().movedim(axis, 0).unsqueeze(-1).flatten(1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    ramp = torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype, device=flat.device)
    rows = torch.stack([torch.linalg.vector_norm(flat, dim=1), flat.sum(1), flat @ ramp], 1)
    eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
    return Seen(where, value.shape, axis, rows, tapped, max(1e-3, eps**0.5))


def some_samples(inputs: Any, batch_size: int, start: int, length: int, axis: int) -> Any:
    """Some of the samples of a batch, in any nesting; what has no axis of ``batch_size`` is left as it is.

    Where the batch has not as many, they are taken again, or are zeros where it has none.
    """

    def narrow(tensor: Tensor) -> Tensor:
        if tensor.dim() <= axis or tensor.shape[axis] != batch_size:
            return tensor
        if start + length <= batch_size:
            return tensor.narrow(axis, start, length)
        if batch_size:
            return tensor.index_select(axis, torch.arange(start, start + length, device=tensor.device) % batch_size)
        return tensor.new_zeros(*tensor.shape[:axis], length, *tensor.shape[axis + 1 :])

    return tree_map_only(Tensor, narrow, inputs)


@contextmanager
def undisturbed(model: nn.Module, inputs: Any) -> Iterator[None]:
    """A context for forwards that are not the user's own: random states, buffers and training modes are as before afterwards.

    Args:
        model: the model.
        inputs: what it is called with.
    """
    modes = {module: module.training for module in model.modules()}
    devices = {tensor.device for tensor in tensors_in(inputs) if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices), restored(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_independence(
    name: str,
    model: nn.Module,
    inputs: Any,
    run: Callable[[int, int], list[Seen]],
    on_all_ranks: Callable[[bool], bool],
    second_first: bool,
) -> bool:
    """Runs two samples of a batch together and each by itself, and compares all that is seen on the way.

    A forward that draws random numbers is run in eval mode.

    Args:
        name: what to call the model in errors.
        model: the model.
        inputs: what it is called with.
        run: runs the forward on samples from one (first argument) on, so many (second).
        on_all_ranks: whether something holds on all ranks that have to run as many forwards.
        second_first: whether the second sample is run by itself before the first. Where that is so on some ranks only, samples
            that are mixed with those of other ranks show as well.

    Returns:
        Whether it could be compared. It cannot if the forward draws random numbers in eval mode too, fails on a batch of one,
        or does other things then.

    Raises:
        NotImplementedError: if something of a sample depends on the other, or rows are not samples.
    """
    runs: list[list[Seen]] = []

    def once(start: int, length: int) -> list[Seen]:
        with restored(model):
            return run(start, length)

    with undisturbed(model, inputs):
        try:
            together = _repeatable(model, lambda: once(0, 2), on_all_ranks)
            if together:
                alone = {start: once(start, 1) for start in ((1, 0) if second_first else (0, 1))}
                runs = [together, alone[0], alone[1]]
        except OUT_OF_MEMORY:
            raise
        except Exception:
            # What the model cannot do on such batches shows, if it matters, where it runs on its own.
            return False
    return len(runs) == 3 and _all_compared(name, runs)


def _all_compared(name: str, runs: list[list[Seen]]) -> bool:
    known = True
    for where in dict.fromkeys(seen.where for run in runs for seen in run):
        at_this_place = [[seen for seen in run if seen.where == where] for run in runs]
        if len({len(seen) for seen in at_this_place}) > 1:
            known &= not any(seen.tapped for run in at_this_place for seen in run)
            continue
        for several in zip(*at_this_place, strict=True):
            known &= _compared(name, *several) or not several[0].tapped
    return known


def refuse_data_in_buffers(
    name: str,
    model: nn.Module,
    inputs: Any,
    before: Buffers,
    changed: Collection[str],
    run: Callable[[int, int], Any] | None,
) -> None:
    """Refuses a model whose buffers take up data.

    Args:
        name: what to call the model in errors.
        model: the model.
        inputs: what it was called with.
        before: its buffers before that.
        changed: the names of those that it changed.
        run: as for `check_independence`; None if there are no two samples to compare.

    Raises:
        NotImplementedError: if such a buffer is not the same after one sample as after another.
    """
    after: list[dict[str, Tensor]] = []
    if run is not None:
        for sample in range(2):
            with undisturbed(model, inputs):
                # The copy is of when buffers changed last; counters have gone on since.
                before.restore(counters=False)
                run(sample, 1)
                after.append({path: buffer.clone() for path, buffer in model.named_buffers() if path in changed})
    taken_up = [path for path in changed if not after or not _equal(*(values.get(path) for values in after))]
    if taken_up:
        raise NotImplementedError(
            f"{name} changes its buffers {', '.join(sorted(taken_up))} in forward, by what it is called on. They may carry one "
            "sample's data to another's output, and leave with the model without noise. Replace the layer "
            "(opacus.validators.ModuleValidator.fix does so for batch norms), or keep the data out of its buffers"
        )


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    return first is not None and second is not None and torch.equal(first, second)


def _repeatable(model: nn.Module, run: Callable[[], list[Seen]], on_all_ranks: Callable[[bool], bool]) -> list[Seen]:
    """What is seen without random numbers in it; nothing if there is no way to that."""
    for train in (True, False):
        if not train:
            model.eval()
        first, second = run(), run()
        if on_all_ranks(len(first) == len(second) and all(map(_repeated, first, second))):
            return first
    return []


def _repeated(first: Seen, second: Seen) -> bool:
    if first.shape != second.shape or first.rows is None or second.rows is None:
        return first.shape == second.shape
    return torch.equal(first.rows, second.rows)


def _compared(name: str, together: Seen, first: Seen, second: Seen) -> bool:
    """Whether what two samples gave together could be compared with what each gave by itself."""
    where, axis, both = together.where, together.axis, together.rows
    if both is None or first.rows is None or second.rows is None:
        return False
    if where and len(first.rows) == len(second.rows) == len(both):
        raise NotImplementedError(
            f"{where}: its rows are not samples, since there are as many for two samples as for one. Check batch_first, and call "
            "layers on tensors that have one row a sample"
        )
    same_rows = all(_others(alone.shape, axis) == _others(together.shape, axis) for alone in (first, second))
    if len(both) != len(first.rows) + len(second.rows) or not same_rows:
        return False
    if not _close(both, torch.cat([first.rows, second.rows]), together.tolerance):
        raise NotImplementedError(
            f"{where or name} gives a sample another value in a batch than by itself, so it mixes samples (by a batch norm, or a "
            "mean or a shift over the batch or over ranks), or its rows are not in the order of the samples. Then no sample has "
            "a gradient of its own"
        )
    return True


def _others(shape: torch.Size, axis: int) -> list[int]:
    return [size for other, size in enumerate(shape) if other != axis]


def _close(both: Tensor, alone: Tensor, tolerance: float) -> bool:
    finite = both[both.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    return torch.allclose(both, alone, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
