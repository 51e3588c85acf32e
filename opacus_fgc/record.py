"""The state of one step: which uses of which parameters were seen, and the norms that came of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from opacus_fgc import per_sample
from opacus_fgc.per_sample import PerSampleGradient


class Record:
    """Born at a step's first forward, gone at the next one's.

    A parameter's norm is taken, and its form given up, as soon as all its uses of this step's forward have come back in
    backward. Uses that the loss does not depend on never come; `norms` takes what is there.

    Args:
        loss_reduction: how the loss of the pass that brings the backprops is reduced over the batch, "mean" or "sum".

    Attributes:
        keep_forms: whether the forms are kept for `weighted_sums`.
    """

    def __init__(self, loss_reduction: str) -> None:
        self.loss_reduction = loss_reduction
        self.keep_forms = False
        self.batch_size: int | None = None
        self._expected: Counter[Any] = Counter()
        self._forms: dict[Any, list[PerSampleGradient]] = {}
        self._norms: dict[Any, Tensor] = {}
        self._kept: dict[Any, PerSampleGradient] = {}

    @property
    def receiving(self) -> bool:
        """Whether backward has begun."""
        return self.batch_size is not None

    def expect(self, params: Iterable[Tensor]) -> None:
        """Notes one more use of each parameter in forward."""
        self._expected.update(params)

    def receive(self, layer: str, forms: Mapping[Any, PerSampleGradient]) -> dict[Any, Tensor]:
        """Takes in the per-sample gradients of one call of a layer.

        Args:
            layer: what to call the layer in errors.
            forms: the forms of its parameters.

        Returns:
            The norms of those parameters that are complete with it; see `norms`.

        Raises:
            ValueError: if the layer saw another number of samples than the layers before it.
            RuntimeError: if a parameter's norm was taken already.
        """
        complete = {}
        for param, form in forms.items():
            if self.batch_size is None:
                self.batch_size = form.batch_size
            if form.batch_size != self.batch_size:
                raise ValueError(
                    f"{layer} was called on a batch of {form.batch_size}, other layers of this step on {self.batch_size}. "
                    "Every layer with trainable parameters needs one row a sample: expand inputs that the batch shares "
                    "(`x.expand(batch_size, ...)`), and check batch_first"
                )
            if param in self._norms:
                raise RuntimeError(
                    f"{layer}: a use of its parameter came back after the parameter's norm was taken. Do not mix the "
                    "graphs of several forwards with a backward between them in one loss"
                )
            received = self._forms.setdefault(param, [])
            received.append(form)
            if len(received) == self._expected[param]:
                complete[param] = self._norm(param, self._forms.pop(param))
        self._norms.update(complete)
        return complete

    def norms(self, params: Iterable[Tensor]) -> dict[Any, Tensor]:
        """The norms of the per-sample gradients of these parameters; 0 for a parameter that the loss does not use.

        Returns:
            For each parameter a tensor of shape ``(N,)``, float32 or wider.

        Raises:
            RuntimeError: if no layer has sent anything.
        """
        if self.batch_size is None:
            raise RuntimeError(
                "no per-sample norms: the loss does not depend on any trainable layer of the wrapped model, or hooks were "
                "disabled during forward"
            )
        self._norms.update((param, self._norm(param, forms)) for param, forms in self._forms.items())
        self._forms.clear()
        missing = [param for param in params if param not in self._norms]
        zeros = torch.zeros(self.batch_size)
        self._norms.update((param, per_sample.at_least_float32(zeros.to(param))) for param in missing)
        return self._norms

    def _norm(self, param: Tensor, forms: list[PerSampleGradient]) -> Tensor:
        with per_sample.full_precision(param.device):
            form = per_sample.add(forms)
            if self.keep_forms:
                norm, self._kept[param] = form.measured()
            else:
                norm = form.norm()
        return norm * len(norm) if self.loss_reduction == "mean" else norm

    def weighted_sums(self, coef: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """``sum_n coef[n] * gradient[n]`` for each parameter with a kept form, which is given up as soon as it is used.

        Args:
            coef: shape ``(N,)``.
        """
        while self._kept:
            param, form = self._kept.popitem()
            # The context ends before the yield: what the caller does in between is not to run under it.
            with per_sample.full_precision(param.device):
                weighted_sum = form.weighted_sum(coef.to(param.device)).to(param.dtype)
            yield param, weighted_sum
