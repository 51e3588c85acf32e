"""The loss of language models, one a sequence."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


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
