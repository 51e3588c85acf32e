"""Whether `torch.func` is at work: ``torch._C._functorch``, as torch 2.6 to 2.15 have it."""

from __future__ import annotations

import torch

innermost_transform = torch._C._functorch.peek_interpreter_stack
"""The innermost transform (vmap, grad) that runs; None if none does. Private: ``peek_interpreter_stack``."""

is_functorch_tensor = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether a tensor is one of a transform, which means nothing outside of it. Private: ``is_functorch_wrapped_tensor``."""
