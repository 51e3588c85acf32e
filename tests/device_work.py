"""What a step asks of a device, counted by operation on a CPU: kernels, and what a GPU would have to be waited for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import opacus_fgc

ROOT = Path(opacus_fgc.__file__).parent

# Operations whose result, or its shape, the CPU has to know before it goes on.
READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "_unique", "_unique2"),
    *("unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
# Operations that start no kernel, though their schema does not say that they are views.
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
    "resize_",
    "squeeze_",
}


def is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)


def waits(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a GPU would be waited for."""
    if name in READS:
        return True
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return False


def origin() -> str:
    """The innermost line of the package that is at work."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT):
            return f"{path.relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class Copies(TorchFunctionMode):
    """Counts methods that copy what a tensor has to the CPU, of which operations say nothing where it lies there."""

    def __init__(self, reads: Counter[tuple[str, str]]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            self.reads[func.__name__, origin()] += 1
        return func(*args, **(kwargs or {}))


class DeviceWork(TorchDispatchMode):
    """Counts what operations a device is given.

    Attributes:
        kernels: how often each operation ran that is no view, by its name and the line of the package that called it.
        reads: likewise those that a GPU would be waited for. All tensors count as its own.
        elsewhere: likewise those that take or give something on the CPU, where the model lies elsewhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.reads: Counter[tuple[str, str]] = Counter()
        self.elsewhere: Counter[tuple[str, str]] = Counter()
        self._copies = Copies(self.reads)

    def __enter__(self) -> DeviceWork:
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if waits(name, args, kwargs):
            self.reads[name, origin()] += 1
        if not is_view(func) and name not in FREE and not name.startswith("profiler::"):
            self.kernels[name, origin()] += 1
        result = func(*args, **kwargs)
        if any(isinstance(one, Tensor) and one.device.type == "cpu" for one in tree_leaves((args, kwargs, result))):
            self.elsewhere[name, origin()] += 1
        return result
