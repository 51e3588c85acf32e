"""Draws the tables of time and memory that step.py printed, wherever they stand: in its output, or on a page of the docs.

    python benchmarks/draw.py docs/speed.md docs/images/step.png

The picture keeps the tables that it was drawn from, in its comment.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from report import plot, read, tables


def main() -> None:
    """Reads, and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, help="a text with the tables in it")
    parser.add_argument("picture", type=Path, help="where the picture goes")
    args = parser.parse_args()
    results = read(args.tables.read_text())
    if not results:
        parser.error(f"{args.tables} has none of the tables that step.py prints")
    plot(results, args.picture, comment=tables(results))


if __name__ == "__main__":
    main()
