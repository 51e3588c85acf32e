"""What FSDP2 and `replicate` leave on modules and in the graph.

Without a name of theirs that this file needs, all but models in them works as before, and these are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from opacus_fgc._compat.autograd import node_type

FSDP_NODE: Any = None
"""The type of the node that FSDP2 puts into the graph in front of a module, an identity on its inputs; None if not known.

Private: ``torch.distributed.fsdp._fully_shard._fsdp_param_group.RegisterPostBackwardFunction``, torch 2.6 to 2.15.
"""

try:
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import RegisterPostBackwardFunction
except ImportError:
    pass
else:
    FSDP_NODE = node_type(RegisterPostBackwardFunction)


def require_fsdp() -> None:
    """Raises a NotImplementedError if `FSDP_NODE` is not known, so that nothing is with FSDP2 as it should be."""
    if FSDP_NODE is None:
        raise NotImplementedError(_UNKNOWN_FSDP)


def meshes_of(module: FSDPModule) -> list[DeviceMesh]:
    """The mesh of each group of parameters that FSDP2 shards together; none if it shards none of the module's own.

    Private: ``FSDPModule._get_fsdp_state`` (torch 2.6 to 2.15), its ``_fsdp_param_group`` or, in newer torch,
    ``_fsdp_param_groups``, and ``mesh_info`` of these.

    Args:
        module: what `torch.distributed.fsdp.fully_shard` was called on.

    Raises:
        NotImplementedError: if FSDP2 of this torch has none of these names.
    """
    with _names_of_fsdp():
        return [group.mesh_info.mesh for group in _param_groups(module)]


def gradient_divisors(module: FSDPModule, ranks: int) -> list[float]:
    """By what FSDP2 divides the sum of gradients over ranks, for each group of parameters.

    Private: see `meshes_of`; ``reduce_scatter_reduce_op`` and ``gradient_divide_factor`` of the groups.

    Args:
        module: as for `meshes_of`.
        ranks: by what it divides where it does not say so.

    Raises:
        NotImplementedError: if a user has set another factor; if FSDP2 of this torch has none of these names.
    """
    with _names_of_fsdp():
        return [_divisor(group, ranks) for group in _param_groups(module)]


def gather_for_loss(module: FSDPModule) -> None:
    """Gathers an FSDP2 module's own parameters, for a loss outside of its forward; they stay until backward has been there.

    So that another evaluation of that loss on some ranks alone, as in a trial, does not wait for the other ranks.

    Args:
        module: as for `meshes_of`.

    Raises:
        NotImplementedError: if FSDP2 of this torch cannot do that (``set_reshard_after_forward``, torch 2.7 and newer).
    """
    with _names_of_fsdp():
        module.set_reshard_after_forward(False, recurse=False)
    module.unshard()


def is_replicated(module: nn.Module) -> bool:
    """Whether ``torch.distributed._composable.replicate`` was called on a module.

    Private: ``torch.distributed._composable.contract._get_registry``, torch 2.6 to 2.15.

    Args:
        module: any module.

    Raises:
        NotImplementedError: if this torch does not tell, and there are several processes.
    """
    try:
        from torch.distributed._composable.contract import _get_registry
    except ImportError as error:
        if not dist.is_initialized():
            return False
        raise NotImplementedError(
            f"torch {torch.__version__} does not tell whether replicate was called on a module, which would reduce gradients "
            f"before they are clipped; {_SUPPORTED}"
        ) from error
    return "replicate" in (_get_registry(module) or {})


_SUPPORTED = "several processes are supported with torch 2.6 to 2.15"
_UNKNOWN_FSDP = (
    f"fully_shard of torch {torch.__version__} is not one that is known here; {_SUPPORTED}. Or use "
    "opacus.distributed.DifferentiallyPrivateDistributedDataParallel"
)


@contextmanager
def _names_of_fsdp() -> Iterator[None]:
    try:
        yield
    except AttributeError as error:
        raise NotImplementedError(_UNKNOWN_FSDP) from error


def _param_groups(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return groups if groups is not None else [state._fsdp_param_group] if state._fsdp_param_group else []


def _divisor(group: Any, ranks: int) -> float:
    if getattr(group, "reduce_scatter_reduce_op", None) is not None:
        raise NotImplementedError(
            "set_reduce_scatter_divide_factor is not supported; leave FSDP's mean over ranks as it is"
        )
    return float(getattr(group, "gradient_divide_factor", None) or ranks)
