"""How criteria are reduced over a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import Tensor, nn

from opacus_fgc.argument_checks import check_loss_reduction


def check_criterion(criterion: Any, loss_reduction: str, params: Collection[Tensor] = ()) -> None:
    """Raises a ValueError if no private loss can be made of a criterion.

    Args:
        criterion: the criterion.
        loss_reduction: "mean" or "sum".
        params: those of the model, which are not the criterion's own.
    """
    check_loss_reduction(loss_reduction)
    if not callable(criterion):
        raise ValueError(f"the criterion is {criterion!r}, which cannot be called")
    reduction = stated_reduction(criterion)
    if {reduction, loss_reduction} == {"mean", "sum"}:
        raise ValueError(
            f"the criterion's reduction is {reduction!r}, loss_reduction {loss_reduction!r}; give both the same"
        )
    if reduction == "batchmean" and loss_reduction == "sum":
        raise ValueError(
            "the criterion's reduction is 'batchmean', a mean over the samples; pass loss_reduction='mean' with it, or "
            "reduction='sum' to the criterion"
        )
    if isinstance(criterion, nn.Module):
        theirs = {id(param) for param in params}
        own = [name for name, param in criterion.named_parameters() if param.requires_grad and id(param) not in theirs]
        if own:
            raise ValueError(
                f"the criterion has weights of its own, {', '.join(own[:5])}, that require a gradient, and a private "
                "loss gives one to the parameters of the wrapped model alone. Make them a part of the module that "
                "make_private gets (a module whose forward returns what the criterion computes of them), or freeze "
                "them (criterion.requires_grad_(False))"
            )


def stated_reduction(criterion: Any) -> Any:
    """The reduction that a criterion, or a `functools.partial` of a function, was given; None if it has none."""
    given = criterion.keywords.get("reduction") if isinstance(criterion, partial) else None
    return getattr(criterion, "reduction", given)


def takes_reduction(criterion: Callable[..., Any]) -> bool:
    """Whether a criterion has an argument ``reduction``."""
    try:
        return "reduction" in inspect.signature(criterion).parameters
    except (TypeError, ValueError):
        return False


def unreduced(criterion: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a criterion gives without reduction."""
    if not hasattr(criterion, "reduction"):
        return criterion(*args, **{**kwargs, **({"reduction": "none"} if takes_reduction(criterion) else {})})
    reduction = criterion.reduction
    criterion.reduction = "none"
    try:
        return criterion(*args, **kwargs)
    finally:
        criterion.reduction = reduction
