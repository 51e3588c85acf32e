"""The weighted pass: clipped sums, from what the norm pass kept or from a backward pass of the weighted loss."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from opacus_fgc.distributed.clipped_sums import as_parameters, gradients_of
from opacus_fgc.per_sample.precision import is_half, reduced_operations
from opacus_fgc.planner import KeepPolicy
from opacus_fgc.step.clipped_sum import ClippedSum
from opacus_fgc.step.layer_norms import pass_of
from opacus_fgc.step.nonfinite import is_finite
from opacus_fgc.step.norm_pass import NormPass
from opacus_fgc.taps.graph import goes_through


class WeightedPass(NormPass):
    """A model that sums the gradients of its samples, each times a clipping coefficient."""

    def add_to_clipped_sum(self, gradients: Iterable[tuple[Any, Tensor | None]]) -> None:
        """Adds the clipped sum of one backward pass to the parameters' ``summed_grad``.

        Args:
            gradients: for each trainable parameter ``sum_n coef[n] * gradient[n]``, None for 0; the samples are those of the
                last `get_norm_sample`.
        """
        try:
            self.clipped_sum.add(gradients, self.per_sample_gradient_norms, self.max_grad_norm)
        except BaseException:
            # Half a sum is of no use to any step.
            for param in self.trainable_parameters:
                param.summed_grad = None
            self.clipped_sum = ClippedSum()
            self._give_up_record()
            raise

    def clipped_gradients(self, coef: Tensor, loss_per_sample: Tensor) -> Iterator[tuple[Any, Tensor | None]]:
        """``sum_n coef[n] * gradient[n]`` for each trainable parameter, after `first_pass`.

        It comes from what the first pass kept, and for the other parameters from a second pass: the gradient of
        ``sum_n coef[n] * loss[n]``, since the coefficients are constants. Where that pass would round otherwise than the first
        did, by more than float32 does, there is a second pass to the taps instead, whose backprops are those of the first.

        Args:
            coef: shape ``(N,)``.
            loss_per_sample: the loss of the first pass, shape ``(N,)``.

        Yields:
            The parameter, and the sum in its shape, float32 or wider; None for a parameter that the loss does not use.
        """
        retain_graph = self.record.step is not None and self.record.step.graph_is_retained
        rest = self.layout.of_any(self.record.unkept)
        self._profile.lap()
        self._gather_heads()
        if rest and not self.layout.on_all_ranks(self._weighs_exactly(loss_per_sample) and self._all_are_summed(rest)):
            self._sum_in_taps(rest, coef, loss_per_sample, retain_graph)
            self._profile.second_pass(rest)
            rest = []
            self._gather_heads()
        later = set(rest)
        yield from as_parameters(self.layout, self._kept_sums(later, coef))
        if rest:
            with self.hooks_set(False), pass_of(self):
                weighted = (coef.to(loss_per_sample.device) * loss_per_sample).sum()
                if self.record.loss_scale != 1:
                    weighted = self.record.loss_scale * weighted
                gradients = gradients_of(self.layout, weighted, rest, self._facts.unsharded.of, retain_graph)
            yield from zip(rest, map(self._unscaled, gradients), strict=True)
            self._profile.second_pass(rest)
        self._reshard_heads()

    def _weighs_exactly(self, loss_per_sample: Tensor) -> bool:
        """Whether the gradient of the weighted loss is, but for roundings of float32, the weighted sum of what was measured."""
        if self.record.sums.samples is not None:
            # Inf and NaN of a sample that is dropped would go through all that coefficients can do.
            return False
        if self.record.in_half or self.record.recomputed or is_half(loss_per_sample):
            return False
        reduced = reduced_operations(loss_per_sample.device)
        convolves = "conv" in reduced and any(param.dim() > 2 for param in self._module.parameters())
        return "matmul" not in reduced and not convolves and not goes_through(loss_per_sample)

    def _all_are_summed(self, params: Sequence[Any]) -> bool:
        """Whether a backward pass brings a gradient of each parameter to FSDP, on this rank; all ranks sum the same ones.

        It brings none of what this rank's losses do not use, as of an expert without tokens. And no pass comes to FSDP's modules
        where a head alone is trained, which is called outside of them.
        """
        outside = {param for head in self._facts.heads for param in self._taps.layers[head].params.values()}
        return not self.layout.reshards or not (outside.issuperset(params) or self.record.unused.intersection(params))

    def _sum_in_taps(self, params: Sequence[Any], coef: Tensor, loss_per_sample: Tensor, retain_graph: bool) -> None:
        """One more pass to the taps, in which gradients are summed as they come; see `Record.summing`."""
        first = self.record
        # Under FSDP, sums of whole parameters take more than what they are made of.
        self.record = again = first.summing(params, None if self.layout.reshards else coef)
        with self._nothing_left_of_errors():
            self._pass_to_taps(again, loss_per_sample, KeepPolicy(everything=True), retain_graph)
            self._measure_unfinished()
            again.norms([])
        self.record = first

    def _kept_sums(self, later: Container[Any], coef: Tensor) -> Iterator[tuple[Any, Tensor | None]]:
        # In an order that all ranks have.
        for param in self.trainable_parameters:
            if param not in later:
                total = self.record.sums.take(param, coef, self.record.loss_scale)
                self._profile.summed(param)
                yield param, total

    def _unscaled(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None or self.record.loss_scale == 1:
            return gradient
        if not is_finite([gradient]):
            raise ValueError(
                f"the clipped sum overflows when it is scaled by {self.record.loss_scale:g}; take a smaller init_scale"
            )
        return gradient / self.record.loss_scale
