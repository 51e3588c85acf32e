"""What activation checkpointing knows of itself while a part of a forward runs that is to run again."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import _CheckpointFrame

_TOP_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

TELLS_CHECKPOINTS = _TOP_HOOKS is not None
"""Whether this torch shows the innermost hooks on saved tensors, by which checkpoints are known; older torch does not.

Private: ``torch._C._autograd._top_saved_tensors_default_hooks``.
"""


def innermost_checkpoint() -> Any:
    """What the innermost checkpoint knows of itself; its attribute ``recompute_fn`` is what it is to run again.

    Private: ``torch.utils.checkpoint._CheckpointFrame``, which the hooks on saved tensors have in their closure, torch 2.6 to
    2.15; see also `TELLS_CHECKPOINTS`.

    Returns:
        The frame; None outside of checkpoints without reentrance, and where torch does not tell.
    """
    hooks = _TOP_HOOKS and _TOP_HOOKS(False)
    cells = getattr(hooks[1], "__closure__", None) or () if hooks else ()
    frames = (cell.cell_contents for cell in cells)
    return next((frame for frame in frames if isinstance(frame, _CheckpointFrame)), None)
