"""How ``backward()`` of a private loss gets the clipped sum: by two passes, or by one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from opacus_fgc.grad_sample_module import GradSampleHooksFastGradientClipping
from opacus_fgc.planner import MEMORY, KeepPolicy


class Backward(Protocol):
    """How ``backward()`` gets the clipped sum."""

    def __call__(
        self,
        module: GradSampleHooksFastGradientClipping,
        loss_per_sample: Tensor,
        loss_scale: float = 1.0,
        retain_graph: bool = False,
    ) -> None:
        """Adds the clipped sum to the parameters' ``summed_grad``."""


def double_backward(
    module: GradSampleHooksFastGradientClipping,
    loss_per_sample: Tensor,
    loss_scale: float = 1.0,
    retain_graph: bool = False,
) -> None:
    """Ghost clipping: one backward pass for the norms, one for the clipped sum (Li et al. 2022, arXiv:2110.05679).

    Where one pass that keeps all for the clipped sum takes no more memory than the step without privacy, by what forward left in
    memory, it is one pass. Else what the first pass can keep in little room is spared the second. See `planner.Memory`.

    Args:
        module: the wrapped model, or the hooks on it.
        loss_per_sample: one loss a sample, shape ``(N,)``.
        loss_scale: see `GradSampleHooksFastGradientClipping.first_pass`.
        retain_graph: likewise.
    """
    # A graph that is retained gives no memory up as backward goes.
    in_one_pass = not retain_graph and module.has_room_for_one_pass(loss_per_sample, MEMORY.peak)
    keep = MEMORY.ghost_bk if in_one_pass else MEMORY.ghost
    _clipped_backward(module, loss_per_sample, loss_scale, retain_graph, keep)


def book_keeping(
    module: GradSampleHooksFastGradientClipping,
    loss_per_sample: Tensor,
    loss_scale: float = 1.0,
    retain_graph: bool = False,
) -> None:
    """Book-keeping: one backward pass, whose activations and backprops give both the norms and the clipped sum.

    Bu et al. 2023, arXiv:2210.00038.

    Args:
        module: the wrapped model, or the hooks on it.
        loss_per_sample: one loss a sample, shape ``(N,)``.
        loss_scale: see `GradSampleHooksFastGradientClipping.first_pass`.
        retain_graph: likewise.
    """
    _clipped_backward(module, loss_per_sample, loss_scale, retain_graph, MEMORY.ghost_bk)


def _clipped_backward(
    module: GradSampleHooksFastGradientClipping,
    loss_per_sample: Tensor,
    loss_scale: float,
    retain_graph: bool,
    keep: KeepPolicy,
) -> None:
    coef = module.coefficients(module.first_pass(loss_per_sample, keep, loss_scale, retain_graph))
    module.add_to_clipped_sum(module.clipped_gradients(coef, loss_per_sample))
