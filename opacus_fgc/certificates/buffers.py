"""Whether the buffers of a model have changed since a moment."""

from __future__ import annotations

from torch import Tensor, nn

from opacus_fgc._compat.autograd import version_of


class Buffers:
    """The buffers of a model at one moment: which they are, and how often each had been written to.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._versions = {path: (buffer, version_of(buffer)) for path, buffer in model.named_buffers()}

    def changed(self, model: nn.Module) -> set[str]:
        """The names of buffers that were written to, replaced or added since."""
        return {path for path, buffer in model.named_buffers() if not self._has(path, buffer)}

    def _has(self, path: str, buffer: Tensor) -> bool:
        before, version = self._versions.get(path, (None, 0))
        return before is buffer and version == version_of(buffer)
