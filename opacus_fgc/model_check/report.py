"""What a check of a model found, as a table and as errors."""

from __future__ import annotations

from dataclasses import dataclass, field

from tabulate import tabulate


@dataclass
class Row:
    """How what this package computes for a layer compares with the oracle.

    Attributes:
        layer: its name in the model.
        type: its type.
        parameters: number of elements of its parameters that were compared.
        norms: the largest relative error of a sample's gradient norm, over samples and parameters.
        clipped_sum: the largest relative error of a parameter's clipped sum, for the clipping coefficients that were used.
        wrong: the names of its parameters that are wrong.
    """

    layer: str
    type: str
    parameters: int = 0
    norms: float = 0.0
    clipped_sum: float = 0.0
    wrong: list[str] = field(default_factory=list)


@dataclass
class CheckReport:
    """What `check` found; ``print(report)`` gives a table.

    A relative error is one of the oracle's value. Where a parameter's gradient is next to nothing beside the whole gradient, and
    is but rounding, it is one of a small share of the whole gradient.

    Attributes:
        rows: one for each layer with parameters that were compared, in the order of the model.
        losses: largest relative error of a sample's loss.
        coefficients: largest relative error of a sample's clipping coefficient ``min(1, C / norm)``.
        contribution: the most that a sample moves the clipped sum by, being in the batch or not, as a multiple of ``C``.
        clipped: how many samples were clipped.
        max_grad_norm: the clipping norm ``C``.
        tolerance: the largest relative error that is taken for rounding.
        notes: how it was compared.
    """

    rows: list[Row]
    losses: float
    coefficients: float
    contribution: float
    clipped: int
    max_grad_norm: float
    tolerance: float
    notes: list[str] = field(default_factory=list)

    @property
    def largest_contribution(self) -> float:
        """What ``contribution`` may be: 1, and rounding."""
        return 1 + max(1e-6, self.tolerance)

    @property
    def wrong(self) -> list[str]:
        """The names of what is wrong: parameters, and quantities of the whole model."""
        # What is NaN is wrong.
        whole = {
            "(losses)": self.losses <= self.tolerance,
            "(clipping coefficients)": self.coefficients <= self.tolerance,
            "(contribution of a sample)": self.contribution <= self.largest_contribution,
        }
        parts = [f"{row.layer}.{name}".lstrip(".") for row in self.rows for name in row.wrong]
        return parts + [name for name, right in whole.items() if not right]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong

    def raise_if_wrong(self) -> None:
        """Raises an AssertionError with the table if something is wrong; for one's own tests."""
        if not self.ok:
            raise AssertionError(f"wrong: {', '.join(self.wrong)}\n{self}")

    def __str__(self) -> str:
        """A table, one row a layer."""
        cells = [
            (
                row.layer or "(the model)",
                row.type,
                f"{row.parameters:,}",
                f"{row.norms:.1e}",
                f"{row.clipped_sum:.1e}",
                f"WRONG: {', '.join(row.wrong)}" if row.wrong else "ok",
            )
            for row in self.rows
        ]
        wrong = self.wrong
        for name, value in (
            ("(losses)", f"{self.losses:.1e}"),
            ("(clipping coefficients)", f"{self.coefficients:.1e}"),
            ("(contribution of a sample)", f"{self.contribution:.6f} C"),
        ):
            cells.append((name, "", "", value, "", "WRONG" if name in wrong else "ok"))
        headers = ("layer", "type", "parameters", "norms", "clipped sum", "verdict")
        table = tabulate(
            cells, headers, colalign=("left", "left", "right", "right", "right", "left"), disable_numparse=True
        )
        verdict = "all right" if self.ok else f"WRONG: {len(wrong)} of the above"
        return "\n".join([table, *self.notes, verdict])
