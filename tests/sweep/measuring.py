"""What a class gives: by how much it is not the oracle, or why it is refused."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from opacus_fgc import (
    DPLossFastGradientClipping,
    DPOptimizerFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyRuntimeError, PrivacyValueError
from opacus_fgc.privacy_engine import MODES
from tests.reference import reference
from tests.sweep.building import NotBuiltError, Subject, built
from tests.sweep.tasks import N, Task

TOLERANCE, IN_FLOAT32 = 1e-10, 1e-5
REFUSALS = (PrivacyNotImplementedError, PrivacyValueError, PrivacyRuntimeError, NotImplementedError)


class Row(NamedTuple):
    """A row of a table."""

    name: str
    experts: str
    result: str
    why: str = ""


class Called(nn.Module):
    """A model that is called with keyword arguments in one dictionary."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        return self.model(**inputs)


class InFloat32(TorchFunctionMode):
    """Notes whether something with a gradient is computed in float32."""

    found = False

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.dtype == torch.float32 and output.requires_grad:
            self.found = True
        return output


class InDouble(TorchFunctionMode):
    """Computes in double precision what models compute in float32 whatever their dtype, so that all differences show."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda leaf: torch.float64 if leaf is torch.float32 else leaf, (args, kwargs or {}))
        return args[0].double() if func is Tensor.float else func(*args, **kwargs)


def private(subject: Subject, mode: str) -> tuple[nn.Module, GradSampleModuleFastGradientClipping, Any]:
    """A copy of a model, wrapped, and its criterion."""
    model = copy.deepcopy(subject.model)
    wrapper = GradSampleModuleFastGradientClipping(model)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=N,
    )
    return model, wrapper, DPLossFastGradientClipping(wrapper, optimizer, subject.call.losses, backward=MODES[mode])


def difference(subject: Subject, *modes: str) -> float:
    """By how much the clipped gradients of two steps are not the oracle's, beside the largest norm; in the worst of the modes."""
    call = subject.call
    # First of all, for batch norms run on no sample alone.
    ways = [private(subject, mode) for mode in modes]
    plain = Called(copy.deepcopy(subject.model))
    worst = 0.0
    for _ in range(2):
        inputs, target = call.batch()
        oracle = reference(plain, lambda *args: call.losses(*args).sum(), (inputs,), target, N)
        norms = oracle.total_norm()
        max_grad_norm = norms.median().item()
        clipped, scale = oracle.clipped_sum(max_grad_norm), norms.max()
        for model, wrapper, criterion in ways:
            wrapper.max_grad_norm = max_grad_norm
            criterion(wrapper(**inputs), target).backward()
            differences = [(wrapper.per_sample_gradient_norms - norms).abs().max() / scale]
            for path, param in model.named_parameters():
                if param.requires_grad:
                    differences.append((param.summed_grad - clipped[f"model.{path}"]).norm() / scale)
            worst = max(worst, torch.stack(differences).max().item())
            criterion.optimizer.zero_grad()
    return worst


def measured(task: Task, model_type: str, name: str, experts: str | None) -> Row:
    """The row of a class."""
    dtypes = [torch.float32] if experts == "grouped_mm" else [torch.float64, torch.float32]
    shown = experts or ""
    failures = []
    for dtype in dtypes:
        torch.set_default_dtype(dtype)
        try:
            subject = built(task, model_type, name, experts, dtype)
            break
        except NotBuiltError as error:
            failures.append(str(error))
    else:
        return Row(name, shown, "not built", failures[0])
    inputs, _ = subject.call.batch()
    with InFloat32() as watch:
        copy.deepcopy(subject.model)(**inputs)
    whole = dtype == torch.float64 and not watch.found
    runs = [(mode, nullcontext(), TOLERANCE if whole else IN_FLOAT32) for mode in MODES]
    if dtype == torch.float64 and watch.found:
        runs += [(mode, InDouble(), TOLERANCE) for mode in MODES]
    worst = 0.0
    for mode, context, tolerance in runs:
        try:
            with context:
                found = difference(subject, mode)
        except REFUSALS as error:
            return Row(name, shown, "refused", str(error))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            return Row(name, shown, "error", why + (", in double" if isinstance(context, InDouble) else ""))
        if not found <= tolerance:
            return Row(name, shown, "wrong", f"{mode}: off by {found:.1e}")
        worst = found if tolerance < IN_FLOAT32 and runs[0][2] == IN_FLOAT32 else max(worst, found)
    return Row(name, shown, "exact", f"{worst:.0e}" + (" in float32" if dtype == torch.float32 else ""))
