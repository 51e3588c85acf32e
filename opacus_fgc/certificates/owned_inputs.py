"""Whose the rows of a model's inputs are, where these are not the samples in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opacus_fgc.certificates.batch import Batch
from opacus_fgc.certificates.entrances import Entrance
from opacus_fgc.certificates.ownership import Owned
from opacus_fgc.certificates.samples import tensors_by_path
from opacus_fgc.norm_samplers.embedding import are_joined_bags


def owned_inputs(entrance: Entrance, owned: Mapping[tuple[Any, int], Owned], batch: Batch) -> dict[str, Owned | None]:
    """The owners of the rows of inputs, by their paths: of those that a layer was called on, and of packed ones.

    They are replaced to see whether samples touch each other. Were they not the owners, rows of samples that stay would change.

    Args:
        entrance: the call of the model.
        owned: whose the rows of the layers' calls in it are, by layer and number of the call.
        batch: which samples the rows of the batch are of.

    Returns:
        The owners; None for inputs that say whose the rows are.
    """
    in_order = {
        call: found
        for call, found in owned.items()
        if not found.by_position and len(found.samples) != batch.rows and found.is_in_order(batch.size)
    }
    # Others have as many rows as a layer that was called on what comes of them.
    by_rows = {len(found.samples): found for found in in_order.values()}
    positions = [found.samples for found in owned.values() if found.by_position]
    longest = max(map(len, positions), default=0)
    packed = (
        Owned(torch.stack([samples for samples in positions if len(samples) == longest]).amax(0), True)
        if longest
        else None
    )
    result = _of_bags(entrance, batch)
    tensors = tensors_by_path(entrance.inputs)
    for tensor in tensors.values():
        # A vector of graphs knows of nodes without a gradient as well.
        several = [found for found in owned.values() if tensor.dim() == 1 and len(found.samples) == len(tensor)]
        if several and all(_numbers(tensor, found, batch.size) for found in several):
            by_rows[len(tensor)] = Owned(tensor.cpu().long(), False)
            in_order = {call: found for call, found in in_order.items() if len(found.samples) != len(tensor)}
    for path, tensor in tensors.items():
        if path in result:
            continue
        if packed is not None and tensor.dim() > 1 and tensor.shape[:2].numel() == longest:
            found: Owned | None = packed
        else:
            found = in_order.get(entrance.rows.get(path, (None, 0)))
            found = by_rows.get(len(tensor)) if found is None and tensor.dim() else found
        if found is not None:
            result[path] = None if _says_whose(tensor, found) else found
    return result


def _of_bags(entrance: Entrance, batch: Batch) -> dict[str, Owned | None]:
    """The same for what embedding bags are called on that lie one after another."""
    result: dict[str, Owned | None] = {}
    tensors = tensors_by_path(entrance.inputs)
    for call in dict.fromkeys(entrance.rows.values()):
        paths = [path for path, of_path in entrance.rows.items() if of_path == call]
        starts = [path for path in paths[1:] if not tensors[path].is_floating_point()]
        if not starts or not are_joined_bags(call[0], [tensors[path] for path in paths]):
            continue
        tokens, offsets = tensors[paths[0]], tensors[starts[0]].cpu()
        offsets = offsets[:-1] if call[0].include_last_offset else offsets
        samples = batch.owners(len(offsets))
        if samples is None:
            continue
        bags = torch.searchsorted(offsets, torch.arange(len(tokens), device="cpu", dtype=offsets.dtype), right=True) - 1
        of_tokens = Owned(torch.where(bags < 0, -1, samples[bags.clamp(min=0)]), False)
        result.update(dict.fromkeys((path for path in paths if tensors[path].shape == tokens.shape), of_tokens))
        result[starts[0]] = None
    return result


def _numbers(tensor: Tensor, found: Owned, size: int) -> bool:
    """Whether an input is the number of the sample of each row, for all samples in order."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool or found.by_position:
        return False
    rows = tensor.cpu().long()
    own = found.samples >= 0
    steps = rows.diff()
    from_first_to_last = len(rows) > 0 and int(rows[0]) == 0 and int(rows[-1]) == size - 1
    return (
        from_first_to_last and bool(((steps == 0) | (steps == 1)).all()) and torch.equal(rows[own], found.samples[own])
    )


def _says_whose(tensor: Tensor, found: Owned) -> bool:
    """Whether an input is one number for all rows of a sample, and says whose they are."""
    if tensor.is_floating_point() or tensor.is_complex():
        return False
    rows = tensor.flatten(0, 1) if found.by_position else tensor
    if rows.dim() != 1 or len(rows) != len(found.samples):
        return False
    samples = found.samples.to(rows.device)
    # Rows without a gradient tell nothing.
    rows, samples = rows[samples >= 0], samples[samples >= 0]
    same = samples.diff() == 0
    return bool(same.any()) and torch.equal(rows.diff() == 0, same)
