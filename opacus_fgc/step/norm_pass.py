"""The norm pass: backward to the taps, from which the norm of each sample's gradient comes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opacus_fgc._compat.opacus import norm_sample, set_norm_sample
from opacus_fgc.certificates.batch import Batch
from opacus_fgc.clipping import note_finite
from opacus_fgc.distributed.agreement import check_samples
from opacus_fgc.distributed.norms import reduce_norms
from opacus_fgc.errors import PrivacyNotImplementedError, PrivacyValueError
from opacus_fgc.per_sample.doubts import Doubts, reads_are_free
from opacus_fgc.per_sample.precision import row_norms
from opacus_fgc.planner import NOTHING, KeepBudget, KeepPolicy
from opacus_fgc.step.clipped_sum import ClippedSum
from opacus_fgc.step.layer_norms import LayerNorms, pass_of
from opacus_fgc.step.nonfinite import is_finite
from opacus_fgc.step.phase import Phase
from opacus_fgc.step.profile import UNWATCHED
from opacus_fgc.step.record import Record, measure_again
from opacus_fgc.step.small_gradients import SmallGradients
from opacus_fgc.step.trained import TrainedParameters
from opacus_fgc.step.uses import Step


class NormPass(LayerNorms):
    """A model that goes backward to its taps alone, and then knows the norm of each sample's gradient."""

    max_grad_norm: float
    clipped_sum: ClippedSum
    trained: TrainedParameters

    def get_norm_sample(self) -> Tensor:
        """The norm of each sample's gradient over all trainable parameters, after the first backward.

        Returns:
            Norms, shape ``(N,)``, float32 or wider; also kept as ``per_sample_gradient_norms``.

        Raises:
            RuntimeError: if there was no backward through the taps.
        """
        if self.record.phase is not Phase.IDLE:
            self._measure_unfinished()
            norms = reduce_norms(self.layout, self.record.norms(self.trainable_parameters), self.record.marks)
            for param, norm in norms.items():
                set_norm_sample(param, norm)
        norms_of_params = list(map(norm_sample, self.trainable_parameters))
        if any(norm is None for norm in norms_of_params):
            raise RuntimeError("no per-sample norms: run forward and backward on the wrapped model first")
        device = norms_of_params[0].device if norms_of_params else None
        self.per_sample_gradient_norms = row_norms(torch.stack([norm.to(device) for norm in norms_of_params], 1))
        return self.per_sample_gradient_norms

    def _measure_unfinished(self) -> None:
        for module, uses in self.record.uses.unfinished():
            if self.layout.reshards:
                self._give_up_record()
                raise PrivacyNotImplementedError(
                    f"{self._tapped(module).name} was called more often than the loss depends on it, and under FSDP its "
                    "parameters are gone when that is known. Run forwards that are not part of the loss under "
                    "torch.no_grad(), and call backward() for each forward before the next"
                )
            self._measure(module, uses)

    def check_accumulation(self) -> None:
        """Raises a ValueError if one more clipped backward pass may not be added to what is there."""
        if self.clipped_sum.passes and not self.grad_accumulation_allowed:
            raise PrivacyValueError(
                "a second backward() before optimizer.step(): under Poisson sampling every batch is one step. Call "
                "optimizer.step() and optimizer.zero_grad() for each batch; add losses of the same samples up, (loss + other)."
                "backward(); to split large batches use opacus.utils.batch_memory_manager.BatchMemoryManager"
            )
        self.clipped_sum.check_norm(self.max_grad_norm)

    def has_room_for_one_pass(self, loss_per_sample: Tensor, peak: float) -> bool:
        """Whether one backward pass can keep all for the clipped sum on each rank, by what forward left in memory.

        Args:
            loss_per_sample: one loss a sample, shape ``(N,)``.
            peak: the most memory that it may take, as a multiple of what the step without privacy takes, or two passes do;
                0 for two passes always.
        """
        if not peak:
            return False
        peaks = self.record.uses.held.peaks(len(loss_per_sample))
        return self.layout.on_all_ranks(peaks.one_pass <= peak * max(peaks.plain, peaks.two_passes))

    def first_pass(
        self,
        loss_per_sample: Tensor,
        keep: KeepPolicy = NOTHING,
        loss_scale: float = 1.0,
        retain_graph: bool = False,
    ) -> Tensor:
        """Backward to the taps alone, without any weight gradient.

        Args:
            loss_per_sample: one loss a sample, shape ``(N,)``.
            keep: what is kept for `clipped_gradients`. Where that is everything, the graph is given up.
            loss_scale: what the losses are multiplied with, and gradients and norms divided by, so that backprops do not vanish
                in float16.
            retain_graph: whether plain losses may go through the graph after `clipped_gradients`.

        Returns:
            The norm of each sample's gradient, shape ``(N,)``.

        Raises:
            RuntimeError: if the loss does not depend on a tapped layer.
            ValueError: if the loss has not one value for each sample that the layers saw, or depends on a trainable
                parameter past its layer.
        """
        reached = self.trained.check(loss_per_sample, self._facts.anchor, self.record.brought, self.record.made)
        self.check_accumulation()
        if self.record.phase.is_backward:
            # Another loss came by the same forward.
            self.record = self.record.again()
        record = self._open_record()
        check_samples(self.layout, loss_per_sample, record.inputs)
        with self._nothing_left_of_errors():
            if record.batch is None or record.batch.size != len(loss_per_sample):
                record.batch = Batch(len(loss_per_sample))
            expected = self.expected_owners(reached, record)
            due = self._due(record.batch, reached, record, expected)
            # The pass that all is kept of gives the graph up, which the certificate needs.
            if due is not None and (due.comes_first or keep.everything):
                record.owned = self.certify(due, loss_per_sample, reached, loss_scale)
                due = None
            else:
                record.owned = expected
            record.step, record.loss_scale = Step(retain_graph), loss_scale
            if due is None:
                self._pass_to_taps(record, loss_per_sample, keep, retain_graph, looks_later=True)
            else:
                with self._witnessed() as backprops:
                    self._pass_to_taps(record, loss_per_sample, keep, retain_graph, looks_later=True)
                owned = self.certify(due, loss_per_sample, reached, loss_scale, backprops)
                if not self.layout.on_all_ranks(owned.keys() == record.owned.keys()):
                    # Norms were taken as if rows were in another order.
                    self.record = record = record.again()
                    record.owned = owned
                    self._pass_to_taps(record, loss_per_sample, keep, retain_graph, looks_later=True)
            norms = self._norms_of(record, loss_per_sample)
            doubtful = _look_at(norms, record.doubts)
            if doubtful:
                if keep.everything:
                    measure_again(record, doubtful)
                else:
                    self.record = record = record.again()
                    self._pass_to_taps(record, loss_per_sample, keep, retain_graph)
                norms = self._norms_of(record, loss_per_sample)
        if norms.shape != loss_per_sample.shape:
            raise ValueError(
                f"the loss has shape {tuple(loss_per_sample.shape)}, one value for each of {len(loss_per_sample)} samples, but "
                f"the layers saw a batch of {len(norms)}. For losses of flattened tokens call the criterion with shape=(batch "
                "size, tokens, ...)"
            )
        return norms

    def _backward_to_taps(self, loss: Tensor, retain_graph: bool) -> None:
        self._gather_heads()
        with pass_of(self):
            torch.autograd.grad(loss, self._facts.anchor, retain_graph=retain_graph, allow_unused=True)

    def _pass_to_taps(
        self,
        record: Record,
        loss_per_sample: Tensor,
        keep: KeepPolicy,
        retain_graph: bool,
        looks_later: bool = False,
    ) -> None:
        """A pass to the taps; with ``looks_later``, norms are complete only with `get_norm_sample`, or looked at after it."""
        # A graph that is retained gives nothing up.
        freed = record.uses.held.freed(len(loss_per_sample)) if keep.freed and not retain_graph else None
        record.loss_reduction, record.budget = "sum", KeepBudget(keep, freed)
        # All ranks of a group have to take the same passes.
        looks_later = looks_later and not self.layout.forward_communicates
        if reads_are_free(loss_per_sample.device):
            record.looking = not is_finite([loss_per_sample])
        else:
            record.losses = loss_per_sample.detach()
            record.doubts = Doubts() if looks_later else None
        record.small = SmallGradients() if looks_later and self._profile is UNWATCHED else None
        loss = loss_per_sample.sum()
        loss = loss if record.loss_scale == 1 else record.loss_scale * loss
        self._backward_to_taps(loss, retain_graph or not keep.everything)

    def _norms_of(self, record: Record, loss_per_sample: Tensor) -> Tensor:
        norms = self.get_norm_sample()
        if record.owned and len(norms) == len(loss_per_sample):
            # Rows of several samples whose losses are inf or NaN are taken to be one's.
            lost = ~loss_per_sample.detach().isfinite().to(norms.device)
            norms = self.per_sample_gradient_norms = norms.masked_fill(lost, torch.nan)
        return norms

    @contextmanager
    def _nothing_left_of_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # Half a pass is of no use to any other, and holds activations.
            self._give_up_record()
            raise


def _look_at(norms: Tensor, doubts: Doubts | None) -> list[Any]:
    """Looks at a device, once in a step: notes whether norms are finite, and gives the parameters whose norms are doubtful."""
    if not len(norms):
        return []
    # NaN is the largest of all.
    largest = norms.amax().unsqueeze(0)
    params, flags = ([], None) if doubts is None else doubts.flags(norms.device)
    worst, *doubtful = (largest if flags is None else torch.cat([largest, flags.to(norms.dtype)])).tolist()
    if worst < math.inf:
        note_finite(norms)
    return [param for param, flag in zip(params, doubtful, strict=True) if flag]
