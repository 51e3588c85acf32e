"""What a criterion gives for each sample alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from opacus_fgc.checks import check_loss_reduction


class CausalLMLoss(nn.Module):
    """The loss of a causal language model, for what models of Hugging Face return, or logits.

    Each token is predicted from those before it, so logits and labels are shifted against each other. The loss of a sequence
    is the mean over its tokens, those with ``ignore_index`` left out.

    Args:
        ignore_index: label of tokens that do not count.
        reduction: how the losses of the sequences are reduced: "mean", "sum" or "none".
    """

    def __init__(self, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, outputs: Any, labels: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            outputs: logits, shape ``(N, T, vocabulary)``, or an object that has them as ``logits``.
            labels: tokens, shape ``(N, T)``, not shifted.

        Returns:
            The loss, in float32 at least; shape ``(N,)`` without reduction, ``()`` with it.
        """
        logits = outputs if isinstance(outputs, Tensor) else outputs.logits
        labels = labels[:, 1:]
        losses = F.cross_entropy(
            logits[:, :-1].mT.float() if logits.element_size() < 4 else logits[:, :-1].mT,
            labels,
            ignore_index=self.ignore_index,
            reduction="none",
        )
        losses = losses.sum(1) / (labels != self.ignore_index).sum(1).clamp(min=1)
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


def check_criterion(criterion: object, loss_reduction: str) -> None:
    """Raises a ValueError if no private loss can be made of a criterion."""
    check_loss_reduction(loss_reduction)
    if not callable(criterion):
        raise ValueError(f"the criterion is {criterion!r}, which cannot be called")
    reduction = getattr(criterion, "reduction", loss_reduction)
    if reduction != loss_reduction:
        raise ValueError(
            f"the criterion's reduction is {reduction!r}, loss_reduction {loss_reduction!r}; give both the same"
        )


def loss_per_sample(
    criterion: Callable[..., Any],
    reduction: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shape: Sequence[int] | None = None,
    batch_first: bool = True,
) -> Tensor:
    """What a criterion gives for each sample alone, with its own reduction over all that a sample has.

    Torch's criteria are evaluated once without reduction; so is what returns unreduced losses, of which the mean (or sum) of
    each sample is taken. Everything else is evaluated on one sample at a time, by ``torch.func.vmap`` or else in a loop: all
    tensors among the arguments that have as many rows as the first are taken row by row. (So class weights cancel in the
    mean of a sample that has but one target; with reduction "sum" they do not.)

    Args:
        criterion: see `DPLossFastGradientClipping`.
        reduction: "mean" or "sum".
        args: its positional arguments.
        kwargs: its keyword arguments.
        shape: for losses of flattened tokens the shape ``(N, T, ...)`` before flattening.
        batch_first: whether the rows of the arguments are samples; if not, losses have to be unreduced.

    Returns:
        One loss a sample, shape ``(N,)``; 0 for one of which nothing counts.

    Raises:
        ValueError: if the criterion cannot be evaluated by sample.
    """
    reducible = hasattr(criterion, "reduction")
    known = reducible and type(criterion).__module__.startswith(("torch.nn.", "opacus_fgc."))
    if shape is not None or known or not batch_first:
        if reducible:
            losses = _unreduced(criterion, args, kwargs)
        else:
            losses = criterion(*args, **kwargs, **({"reduction": "none"} if _takes_reduction(criterion) else {}))
        return _of_unreduced(losses, criterion, reduction, args, kwargs, shape)
    if _takes_reduction(criterion):
        kwargs = {"reduction": reduction, **kwargs}
    batch_size = _batch_size(args, kwargs)
    losses = criterion(*args, **kwargs)
    if isinstance(losses, Tensor) and losses.dim() > 0 and len(losses) == batch_size:
        return _of_unreduced(losses, criterion, reduction, args, kwargs, shape)
    return _one_at_a_time(criterion, args, kwargs, batch_size)


def _takes_reduction(criterion: Callable[..., Any]) -> bool:
    try:
        return "reduction" in inspect.signature(criterion).parameters
    except (TypeError, ValueError):
        return False


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not tensors:
        raise ValueError("the criterion was called without a tensor that has a batch axis")
    return len(tensors[0])


def _unreduced(criterion: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    reduction = criterion.reduction
    criterion.reduction = "none"
    try:
        return criterion(*args, **kwargs)
    finally:
        criterion.reduction = reduction


def _of_unreduced(
    losses: Any,
    criterion: Any,
    reduction: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shape: Sequence[int] | None,
) -> Tensor:
    if not isinstance(losses, Tensor) or losses.dim() == 0:
        raise ValueError(
            "the criterion returned one value for all flattened tokens, from which no sample's loss follows"
        )
    weights = _weights(losses, criterion, args, kwargs)
    if shape is not None:
        losses, weights = (value.reshape(shape[0], shape[1]) for value in (losses, weights))
    sums = losses if losses.dim() == 1 else losses.flatten(1).sum(1)
    if reduction == "sum":
        return sums
    counted = weights if weights.dim() == 1 else weights.flatten(1).sum(1)
    return sums / torch.where(counted == 0, torch.ones_like(counted), counted)


def _weights(losses: Tensor, criterion: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What each loss counts in the criterion's own mean."""
    ones = torch.ones_like(losses, dtype=losses.dtype)
    if isinstance(criterion, nn.CTCLoss):
        lengths = kwargs.get("target_lengths", args[3] if len(args) > 3 else None)
        return torch.as_tensor(lengths, device=losses.device).to(losses.dtype).clamp(min=1)
    target = kwargs.get("target", args[1] if len(args) > 1 else None)
    ignore_index = getattr(criterion, "ignore_index", None)
    if ignore_index is None or not isinstance(target, Tensor) or target.shape != losses.shape:
        return ones
    counted = target != ignore_index
    class_weights = getattr(criterion, "weight", None)
    if class_weights is not None:
        ones = class_weights.to(losses)[target.where(counted, torch.zeros_like(target))]
    return ones * counted


def _one_at_a_time(
    criterion: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int
) -> Tensor:
    leaves, spec = tree_flatten((args, kwargs))
    places = [
        place
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == batch_size
    ]
    rows = [leaves[place] for place in places]
    if batch_size == 0:
        return rows[0].flatten(1).sum(1) * 0.0

    def of_one(*rows: Tensor) -> Tensor:
        one = list(leaves)
        for place, row in zip(places, rows, strict=True):
            one[place] = row.unsqueeze(0)
        args, kwargs = tree_unflatten(one, spec)
        loss = criterion(*args, **kwargs)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("the criterion's result is not one number for one sample; return losses of shape (N,)")
        return loss.reshape(())

    try:
        return torch.func.vmap(of_one, randomness="different")(*rows)
    except RuntimeError:
        # What vmap cannot do, a loop can.
        return torch.stack([of_one(*row) for row in zip(*rows, strict=True)])
