"""What governs saved tensors governs those of the taps, so that checkpointing saves memory, and offloading sees all.

Memory is by a trace of torch's allocator, so nothing depends on a clock.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import peak_memory
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opacus_fgc import GradSampleModuleFastGradientClipping
from opacus_fgc.planner import MEMORY, Memory
from opacus_fgc.privacy_engine import MODES
from tests.reference import reference


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Network(nn.Module):
    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.stem, self.head = nn.Linear(64, 64), nn.Linear(64, 3)
        self.blocks = nn.ModuleList(Block(64) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(x.mean(1))


def peak(mode: str | None, checkpointing: bool) -> int:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    model, x = Network(checkpointing), torch.randn(16, 128, 64)
    wrapped = GradSampleModuleFastGradientClipping(model) if mode else model

    def step() -> None:
        loss = wrapped(x).square()
        MODES[mode](wrapped, loss.sum(1)) if mode else loss.sum().backward()

    return peak_memory(step, torch.device("cpu"))


@pytest.mark.parametrize("mode, most", [("ghost", 1.15), ("ghost_bk", 2.5)])
def test_memory_of_a_step(mode: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checkpointed is not there to be given up, so that "ghost" makes two passes by itself."""
    monkeypatch.setattr(MEMORY, "peak", Memory().peak)
    plain, saved = peak(None, False), peak(None, True)
    assert saved < plain / 2
    private = peak(mode, True)
    print(
        f"{mode}: {private / saved:.2f} of the checkpointed step without privacy, {private / plain:.2f} of the plain one"
    )
    assert private < most * saved
    assert private < 0.7 * plain


@pytest.mark.parametrize("mode", MODES)
def test_saved_tensors_hooks(mode: str) -> None:
    model, x = Network(False), torch.randn(5, 3, 64)
    oracle = reference(model, lambda output, _: output.square().sum(), (x,), x, 5)
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=oracle.total_norm().median().item())
    packed: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        packed.add(tensor.data_ptr())
        return tensor.clone()

    inputs: list[Tensor] = []
    model.blocks[1].up.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = wrapped(x).square().sum(1)
    assert inputs[-1].data_ptr() in packed
    MODES[mode](wrapped, losses)
    for path, wanted in oracle.clipped_sum(wrapped.max_grad_norm).items():
        torch.testing.assert_close(model.get_parameter(path).summed_grad, wanted, rtol=1e-10, atol=1e-10)
