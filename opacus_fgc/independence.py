"""Whether a model computes each sample's output from that sample alone, without which no sample has a gradient of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from opacus_fgc.checks import describe
from opacus_fgc.taps import tensors_in


def check_independence(name: str, model: nn.Module, inputs: Any, batch_size: int, axis: int) -> None:
    """Runs two samples of a batch together and each by itself, and compares what comes out.

    A forward that draws random numbers is run in eval mode; nothing can be said of one that does so there as well, or that fails
    on a batch of one. Random states and buffers are as before afterwards.

    Args:
        name: the model's name, for the error.
        model: the model, whose ``forward`` is called.
        inputs: its positional and its keyword arguments, with ``batch_size`` samples.
        batch_size: number of samples, 2 or more.
        axis: the axis of inputs and outputs that counts them.

    Raises:
        NotImplementedError: if a sample's output depends on the other sample, or a buffer changed.
    """
    buffers = {path: (buffer, buffer.clone()) for path, buffer in model.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    devices = {tensor.device for tensor in tensors_in(inputs) if tensor.device.type == "cuda"}

    def run(start: int, length: int) -> list[Tensor]:
        def some(tensor: Tensor) -> Tensor:
            counts = tensor.dim() > axis and tensor.shape[axis] == batch_size
            return tensor.narrow(axis, start, length) if counts else tensor

        args, kwargs = tree_map_only(Tensor, some, inputs)
        return [tensor.detach().double() for tensor in tensors_in(model.forward(*args, **kwargs))]

    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            outputs = _repeatable(model, lambda: run(0, 2))
            alone = [run(0, 1), run(1, 1)] if outputs else []
    except Exception:
        # What this model cannot do on such batches will show, if it matters, where it runs on its own.
        return
    finally:
        changed = [path for path, (buffer, before) in buffers.items() if not torch.equal(buffer, before)]
        for buffer, before in buffers.values():
            buffer.copy_(before)
        for module, training in modes.items():
            module.training = training
    for sample, single in enumerate(alone):
        for together, one in zip(outputs, single, strict=False):
            if not _same(together, one, sample, axis):
                raise NotImplementedError(
                    f"{describe(name, model)} gives a sample another output in a batch than by itself, so it mixes samples, and "
                    "no sample has a gradient of its own. Take out what goes across the batch: batch norms, means over it"
                )
    trainable = {path.rpartition(".")[0] for path, param in model.named_parameters() if param.requires_grad}
    state = [path for path in changed if path.rpartition(".")[0] in trainable]
    if state:
        raise NotImplementedError(
            f"{describe(name, model)} changes its buffers {', '.join(state)} in forward, which may carry one sample's data to "
            "another's output. Replace the layer, or freeze its parameters"
        )


def _repeatable(model: nn.Module, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Outputs without random numbers in them; nothing if there is no way to them."""
    for mode in (None, False):
        if mode is not None:
            model.train(mode)
        first, second = run(), run()
        if all(torch.equal(a, b) for a, b in zip(first, second, strict=False)):
            return first
    return []


def _same(together: Tensor, one: Tensor, sample: int, axis: int) -> bool:
    """Whether a sample's rows agree, where they can be compared."""
    if together.dim() <= axis or together.shape[axis] != 2:
        return True
    row = together.narrow(axis, sample, 1)
    if row.shape != one.shape:
        return True
    scale = row[row.isfinite()].abs().max().item() if row.isfinite().any() else 0.0
    return torch.allclose(row, one, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)
