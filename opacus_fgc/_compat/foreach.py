"""Torch's operations on several tensors at once, which take few kernels on a GPU."""

from __future__ import annotations

import torch

foreach_div_ = torch._foreach_div_
"""Divides each of several tensors by a number, in place. Private: ``torch._foreach_div_``, torch 2.6 to 2.15."""
