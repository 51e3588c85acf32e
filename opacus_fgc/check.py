"""A check of this package on a user's own model: against plain autograd on one sample at a time, all on copies.

The oracle is as dull as can be, and uses nothing of this package: for each sample alone the user's criterion on a batch of
one, and `torch.autograd.grad`.
"""

from __future__ import annotations

import copy
import gc
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from opacus.grad_sample import AbstractGradSampleModule, GradSampleHooks
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from opacus_fgc.grad_sample_module import GradSampleModuleFastGradientClipping
from opacus_fgc.loss import DPLossFastGradientClipping
from opacus_fgc.model_state import restored
from opacus_fgc.optimizer import DPOptimizerFastGradientClipping
from opacus_fgc.privacy_engine import MODES
from opacus_fgc.taps import leaves_of, tensors_in


@dataclass
class Row:
    """How what this package computes for a layer compares with the oracle.

    Attributes:
        layer: its name in the model.
        type: its type.
        parameters: number of elements of its parameters that were compared.
        norms: the largest relative error of a sample's gradient norm, over samples and parameters.
        clipped_sum: the largest relative error of a parameter's clipped sum, for the clipping coefficients that were used.
        wrong: the names of its parameters that are wrong.
    """

    layer: str
    type: str
    parameters: int = 0
    norms: float = 0.0
    clipped_sum: float = 0.0
    wrong: list[str] = field(default_factory=list)


