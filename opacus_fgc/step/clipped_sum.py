"""The sum of clipped gradients that waits for the optimizer's step, in the parameters' ``summed_grad``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opacus_fgc.distributed.mesh import local
from opacus_fgc.per_sample.precision import at_least_float32


@dataclass
class ClippedSum:
    """What has been summed since the last step.

    Attributes:
        passes: how many clipped backward passes.
        max_grad_norm: the norm that their samples were clipped to; None before the first.
        norms: the norms of their samples' gradients before clipping, shape ``(N,)`` for each pass, those of skipped steps too.
    """

    passes: int = 0
    max_grad_norm: float | None = None
    norms: list[Tensor] = field(default_factory=list)

    def check_norm(self, max_grad_norm: float) -> None:
        """Raises a ValueError if the clipping norm is not the one that the sum was clipped to."""
        if self.max_grad_norm not in (None, max_grad_norm):
            raise ValueError(
                f"max_grad_norm changed from {self.max_grad_norm} to {max_grad_norm} with a clipped sum there that goes by the "
                "former; change it between steps only, and call optimizer.zero_grad() after each step"
            )

    def add(self, gradients: Iterable[tuple[Any, Tensor | None]], norms: Tensor, max_grad_norm: float) -> None:
        """Adds one backward pass, in float32 for parameters in half precision.

        Args:
            gradients: for each trainable parameter ``sum_n coef[n] * gradient[n]``, None for 0.
            norms: the norm of each sample's gradient before clipping, shape ``(N,)``.
            max_grad_norm: the norm that was clipped to.
        """
        stored: set[int] = set()
        for param, gradient in gradients:
            if gradient is None:
                gradient = torch.zeros_like(param)
            if gradient.layout != torch.strided:
                gradient = gradient.to_dense()
            # In half precision, one more sample would move a large sum by a step of that sum, or not at all.
            gradient = at_least_float32(gradient)
            part = local(gradient)
            if param.dtype is torch.float16 and not torch.isfinite(part.half()).all():
                raise ValueError(
                    "the clipped sum overflows in float16; take a smaller max_grad_norm, or float32 parameters under autocast"
                )
            summed = getattr(param, "summed_grad", None)
            if summed is not None:
                summed.add_(gradient)
                continue
            # Autograd may give one tensor for several parameters or elements, and what comes next is added in place.
            shared = part.data_ptr() in stored or 0 in part.stride()
            stored.add(part.data_ptr())
            param.summed_grad = gradient.detach().clone() if shared else gradient.detach()
        self.passes += 1
        self.norms.append(norms.detach())
        self.max_grad_norm = max_grad_norm
