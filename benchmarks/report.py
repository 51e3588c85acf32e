"""Tables and a plot of what was measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING

from measure import BASELINE, WAYS, Figures
from tabulate import tabulate
from workloads import MAIN, SWEEPS, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = dict[str, Figures]

QUANTITIES = {
    "time": "time of a step",
    "memory": "peak memory of the first step",
    "later": "peak memory of a later step",
}
# The colours of Okabe and Ito, which the colour-blind can tell apart.
COLOURS = dict(zip(WAYS, ["#999999", "#E69F00", "#56B4E9", "#009E73"], strict=True))
MARKERS = dict(zip(WAYS, "sDo^", strict=True))


def main_results(results: Results) -> Results:
    """Those of the main table."""
    return {name: results[name] for name in MAIN if name in results}


def measured_sweeps(results: Results) -> dict[str, tuple[Sweep, dict[int, Figures]]]:
    """The sweeps of which a point was measured that is not in the main table as well, with all their points."""
    sweeps = {}
    for sweep in SWEEPS:
        names = sweep.names()
        if any(name in results and name not in MAIN for name in names.values()):
            points = {size: results[name] for size, name in names.items() if name in results}
            sweeps[sweep.heading] = sweep, points
    return sweeps


def mean(results: Results, quantity: str, way: str, ways: list[str]) -> float | None:
    """The geometric mean of a way's ratios over the workloads where all of some ways run; None if there are none."""
    rows = [getattr(figures, quantity) for figures in results.values()]
    ratios = [row[way] for row in rows if all(row[other] is not None for other in [way, *ways])]
    return geometric_mean(ratios) if ratios else None


def worst(results: Results, quantity: str, way: str) -> float | None:
    """The largest of a way's ratios."""
    ratios = [getattr(figures, quantity)[way] for figures in results.values()]
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def table(title: str, rows: list[list[str | float | None]]) -> str:
    """A Markdown table of ratios."""
    return tabulate(rows, [title, *WAYS], tablefmt="github", floatfmt=".2f", missingval="stops")


def tables(results: Results) -> str:
    """All tables, of time and of memory, in Markdown."""
    parts = []
    main = main_results(results)
    for quantity, title in QUANTITIES.items():
        if main:
            rows = [[name, *getattr(figures, quantity).values()] for name, figures in main.items()]
            rows.append(["geometric mean", *(mean(main, quantity, way, [way]) for way in WAYS)])
            rows.append(["geometric mean where all run", *(mean(main, quantity, way, WAYS) for way in WAYS)])
            rows.append(["worst", *(worst(main, quantity, way) for way in WAYS)])
            parts.append(table(title, rows))
        for name, (sweep, points) in measured_sweeps(results).items():
            rows = [[f"{sweep.axis}={size}", *getattr(figures, quantity).values()] for size, figures in points.items()]
            parts.append(table(f"{title}, {name}", rows))
    return "\n\n".join([*parts, *speed_up(main)])


def read(text: str) -> Results:
    """The ratios of the main workloads as `tables` wrote them, of time and of memory; none without all."""
    ratios: dict[str, dict[str, dict[str, float | None]]] = {quantity: {} for quantity in QUANTITIES}
    title = None
    for line in text.splitlines():
        first, *cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells == WAYS:
            title = first
        for quantity, heading in QUANTITIES.items():
            if heading == title and first in MAIN and len(cells) == len(WAYS):
                numbers = (None if cell == "stops" else float(cell) for cell in cells)
                ratios[quantity][first] = dict(zip(WAYS, numbers, strict=True))
    names = [name for name in MAIN if all(name in rows for rows in ratios.values())]
    return {
        name: Figures(
            **{quantity: rows[name] for quantity, rows in ratios.items()}, batch=0, step_ms=0.0, step_mib=0.0, stops={}
        )
        for name in names
    }


