"""A check of this package on a user's own model: against plain autograd on one sample at a time, all on copies.

The oracle is as dull as can be, and uses nothing of this package: for each sample alone the user's criterion on a batch of
one, and `torch.autograd.grad`.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from opacus.grad_sample import AbstractGradSampleModule, GradSampleHooks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from opacus_fgc._compat.compiler import uncompiled
from opacus_fgc._compat.opacus import wrapped_model
from opacus_fgc.certificates.model_state import restored
from opacus_fgc.loss import DPLossFastGradientClipping
from opacus_fgc.model_check.comparison import compared, steps
from opacus_fgc.model_check.report import CheckReport
from opacus_fgc.model_check.subject import Subject, samples_in
from opacus_fgc.privacy_engine import MODES
from opacus_fgc.taps.graph import leaves_of
from opacus_fgc.taps.tap import tensors_in


def check(
    model: Any,
    criterion: Callable[..., Any],
    inputs: Any,
    target: Any,
    *,
    max_grad_norm: float | None = None,
    grad_sample_mode: str | Sequence[str] = tuple(MODES),
    batch_first: bool | None = None,
    loss_reduction: str | None = None,
    dtype: torch.dtype | None = torch.float64,
    samples: int = 8,
    max_elements: int = 2**27,
) -> CheckReport:
    """Compares what this package computes for a model with plain autograd on one sample at a time, layer by layer.

    It compares each sample's loss, the norms of each sample's gradients, the clipping coefficients and the clipped sum. And it
    takes each sample out of the batch, to see by how much that moves the clipped sum: at most by ``C``.

    All runs on copies. The model, its parameters, gradients, buffers, hooks and modes, and torch's random states are left as they
    are. What user's hooks on the model do, they do for the copies too.

    Where the model draws random numbers in training mode (dropout), the copies run in eval mode, since no two runs could be
    compared otherwise; the report says so.

    Args:
        model: the model; wrapped by this package or not. If it is compiled, what it was compiled from is checked.
        criterion: as for `make_private`, or what that returned; called as ``criterion(output, target)``.
        inputs: what the model is called with: a tuple of positional arguments, a dict of keyword arguments, or one argument.
            Tensors with as many rows as the target are batches of samples; all others are shared by the batch.
        target: a tensor or a nesting of them, batch first, shape ``(N, ...)``.
        max_grad_norm: the clipping norm ``C``; what a wrapped model has if None, else a little less than the mean
            of the norms, so that some samples are clipped and some are not.
        grad_sample_mode: "ghost", "ghost_bk", or several; the report shows the largest errors of them.
        batch_first: as for `make_private`; what a wrapped model has if None, else True.
        loss_reduction: as for `make_private`; what a wrapped model has if None, else "mean".
        dtype: what the copies are converted to, which tells wrong from rounding; None for the model's own. A model that does not
            run in it is run in its own, and the report says so.
        samples: so many samples of the batch, evenly chosen, are compared.
        max_elements: if the model has more trainable elements than this, some layers are compared, of each kind first; all
            others are frozen in the copies. The check needs the memory of one copy, and of these elements four times.

    Returns:
        The report, right or wrong.

    Raises:
        NotImplementedError: if this package refuses the model; the text says which layer, why, and what to do.
        ValueError: likewise; or if the model cannot be copied, or run on one sample, or twice with the same result.

    Example:
        >>> report = opacus_fgc.check(model, criterion, x, y)
        >>> print(report)
        >>> report.raise_if_wrong()
    """
    modes = [grad_sample_mode] if isinstance(grad_sample_mode, str) else list(grad_sample_mode)
    if not modes or not set(modes) <= set(MODES):
        raise ValueError(f"grad_sample_mode is {grad_sample_mode!r}; what can be checked is {', '.join(MODES)}")
    wrapper = model if isinstance(model, (AbstractGradSampleModule, GradSampleHooks)) else None
    inner = uncompiled(model if wrapper is None else wrapped_model(wrapper))
    if any(isinstance(param, DTensor) for param in inner.parameters()):
        raise NotImplementedError(
            "the model lies over several processes, and all is done on copies in one; check it before fully_shard and "
            "parallelize_module"
        )
    if max_grad_norm is None:
        max_grad_norm = getattr(wrapper, "max_grad_norm", None)
    subject = Subject(
        model=inner,
        hooks=getattr(inner if wrapper is None else wrapper, "autograd_grad_sample_hooks", []),
        criterion=criterion.criterion if isinstance(criterion, DPLossFastGradientClipping) else criterion,
        inputs=dict(inputs) if isinstance(inputs, Mapping) else inputs,
        target=target,
        batch_size=samples_in(inputs, target),
        batch_first=getattr(wrapper, "batch_first", True) if batch_first is None else batch_first,
        reduction=getattr(wrapper, "loss_reduction", "mean") if loss_reduction is None else loss_reduction,
        trained=_chosen_parameters(inner, max_elements),
        dtype=dtype,
    )
    chosen = _chosen_samples(subject.batch_size, samples)
    tensors = [*inner.parameters(), *inner.buffers(), *tensors_in((subject.inputs, target))]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.enable_grad():
        subject, tolerance = _repeatable(subject, chosen, devices)
        max_grad_norm, taken = steps(subject, chosen, modes, max_grad_norm)
        # The model that was wrapped is in cycles; it makes room for the oracle's.
        gc.collect()
        report = compared(subject, chosen, taken, max_grad_norm, tolerance)
    trainable = [param for param in inner.parameters() if param.requires_grad]
    report.notes = [
        f"{len(chosen)} of {subject.batch_size} samples, in {' and '.join(modes)}; C = {max_grad_norm:.4g}, "
        f"{report.clipped} clipped; relative errors, up to {tolerance:.1e} is rounding",
        *subject.notes,
    ]
    if len(subject.trained) < len(trainable):
        report.notes.append(
            f"{len(subject.trained)} of {len(trainable)} parameters, the others frozen in the copies "
            f"(max_elements={max_elements:,})"
        )
    return report


def _chosen_samples(batch_size: int, samples: int) -> list[int]:
    count = min(samples, batch_size)
    if count < 1:
        raise ValueError(f"{samples} of {batch_size} samples cannot be compared; it takes one at least")
    return torch.linspace(0, batch_size - 1, count, dtype=torch.float64, device="cpu").round().long().tolist()


def _chosen_parameters(model: nn.Module, max_elements: int) -> frozenset[str]:
    """The parameters of some layers, the first of each kind first."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            layers.setdefault(name.rpartition(".")[0], {})[name] = param
    if not layers:
        raise ValueError("the model has no trainable parameters, so there is nothing to check")
    seen: Counter[Any] = Counter()
    turns: dict[str, int] = {}
    for path, params in layers.items():
        kind = (type(model.get_submodule(path)), *(param.shape for param in params.values()))
        turns[path] = seen[kind]
        seen[kind] += 1
    chosen: list[str] = []
    left = max_elements
    for path in sorted(layers, key=turns.__getitem__):
        elements = sum(param.numel() for param in layers[path].values())
        if elements <= left:
            left -= elements
            chosen += layers[path]
    if not chosen:
        raise ValueError(f"no layer has {max_elements:,} elements or less; raise max_elements, as far as memory allows")
    return frozenset(chosen)


