"""Whether the buffers of a model have changed since a moment."""

from __future__ import annotations

from torch import Tensor, nn

from opacus_fgc._compat.autograd import version_of
from opacus_fgc._compat.modules import buffers_by_name, every_module


class Buffers:
    """The buffers of a model at one moment: which they are, and how often each had been written to.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._versions = {path: (buffer, version_of(buffer)) for path, buffer in model.named_buffers()}
        self._in_order = _in_order(model)

    def changed(self, model: nn.Module) -> set[str]:
        """The names of buffers that were written to, replaced or added since."""
        if _in_order(model) == self._in_order:
            return set()
        return {path for path, buffer in model.named_buffers() if not self._has(path, buffer)}

    def _has(self, path: str, buffer: Tensor) -> bool:
        before, version = self._versions.get(path, (None, 0))
        return before is buffer and version == version_of(buffer)


def _in_order(model: nn.Module) -> list[tuple[int, int]]:
    """Which buffers there are, and their versions, without names: in a fraction of the time, for it is asked twice a step."""
    return [
        (id(buffer), version_of(buffer))
        for module in every_module(model)
        for buffer in buffers_by_name(module).values()
        if buffer is not None
    ]