@dataclass
class CheckReport:
    """What `check` found; ``print(report)`` gives a table.

    A relative error is one of the oracle's value. Where a parameter's gradient is next to nothing beside the whole gradient, and
    is but rounding, it is one of a small share of the whole gradient.

    Attributes:
        rows: one for each layer with parameters that were compared, in the order of the model.
        losses: largest relative error of a sample's loss.
        coefficients: largest relative error of a sample's clipping coefficient ``min(1, C / norm)``.
        contribution: the most that a sample moves the clipped sum by, being in the batch or not, as a multiple of ``C``.
        clipped: how many samples were clipped.
        max_grad_norm: the clipping norm ``C``.
        tolerance: the largest relative error that is taken for rounding.
        notes: how it was compared.
    """

    rows: list[Row]
    losses: float
    coefficients: float
    contribution: float
    clipped: int
    max_grad_norm: float
    tolerance: float
    notes: list[str] = field(default_factory=list)

    @property
    def largest_contribution(self) -> float:
        """What ``contribution`` may be: 1, and rounding."""
        return 1 + max(1e-6, self.tolerance)

    @property
    def wrong(self) -> list[str]:
        """The names of what is wrong: parameters, and quantities of the whole model."""
        # What is NaN is wrong.
        whole = {
            "(losses)": self.losses <= self.tolerance,
            "(clipping coefficients)": self.coefficients <= self.tolerance,
            "(contribution of a sample)": self.contribution <= self.largest_contribution,
        }
        parts = [f"{row.layer}.{name}".lstrip(".") for row in self.rows for name in row.wrong]
        return parts + [name for name, right in whole.items() if not right]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong

    def raise_if_wrong(self) -> None:
        """Raises an AssertionError with the table if something is wrong; for one's own tests."""
        if not self.ok:
            raise AssertionError(f"wrong: {', '.join(self.wrong)}\n{self}")

    def __str__(self) -> str:
        """A table, one row a layer."""
        cells = [
            (
                row.layer or "(the model)",
                row.type,
                f"{row.parameters:,}",
                f"{row.norms:.1e}",
                f"{row.clipped_sum:.1e}",
                f"WRONG: {', '.join(row.wrong)}" if row.wrong else "ok",
            )
            for row in self.rows
        ]
        wrong = self.wrong
        for name, value in (
            ("(losses)", f"{self.losses:.1e}"),
            ("(clipping coefficients)", f"{self.coefficients:.1e}"),
            ("(contribution of a sample)", f"{self.contribution:.6f} C"),
        ):
            cells.append((name, "", "", value, "", "WRONG" if name in wrong else "ok"))
        headers = ("layer", "type", "parameters", "norms", "clipped sum", "verdict")
        table = tabulate(
            cells, headers, colalign=("left", "left", "right", "right", "right", "left"), disable_numparse=True
        )
        verdict = "all right" if self.ok else f"WRONG: {len(wrong)} of the above"
        return "\n".join([table, *self.notes, verdict])


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
    inner = model if wrapper is None else wrapper._module
    inner = getattr(inner, "_orig_mod", inner)
    if any(isinstance(param, DTensor) for param in inner.parameters()):
        raise NotImplementedError(
            "the model lies over several processes, and all is done on copies in one; check it before fully_shard and "
            "parallelize_module"
        )
    if max_grad_norm is None:
        max_grad_norm = getattr(wrapper, "max_grad_norm", None)
    subject = _Subject(
        model=inner,
        hooks=getattr(inner if wrapper is None else wrapper, "autograd_grad_sample_hooks", []),
        criterion=criterion.criterion if isinstance(criterion, DPLossFastGradientClipping) else criterion,
        inputs=dict(inputs) if isinstance(inputs, Mapping) else inputs,
        target=target,
        batch_size=_batch_size(inputs, target),
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
        max_grad_norm, steps = _steps(subject, chosen, modes, max_grad_norm)
        # The model that was wrapped is in cycles; it makes room for the oracle's.
        gc.collect()
        report = _compared(subject, chosen, steps, max_grad_norm, tolerance)
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


@dataclass(frozen=True)
class _Subject:
    """What is checked, of which copies are made.

    Attributes:
        model: the user's model.
        hooks: handles of Opacus' hooks on it.
        criterion: the user's criterion.
        inputs: what the model is called with.
        target: what it is to learn.
        batch_size: number of samples in these.
        batch_first: whether the batch is the first axis of the inputs, or the second.
        reduction: of the loss, "mean" or "sum".
        trained: names of the parameters that are compared; all others are frozen in the copies.
        dtype: of the copies; None for the model's own.
        eval_mode: whether the copies are put into eval mode.
        notes: what has to be said of all this.
    """

    model: nn.Module
    hooks: Sequence[Any]
    criterion: Callable[..., Any]
    inputs: Any
    target: Any
    batch_size: int
    batch_first: bool
    reduction: str
    trained: frozenset[str]
    dtype: torch.dtype | None
    eval_mode: bool = False
    notes: tuple[str, ...] = ()

    def copies(self) -> tuple[nn.Module, Callable[..., Any]]:
        """A copy of the model, without Opacus' hooks, and one of the criterion."""
        # The hooks hold what wraps the model, so they are replaced by something else in the copy before they are removed from it.
        memo: dict[int, Any] = {id((hook.hooks_dict_ref() or {}).get(hook.id)): ... for hook in self.hooks}
        memo.pop(id(None), None)
        try:
            # Together, for a criterion that has the model in it.
            model, criterion, hooks = copy.deepcopy((self.model, self.criterion, list(self.hooks)), memo)
        except Exception as error:
            raise ValueError(
                f"the model or the criterion cannot be copied, and all is done on copies: {error}. A tensor that is "
                "left from a forward may be in it; check it as it is when it is made"
            ) from error
        for hook in hooks:
            hook.remove()
        vars(model).pop("autograd_grad_sample_hooks", None)
        for part in (model, criterion):
            if self.dtype is not None and isinstance(part, nn.Module):
                part.to(self.dtype)
        for name, param in model.named_parameters():
            if name not in self.trained:
                param.requires_grad_(False)
        return (model.eval() if self.eval_mode else model), criterion

    def batch(self, samples: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """A copy of some samples: positional and keyword arguments of the model, and the target."""
        inputs = self._some(self.inputs, samples, (0,) if self.batch_first else (1, 0))
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        return args if isinstance(args, tuple) else (args,), kwargs, self._some(self.target, samples, (0,))

    def _some(self, tree: Any, samples: Sequence[int], axes: Sequence[int]) -> Any:
        def rows(tensor: Tensor) -> Tensor:
            axis = next((axis for axis in axes if tensor.dim() > axis and tensor.shape[axis] == self.batch_size), None)
            index = torch.tensor(samples, device=tensor.device)
            tensor = tensor.detach().clone() if axis is None else tensor.detach().index_select(axis, index)
            return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

        return tree_map_only(Tensor, rows, tree)

    def loss(self, model: nn.Module, criterion: Callable[..., Any], samples: Sequence[int]) -> Tensor:
        """The user's own loss, shape ``()``."""
        args, kwargs, target = self.batch(samples)
        loss = criterion(model(*args, **kwargs), target)
        if not isinstance(loss, Tensor):
            raise ValueError(f"the criterion returns {type(loss).__name__}, not a tensor")
        return getattr(loss, self.reduction)() if loss.dim() else loss


def _batch_size(inputs: Any, target: Any) -> int:
    if any(isinstance(leaf, PackedSequence) for leaf in tree_leaves(inputs, is_leaf=_is_packed)):
        raise NotImplementedError(
            "samples cannot be picked from a PackedSequence; check a model that packs its inputs itself"
        )
    tensors = [tensor for tensor in tensors_in(target) if tensor.dim() > 0]
    if not tensors:
        raise ValueError("the target has no tensor with a batch axis, so the number of samples is not known")
    return len(tensors[0])


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedSequence)


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


def _repeatable(subject: _Subject, samples: Sequence[int], devices: Sequence[int]) -> tuple[_Subject, float]:
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


def _run_twice(subject: _Subject, samples: Sequence[int], devices: Sequence[int]) -> tuple[torch.dtype, bool]:
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


# This package


class _Steps(NamedTuple):
    """What this package gives in one mode.

    Attributes:
        losses: shape ``(N,)``.
        norms: of each parameter by name, shape ``(N,)``.
        coefficients: shape ``(N,)``.
        sums: the clipped sum of each parameter by name.
        contribution: the largest norm of the difference that one sample makes to the clipped sum.
    """

    losses: Tensor
    norms: dict[str, Tensor]
    coefficients: Tensor
    sums: dict[str, Tensor]
    contribution: float


def _steps(
    subject: _Subject, samples: Sequence[int], modes: Sequence[str], max_grad_norm: float | None
) -> tuple[float, list[_Steps]]:
    """In each mode a clipped backward pass, and one without each of the samples; and the clipping norm, if none is given."""
    model, criterion = subject.copies()
    params: dict[str, Any] = {name: param for name, param in model.named_parameters() if param.requires_grad}
    given = 1.0 if max_grad_norm is None else max_grad_norm
    wrapped = GradSampleModuleFastGradientClipping(
        model, batch_first=subject.batch_first, loss_reduction=subject.reduction, max_grad_norm=given
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(params.values(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=given,
        expected_batch_size=len(samples),
        loss_reduction=subject.reduction,
    )
    private = DPLossFastGradientClipping(wrapped, optimizer, criterion, subject.reduction)

    def clipped_sum(some: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        args, kwargs, target = subject.batch(some)
        with restored(model):
            loss = private(wrapped(*args, **kwargs), target)
            loss.backward()
        sums = {name: param.summed_grad for name, param in params.items()}
        optimizer.zero_grad()
        return loss.loss_per_sample.detach(), sums

    if max_grad_norm is None:
        clipped_sum(samples)
        # Some samples are clipped and some are not; one alone is.
        optimizer.max_grad_norm = 0.99 * wrapped.per_sample_gradient_norms.mean().item() or 1.0
    steps = []
    for mode in modes:
        private.clipped_backward = MODES[mode]
        losses, sums = clipped_sum(samples)
        norms = {name: param._norm_sample for name, param in params.items()}
        coefficients = wrapped.clipping.coefficients(wrapped.per_sample_gradient_norms)
        moved = [_moved(sums, clipped_sum, samples, sample) for sample in samples]
        steps.append(_Steps(losses, norms, coefficients, sums, _largest(moved)))
    return optimizer.max_grad_norm, steps


def _moved(sums: dict[str, Tensor], clipped_sum: Callable, samples: Sequence[int], sample: int) -> float:
    """The norm of the difference that a sample makes to the clipped sum."""
    others = [other for other in samples if other != sample]
    try:
        rest = clipped_sum(others)[1] if others else {}
    except Exception as error:
        raise ValueError(
            f"without sample {sample} the batch cannot be run, so that nothing can be compared: {error}"
        ) from error
    differences = [total - rest[name] if others else total for name, total in sums.items()]
    return math.hypot(*(torch.linalg.vector_norm(one, dtype=torch.float64).item() for one in differences))


# The oracle


def _alone(subject: _Subject, samples: Sequence[int]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The loss of each sample alone, and its gradients by plain autograd."""
    model, criterion = subject.copies()
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for sample in samples:
        with restored(model):
            try:
                loss = subject.loss(model, criterion, [sample])
            except Exception as error:
                raise ValueError(
                    f"sample {sample} cannot be run alone, so that there is nothing to compare it with: {error}"
                ) from error
            if not torch.isfinite(loss):
                raise ValueError(f"the loss of sample {sample} alone is {loss.item()}; check without it")
            # What the loss does not use has no gradient.
            used = torch.autograd.grad(loss, list(params.values()), allow_unused=True) if loss.requires_grad else ()
        gradients = {name: gradient for name, gradient in zip(params, used) if gradient is not None}  # noqa: B905
        yield loss.detach(), {name: grad.to_dense() if grad.is_sparse else grad for name, grad in gradients.items()}


def _compared(
    subject: _Subject, samples: Sequence[int], steps: Sequence[_Steps], max_grad_norm: float, tolerance: float
) -> CheckReport:
    losses = torch.zeros(len(samples), dtype=torch.float64, device="cpu")
    norms = {name: torch.zeros_like(losses) for name in steps[0].norms}
    for n, (loss, gradients) in enumerate(_alone(subject, samples)):
        losses[n] = loss
        for name, gradient in gradients.items():
            norms[name][n] = torch.linalg.vector_norm(gradient, dtype=torch.float64)
            for step in steps:
                # What remains of the clipped sum when the oracle's is taken from it.
                step.sums[name] = step.sums[name] - step.coefficients[n].to(gradient) * gradient
    total_norms = torch.stack(list(norms.values())).norm(dim=0)
    coefficients = (max_grad_norm / total_norms).clamp(max=1.0)
    share = min(1.0, 100 * tolerance)
    rows: dict[str, Row] = {}
    for name, norm in norms.items():
        path, _, short = name.rpartition(".")
        row = rows.setdefault(path, Row(path, type(subject.model.get_submodule(path)).__name__))
        scale = norm.maximum(share * total_norms)
        norm_error = _largest(_relative(_double(step.norms[name]) - norm, scale) for step in steps)
        sum_error = _largest(
            _relative(_double(step.sums[name].norm()), (_double(step.coefficients) * scale).sum()) for step in steps
        )
        row.parameters += subject.model.get_parameter(name).numel()
        row.norms, row.clipped_sum = _largest([row.norms, norm_error]), _largest([row.clipped_sum, sum_error])
        if not (norm_error <= tolerance and sum_error <= tolerance):
            row.wrong.append(short)
    scale = losses.abs().max()
    return CheckReport(
        rows=list(rows.values()),
        losses=_largest(_relative(_double(step.losses) - losses, scale) for step in steps),
        coefficients=_largest(_relative(_double(step.coefficients) - coefficients, coefficients) for step in steps),
        contribution=_largest(step.contribution / max_grad_norm for step in steps),
        clipped=int((total_norms > max_grad_norm).sum()),
        max_grad_norm=max_grad_norm,
        tolerance=tolerance,
    )


def _double(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float64)


def _relative(error: Tensor, scale: Tensor) -> float:
    """The largest error; NaN if there is one."""
    return (error.abs() / scale.clamp(min=torch.finfo(torch.float64).tiny)).max().item()


def _largest(values: Iterable[float]) -> float:
    """As `max`, which passes over NaN."""
    return torch.tensor(list(values), dtype=torch.float64, device="cpu").max().item()
