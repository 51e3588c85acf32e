"""A tiny model of a class, and how it is called."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from tests.sweep.tasks import Call, N, Task
from tests.sweep.tiny import BY_TYPE, VARIANTS, tiny_fields

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
MOST_PARAMETERS = 10**7


class Subject(NamedTuple):
    """A model, and how it is called."""

    model: nn.Module
    call: Call


class NotBuiltError(Exception):
    """No tiny model of a class runs."""


def has_experts(name: str) -> bool:
    """Whether a class has experts of which transformers has several implementations."""
    try:
        return bool(getattr(transformers, name)._can_set_experts_implementation())
    except Exception:
        return False


def _model(config: Any, model_class: Any, experts: str | None, dtype: torch.dtype) -> nn.Module:
    if model_class.config_class is not None and not isinstance(config, model_class.config_class):
        config = next((one for one in vars(config).values() if isinstance(one, model_class.config_class)), config)
    options = {} if experts is None else {"experts_implementation": experts}
    model = model_class._from_config(config, **options).to(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    if sum(param.numel() for param in model.parameters()) > MOST_PARAMETERS:
        raise NotBuiltError(f"more than {MOST_PARAMETERS} parameters")
    return model


def _try(model: nn.Module, call: Call) -> None:
    inputs, target = call.batch()
    # Some keep tensors from a forward, and cannot be copied then.
    tried, again = copy.deepcopy(model), copy.deepcopy(model)
    losses = call.losses(tried(**inputs), target)
    if losses.shape != (N,):
        raise ValueError(f"losses of shape {tuple(losses.shape)}")
    if not torch.equal(losses, call.losses(again(**inputs), target)):
        raise ValueError("it draws random numbers, whatever its configuration")
    losses.sum().backward()
    if not all(param.grad.isfinite().all() for param in tried.parameters() if param.grad is not None):
        raise ValueError("gradients that are not finite")


def built(task: Task, model_type: str, name: str, experts: str | None, dtype: torch.dtype) -> Subject:
    """A tiny model of a class that runs and has gradients."""
    try:
        config_class = transformers.AutoConfig.for_model(model_type).__class__
        model_class = getattr(transformers, name)
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {error}") from error
    not_made, not_run = [], []
    for variant in VARIANTS:
        try:
            torch.manual_seed(0)
            fields = tiny_fields(config_class(), {**task.fields, **variant}) | BY_TYPE.get(model_type, {})
            model = _model(config_class(**fields), model_class, experts, dtype)
        except Exception as error:
            not_made.append(f"{type(error).__name__}: {error}")
            continue
        for call in task.calls(model):
            try:
                _try(model, call)
            except Exception as error:
                not_run.append(f"{type(error).__name__}: {error}")
                continue
            # All weights matter: those that begin at 0 would let nothing come through.
            with torch.no_grad():
                for param in model.parameters():
                    if param.requires_grad and param.is_floating_point():
                        param.add_(0.02 * torch.randn_like(param))
            return Subject(model, call)
    raise NotBuiltError((not_run + not_made)[0])
