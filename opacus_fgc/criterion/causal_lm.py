"""The loss of language models, one a sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalLMLoss(nn.Module):
    """The loss of a causal language model, for what models of Hugging Face return, or logits.

    Each token is predicted from those before it, so logits and labels are shifted against each other. The loss of a sequence
    is the mean over its tokens, those with ``ignore_index`` left out.

    Sequences may be packed, one after another in one row, as `transformers.DataCollatorWithFlattening` makes it; with their
    ``position_ids`` there is one loss for each of them.

    Args:
        ignore_index: label of tokens that do not count.
        reduction: how the losses of the sequences are reduced: "mean", "sum" or "none".
    """

    def __init__(self, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, outputs: Any, labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Computes the loss.

        Args:
            outputs: logits, shape ``(N, T, vocabulary)``, or an object that has them as ``logits``.
            labels: tokens, shape ``(N, T)``, not shifted.
            position_ids: of packed sequences the place of each token in its sequence, shape ``(1, T)``, which is 0 where a
                sequence begins; None if each row is one sequence.

        Returns:
            The loss, in float32 at least; shape ``(N,)`` without reduction, ``()`` with it. ``N`` is the number of sequences.
        """
        logits = outputs if isinstance(outputs, Tensor) else outputs.logits
        starts = None if position_ids is None else self.starts(position_ids)
        if starts is not None:
            # The first token of a sequence is not predicted from the last one of the sequence before.
            labels = labels.masked_fill(starts, self.ignore_index)
        labels = labels[:, 1:]
        losses = F.cross_entropy(
            logits[:, :-1].mT.float() if logits.element_size() < 4 else logits[:, :-1].mT,
            labels,
            ignore_index=self.ignore_index,
            reduction="none",
        )
        counted = (labels != self.ignore_index).to(losses.dtype)
        if starts is not None:
            places = torch.arange(int(starts.sum()), device=starts.device)
            own = starts[0, 1:].cumsum(0) == places[:, None]
            losses, counted = (torch.where(own, value, 0.0).sum(1) for value in (losses, counted))
        else:
            losses, counted = losses.sum(1), counted.sum(1)
        losses = losses / counted.clamp(min=1)
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()

    @staticmethod
    def sequences(position_ids: Tensor) -> Tensor:
        """Which of the packed sequences each token is of, shape ``(T,)``.

        Args:
            position_ids: see `forward`.
        """
        return CausalLMLoss.starts(position_ids)[0].cumsum(0) - 1

    @staticmethod
    def starts(position_ids: Tensor) -> Tensor:
        """Where packed sequences begin, a mask of shape ``(1, T)``.

        Args:
            position_ids: see `forward`.

        Raises:
            ValueError: if they lie in several rows, or the first token begins no sequence.
        """
        if position_ids.dim() != 2 or len(position_ids) != 1:
            raise ValueError(
                f"position_ids has shape {tuple(position_ids.shape)}; packed sequences lie one after another in one row, (1, T). "
                "Without packing leave position_ids out of the criterion's arguments"
            )
        starts = position_ids == 0
        if starts.numel() and not starts[0, 0]:
            raise ValueError("the first token's position is not 0, so that it is not known whose it is")
        return starts
