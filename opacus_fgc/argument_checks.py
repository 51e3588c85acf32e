"""What is refused before or while a model is wrapped, and the names by which errors call layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeGuard

from opacus.utils.module_utils import trainable_modules
from torch import nn

from opacus_fgc._compat.modules import NormBase, parameters_by_name
from opacus_fgc.errors import PrivacyNotImplementedError
from opacus_fgc.per_sample import PerSampleGradient


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether a value is one finite number (not a bool, a list, a tensor)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number from 1 on (not a bool)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_loss_reduction(loss_reduction: object) -> None:
    """Raises a ValueError if the reduction is none that Opacus knows."""
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"loss_reduction is {loss_reduction!r}; it is either 'mean' or 'sum'")


def check_nonfinite(nonfinite: object) -> None:
    """Raises a ValueError if it does not say what to do about samples with inf or NaN in their gradients."""
    if nonfinite not in ("error", "drop"):
        raise ValueError(f"nonfinite is {nonfinite!r}; it is either 'error' or 'drop'")


def describe(name: str, module: nn.Module) -> str:
    """What to call a layer in errors, given its name in the model."""
    return f"layer '{name}' ({type(module).__name__})" if name else f"the model itself ({type(module).__name__})"


def refuse_running_statistics(model: nn.Module) -> None:
    """Raises a PrivacyNotImplementedError if a trainable layer keeps running statistics of the data."""
    for name, module in trainable_modules(model):
        if isinstance(module, NormBase) and module.track_running_stats:
            raise PrivacyNotImplementedError(
                f"{describe(name, module)} is trainable and keeps running statistics in its buffers, which carry one "
                "sample's data to another's output. Replace it (opacus.validators.ModuleValidator.fix does so), or "
                "freeze its parameters and put it in eval mode"
            )


def refuse_hidden_parameters(model: nn.Module) -> None:
    """Raises a NotImplementedError if a trainable layer gives something else than its parameter when asked for it by name."""
    for path, layer in model.named_modules():
        for name, param in parameters_by_name(layer).items():
            if param is not None and param.requires_grad and getattr(layer, name, None) is not param:
                raise NotImplementedError(
                    f"{describe(path, layer)} gives another tensor than its parameter when asked for '{name}', by a property "
                    "or a "
                    "__getattr__ of its own, so that what initializes, shards or serves layers does not reach it. Give what is "
                    "computed from the parameter another name, or use torch.nn.utils.parametrize"
                )


def check_forms(params: Mapping[str, Any], forms: Mapping[Any, PerSampleGradient]) -> None:
    """Raises if a sampler did not answer for just the parameters of its layer."""
    for param, form in forms.items():
        for own in params.values():
            if own is param:
                break
        else:
            raise ValueError(
                f"its sampler gives per-sample gradients for something of shape {tuple(param.shape)} that is no parameter of "
                "its own; those of its children have taps of their own"
            )
        if form.shape != param.shape:
            raise ValueError(
                f"its sampler gives per-sample gradients of shape {tuple(form.shape)} for a parameter of shape "
                f"{tuple(param.shape)}"
            )
    for name, param in params.items():
        if param.requires_grad and param not in forms:
            raise NotImplementedError(
                f"its sampler gives nothing for its parameter '{name}' of shape {tuple(param.shape)}; register a norm "
                "sampler for it that does (opacus_fgc.register_norm_sampler), or freeze the parameter"
            )


def refuse_overlap(model: nn.Module, tapped: set[nn.Module], whole: set[nn.Module]) -> None:
    """Raises a NotImplementedError if a layer with a tap of its own is a part of one that is tapped as a whole.

    Args:
        model: the model, for names.
        tapped: all layers that get a tap.
        whole: those of them whose tap stands for everything in them.
    """
    names = {module: name for name, module in model.named_modules()}
    for layer in whole:
        for child in tapped.intersection(layer.modules()) - {layer}:
            raise NotImplementedError(
                f"{describe(names[child], child)} is a part of {describe(names[layer], layer)}, which has no norm sampler and "
                "goes to functorch as a whole, and is used elsewhere too. Register a norm sampler for the latter "
                "(opacus_fgc.register_norm_sampler)"
            )
