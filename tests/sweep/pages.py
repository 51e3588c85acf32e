"""The pages of the documentation that show the rows."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from tests.sweep.building import IMPLEMENTATIONS
from tests.sweep.measuring import IN_FLOAT32, TOLERANCE, Row
from tests.sweep.tasks import TASKS

DOCS = Path(__file__).parent.parent.parent / "docs"
RESULTS = ("exact", "refused", "wrong", "error", "not built")


def shortened(text: str, length: int = 160) -> str:
    """A text in one cell of a table."""
    text = " ".join(text.split()).replace("|", "/")
    text = re.sub(r"/\S*/(\S+\.py)", r"\1", text).replace("<", "&lt;")
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " ..."


@dataclass(frozen=True)
class Page:
    """A page: the tasks that it has a table each of, and what is said before.

    Attributes:
        kind: what ``--kind`` takes.
        file: in the folder of the documentation.
        title: its heading.
        called: how models are called.
        tasks: keys of ``TASKS``.
    """

    kind: str
    file: str
    title: str
    called: str
    tasks: tuple[str, ...]

    def write(self, rows: list[tuple[str, Row]]) -> None:
        """Writes it from all rows, each with the key of its task."""
        (DOCS / self.file).write_text(self.text(rows))

    def text(self, rows: list[tuple[str, Row]]) -> str:
        """What is in the file."""
        classes = ", ".join(f"`AutoModelFor{TASKS[task].name}`" for task in self.tasks)
        counts = Counter(row.result for _, row in rows)
        lines = [
            f"# {self.title}",
            "",
            f"Every class that {classes} knows, tiny, with random weights and without dropout: the clipped",
            "gradients of two steps in both modes, compared with one sample at a time by plain autograd. Models are not patched.",
            *self.called.splitlines(),
            "",
            f"Double precision, to {TOLERANCE:.0e} of the largest norm. Many models compute parts in float32 whatever their",
            f"dtype: as they are, those are exact to {IN_FLOAT32:.0e}, as is what runs in float32 only (torch's `grouped_mm`);",
            f"with these parts in double precision too they are to {TOLERANCE:.0e}, and that difference is shown.",
            "",
            f"`tox -e sweep -- --kind {self.kind}` writes this page; here it was torch {torch.__version__.partition('+')[0]},",
            f"transformers {transformers.__version__}.",
            "",
            ", ".join(f"{counts[result]} {result}" for result in RESULTS) + ".",
        ]
        for task in self.tasks:
            found = [row for key, row in rows if key == task]
            found.sort(key=lambda row: (row.name.lower(), IMPLEMENTATIONS.index(row.experts or "eager")))
            lines += [""] + ([f"## {TASKS[task].name}", ""] if len(self.tasks) > 1 else [])
            lines += ["| Class | Experts | Result | Largest difference, or why |", "|---|---|---|---|"]
            lines += [f"| {row.name} | {row.experts} | {row.result} | {shortened(row.why)} |" for row in found]
        return "\n".join(lines) + "\n"


PAGES = {
    page.kind: page
    for page in (
        Page(
            *("causal", "sweep.md", "Language models of transformers"),
            "They are called with tokens alone. Mixtures of experts run under each implementation of transformers.",
            ("causal-lm",),
        ),
        Page(
            *("text", "sweep-text.md", "Text classifiers of transformers"),
            "They are called with tokens, and with boxes where they need them; of those that have no classification head, the\n"
            "masked language model is here.",
            ("text", "masked-lm"),
        ),
        Page(
            *("seq2seq", "sweep-seq2seq.md", "Encoder-decoders of transformers"),
            "They are called with tokens for the encoder and for the decoder.",
            ("seq2seq",),
        ),
        Page(
            *("vision", "sweep-vision.md", "Image classifiers of transformers"),
            "They are called with images.",
            ("image",),
        ),
        Page(
            *("speech", "sweep-speech.md", "Speech models of transformers"),
            "They are called with waves or frames, and with tokens where they have a decoder.",
            ("audio", "ctc", "speech"),
        ),
    )
}
