"""Time of one training step (forward, backward, clip), as a ratio to the same step without privacy.

All ways are run in turn in one process, so that whatever else the machine does hits them alike; a ratio is the median over
the rounds.

    python benchmarks/step.py                       # everything
    python benchmarks/step.py --only "MLP" "ViT"    # some workloads
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import opacus
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import WORKLOADS, Workload

import opacus_fgc

Step = Callable[[], None]
WAYS: dict[str, tuple[type[opacus.PrivacyEngine], str] | None] = {
    "non-private": None,
    "opacus hooks": (opacus.PrivacyEngine, "hooks"),
    "opacus ghost": (opacus.PrivacyEngine, "ghost"),
    "ghost": (opacus_fgc.PrivacyEngine, "ghost"),
    "ghost_bk": (opacus_fgc.PrivacyEngine, "ghost_bk"),
}


def make_step(workload: Workload, way: str) -> Step:
    """A function that makes one step of a workload without the optimizer's own."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, inputs, target = workload.model(), workload.inputs(workload.batch), workload.target(workload.batch)
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.0)
    criterion = nn.CrossEntropyLoss()
    private = WAYS[way]
    if private is not None:
        engine_type, mode = private
        model, optimizer, *rest = engine_type().make_private(
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
        optimizer.zero_grad(set_to_none=True)
        criterion(model(inputs), target).backward()
        if way == "opacus hooks":
            optimizer.clip_and_accumulate()

    return step


def time_ratios(workload: Workload, seconds: float) -> dict[str, float | None]:
    """The median time of each way over the non-private one's; None for a way that fails on the workload."""
    steps: dict[str, Step | None] = {}
    for way in WAYS:
        try:
            steps[way] = make_step(workload, way)
            steps[way]()
        except Exception as error:
            print(f"    {way}: {type(error).__name__}: {str(error)[:100]}", flush=True)
            steps[way] = None
    running = {way: step for way, step in steps.items() if step is not None}
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < 5:
        taken = {}
        for way, step in running.items():
            start = time.perf_counter()
            step()
            taken[way] = time.perf_counter() - start
        rounds.append(taken)
    return {
        way: statistics.median(taken[way] / taken["non-private"] for taken in rounds) if way in running else None
        for way in WAYS
    }


def table(title: str, rows: dict[str, dict[str, float | None]]) -> str:
    """A Markdown table, with the geometric means of what all ways could run."""
    ways = [way for way in WAYS if way != "non-private"]
    complete = [row for row in rows.values() if all(row[way] is not None for way in ways)]
    lines = [f"| {title} | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for name, row in rows.items():
        cells = ["stops" if row[way] is None else f"{row[way]:.2f}" for way in ways]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if complete:
        means = [math.exp(statistics.fmean(math.log(row[way] or 1.0) for row in complete)) for way in ways]
        lines.append("| geometric mean where all run | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints tables, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(description="Step time over that of non-private training.")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="some workloads")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for the rounds of each workload")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()

    times = {}
    for name in args.only:
        print(name, flush=True)
        times[name] = time_ratios(WORKLOADS[name], args.seconds)
    machine = f"torch {torch.__version__}, opacus {opacus.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
    print(f"\n{machine}\n\n{table('time of a step', times)}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "time": times}, indent=2) + "\n")


if __name__ == "__main__":
    main()
