"""What a criterion gives for each sample alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from opacus_fgc._compat.functorch import is_functorch_tensor
from opacus_fgc.certificates.criterion import check_independent_losses, check_reduced_loss
from opacus_fgc.certificates.sketch import OUT_OF_MEMORY
from opacus_fgc.criterion.arguments import Arguments
from opacus_fgc.criterion.causal_lm import CausalLMLoss
from opacus_fgc.criterion.chunked_causal_lm import ChunkedCausalLMLoss
from opacus_fgc.criterion.reduction import takes_reduction, unreduced
from opacus_fgc.criterion.torch_criteria import TorchCriterion
from opacus_fgc.errors import PrivacyValueError
from opacus_fgc.taps.graph import depends_past

_PLACE_OF_POSITIONS: dict[Any, int] = {CausalLMLoss.forward: 2, ChunkedCausalLMLoss.forward: 3}


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
    alone, and that the losses give what the criterion gives for the batch; see `certificates.criterion`.

    Args:
        criterion: see `DPLossFastGradientClipping`.
    """

    def __init__(self, criterion: Callable[..., Any]) -> None:
        self.criterion = criterion
        self._of_torch = TorchCriterion(criterion) if TorchCriterion.serves(criterion) else None
        self._takes_reduction = self._of_torch is None and takes_reduction(criterion)
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
        packed: bool = False,
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
            packed: whether samples are packed; see `packed`.
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
            losses, counts, within = self._of_torch(args, kwargs, reduction, shape is not None)
            return _by_sample(losses, counts, within, shape)

        def run(criterion: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return criterion(*args, **kwargs)

        if packed or (
            not batch_first and getattr(type(self.criterion), "forward", None) is ChunkedCausalLMLoss.forward
        ):
            # Each loss is of one sequence's logits and labels by its definition, which has the batch first.
            return unreduced(self.criterion, args, kwargs)
        if shape is not None or not batch_first:
            run = unreduced
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
            if returns_losses or run is unreduced:
                losses = run(criterion, *arguments.whole())
                return _by_sample(losses, None, reduction, shape)
            return _one_at_a_time(criterion, arguments)

        if returns_losses or run is unreduced:
            if not returns_losses:
                raise PrivacyValueError(
                    "the criterion returned one value for all, from which no sample's loss follows; have it return its losses "
                    "without reduction"
                )
            losses = _by_sample(result, None, reduction, shape)
        else:
            losses = evaluated(self.criterion, arguments)
        if copies is not None and size > 1 and torch.is_grad_enabled():
            with aside():
                check = check_independent_losses if returns_losses else check_reduced_loss
                if check(copies, evaluated, arguments):
                    self._owed = False
                    self._checked.add(key)
        return losses

    def packed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Of packed sequences, which of them each token is of, shape ``(T,)``; None if samples are not packed.

        Args:
            args: positional arguments of the criterion.
            kwargs: its keyword arguments.
        """
        criterion: Any = self.criterion
        # Not in a class that computes something else.
        place = _PLACE_OF_POSITIONS.get(getattr(type(criterion), "forward", None))
        if place is None:
            return None
        position_ids = args[place] if len(args) > place else kwargs.get("position_ids")
        return None if position_ids is None else CausalLMLoss.sequences(position_ids)

    def _copies(self, model: nn.Module | None) -> Callable[[], Any]:
        """Gives the criterion as it is now, for a run that leaves nothing behind; functions cannot be copied."""
        modules = list(self.criterion.modules()) if isinstance(self.criterion, nn.Module) else []
        shared: list[Any] = [param for module in modules for param in module.parameters(recurse=False)]
        if model is not None:
            shared += [*model.modules(), *model.parameters()]
        for part in modules or (self.criterion,):
            # Results that it keeps cannot be copied, and are not written to.
            kept = (value for value in getattr(part, "__dict__", {}).values() if isinstance(value, Tensor))
            shared += [value for value in kept if not value.is_leaf or is_functorch_tensor(value)]
        memo = {id(part): part for part in shared}
        try:
            now = copy.deepcopy(self.criterion, dict(memo))
        except Exception:
            return lambda: self.criterion
        return lambda: copy.deepcopy(now, dict(memo))


def _by_sample(losses: Tensor, counts: Tensor | None, within: str, shape: Sequence[int] | None) -> Tensor:
    """Reduces what there is of each sample, by "mean" or "sum"; ``counts`` is what each loss counts in a mean, 1 if None."""
    if shape is not None:
        losses = losses.reshape(shape[0], shape[1])
        counts = None if counts is None else counts.reshape(shape[0], shape[1])
    sums = losses if losses.dim() == 1 else losses.flatten(1).sum(1)
    if within == "sum":
        return sums
    if counts is None:
        return sums if losses.dim() == 1 else sums / max(1, losses.shape[1:].numel())
    counted = counts if counts.dim() == 1 else counts.flatten(1).sum(1)
    if not counted.is_floating_point():
        return sums / counted.clamp(min=1)
    return sums / torch.where(counted == 0, torch.ones_like(counted), counted)


def by_unit(losses: Tensor, numbers: Tensor, within: str) -> Tensor:
    """One loss a unit: the mean or sum of those of its records.

    Args:
        losses: one loss a record, shape ``(N,)``.
        numbers: the unit of each record, from 0 on.
        within: "mean" or "sum".
    """
    numbers = numbers.to(losses.device)
    counts = torch.bincount(numbers)
    sums = losses.new_zeros(len(counts)).index_add(0, numbers, losses)
    return sums / counts.to(losses.dtype) if within == "mean" else sums


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
