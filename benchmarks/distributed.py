"""Time, bytes sent and peak memory of a whole training step over several processes, against the same step without privacy.

A step is forward, backward, noise and SGD. All ways run in turn in the same processes, in another order each round; a ratio of
times is the median over the rounds, a time that of the slowest rank. Bytes are those that a rank sends, by the formulas of
ring algorithms (`communication.py`) on every collective of one step, beside what `scaling.py` says of them; memory is what
`step.py` measures, but of a later step. The ranks are started here, with gloo, on CUDA with NCCL.

    python benchmarks/distributed.py                        # 2 ranks
    python benchmarks/distributed.py --ranks 4              # layouts over meshes of two axes as well
    python benchmarks/distributed.py --only "fsdp*"         # some
    python benchmarks/distributed.py --formulas             # what it comes to for a large model on many ranks; runs nothing
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from communication import Communication
from layouts import LAYOUTS, OF_TWO_AXES
from measure import BASELINE, Step, peak_memory
from report import selection
from scaling import Batch, scaling_tables, sent
from step import machine, versions
from tabulate import tabulate
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from workloads import WORKLOADS, Workload

from opacus_fgc import PrivacyEngine
from opacus_fgc.planner import MEMORY

MODES = ["ghost", "ghost_bk"]
MIB = 2**20


@dataclass(frozen=True)
class Figures:
    """What was measured of a layout; by way, the one without privacy first.

    Attributes:
        time: median time of a step, as a ratio to the one without privacy.
        step_ms: that of the step without privacy, in milliseconds.
        sent: bytes that the first rank sends.
        expected: what the formulas say of them.
        calls: how many collectives it takes part in.
        expected_calls: what the formulas say of them.
        peak: the most bytes that the first rank's step holds over the level before it.
    """

    time: dict[str, float]
    step_ms: float
    sent: dict[str, float]
    expected: dict[str, float]
    calls: dict[str, int]
    expected_calls: dict[str, int]
    peak: dict[str, int]


def make_step(workload: Workload, name: str, way: str, device: torch.device) -> Step:
    """A freshly made model, laid out over the ranks, and the function that makes one step of it.

    Args:
        workload: what to train; each rank of data parallel and FSDP has a batch of it.
        name: which of `LAYOUTS`.
        way: `BASELINE`, or one of `MODES`.
        device: where.
    """
    MEMORY.peak = 0  # the formulas of mode "ghost" are those of two passes
    torch.manual_seed(0)
    axes = LAYOUTS[name].mesh(dist.get_world_size())
    sizes = {axis: size for axis, size in axes.sizes.items() if size > 1}
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    model: Any = LAYOUTS[name].wrap(workload.model().to(device), mesh, way != BASELINE)
    torch.manual_seed(dist.get_rank() // axes.tensor)
    inputs, target = workload.inputs(workload.batch).to(device), workload.target(workload.batch).to(device)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.0)
    criterion: Any = nn.CrossEntropyLoss()
    if way != BASELINE:
        ranks = dist.get_world_size() // axes.tensor
        data = TensorDataset(*(part.repeat(ranks, *[1] * (part.dim() - 1)) for part in (inputs, target)))
        sampler = DistributedSampler(data, ranks, dist.get_rank() // axes.tensor, drop_last=True)
        model, optimizer, criterion, _ = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            criterion=criterion,
            data_loader=DataLoader(data, batch_size=workload.batch, sampler=sampler),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            # All steps are on one batch.
            poisson_sampling=False,
            grad_sample_mode=way,
        )

    def step() -> None:
        criterion(model(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def agreed(value: float, op: Any) -> float:
    """A number reduced over all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(tensor, op)
    return tensor.item()


def time_rounds(steps: dict[str, Step], seconds: float) -> list[dict[str, float]]:
    """The seconds that each step takes on the slowest rank, in rounds in which all are run once, in random order."""
    generator = random.Random(0)
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while agreed(time.perf_counter() < end or len(rounds) < 5, dist.ReduceOp.MAX):
        order = list(steps)
        generator.shuffle(order)
        taken = {}
        for way in order:
            dist.barrier()
            start = time.perf_counter()
            steps[way]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken[way] = agreed(time.perf_counter() - start, dist.ReduceOp.MAX)
        rounds.append(taken)
    return rounds


def count(step: Step) -> Communication:
    """What this rank sends in a step."""
    with Communication() as communication:
        step()
    return communication


