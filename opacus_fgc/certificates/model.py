"""A model whose backward passes are certified: each row belongs to the sample it counts for, and no sample touches another."""

from __future__ import annotations

import random
import secrets
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from torch import Tensor

from opacus_fgc.argument_checks import describe
from opacus_fgc.certificates.entrances import Entrance
from opacus_fgc.certificates.independence import check_independence, replacements
from opacus_fgc.certificates.model_state import ModelState, restored
from opacus_fgc.certificates.observations import Forward, Observations
from opacus_fgc.certificates.ownership import Backprops, check_owners, draws_that_tell, weights
from opacus_fgc.certificates.samples import Replacement, copied, tensors_of
from opacus_fgc.certificates.schedule import Certification
from opacus_fgc.certificates.sketch import forget_weights
from opacus_fgc.step.record import Record
from opacus_fgc.taps.graph import Reached
from opacus_fgc.taps.routes import arrangement
from opacus_fgc.taps.trial import TriedModel


class Due(NamedTuple):
    """A certificate that is to be made.

    Attributes:
        size: number of samples.
        structure: what is equal for passes that it is for.
        is_new: whether there was none for such passes.
        draws: how many draws of loss weights tell the samples apart.
    """

    size: int
    structure: Hashable
    is_new: bool
    draws: int


class CertifiedModel(TriedModel):
    """A tapped model that proves of a backward pass what its norms rely on; see `certificates`."""

    certification: Certification

    def _backward_to_taps(self, loss: Tensor, retain_graph: bool) -> None:
        raise NotImplementedError

    def _due(self, size: int, reached: Reached, record: Record) -> Due | None:
        """The certificate that a pass needs, on this rank or another one; None if it needs none.

        Args:
            size: number of samples.
            reached: what their losses depend on.
            record: the state of the step.
        """
        structure = self._structure(size, reached, record)
        is_due, is_new = (
            self.certification.schedule.is_due(size, structure),
            self.certification.schedule.is_new(structure),
        )
        due, new, draws = self.layout.all_reduce_max([is_due, is_new, draws_that_tell(size) if is_new else 1])
        return Due(size, structure, bool(new), draws) if due else None

    @contextmanager
    def _witnessed(self, certifying: bool = False) -> Iterator[Backprops]:
        """What the taps are shown within, as sketches.

        Args:
            certifying: whether nothing else is to come of it.
        """
        self.certification.witness, self.certification.certifying = Backprops(), certifying
        try:
            yield self.certification.witness
        finally:
            self.certification.witness, self.certification.certifying = None, False

    def certify(
        self, due: Due, loss_per_sample: Tensor, reached: Reached, loss_scale: float, plain: Backprops | None = None
    ) -> None:
        """Proves that losses have per-sample gradients, and that their taps see them.

        Args:
            due: the certificate.
            loss_per_sample: shape ``(N,)``.
            reached: what they depend on.
            loss_scale: see `GradSampleHooksFastGradientClipping.first_pass`.
            plain: what the taps were shown of the losses as they are, if they were.

        Raises:
            NotImplementedError: if they do not, or it cannot be told.
        """
        size, choices = due.size, self._choices()

        def backward(weights: Tensor) -> Backprops:
            with self._witnessed(certifying=True) as backprops:
                loss = loss_scale * (weights.to(loss_per_sample) * loss_per_sample).sum()
                self._backward_to_taps(loss, retain_graph=True)
            return backprops

        check_owners(
            size,
            lambda exponents: weights(size, due.draws, choices, exponents),
            backward,
            plain,
            lambda key: self._tapped(key.layer).name,
            self.layout.on_all_ranks,
        )
        layers = {call.layer for call in reached.calls}
        # Where something is new both signs are tried, since a statistic of the batch may be compared with a number.
        signs = (1, -1) if due.is_new else (choices.choice((1, -1)),)
        for entrance in self._entrances(reached):
            for tries in self._replacements(entrance, size, signs):
                check_independence(
                    describe("", entrance.module) if entrance.module is self._module else self._name_of(entrance),
                    tries,
                    partial(self._run_again, entrance, size),
                    layers.__contains__,
                    self.layout.on_all_ranks,
                    entrance.forward if entrance.forward is not None and entrance.forward.size == size else None,
                )
        forget_weights()
        self.certification.schedule.made(size, due.structure)

    def _choices(self) -> random.Random:
        if self.certification.choices is None:
            # Ranks that work on the same samples have to choose the same ones.
            seed = secrets.token_bytes(16)
            self.certification.choices = random.Random(
                self.layout.common(seed) if self.layout.forward_communicates else seed
            )

        return self.certification.choices

    def _structure(self, size: int, reached: Reached, record: Record) -> Hashable:
        """What is equal for passes that one certificate is for."""
        layers = {(call.layer, call.rows == size, call.samples is None) for call in reached.calls}
        modes = {(entrance.module, entrance.modes) for entrance in self._entrances(reached)}
        known = {order.data_ptr() for order in record.orders}
        moved = arrangement(reached.moving, self.batch_first, known)
        return size > 1, frozenset(layers), frozenset(modes), frozenset(record.changed_buffers), moved

    @staticmethod
    def _entrances(reached: Reached) -> list[Entrance]:
        return list(dict.fromkeys(call.entrance for call in reached.calls if call.entrance is not None))

    def _name_of(self, entrance: Entrance) -> str:
        paths = {module: path for path, module in self._module.named_modules()}
        return describe(paths[entrance.module], entrance.module)

    def _replacements(self, entrance: Entrance, size: int, signs: Sequence[int]) -> list[list[Replacement]]:
        shared = self._facts.shared_inputs.setdefault(entrance.module, set())
        # On other devices an index out of range is an error that nothing recovers from.
        enlarge = all(tensor.device.type == "cpu" for tensor in tensors_of(entrance.inputs))
        return replacements(size, 0 if self.batch_first else 1, shared, self._choices(), enlarge, signs)

    def _run_again(
        self, entrance: Entrance, size: int, replacement: Replacement | None, state: ModelState | None
    ) -> Forward:
        try:
            return self._run(entrance, size, replacement, state, keep=False)
        except (RuntimeError, NotImplementedError):
            # Some forwards go backward themselves, or through torch.func, which takes no hooks on saved tensors.
            return self._run(entrance, size, replacement, state, keep=True)

    def _run(
        self, entrance: Entrance, size: int, replacement: Replacement | None, state: ModelState | None, keep: bool
    ) -> Forward:
        with entrance.again(keep) as random_states, restored(self._module):
            state = state or entrance.state
            if state is not None:
                state.restore()
            random_states.restore()
            inputs = copied(entrance.inputs) if replacement is None else replacement(entrance.inputs)
            self._running.seen = observations = Observations(size)
            try:
                output = self._trial(entrance.module, inputs, size)
            finally:
                self._running.seen = None
            return observations.of(tensors_of(output), self._module)
