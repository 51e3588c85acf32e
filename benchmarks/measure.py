"""Time and peak memory of one training step, as ratios to the same step without privacy."""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import opacus
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader, TensorDataset
from workloads import Workload

import opacus_fgc

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch prints two lines about each trace, from 2.13 on

Step = Callable[[], None]
Ratios = dict[str, float | None]

BASELINE = "non-private"
EARLY = 4
"""So many steps have a certificate each, or follow one soon; what comes later is timed."""

ENGINES: dict[str, tuple[type[opacus.PrivacyEngine], str]] = {
    "opacus hooks": (opacus.PrivacyEngine, "hooks"),
    "opacus ghost": (opacus.PrivacyEngine, "ghost"),
    "ghost": (opacus_fgc.PrivacyEngine, "ghost"),
    "ghost_bk": (opacus_fgc.PrivacyEngine, "ghost_bk"),
}
WAYS = list(ENGINES)


@dataclass(frozen=True)
class Figures:
    """What was measured on one workload.

    Attributes:
        batch: the batch size.
        time: of a step after the early ones, as a ratio to the non-private one's; None for a way that stops.
        memory: peak of the first step over the level before it, likewise.
        later: peak of the first step after the early ones, over the same level.
        step_ms: median time of the non-private step, in milliseconds.
        step_mib: peak memory of the first non-private step, in MiB.
        stops: why a way stops.
    """

    batch: int
    time: Ratios
    memory: Ratios
    later: Ratios
    step_ms: float
    step_mib: float
    stops: dict[str, str]


def make_step(workload: Workload, way: str, device: torch.device, autocast: bool = False) -> Step:
    """A freshly made model, and the function that makes one step of it: forward, backward, clip.

    Args:
        workload: what to train.
        way: `BASELINE`, or one of `WAYS`.
        device: where.
        autocast: whether the forward pass is autocast to bfloat16.
    """
    torch.manual_seed(0)
    model = workload.model().to(device)
    inputs, target = workload.inputs(workload.batch).to(device), workload.target(workload.batch).to(device)
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.0)
    criterion = nn.CrossEntropyLoss()
    mode = None
    if way != BASELINE:
        engine, mode = ENGINES[way]
        model, optimizer, *rest = engine().make_private(
            module=model,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=DataLoader(TensorDataset(inputs, target), batch_size=workload.batch),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        criterion = rest[0] if len(rest) == 2 else criterion

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = criterion(model(inputs), target)
        loss.backward()
        if mode == "hooks":  # the others have clipped by now
            optimizer.clip_and_accumulate()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_memory(step: Step, device: torch.device, early: int = 0) -> int:
    """The most bytes that a step holds at a time, over what was allocated before it and the steps before it.

    On CUDA from the statistics of torch's allocator, on a CPU from the profiler's trace of it. Neither sees what libraries
    such as oneDNN and MKL allocate on their own for scratch.

    Args:
        step: makes one step.
        device: where.
        early: how many steps to make before it.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        for _ in range(early):
            step()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        for _ in range(early):
            step()
        with record_function(_MEASURED):
            step()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    begin = next(event["ts"] for event in events if event["name"] == _MEASURED)
    held: dict[int, int] = {}  # by address, so that only what the step itself allocated counts as freed by it
    level = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            held[address] = size
            level += size
            peak = max(peak, level if event["ts"] >= begin else 0)
        else:
            level -= held.pop(address, 0)
    return peak


_MEASURED = "the step that is measured"


def time_rounds(steps: dict[str, Step], seconds: float, device: torch.device) -> list[dict[str, float]]:
    """The seconds that each step takes, in each of the rounds in which all are run once, in random order.

    A way that is more than ten times slower than the baseline is in the first five rounds only, or there would be too few.
    """
    generator = random.Random(0)
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < 5:
        order = list(steps)
        if len(rounds) >= 5:
            order = [way for way in order if rounds[0][way] < 10 * rounds[0][BASELINE]]
        generator.shuffle(order)
        taken = {}
        for way in order:
            start = time.perf_counter()
            steps[way]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken[way] = time.perf_counter() - start
        rounds.append(taken)
    return rounds


def measure(workload: Workload, seconds: float, device: torch.device, autocast: bool = False) -> Figures:
    """All figures of one workload.

    Args:
        workload: what to train.
        seconds: time for the rounds.
        device: where.
        autocast: whether forward passes are autocast to bfloat16.
    """
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    later: dict[str, int] = {}
    stops: dict[str, str] = {}
    for way in [BASELINE, *WAYS]:
        try:
            make_step(workload, way, device, autocast)()  # since what torch initializes once belongs to no way
            # Of fresh instances, so that what a way keeps from step to step counts.
            peaks[way] = peak_memory(make_step(workload, way, device, autocast), device)
            step = make_step(workload, way, device, autocast)
            later[way] = peak_memory(step, device, EARLY)
            steps[way] = step
        except Exception as error:
            if way == BASELINE:
                raise
            stops[way] = f"{type(error).__name__}: {error}"
    rounds = time_rounds(steps, seconds, device)
    return Figures(
        batch=workload.batch,
        time={
            way: statistics.median(taken[way] / taken[BASELINE] for taken in rounds if way in taken)
            if way in steps
            else None
            for way in WAYS
        },
        memory={way: peaks[way] / peaks[BASELINE] if way in steps else None for way in WAYS},
        later={way: later[way] / later[BASELINE] if way in steps else None for way in WAYS},
        step_ms=1e3 * statistics.median(taken[BASELINE] for taken in rounds),
        step_mib=peaks[BASELINE] / 2**20,
        stops=stops,
    )
