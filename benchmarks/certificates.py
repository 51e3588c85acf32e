"""What certificates cost: the first step of a model, and the mean over 1,000 steps, as shares of a step without certificates.

Steps with and without run in turn in one process, in another order each round, and a ratio is the median over the rounds.
Of 1,000 steps the first has the certificate of something new, and five more have one each (2, 4, 16, 64, 256), if nothing new
comes later.

    python benchmarks/certificates.py                       # the main workloads
    python benchmarks/certificates.py --only MLP "language*"
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
from measure import ENGINES, Step, make_step
from report import selection
from tabulate import tabulate
from workloads import MAIN, WORKLOADS, Workload

from opacus_fgc.certificates.schedule import Schedule

STEPS, AGAIN = 1000, 5
WAYS = [way for way, (_, mode) in ENGINES.items() if way == mode]


def scheduled(workload: Workload, way: str, how: str) -> Step:
    """A step of a freshly made model with certificates made so often."""
    made: list[Schedule] = []
    init = Schedule.__post_init__

    def noted(self: Schedule) -> None:
        init(self)
        made.append(self)

    Schedule.__post_init__ = noted  # type: ignore[method-assign]
    try:
        step = make_step(workload, way, torch.device("cpu"))
    finally:
        Schedule.__post_init__ = init  # type: ignore[method-assign]
    for schedule in made:
        schedule.how = how
    return step


def seconds(step: Step) -> float:
    """How long one step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(workload: Workload, way: str, duration: float) -> tuple[float, float, float]:
    """Costs as shares of a step without certificates: of the first one, of a later one, and of the mean over `STEPS`."""
    plain, certified = scheduled(workload, way, "never"), scheduled(workload, way, "always")
    seconds(plain)
    seconds(certified)
    rounds: list[tuple[float, float]] = []
    end = time.perf_counter() + duration
    while time.perf_counter() < end or len(rounds) < 6:
        certified_first = len(rounds) % 2
        first, second = (certified, plain) if certified_first else (plain, certified)
        one, two = seconds(first), seconds(second)
        with_them, without = (one, two) if certified_first else (two, one)
        first_step = seconds(scheduled(workload, way, "thinning"))
        rounds.append((first_step / without - 1, with_them / without - 1))
    first, later = (statistics.median(values) for values in zip(*rounds, strict=True))
    return first, later, (first + AGAIN * later) / STEPS


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", type=selection(WORKLOADS), metavar="PATTERN", help="workloads by name, with * and ?"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="time for the rounds of each workload and way")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = [name for names in args.only for name in names] if args.only else MAIN
    rows = []
    for name in chosen:
        for way in WAYS:
            first, later, mean = measure(WORKLOADS[name], way, args.seconds)
            rows.append((name, way, f"{first:+.2f}", f"{later:+.2f}", f"{mean:.2%}"))
            print(*rows[-1], flush=True)
    headers = ("workload", "mode", "first step", "later certificate", f"mean over {STEPS:,} steps")
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads; in steps without certificates\n")
    print(tabulate(rows, headers, disable_numparse=True, tablefmt="github"))


if __name__ == "__main__":
    main()
