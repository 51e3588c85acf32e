"""What `torch.compile` leaves on modules, and how to keep it off."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._functorch import config

disable_dynamo = torch._disable_dynamo
"""A decorator: `torch.compile` leaves the function as it is. It does not load the compiler by itself.

Private: ``torch._disable_dynamo``, torch 2.6 to 2.15.
"""


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` returned, or was compiled in place; its parts do not count.

    Private: ``_orig_mod`` of the former, ``Module._compiled_call_impl`` of the latter, torch 2.6 to 2.15.

    Args:
        module: any module.
    """
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given, if a module is what it returned; else the module itself.

    Private: ``_orig_mod``, torch 2.6 to 2.15.

    Args:
        module: any module.
    """
    return getattr(module, "_orig_mod", module)


def call_uncompiled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module with all of its hooks, though it was compiled in place.

    Private: ``Module._call_impl``, torch 2.6 to 2.15.

    Args:
        module: any module.
        *args: what it is called with.
        **kwargs: likewise.
    """
    return module._call_impl(*args, **kwargs)


def donates_buffers() -> bool:
    """Whether compiled backward passes give up what they are given, and so may run but once.

    Private: ``torch._functorch.config.donated_buffer``, torch 2.6 to 2.15.
    """
    return config.donated_buffer


def set_donates_buffers(donates: bool) -> None:
    """Sets what `donates_buffers` tells, for the whole process.

    Args:
        donates: whether backward passes may run but once.
    """
    config.donated_buffer = donates
