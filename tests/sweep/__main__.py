"""Writes the tables of some kinds of model, or of all; with names of classes it prints the rows of these alone.

``python -m tests.sweep --kind vision speech`` writes two pages, ``python -m tests.sweep ViTForImageClassification`` none.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter

from tests.sweep.pages import PAGES, shortened
from tests.sweep.running import run, works


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes; all without one")
    parser.add_argument("--kind", nargs="+", choices=PAGES, default=list(PAGES), help="kinds of model; all without it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one class")
    options = parser.parse_args()
    for kind in options.kind:
        page = PAGES[kind]
        left = [work for task in page.tasks for work in works(task, options.names)]
        rows = []
        for work, row in run(left, options.jobs, options.timeout):
            rows.append((work.task, row))
            print(row.name, row.experts, row.result, row.why if options.names else shortened(row.why), flush=True)
        if rows:
            print(kind, dict(Counter(row.result for _, row in rows)), flush=True)
        if not options.names:
            page.write(rows)


if __name__ == "__main__":
    main()