def speed_up(results: Results) -> list[str]:
    """One line on how many times faster book-keeping is than Opacus' ghost mode, if both ran."""
    pair = ["opacus ghost", "ghost_bk"]
    theirs, ours = (mean(results, "time", way, pair) for way in pair)
    if theirs is None or ours is None:
        return []
    return [f"ghost_bk is {theirs / ours:.2f} times as fast as opacus ghost (geometric mean where both run)"]


def draw_bars(axes: Axes, results: Results, quantity: str) -> None:
    """One group of bars a workload; bars of Opacus' hooks that would dwarf all others are cut, with their ratios on them."""
    others = [worst(results, quantity, way) for way in WAYS if way != "opacus hooks"]
    limit = 1.15 * max(ratio for ratio in [1.0, *others] if ratio is not None)
    height = 0.8 / len(WAYS)
    for i, way in enumerate(WAYS):
        ratios = [getattr(figures, quantity)[way] for figures in results.values()]
        places = [row + (i - (len(WAYS) - 1) / 2) * height for row in range(len(ratios))]
        axes.barh(places, [min(ratio or 0.0, limit) for ratio in ratios], height, color=COLOURS[way], label=way)
        for place, ratio in zip(places, ratios, strict=True):
            if ratio is None:
                axes.text(0.03 * limit, place, "stops", va="center", fontsize=7, color="#555555")
            elif ratio > limit:
                axes.text(0.98 * limit, place, f"{ratio:.1f} →", va="center", ha="right", fontsize=7)
    axes.axvline(1.0, color="black", linewidth=1, linestyle="--", label=BASELINE)
    axes.set(
        xlim=(0, limit), ylim=(len(results) - 0.5, -0.5), title=QUANTITIES[quantity], xlabel="ratio to non-private"
    )
    axes.set_yticks(range(len(results)), list(results))


def draw_lines(axes: Axes, name: str, sweep: Sweep, points: dict[int, Figures], quantity: str) -> None:
    """One line a way, over what grows."""
    for way in WAYS:
        ratios = {size: getattr(figures, quantity)[way] for size, figures in points.items()}
        ran = {size: ratio for size, ratio in ratios.items() if ratio is not None}
        axes.plot(list(ran), list(ran.values()), color=COLOURS[way], marker=MARKERS[way], label=way)
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--", label=BASELINE)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(list(points), [str(size) for size in points])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(name, fontsize="medium")
    axes.set(xlabel=sweep.axis, ylabel=f"{QUANTITIES[quantity]}, ratio")


def plot(results: Results, path: Path, comment: str = "") -> None:
    """Draws bars of the main workloads and lines of the sweeps, as far as they were measured.

    Args:
        results: what was measured.
        path: where the picture goes, a PNG if there is a comment.
        comment: what the file is to say about itself.
    """
    import matplotlib.pyplot as plt

    main, sweeps = main_results(results), measured_sweeps(results)
    heights = [1.5 + 0.55 * len(main)] * bool(main) + [3.0 * len(QUANTITIES)] * bool(sweeps)
    figure = plt.figure(figsize=(15, sum(heights)), layout="constrained")
    parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat)
    if main:
        bars = next(parts).subplots(1, len(QUANTITIES), sharey=True)
        for axes, quantity in zip(bars, QUANTITIES, strict=True):
            draw_bars(axes, main, quantity)
    if sweeps:
        panels = next(parts).subplots(len(QUANTITIES), len(sweeps), squeeze=False)
        for row, quantity in zip(panels, QUANTITIES, strict=True):
            for axes, (name, (sweep, points)) in zip(row, sweeps.items(), strict=True):
                draw_lines(axes, name, sweep, points, quantity)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150, **({"metadata": {"Comment": comment}} if comment else {}))
    plt.close(figure)


def selection(names: Iterable[str]) -> Callable[[str], list[str]]:
    """What makes a pattern on the command line the names that it matches; its error if there are none is argparse's."""

    def matching(pattern: str) -> list[str]:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise argparse.ArgumentTypeError(f"{pattern!r} matches none of: {'; '.join(names)}")
        return found

    return matching
