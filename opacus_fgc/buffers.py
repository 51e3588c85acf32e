"""The buffers of a model at one moment, and whether they have changed since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class Buffers:
    """A copy of all buffers of a model, and of the plain attributes by which modules know what they have made of them.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tables = {module: dict(module._buffers) for module in model.modules()}
        self._flags = {module: _flags(module) for module in self._tables}
        self._versions = {path: (buffer, buffer._version) for path, buffer in model.named_buffers()}
        self._values = {buffer: buffer.clone() for buffer, _ in self._versions.values()}

    def changed(self, model: nn.Module) -> set[str]:
        """The names of buffers that were written to, replaced or added since."""
        return {path for path, buffer in model.named_buffers() if not self._has(path, buffer)}

    def _has(self, path: str, buffer: Tensor) -> bool:
        before, version = self._versions.get(path, (None, 0))
        return before is buffer and version == buffer._version

    def restore(self, counters: bool = True) -> None:
        """Makes all of them what they were.

        Args:
            counters: whether also the attributes of modules to which no buffer was added.
        """
        for module, table in self._tables.items():
            added = module._buffers.keys() - table.keys()
            module._buffers.clear()
            module._buffers.update(table)
            if added or counters:
                for name in _flags(module).keys() - self._flags[module].keys():
                    delattr(module, name)
                vars(module).update(self._flags[module])
        with torch.no_grad():
            for buffer, version in self._versions.values():
                if buffer._version != version:
                    buffer.copy_(self._values[buffer])


def _flags(module: nn.Module) -> dict[str, object]:
    """Attributes of a module that are numbers and the like: counters, and whether a table was made."""
    attributes = vars(module).items()
    return {name: value for name, value in attributes if isinstance(value, (int, float, str)) and name != "training"}


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """A context after which all buffers are as before it, so that autograd need not know."""
    before = Buffers(model)
    with ExitStack() as versions:
        for buffer in model.buffers():
            versions.enter_context(torch.autograd._unsafe_preserve_version_counter(buffer))
        try:
            yield
        finally:
            before.restore()
