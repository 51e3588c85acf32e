"""What models in `torch.compile` need while they are private."""

from __future__ import annotations

from typing import ClassVar

from opacus_fgc._compat.compiler import donates_buffers, set_donates_buffers


class KeptBuffers:
    """While one of these is there, compiled backward passes may run twice, and leave what they are given.

    Torch asks for ``torch._functorch.config.donated_buffer = False`` where a graph goes through backward twice. It is one for
    the whole process, and goes back to what it was when the last of these is removed, or nobody has it any more.
    """

    _living: ClassVar[int] = 0
    _before: ClassVar[bool] = True

    def __init__(self) -> None:
        if not KeptBuffers._living:
            KeptBuffers._before = donates_buffers()
        KeptBuffers._living += 1
        self._needed = True
        set_donates_buffers(False)

    def remove(self) -> None:
        """Gives the setting back, unless others need it."""
        if self._needed:
            self._needed = False
            KeptBuffers._living -= 1
            if not KeptBuffers._living:
                set_donates_buffers(KeptBuffers._before)

    __del__ = remove

    def __reduce__(self) -> tuple[type[KeptBuffers], tuple[()]]:
        """A copy needs it for itself."""
        return KeptBuffers, ()
