"""Private steps against plain autograd on one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opacus_fgc._compat.opacus import norm_sample
from opacus_fgc.certificates.model_state import restored
from opacus_fgc.grad_sample_module import GradSampleModuleFastGradientClipping
from opacus_fgc.loss import DPLossFastGradientClipping
from opacus_fgc.model_check.report import CheckReport, Row
from opacus_fgc.model_check.subject import Subject
from opacus_fgc.optimizer import DPOptimizerFastGradientClipping
from opacus_fgc.privacy_engine import MODES

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


def steps(
    subject: Subject, samples: Sequence[int], modes: Sequence[str], max_grad_norm: float | None
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
        norms = {name: norm_sample(param) for name, param in params.items()}
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


def _alone(subject: Subject, samples: Sequence[int]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
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


def compared(
    subject: Subject, samples: Sequence[int], steps: Sequence[_Steps], max_grad_norm: float, tolerance: float
) -> CheckReport:
    """What steps of this package gave, beside what plain autograd gives for each sample alone.

    Args:
        subject: what is checked.
        samples: those that are compared.
        steps: what each mode gave; their sums are used up.
        max_grad_norm: the clipping norm.
        tolerance: relative errors from which on something is wrong.
    """
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
