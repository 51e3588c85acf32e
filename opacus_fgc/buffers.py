"""The buffers of a model at one moment, and whether they have changed since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class Buffers:
    """A copy of all buffers of a model.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tables = {module: dict(module._buffers) for module in model.modules()}
        self._versions = {path: (buffer, buffer._version) for path, buffer in model.named_buffers()}
        self._values = {buffer: buffer.clone() for buffer, _ in self._versions.values()}

    def changed(self, model: nn.Module) -> set[str]:
        """The names of buffers that were written to, replaced or added since."""
        return {path for path, buffer in model.named_buffers() if not self._has(path, buffer)}

    def _has(self, path: str, buffer: Tensor) -> bool:
        before, version = self._versions.get(path, (None, 0))
        return before is buffer and version == buffer._version

    def restore(self) -> None:
        """Makes all buffers what they were."""
        for module, table in self._tables.items():
            module._buffers.clear()
            module._buffers.update(table)
        with torch.no_grad():
            for buffer, version in self._versions.values():
                if buffer._version != version:
                    buffer.copy_(self._values[buffer])


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
