"""Time and peak memory of one training step (forward, backward, clip), as ratios to the same step without privacy.

All ways run in turn in one process, in another order each round, so that whatever else the machine does hits them alike; a
ratio of times is the median over the rounds, after the first steps, which have certificates. Memory is the peak of the first
step, and of one after these, over the level before the first, by a trace of torch's allocator: what a way keeps from step to step
counts, scratch memory inside oneDNN and MKL is not seen.

    python benchmarks/step.py                               # the main workloads
    python benchmarks/step.py --sweeps --plot step.png      # over T and B as well, and a picture
    python benchmarks/step.py --only MLP "language*"        # some
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from dataclasses import asdict
from pathlib import Path

import opacus
import torch
from measure import measure
from report import plot, selection, tables
from workloads import MAIN, WORKLOADS

import opacus_fgc


def processor() -> str:
    """What the system calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The versions of what was measured."""
    return {
        "opacus_fgc": opacus_fgc.__version__,
        "opacus": opacus.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }


def machine(device: torch.device) -> dict[str, str | int]:
    """What it was measured on."""
    return {
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--only", nargs="+", type=selection(WORKLOADS), metavar="PATTERN", help="workloads by name, with * and ?"
    )
    which.add_argument("--sweeps", action="store_true", help="sweeps over T and B as well")
    parser.add_argument("--seconds", type=float, default=12.0, help="time for the rounds of each workload")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", action="store_true", help="forward passes in bfloat16")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    return parser.parse_args()


def main() -> None:
    """Measures, prints tables, and writes JSON and a plot if asked to."""
    args = arguments()
    warnings.simplefilter("ignore")
    if args.only:
        chosen = {name for names in args.only for name in names}
    else:
        chosen = set(WORKLOADS if args.sweeps else MAIN)
        if args.device.type == "cpu":
            chosen -= {name for name, workload in WORKLOADS.items() if workload.large}

    results = {}
    for name in [name for name in WORKLOADS if name in chosen]:
        print(name, flush=True)
        results[name] = measure(WORKLOADS[name], args.seconds, args.device, args.autocast)
        for way, why in results[name].stops.items():
            print(f"    {way} stops: {why[:100]}", flush=True)

    about = {
        "versions": versions(),
        "machine": machine(args.device),
        "seconds": args.seconds,
        "autocast": args.autocast,
    }
    print(f"\n{json.dumps(about, indent=2)}\n\n{tables(results)}")
    if args.json:
        workloads = {name: asdict(figures) for name, figures in results.items()}
        args.json.write_text(json.dumps(about | {"workloads": workloads}, indent=2) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
