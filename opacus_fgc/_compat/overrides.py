"""What is called in the place of torch's functions."""

from __future__ import annotations

import torch
from torch import overrides

DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass
"""A context in which ``__torch_function__`` of tensor subclasses is not called. Private: ``torch._C``, torch 2.6 to 2.15."""

current_function_mode = overrides._get_current_function_mode
"""The innermost `torch.overrides.TorchFunctionMode` that is entered; None if none is.

Private: ``torch.overrides._get_current_function_mode``, torch 2.6 to 2.15.
"""

GROUPED_MM = frozenset(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"))
"""The names by which a function mode sees ``torch.nn.functional.grouped_mm``, and what transformers has in its place.

Private: ``torch._grouped_mm``, torch 2.8 to 2.15.
"""
