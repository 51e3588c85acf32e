"""What modules hold in private tables, and base classes of layers that torch.nn does not name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv, instancenorm

ConvNd = conv._ConvNd
"""The base of all convolutions. Private: ``torch.nn.modules.conv._ConvNd``, torch 2.6 to 2.15."""

InstanceNorm = instancenorm._InstanceNorm
"""The base of instance norms. Private: ``torch.nn.modules.instancenorm._InstanceNorm``, torch 2.6 to 2.15."""

NormBase = batchnorm._NormBase
"""The base of layers with running statistics. Private: ``torch.nn.modules.batchnorm._NormBase``, torch 2.6 to 2.15."""

PRIVATE_NAMES_BESIDE_FORWARD = frozenset(("_get_name", "_load_from_state_dict", "_save_to_state_dict", "_version"))
"""Private names of `torch.nn.Module` that say how it is stored and printed, not what its ``forward`` does; torch 2.6 to 2.15."""

parameters_by_name: Callable[[nn.Module], dict[str, Any]] = attrgetter("_parameters")
"""The table of a module's own parameters: what is in their place at the moment, None too.

Private: ``Module._parameters``, torch 2.6 to 2.15.
"""

buffers_by_name: Callable[[nn.Module], dict[str, Any]] = attrgetter("_buffers")
"""The table of a module's own buffers, None too; to be written to. Private: ``Module._buffers``, torch 2.6 to 2.15."""


def every_module(model: nn.Module) -> list[nn.Module]:
    """A module and all in it, each once, in the order of `torch.nn.Module.modules`, in a tenth of its time.

    Private: ``Module._modules``, torch 2.6 to 2.15.

    Args:
        model: any module.
    """
    found: dict[int, nn.Module] = {}
    todo: list[nn.Module | None] = [model]
    while todo:
        module = todo.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            todo.extend(reversed(module._modules.values()))
    return list(found.values())


def remove_forward_hooks(module: nn.Module, hook: Callable) -> None:
    """Takes a hook off a module that is known by itself, since its handle is lost: of a copied module.

    Private: ``Module._forward_pre_hooks``, ``_forward_pre_hooks_with_kwargs``, ``_forward_hooks``,
    ``_forward_hooks_with_kwargs`` and ``_forward_hooks_always_called``, torch 2.6 to 2.15.

    Args:
        module: any module.
        hook: a forward pre-hook, a forward hook, or both.
    """
    for hooks, *flags in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
    ):
        for key in [key for key, one in hooks.items() if one is hook]:
            del hooks[key]
            for flag in flags:
                flag.pop(key, None)


def with_parameters(layer: nn.Module, kind: type, params: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> Any:
    """A layer like another one, with other tensors in the place of its parameters, which need not be parameters.

    Private: ``Module._parameters``, torch 2.6 to 2.15.

    Args:
        layer: the other layer, which stays as it is.
        kind: the type of the new one.
        params: the tensors, by the names of parameters; the others are as in the other layer.
        attributes: what else the new one has in another way.
    """
    other: Any = object.__new__(kind)
    vars(other).update({**vars(layer), **attributes, "_parameters": {**layer._parameters, **params}})
    return other


def dims_without_batch(layer: Any) -> int:
    """How many dimensions one sample has for an instance norm.

    Private: ``_InstanceNorm._get_no_batch_dim``, torch 2.6 to 2.15.

    Args:
        layer: an instance norm.
    """
    return layer._get_no_batch_dim()
