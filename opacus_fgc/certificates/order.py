"""In which order the rows of calls are, and what is equal for passes whose rows are in the same one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from opacus_fgc.certificates.batch import Batch
from opacus_fgc.certificates.entrances import Entrance
from opacus_fgc.certificates.ownership import Owned
from opacus_fgc.certificates.ownership_errors import order_error, packed_error
from opacus_fgc.taps.graph import Reached, before_call


def entrances_of(reached: Reached) -> list[Entrance]:
    """The calls of the model from outside that losses depend on."""
    return list(dict.fromkeys(call.entrance for call in reached.calls if call.entrance is not None))


def structure_of(
    batch: Batch, reached: Reached, changed_buffers: Collection[str], dealt_out: Collection[Any]
) -> Hashable:
    """What is equal for passes that one certificate is for.

    Args:
        batch: which samples the rows of the batch are of.
        reached: what their losses depend on.
        changed_buffers: the buffers that forward changed.
        dealt_out: the layers whose rows are not the samples in order, of which each pass says whose they are.
    """
    layers = {
        (call.layer, call.rows == batch.rows, call.samples is None)
        for call in reached.calls
        if call.layer not in dealt_out
    }
    modes = {(entrance.module, entrance.modes) for entrance in entrances_of(reached)}
    return batch.size > 1, frozenset(layers), frozenset(modes), frozenset(changed_buffers)


def order_error_of(owned: Mapping[Any, Owned], batch: Batch, describe: Callable[[Any], str]) -> Exception | None:
    """What is wrong with a layer that is called on the batch as it is, and whose rows belong to the losses of others.

    Args:
        owned: whose the rows of calls are, by `Call.key`.
        batch: which samples the rows of the batch are of.
        describe: what to call a call's layer in errors.
    """
    for call, found in owned.items():
        samples = found.samples
        if batch.packed is not None and found.by_position:
            expected = batch.packed
            if len(expected) != len(samples) or (samples >= 0)[samples != expected].any():
                return packed_error(describe(call))
        on_batch = call.entrance is not None and (call.layer, call.number) in call.entrance.rows.values()
        if on_batch and len(samples) == batch.rows:
            own = batch.owners(batch.rows)
            wrong = [] if own is None else ((samples >= 0) & (samples != own)).nonzero().flatten().tolist()
            if wrong:
                return order_error(describe(call), wrong[0], int(samples[wrong[0]]), batch.unit is not None)
    return None


def keeps_samples(reached: Reached, owned: Mapping[Any, Owned], size: int) -> bool:
    """Whether rows that are not the samples in order come of rows that are, or follow each other as the samples do.

    If not, they may belong to other losses than those of their own samples, which replaced samples alone show.

    Args:
        reached: what the losses depend on.
        owned: whose the rows of calls are, by `Call.key`.
        size: number of samples.
    """
    nodes = {call: node for call, node in zip(reached.calls, reached.nodes, strict=True) if call in owned}
    several: dict[Any, list[Tensor]] = {}
    for call in sorted(nodes, key=lambda call: call.number):
        several.setdefault((call.entrance, call.layer), []).append(owned[call].samples)
    in_order = {key: Owned(torch.cat(samples), False).is_in_order(size) for key, samples in several.items()}
    for call, node in nodes.items():
        before = before_call(node)
        if not before and not in_order[call.entrance, call.layer]:
            return False
    return True
