"""Torch's own criteria: how they are reduced, and what each gives for one sample."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_fgc.criterion.reduction import check_criterion, stated_reduction, takes_reduction, unreduced


class _Kind(NamedTuple):
    """A criterion of torch's.

    Attributes:
        elementwise: how many of its first arguments are combined element by element.
        ignoring: whether targets that are left out, and weights of classes, count in its mean.
    """

    elementwise: int = 0
    ignoring: bool = False


_KINDS = {
    **dict.fromkeys(
        (
            *("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "BCELoss", "BCEWithLogitsLoss", "KLDivLoss"),
            *("PoissonNLLLoss", "GaussianNLLLoss", "SoftMarginLoss", "HingeEmbeddingLoss", "CosineEmbeddingLoss"),
            *(
                "MultiLabelSoftMarginLoss",
                "mse_loss",
                "l1_loss",
                "smooth_l1_loss",
                "huber_loss",
                "binary_cross_entropy",
            ),
            *(
                "binary_cross_entropy_with_logits",
                "kl_div",
                "poisson_nll_loss",
                "gaussian_nll_loss",
                "soft_margin_loss",
            ),
            *("hinge_embedding_loss", "cosine_embedding_loss", "multilabel_soft_margin_loss"),
        ),
        _Kind(elementwise=2),
    ),
    **dict.fromkeys(("MarginRankingLoss", "margin_ranking_loss"), _Kind(elementwise=3)),
    **dict.fromkeys(("CrossEntropyLoss", "NLLLoss", "cross_entropy", "nll_loss"), _Kind(ignoring=True)),
}


class TorchCriterion:
    """One of ``torch.nn``'s, or of ``torch.nn.functional``'s, which can be called without reduction.

    Args:
        criterion: a module, a function, or a `functools.partial` of one.
    """

    def __init__(self, criterion: Any) -> None:
        self._criterion = criterion
        self._module = criterion if isinstance(criterion, nn.Module) else None
        self._function = criterion.func if isinstance(criterion, partial) else criterion
        name = type(criterion).__name__ if self._module is not None else self._function.__name__
        self._signature = inspect.signature(self._function if self._module is None else self._module.forward)
        self._kind, self._is_ctc = _KINDS.get(name, _Kind()), name in ("CTCLoss", "ctc_loss")

    @staticmethod
    def serves(criterion: Any) -> bool:
        """Whether a criterion is such a one. Those that call a function of the user's are not."""
        if isinstance(criterion, nn.Module):
            own = not isinstance(criterion, nn.TripletMarginWithDistanceLoss)
            return (
                own
                and hasattr(criterion, "reduction")
                and type(criterion).__module__.startswith(("torch.nn.", "opacus_fgc."))
            )
        function = criterion.func if isinstance(criterion, partial) else criterion
        own = function is not F.triplet_margin_with_distance_loss
        return own and getattr(function, "__module__", None) == F.__name__ and takes_reduction(function)

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], reduction: str, joined: bool = False
    ) -> tuple[Tensor, Tensor | None, str]:
        """Evaluates it without reduction.

        Args:
            args: its positional arguments.
            kwargs: its keyword arguments.
            reduction: "mean" or "sum".
            joined: whether a sample may have several losses along the first axis.

        Returns:
            The losses; what each counts in a mean, of the same shape, None for 1; and how those of a sample are reduced.

        Raises:
            ValueError: if arguments that are combined element by element are not of the same samples.
        """
        given = dict(self._arguments(args, kwargs))
        self._check_elementwise(list(given.values())[: self._kind.elementwise])
        stated = stated_reduction(self._criterion)
        if "reduction" in kwargs:
            stated = kwargs["reduction"]
            check_criterion(partial(self._function, reduction=stated), reduction)
        losses = unreduced(self._criterion, args, kwargs)
        if self._is_ctc:
            lengths = torch.as_tensor(given["target_lengths"], device=losses.device)
            return losses, lengths.to(losses.dtype).clamp(min=1), reduction
        counts = self._counts(losses, given, joined) if self._kind.ignoring and stated != "none" else None
        return losses, counts, "sum" if stated == "batchmean" else reduction

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if self._module is not None:
            return self._signature.bind(*args, **kwargs).arguments
        bound: Any = self._criterion if isinstance(self._criterion, partial) else partial(self._criterion)
        arguments = self._signature.bind(*bound.args, *args, **{**bound.keywords, **kwargs})
        arguments.apply_defaults()
        return arguments.arguments

    def _check_elementwise(self, values: Iterable[Any]) -> None:
        shapes = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
        if len({(len(shape), shape[:1]) for shape in shapes}) > 1:
            raise ValueError(
                f"the criterion got shapes {' and '.join(map(str, shapes))}, which torch broadcasts, so that every "
                "sample's loss would be of all samples. Give it one shape: target.view_as(output), output.squeeze(1), "
                "or target.expand_as(output) for a target that the samples share"
            )

    def _counts(self, losses: Tensor, given: dict[str, Any], joined: bool) -> Tensor | None:
        option = (lambda name: getattr(self._module, name)) if self._module is not None else given.__getitem__
        target = given["target"]
        weight = option("weight")
        # The only loss of a sample is 0 if it does not count, and need not be divided.
        if target.shape != losses.shape or (weight is None and losses.dim() == 1 and not joined):
            return None
        counted = target != option("ignore_index")
        if weight is None:
            return counted
        return weight.to(losses)[target.where(counted, torch.zeros_like(target))] * counted
