"""Tensors that a model keeps in plain attributes: an index of relative positions, the ids of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from opacus_fgc._compat.autograd import version_of


def constants_of(model: nn.Module) -> dict[Tensor, int]:
    """The tensors in plain attributes of modules, also within lists, dicts and dataclasses, that need no gradient.

    They are no data of a batch to come, for as long as nobody replaces them or writes into them.

    Args:
        model: the model.

    Returns:
        The version that each has now.
    """
    found: dict[Tensor, int] = {}
    seen: set[int] = set()
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE:
                found.update((tensor, version_of(tensor)) for tensor in _tensors(value, seen))
    return found


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not value.requires_grad and not value.is_inference():
            yield value
        return
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = list(value)
    elif isinstance(value, SimpleNamespace) or (is_dataclass(value) and not isinstance(value, type)):
        inner = list(vars(value).values()) if hasattr(value, "__dict__") else []
    else:
        return
    if id(value) not in seen:
        seen.add(id(value))
        for each in inner:
            yield from _tensors(each, seen)
