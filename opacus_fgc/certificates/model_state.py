"""What a model keeps from one forward to the next: its buffers, and the plain attributes of its modules."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from opacus_fgc._compat.autograd import preserve_version_counter
from opacus_fgc._compat.modules import buffers_by_name

_OF_MODULES = frozenset(vars(nn.Module()))
_VALUES = (bool, int, float, complex, str, bytes, type(None))


class ModelState:
    """A copy of the buffers of a model, of the plain attributes of its modules, and of all that is in these.

    Frozen parameters of types that are not torch's, such as quantized ones, may take other data or attributes in a forward. These
    are remembered, and not copied.

    Containers and objects in attributes are looked into, but for modules, functions, types, and objects of torch that are no
    tensors or generators of random numbers.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.values: dict[str, Any] = {}
        self._buffers = {module: dict(buffers_by_name(module)) for module in model.modules()}
        self._attributes: list[tuple[dict, dict]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._generators: list[tuple[Any, Any]] = []
        self._known: set[int] = set()
        frozen = [param for param in model.parameters() if not param.requires_grad and _is_of_others(type(param))]
        self._data = [(param, param.data) for param in frozen]
        self._places = set(map(_place, frozen)) - {0}
        for param in frozen:
            self._note_parts(param)
        self.buffers = {path for path, _ in model.named_buffers()}
        for path, buffer in model.named_buffers():
            self._note(path, buffer)
        for path, module in model.named_modules():
            own = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
            self._attributes.append((vars(module), {**own, "training": module.training}))
            for name, value in own.items():
                self._note(f"{path}.{name}".lstrip("."), value)

    def _note(self, path: str, value: Any) -> None:
        if isinstance(value, _VALUES):
            self.values[path] = value
            return
        if isinstance(value, nn.Parameter) or id(value) in self._known:
            return
        if self._places and isinstance(value, Tensor) and _place(value) in self._places:
            return  # the weights of a quantized layer, which are too large to copy
        self._known.add(id(value))
        if isinstance(value, Tensor):
            self.values[path] = copy = value.detach().clone()
            self._tensors[id(value)] = (value, copy)
        elif isinstance(value, torch.Generator):
            self._generators.append((value, value.get_state()))
        elif isinstance(value, (dict, list, deque, set)):
            self._containers.append((value, value.copy()))
            self.values[path] = len(value)
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for place, item in items:
                self._note(f"{path}[{place!r}]", item)
        elif isinstance(value, tuple):
            for place, item in enumerate(value):
                self._note(f"{path}[{place}]", item)
        elif _is_object(value):
            self._attributes.append((vars(value), dict(vars(value))))
            for name, item in vars(value).items():
                self._note(f"{path}.{name}", item)

    def _note_parts(self, value: Any) -> None:
        """Remembers the attributes of a parameter, and of the objects in them; a part of its data is not copied."""
        self._known.add(id(value))
        self._attributes.append((vars(value), dict(vars(value))))
        for part in vars(value).values():
            if isinstance(part, Tensor):
                self._known.add(id(part))
            elif id(part) not in self._known and _is_object(part):
                self._note_parts(part)

    def restore(self) -> None:
        """Makes all of it what it was."""
        for module, table in self._buffers.items():
            buffers = buffers_by_name(module)
            buffers.clear()
            buffers.update(table)
        for attributes, before in self._attributes:
            for name in attributes.keys() - before.keys() - _OF_MODULES:
                del attributes[name]
            attributes.update(before)
        for param, data in self._data:
            if _place(param) != _place(data) or param.shape != data.shape:
                param.data = data
        for container, before in self._containers:
            container.clear()
            (container.update if isinstance(container, (dict, set)) else container.extend)(before)
        for generator, state in self._generators:
            generator.set_state(state)
        with torch.no_grad():
            for tensor, copy in self._tensors.values():
                # What autograd made cannot be written to, and is replaced rather than changed.
                if tensor.is_leaf and tensor.shape == copy.shape and not torch.equal(tensor, copy):
                    tensor.copy_(copy)

    def differs_from(self, other: ModelState) -> set[str]:
        """The paths of what is not the same in both."""
        paths = self.values.keys() | other.values.keys()
        return {path for path in paths if not _same(self.values.get(path, paths), other.values.get(path, paths))}


def _is_object(value: Any) -> bool:
    if callable(value) or isinstance(value, (type, nn.Module)) or not hasattr(value, "__dict__"):
        return False
    return _is_of_others(type(value))


def _is_of_others(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in ("torch", "builtins", "opacus_fgc")


def _place(tensor: Tensor) -> int:
    """Where the data of a tensor is; 0 where it is none of one piece."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            return False
        return torch.equal(first, second) or bool(torch.isclose(first, second, 0, 0, equal_nan=True).all())
    if isinstance(first, float) and isinstance(second, float):
        return first == second or (first != first and second != second)
    return type(first) is type(second) and first == second


@contextmanager
def restored(model: nn.Module) -> Iterator[ModelState]:
    """A context after which the state of a model is as before it, so that autograd need not know."""
    before = ModelState(model)
    with ExitStack() as versions:
        for tensor, _ in before._tensors.values():
            with suppress(RuntimeError):  # of inference mode
                versions.enter_context(preserve_version_counter(tensor))
        try:
            yield before
        finally:
            before.restore()
