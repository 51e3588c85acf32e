"""Whose the rows of a model's inputs are, where these are not the samples in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opacus_fgc.certificates.entrances import Entrance
from opacus_fgc.certificates.ownership import Owned
from opacus_fgc.certificates.samples import tensors_by_path


def owned_inputs(entrance: Entrance, owned: Mapping[tuple[Any, int], Owned], size: int) -> dict[str, Owned]:
    """The owners of the rows of inputs, by their paths: of those that a layer was called on, and of packed ones.

    They are replaced to see whether samples touch each other. Were they not the owners, rows of samples that stay would change.

    Args:
        entrance: the call of the model.
        owned: whose the rows of the layers' calls in it are, by layer and number of the call.
        size: number of samples.
    """
    result = {
        path: owned[call]
        for path, call in entrance.rows.items()
        if call in owned and len(owned[call].samples) != size and owned[call].is_in_order(size)
    }
    # Others have as many rows as a layer that was called on what comes of them.
    in_order = {
        len(found.samples): found
        for found in owned.values()
        if not found.by_position and len(found.samples) != size and found.is_in_order(size)
    }
    for path, tensor in tensors_by_path(entrance.inputs).items():
        if tensor.dim() and len(tensor) in in_order:
            result.setdefault(path, in_order[len(tensor)])
    positions = [found.samples for found in owned.values() if found.by_position]
    longest = max(map(len, positions), default=0)
    if longest:
        every = torch.stack([samples for samples in positions if len(samples) == longest]).amax(0)
        for path, tensor in tensors_by_path(entrance.inputs).items():
            if tensor.dim() > 1 and tensor.shape[0] * tensor.shape[1] == longest:
                result[path] = Owned(every, True)
    tensors = tensors_by_path(entrance.inputs)
    return {path: found for path, found in result.items() if not _says_whose(tensors[path], found)}


def _says_whose(tensor: Tensor, found: Owned) -> bool:
    """Whether an input is one number for all rows of a sample, and says whose they are."""
    if tensor.is_floating_point() or tensor.is_complex():
        return False
    rows = tensor.flatten(0, 1) if found.by_position else tensor
    if rows.dim() != 1 or len(rows) != len(found.samples):
        return False
    samples = found.samples.to(rows.device)
    same = samples.diff() == 0
    return bool(same.any()) and not (rows.diff()[same] != 0).any()
