"""What a criterion gives for each sample alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_fgc.certificates import OUT_OF_MEMORY
from opacus_fgc.checks import check_loss_reduction
from opacus_fgc.criterion_arguments import Arguments
from opacus_fgc.criterion_check import check_independent_losses, check_reduced_loss
from opacus_fgc.errors import PrivacyValueError
from opacus_fgc.taps import depends_past


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


def stated_reduction(criterion: Any) -> Any:
    """The reduction that a criterion, or a `functools.partial` of a function, was given; None if it has none."""
    given = criterion.keywords.get("reduction") if isinstance(criterion, partial) else None
    return getattr(criterion, "reduction", given)


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


class _TorchCriterion:
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
        return own and getattr(function, "__module__", None) == F.__name__ and _takes_reduction(function)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], reduction: str) -> tuple[Tensor, Tensor, str]:
        """Evaluates it without reduction.

        Args:
            args: its positional arguments.
            kwargs: its keyword arguments.
            reduction: "mean" or "sum".

        Returns:
            The losses; what each counts in a mean, of the same shape; and how those of a sample are reduced.

        Raises:
            ValueError: if arguments that are combined element by element are not of the same samples.
        """
        given = dict(self._arguments(args, kwargs))
        self._check_elementwise(list(given.values())[: self._kind.elementwise])
        stated = stated_reduction(self._criterion)
        if "reduction" in kwargs:
            stated = kwargs["reduction"]
            check_criterion(partial(self._function, reduction=stated), reduction)
        losses = _unreduced(self._criterion, args, kwargs)
        if self._is_ctc:
            lengths = torch.as_tensor(given["target_lengths"], device=losses.device)
            return losses, lengths.to(losses.dtype).clamp(min=1), reduction
        ones = torch.ones_like(losses)
        if self._kind.ignoring and stated != "none":
            ones = self._counts(ones, given)
        return losses, ones, "sum" if stated == "batchmean" else reduction

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

    def _counts(self, ones: Tensor, given: dict[str, Any]) -> Tensor:
        option = (lambda name: getattr(self._module, name)) if self._module is not None else given.__getitem__
        target = given["target"]
        if target.shape != ones.shape:
            return ones
        counted = target != option("ignore_index")
        if option("weight") is not None:
            ones = option("weight").to(ones)[target.where(counted, torch.zeros_like(target))]
        return ones * counted


class SampleLosses:
    """What a criterion gives for each sample alone, with its own reduction over all that a sample has.

    ======================================  ========================================================================
    a criterion                             how it is evaluated
    ======================================  ========================================================================
    of torch's                              once, without reduction
    that returns losses of samples          once; the mean (or sum) of each sample's is taken
    of any other kind                       on each sample by itself, by ``torch.func.vmap`` or else in a loop
    ======================================  ========================================================================

    So class weights cancel in the mean of a sample that has but one target; with reduction "sum" they do not. For all but torch's
    it is checked, when asked for and whenever arguments are of another kind than before, that a sample's loss is of that sample
    alone, and that the losses give what the criterion gives for the batch; see `criterion_check`.

    Args:
        criterion: see `DPLossFastGradientClipping`.
    """

    def __init__(self, criterion: Callable[..., Any]) -> None:
        self.criterion = criterion
        self._of_torch = _TorchCriterion(criterion) if _TorchCriterion.serves(criterion) else None
        self._takes_reduction = self._of_torch is None and _takes_reduction(criterion)
        self._shared: dict[Any, set[int]] = {}
        self._checked: set[Any] = set()
        self._owed = False

    def __call__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        reduction: str,
        shape: Sequence[int] | None = None,
        batch_first: bool = True,
        due: bool = False,
        aside: Callable[[], AbstractContextManager] = nullcontext,
        model: nn.Module | None = None,
    ) -> Tensor:
        """Evaluates the criterion.

        Args:
            args: its positional arguments.
            kwargs: its keyword arguments.
            reduction: "mean" or "sum".
            shape: for losses of flattened tokens the shape ``(N, T, ...)`` before flattening.
            batch_first: whether the rows of the arguments are samples; if not, losses have to be unreduced.
            due: whether it is to be checked; if it cannot be now, it is when it can.
            aside: gives a context for runs that are not the user's own.
            model: what a copy of the criterion may share with it.

        Returns:
            One loss a sample, shape ``(N,)``; 0 for one of which nothing counts.

        Raises:
            ValueError: if the criterion cannot be evaluated by sample, or its losses mix samples.
        """
        self._owed |= due
        if self._of_torch is not None:
            losses, counts, within = self._of_torch(args, kwargs, reduction)
            return _by_sample(losses, counts, within, shape)

        def run(criterion: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return criterion(*args, **kwargs)

        if shape is not None or not batch_first:
            run = _unreduced
        elif self._takes_reduction:
            kwargs = {"reduction": reduction, **kwargs}
        # As it is before this call, which may change it.
        copies = self._copies(model) if self._owed or not self._checked else None
        result = run(self.criterion, args, kwargs)
        returns_losses = isinstance(result, Tensor) and result.dim() > 0
        if shape is not None or not batch_first:
            size = shape[0] if shape is not None else len(result) if returns_losses else 0
        else:
            size = Arguments.batch_size(args, kwargs)
            returns_losses = returns_losses and len(result) == size
        arguments = Arguments.of(args, kwargs, size, shape, batch_first, self._shared)
        key = (arguments.kind, returns_losses)
        if copies is None and key not in self._checked:
            copies = self._copies(model)

        def evaluated(criterion: Any, arguments: Arguments) -> Tensor:
            if returns_losses or run is _unreduced:
                losses = run(criterion, *arguments.whole())
                return _by_sample(losses, torch.ones_like(losses), reduction, shape)
            return _one_at_a_time(criterion, arguments)

        if returns_losses or run is _unreduced:
            if not returns_losses:
                raise PrivacyValueError(
                    "the criterion returned one value for all, from which no sample's loss follows; have it return its losses "
                    "without reduction"
                )
            losses = _by_sample(result, torch.ones_like(result), reduction, shape)
        else:
            losses = evaluated(self.criterion, arguments)
        if copies is not None and size > 1 and torch.is_grad_enabled():
            with aside():
                check = check_independent_losses if returns_losses else check_reduced_loss
                if check(copies, evaluated, arguments):
                    self._owed = False
                    self._checked.add(key)
        return losses

    def _copies(self, model: nn.Module | None) -> Callable[[], Any]:
        """Gives the criterion as it is now, for a run that leaves nothing behind; functions cannot be copied."""
        modules = list(self.criterion.modules()) if isinstance(self.criterion, nn.Module) else []
        shared: list[Any] = [param for module in modules for param in module.parameters(recurse=False)]
        if model is not None:
            shared += [*model.modules(), *model.parameters()]
        for part in modules or (self.criterion,):
            # Results that it keeps cannot be copied, and are not written to.
            kept = (value for value in getattr(part, "__dict__", {}).values() if isinstance(value, Tensor))
            shared += [
                value for value in kept if not value.is_leaf or torch._C._functorch.is_functorch_wrapped_tensor(value)
            ]
        memo = {id(part): part for part in shared}
        try:
            now = copy.deepcopy(self.criterion, dict(memo))
        except Exception:
            return lambda: self.criterion
        return lambda: copy.deepcopy(now, dict(memo))


def _takes_reduction(criterion: Callable[..., Any]) -> bool:
    try:
        return "reduction" in inspect.signature(criterion).parameters
    except (TypeError, ValueError):
        return False


def _unreduced(criterion: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not hasattr(criterion, "reduction"):
        return criterion(*args, **{**kwargs, **({"reduction": "none"} if _takes_reduction(criterion) else {})})
    reduction = criterion.reduction
    criterion.reduction = "none"
    try:
        return criterion(*args, **kwargs)
    finally:
        criterion.reduction = reduction


def _by_sample(losses: Tensor, counts: Tensor, within: str, shape: Sequence[int] | None) -> Tensor:
    """Reduces what there is of each sample, by "mean" or "sum"; ``counts`` is what each loss counts in a mean."""
    if shape is not None:
        losses, counts = (value.reshape(shape[0], shape[1]) for value in (losses, counts))
    sums = losses if losses.dim() == 1 else losses.flatten(1).sum(1)
    if within == "sum":
        return sums
    counted = counts if counts.dim() == 1 else counts.flatten(1).sum(1)
    return sums / torch.where(counted == 0, torch.ones_like(counted), counted)


_NO_NUMBER = torch.zeros(2, device="cpu")


def _one_at_a_time(criterion: Callable[..., Any], arguments: Arguments) -> Tensor:
    rows = arguments.rows()
    if arguments.size == 0:
        return rows[0].flatten(1).sum(1) * 0.0

    def of_one(*rows: Tensor) -> Tensor:
        args, kwargs = arguments.of_one(rows)
        loss = criterion(*args, **kwargs)
        return loss.reshape(()) if isinstance(loss, Tensor) and loss.numel() == 1 else _NO_NUMBER

    try:
        try:
            losses = torch.func.vmap(of_one, randomness="different")(*rows)
        except RuntimeError:
            # What vmap cannot do, a loop can.
            losses = torch.stack([of_one(*row) for row in zip(*rows, strict=True)])
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        raise ValueError(
            f"the criterion cannot be evaluated on one sample by itself: {error}. All that is the sample's has to be a "
            "row of a tensor among the criterion's arguments (outputs.logits, not an object that has them); or have "
            "it return one loss for each sample (reduction='none')"
        ) from error
    if losses.dim() != 1:
        raise ValueError("the criterion's result is not one number for one sample; return losses of shape (N,)")
    if depends_past([losses], rows):
        raise PrivacyValueError(
            "the criterion brings in something with a gradient that is no row of its arguments, and that would be "
            "whole in every sample's loss: a loss of the batch that the model computed itself (outputs.loss), a term "
            "that it keeps (model.kl), weights. Give the criterion the logits, and all that it computes with, as "
            "arguments with one row a sample; or have it return one loss for each sample (reduction='none'). Weights "
            "of its own belong into the module, penalties on weights into the optimizer (weight_decay)"
        )
    return losses
