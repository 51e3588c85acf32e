"""The gradients of a cross-entropy by the logits of a linear head, computed anew in tiles of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opacus_fgc.per_sample.precision import at_least_float32

NOT_COUNTED = -1
"""The target of positions that have no loss."""


@dataclass(frozen=True, eq=False)
class LogitGradients:
    """``factor[n, t] * (softmax(hidden[n, t] W^T + b) - onehot(target[n, t]))``, shape ``(N, T, V)``, made when it is needed.

    Attributes:
        hidden: what the head is applied to, shape ``(N, T, d)``.
        weight: that of the head, shape ``(V, d)``.
        bias: likewise, shape ``(V,)``; None if there is none.
        targets: tokens, shape ``(N, T)``, int64; `NOT_COUNTED` where there is none.
        log_sums: the logarithms of the sums of the exponentials of the logits, shape ``(N, T)``.
        factor: what each position counts, shape ``(N, T)``.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    log_sums: Tensor
    factor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """That of the gradients: float32 or wider."""
        return self.log_sums.dtype

    def tile(self, sample: int, rows: slice) -> Tensor:
        """The gradients of one sample by some logits, shape ``(T, rows)``; the same to the bit each time.

        Args:
            sample: which sample.
            rows: which tokens of the vocabulary, with a start and a stop.
        """
        hidden = at_least_float32(self.hidden[sample]).to(self.dtype)
        gradients = hidden @ self.weight[rows].to(self.dtype).mT
        if self.bias is not None:
            gradients += self.bias[rows]
        gradients.sub_(self.log_sums[sample].unsqueeze(1)).exp_()
        places = self.targets[sample].unsqueeze(1) - rows.start
        within = (places >= 0) & (places < gradients.shape[1])
        gradients.scatter_add_(1, places.clamp(0, gradients.shape[1] - 1), -within.to(self.dtype))
        return gradients.mul_(self.factor[sample].unsqueeze(1))

    def select(self, samples: slice | Tensor) -> LogitGradients:
        """Those of some samples: a slice of them, or those that a mask of shape ``(N,)`` has."""
        return LogitGradients(
            self.hidden[samples],
            self.weight,
            self.bias,
            self.targets[samples],
            self.log_sums[samples],
            self.factor[samples],
        )

    def over_uses(self, uses: int) -> LogitGradients:
        """Those of samples that have ``uses`` rows each, one after another, which become positions of one."""
        by_position = (self.hidden, self.targets, self.log_sums, self.factor)
        hidden, *rest = (each.unflatten(0, (-1, uses)).flatten(1, 2) for each in by_position)
        return LogitGradients(hidden, self.weight, self.bias, *rest)

    @staticmethod
    def joined(several: list[LogitGradients]) -> LogitGradients:
        """Those of several uses of one head by the same samples, of which the positions come one after another."""
        by_position = [(one.hidden, one.targets, one.log_sums, one.factor) for one in several]
        hidden, *rest = (torch.cat(each, 1) for each in zip(*by_position, strict=True))
        return LogitGradients(hidden, several[0].weight, several[0].bias, *rest)