# What can be compared


class _Precision(TorchFunctionMode):
    """Notes the coarsest type in which something with a gradient is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.coarsest = torch.float64

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tensors_in(output):
            if tensor.requires_grad and tensor.is_floating_point():
                self.coarsest = max(self.coarsest, tensor.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return output


def _repeatable(subject: Subject, samples: Sequence[int], devices: Sequence[int]) -> tuple[Subject, float]:
    """The subject in a type and a mode in which it runs, and gives the same twice; and how far rounding may lead."""
    try:
        coarsest, same = _run_twice(subject, samples, devices)
    except Exception as error:
        if subject.dtype is None:
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        note = f"in the model's own precision, since it does not run in {subject.dtype}: {reason}"
        subject = replace(subject, dtype=None, notes=(*subject.notes, note))
        coarsest, same = _run_twice(subject, samples, devices)
    if not same:
        note = "in eval mode, since the model draws random numbers in training mode"
        subject = replace(subject, eval_mode=True, notes=(*subject.notes, note))
        coarsest, same = _run_twice(subject, samples, devices)
    if not same:
        raise ValueError(
            "the model or the criterion draws random numbers in eval mode too, or changes from run to run, so that no two runs "
            "can be compared; check it without that"
        )
    # Half of the digits: rounding leaves more, and few mistakes are as small.
    return subject, torch.finfo(coarsest).eps ** 0.5


def _run_twice(subject: Subject, samples: Sequence[int], devices: Sequence[int]) -> tuple[torch.dtype, bool]:
    """The coarsest type of a forward, and whether it has the same result twice and draws no random numbers."""
    model, criterion = subject.copies()
    before = _random_states(devices)
    with restored(model), _Precision() as precision:
        first = subject.loss(model, criterion, samples)
    with restored(model):
        second = subject.loss(model, criterion, samples)
    theirs = set(subject.model.parameters()).intersection(leaves_of([first]))
    if theirs:
        shapes = ", ".join(str(tuple(param.shape)) for param in theirs)
        raise ValueError(
            f"the criterion, or the forward, comes to parameters (shapes {shapes}) by another way than the model that it is "
            "called on, so that a copy comes to those of the original; give it the model, or what it needs of it, as an "
            "argument"
        )
    same = torch.allclose(first, second, rtol=torch.finfo(precision.coarsest).eps ** 0.5, equal_nan=True)
    return precision.coarsest, same and all(map(torch.equal, before, _random_states(devices)))


def _random_states(devices: Sequence[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
