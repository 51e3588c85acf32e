"""A model whose backward passes are certified: each row belongs to the sample it counts for, and no sample touches another."""

from __future__ import annotations

import random
import secrets
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opacus_fgc.argument_checks import describe
from opacus_fgc.certificates.backprops import Backprops, draws_that_tell, weights
from opacus_fgc.certificates.batch import Batch
from opacus_fgc.certificates.comparison import Comparison
from opacus_fgc.certificates.entrances import Entrance
from opacus_fgc.certificates.independence import check_independence, replacements
from opacus_fgc.certificates.model_state import ModelState, restored
from opacus_fgc.certificates.observations import Forward, Observations
from opacus_fgc.certificates.order import entrances_of, keeps_samples, order_error_of, structure_of
from opacus_fgc.certificates.owned_inputs import owned_inputs
from opacus_fgc.certificates.ownership import Owned, OwnerSearch
from opacus_fgc.certificates.samples import Replacement, copied, tensors_of
from opacus_fgc.certificates.schedule import Certification
from opacus_fgc.certificates.sketch import forget_weights, raise_on_all_ranks
from opacus_fgc.norm_samplers.head import are_head_rows
from opacus_fgc.step.record import Record
from opacus_fgc.taps.graph import Reached, goes_through
from opacus_fgc.taps.routes import arrangement
from opacus_fgc.taps.trial import TriedModel


class Due(NamedTuple):
    """A certificate that is to be made.

    Attributes:
        batch: which samples the rows of the batch are of.
        structure: what is equal for passes that it is for.
        moved: the indices by which rows move.
        is_whole: whether samples are replaced, too; else it says whose the rows are, and no more.
        is_new: whether there was none for such passes.
        is_unknown: whether nobody but this pass knows whose its rows are.
        draws: how many draws of loss weights are made.
    """

    batch: Batch
    structure: Hashable
    moved: Hashable
    is_whole: bool
    is_new: bool
    is_unknown: bool
    draws: int

    @property
    def comes_first(self) -> bool:
        """Whether it is to be made before norms are taken.

        Of what is new it tells better what is wrong than the norms' errors; and without owners some rows have no norms.
        """
        return self.is_new or self.is_unknown