def measure(workload: Workload, name: str, seconds: float, device: torch.device) -> Figures:
    """All figures of one layout, on a rank.

    Args:
        workload: what to train.
        name: which of `LAYOUTS`.
        seconds: time for the rounds.
        device: where.
    """
    ways = [BASELINE, *MODES]
    steps = {way: make_step(workload, name, way, device) for way in ways}
    for step in [*steps.values(), *steps.values()]:
        step()  # what is done once belongs to no step; torch's data parallel plans its buckets in a second one
    counted = {way: count(step) for way, step in steps.items()}
    peaks = {way: peak_memory(step, device) for way, step in steps.items()}
    rounds = time_rounds(steps, seconds)
    mesh = LAYOUTS[name].mesh(dist.get_world_size())
    with torch.device("meta"):
        shape: Any = workload.model()
    batch = Batch(*workload.inputs(workload.batch).shape)
    expected = {way: sent(shape, mesh, way, batch) for way in ways}
    return Figures(
        time={way: statistics.median(taken[way] / taken[BASELINE] for taken in rounds) for way in ways},
        step_ms=1e3 * statistics.median(taken[BASELINE] for taken in rounds),
        sent={way: sum(communication.sent.values()) for way, communication in counted.items()},
        expected={way: formula.size for way, formula in expected.items()},
        calls={way: sum(communication.calls.values()) for way, communication in counted.items()},
        expected_calls={way: formula.calls for way, formula in expected.items()},
        peak=peaks,
    )


def run_rank(rank: int, ranks: int, folder: str, names: list[str], workload: str, seconds: float) -> None:
    """All that one process does; the first writes what it measured into the folder."""
    warnings.simplefilter("ignore")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    try:
        results = {}
        for name in names:
            if rank == 0:
                print(name, flush=True)
            results[name] = asdict(measure(WORKLOADS[workload], name, seconds, device))
        if rank == 0:
            about = machine(device) | {"threads of a rank": torch.get_num_threads()}
            Path(folder, "results.json").write_text(json.dumps({"machine": about, "layouts": results}))
        dist.barrier()
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def tables(results: dict[str, Figures]) -> str:
    """All tables, in Markdown."""

    def table(rows: list[list[Any]], *head: str) -> str:
        return tabulate(rows, head, tablefmt="github", floatfmt=".2f")

    named = results.items()
    of_sent = [
        [
            name,
            *(f"{figures.sent[way] / MIB:.2f} ({figures.expected[way] / MIB:.2f})" for way in figures.sent),
            *(figures.sent[way] / figures.sent[BASELINE] for way in MODES),
        ]
        for name, figures in named
    ]
    of_calls = [
        [name, *(f"{figures.calls[way]} ({figures.expected_calls[way]})" for way in figures.calls)]
        for name, figures in named
    ]
    of_peaks = [
        [
            name,
            *(size / MIB for size in figures.peak.values()),
            *(figures.peak[way] / figures.peak[BASELINE] for way in MODES),
        ]
        for name, figures in named
    ]
    ratios = [f"{way}, ratio" for way in MODES]
    return "\n\n".join(
        [
            table(
                [[name, figures.step_ms, *(figures.time[way] for way in MODES)] for name, figures in named],
                "time of a step",
                f"{BASELINE}, ms",
                *ratios,
            ),
            table(of_sent, "MiB sent by a rank (formula)", BASELINE, *MODES, *ratios),
            table(of_calls, "collectives of a step (formula)", BASELINE, *MODES),
            table(of_peaks, "peak memory of a step, MiB", BASELINE, *MODES, *ratios),
        ]
    )


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", type=selection(LAYOUTS), metavar="PATTERN", help="layouts by name, with * and ?"
    )
    transformers = [name for name in WORKLOADS if name.startswith(("text", "language")) and "tied" not in name]
    parser.add_argument("--workload", choices=transformers, default="language model, T=128", help="as in step.py")
    parser.add_argument("--ranks", type=int, default=2, help="even; layouts over two axes need 4")
    parser.add_argument("--seconds", type=float, default=12.0, help="time for the rounds of each layout")
    parser.add_argument("--formulas", action="store_true", help="print what the formulas say of a large model")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    if args.ranks not in (2, 4):
        parser.error(f"--ranks is {args.ranks}; the model has 4 heads, which tensor parallel cuts: take 2 or 4")
    args.names = [name for name in LAYOUTS if not args.only or any(name in names for names in args.only)]
    if args.ranks < 4:
        if args.only and OF_TWO_AXES.intersection(args.names):
            parser.error(f"{' and '.join(sorted(OF_TWO_AXES.intersection(args.names)))} need --ranks 4")
        args.names = [name for name in args.names if name not in OF_TWO_AXES]
    return args


def main() -> None:
    """Measures, prints tables, and writes JSON if asked to."""
    args = arguments()
    if args.formulas:
        print(scaling_tables())
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or the profiler says of memory that it does not know it
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (args.ranks, folder, args.names, args.workload, args.seconds), nprocs=args.ranks)
        measured = json.loads(Path(folder, "results.json").read_text())
    about = {
        "versions": versions(),
        "machine": measured["machine"],
        "workload": args.workload,
        "ranks": args.ranks,
        "seconds": args.seconds,
    }
    results = {name: Figures(**figures) for name, figures in measured["layouts"].items()}
    print(f"\n{json.dumps(about, indent=2)}\n\n{tables(results)}")
    if args.json:
        args.json.write_text(json.dumps(about | {"layouts": measured["layouts"]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