class CertifiedModel(TriedModel):
    """A tapped model that proves of a backward pass what its norms rely on; see `certificates`."""

    certification: Certification

    def _backward_to_taps(self, loss: Tensor, retain_graph: bool) -> None:
        raise NotImplementedError

    def _due(self, batch: Batch, reached: Reached, record: Record, expected: Collection[Any] = ()) -> Due | None:
        """The certificate that a pass needs, on this rank or another one; None if it needs none.

        Args:
            batch: which samples the rows of the batch are of.
            reached: what their losses depend on.
            record: the state of the step.
            expected: the calls whose rows have owners that are known; see `expected_owners`.
        """
        size = batch.size
        structure = structure_of(batch, reached, record.changed_buffers, self.certification.dealt_out)
        moved = arrangement(reached.moving, self.batch_first, {order.data_ptr() for order in record.orders})
        schedule, dealt_out = self.certification.schedule, self.certification.dealt_out
        whole, is_new = schedule.is_due(size, structure), schedule.is_new(structure)
        others = [call for call in reached.calls if call not in expected]
        unknown = bool(size) and (
            not schedule.is_in_order(structure, moved)
            or any(call.samples is None and (call.layer in dealt_out or call.rows % batch.rows) for call in others)
        )
        draws = draws_that_tell(size) if is_new or unknown else 1
        due, new, dealt, draws = self.layout.all_reduce_max([whole, is_new, unknown, draws])
        return Due(batch, structure, moved, bool(due), bool(new), bool(dealt), draws) if due or dealt else None

    def expected_owners(self, reached: Reached, record: Record) -> dict[Any, Owned]:
        """Whose the rows are of packed samples, by the criterion's arguments, in layers that were found to see these positions.

        Certificates prove it, as they do for rows that are the samples in order.
        """
        if record.batch is None or record.batch.packed is None:
            return {}
        owned = Owned(record.batch.packed, True)
        return {call: owned for call in reached.calls if call.layer in self.certification.by_position}

    @contextmanager
    def _witnessed(self, certifying: bool = False) -> Iterator[Backprops]:
        """What the taps are shown within, as sketches.

        Args:
            certifying: whether nothing else is to come of it.
        """
        self.certification.witness = Backprops(self.certification.by_position)
        self.certification.certifying = certifying
        try:
            yield self.certification.witness
        finally:
            self.certification.witness, self.certification.certifying = None, False

    def certify(
        self, due: Due, loss_per_sample: Tensor, reached: Reached, loss_scale: float, plain: Backprops | None = None
    ) -> dict[Any, Owned]:
        """Proves that losses have per-sample gradients, and that their taps see them.

        Args:
            due: the certificate.
            loss_per_sample: shape ``(N,)``.
            reached: what they depend on.
            loss_scale: see `GradSampleHooksFastGradientClipping.first_pass`.
            plain: what the taps were shown of the losses as they are, if they were.

        Returns:
            Whose the rows are of calls whose rows are not the samples in order, by `Call.key`.

        Raises:
            NotImplementedError: if they do not, or it cannot be told.
        """
        batch, choices = due.batch, self._choices()
        size = batch.size
        half = goes_through(loss_per_sample, {torch.float16})
        if plain is not None:
            plain.half |= half

        def backward(weights: Tensor) -> Backprops:
            with self._witnessed(certifying=True) as backprops:
                loss = loss_scale * (weights.to(loss_per_sample) * loss_per_sample).sum()
                self._backward_to_taps(loss, retain_graph=True)
            backprops.half |= half
            return backprops

        search = OwnerSearch(
            batch,
            draw=lambda count, exponents: weights(size, count, choices, exponents),
            run=backward,
            by_position=self.certification.by_position,
            packed=self.record.batch_size_seen == 1,
            lost=next(iter((~loss_per_sample.detach().isfinite()).nonzero().flatten().tolist()), None),
            describe=lambda key: self._tapped(key.layer).name,
            on_all_ranks=self.layout.on_all_ranks,
        )
        owned = search.find(due.draws, plain)
        error = order_error_of(owned, batch, lambda key: self._tapped(key.layer).name)
        raise_on_all_ranks(error, self.layout.on_all_ranks)
        self.certification.dealt_out.update(call.layer for call in owned)
        if self.layout.on_all_ranks(not owned):
            self.certification.schedule.found_in_order(due.structure, due.moved)
        # Rows may belong to other losses than those of their own samples, which replaced samples alone show.
        if due.is_whole or not self.layout.on_all_ranks(keeps_samples(reached, owned, size)):
            self._check_independence(due, reached, owned, search.idle)
        if due.is_whole:
            self.certification.schedule.made(size, due.structure)
        forget_weights()
        return owned

    def _check_independence(
        self, due: Due, reached: Reached, owned: Mapping[Any, Owned], idle: Mapping[Any, Owned]
    ) -> None:
        batch, choices = due.batch, self._choices()
        layers = {call.layer for call in reached.calls}
        by_position = any(found.by_position for found in owned.values())
        # A statistic of the batch may be compared with a number: both signs; samples may touch those behind them: both halves.
        signs = (1, -1, 0) if due.is_new else (choices.choice((1, -1)),)
        for entrance in entrances_of(reached):
            if are_head_rows(entrance.inputs[0]):
                continue  # what they give is the same whatever they are
            own = {(call.layer, call.number): found for call, found in owned.items() if call.entrance is entrance}
            inputs = owned_inputs(entrance, own, batch)
            rows = {(call.layer, call.number): found for call, found in idle.items() if call.entrance is entrance} | own
            comparison = Comparison(layers.__contains__, self.certification.dealt_out, rows)
            # What was noted before it was known that positions are rows is of no use.
            known = entrance.forward is not None and entrance.forward.size == batch.rows and not by_position
            for tries in self._replacements(entrance, batch, signs, inputs):
                check_independence(
                    describe("", entrance.module) if entrance.module is self._module else self._name_of(entrance),
                    tries,
                    partial(self._run_again, entrance, batch),
                    comparison,
                    self.layout.on_all_ranks,
                    entrance.forward if known else None,
                )

    def _choices(self) -> random.Random:
        if self.certification.choices is None:
            # Ranks that work on the same samples have to choose the same ones.
            seed = secrets.token_bytes(16)
            self.certification.choices = random.Random(
                self.layout.common(seed) if self.layout.forward_communicates else seed
            )

        return self.certification.choices

    def _name_of(self, entrance: Entrance) -> str:
        paths = {module: path for path, module in self._module.named_modules()}
        return describe(paths[entrance.module], entrance.module)

    def _replacements(
        self, entrance: Entrance, batch: Batch, signs: Sequence[int], owned: Mapping[str, Owned | None]
    ) -> list[list[Replacement]]:
        shared = self._facts.shared_inputs.setdefault(entrance.module, set())
        # On other devices an index out of range is an error that nothing recovers from.
        enlarge = all(tensor.device.type == "cpu" for tensor in tensors_of(entrance.inputs))
        return replacements(batch, 0 if self.batch_first else 1, shared, owned, self._choices(), enlarge, signs)

    def _run_again(
        self, entrance: Entrance, batch: Batch, replacement: Replacement | None, state: ModelState | None
    ) -> Forward:
        try:
            return self._run(entrance, batch, replacement, state, keep=False)
        except (RuntimeError, NotImplementedError):
            # Some forwards go backward themselves, or through torch.func, which takes no hooks on saved tensors.
            return self._run(entrance, batch, replacement, state, keep=True)

    def _run(
        self, entrance: Entrance, batch: Batch, replacement: Replacement | None, state: ModelState | None, keep: bool
    ) -> Forward:
        self._gather_heads()
        with entrance.again(keep) as random_states, restored(self._module):
            state = state or entrance.state
            if state is not None:
                state.restore()
            random_states.restore()
            inputs = copied(entrance.inputs) if replacement is None else replacement(entrance.inputs)
            self._running.seen = observations = Observations(batch.rows, batch.packed)
            try:
                output = self._trial(entrance.module, inputs, batch.rows)
            finally:
                self._running.seen = None
            return observations.of(tensors_of(output), self._module)
