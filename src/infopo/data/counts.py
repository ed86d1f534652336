"""What happened to the rows: used, skipped and why, cut and how. One ledger from file to token ids."""

from collections import Counter
from dataclasses import dataclass, field

from infopo.errors import DataError, printable

TIE = "tie"
TOO_LONG = "too long"
NO_FAULT = (TIE, TOO_LONG)
"""Reasons to leave a row out that are no fault of it: such rows are dropped and counted, whatever the policy."""

_OF_ALL_ROWS = ("missing column", "column collision", "ignored column")
"""Reasons that mean the same for all rows of a file: to leave these rows out would leave none."""

_NAMED_COLUMNS = 12


@dataclass
class DataCounts:
    """Ledger of one dataset: rows in = rows used + rows skipped by reason.

    Attributes:
        on_bad_row: `raise` stops at the first row that cannot be used; `skip` counts it and goes on. Rows that are
            left out without a fault (`NO_FAULT`) are counted under both.
        source: Name of the dataset, for messages.
        shapes: Shape of the rows of each source by its name, and whether it was `detected` or `named`.
        rows: Rows seen.
        used: Rows that became examples.
        skipped: Number of skipped rows by reason.
        first_skipped: The first error of each reason, as an example to look at.
        notes: Counts of what was changed or found in rows that are used, e.g. `response cut`.
        columns: How columns of other names are read, by source.
        files: Files that the rows of a folder or of a pattern come from, by source.
        ignored: Number of rows that hold a value in a column which is not read, by column.
        warnings: Sentences about the data as a whole that should not be missed.
        first_noted: The first row of each note, as an example to look at.
    """

    on_bad_row: str = "raise"
    source: str = ""
    shapes: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    used: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    columns: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    first_noted: dict[str, str] = field(default_factory=dict)

    def bad_row(self, error: DataError) -> None:
        """Applies the policy to a row that cannot be used.

        Raises:
            DataError: `error`, unless bad rows are skipped or its reason is none of a fault.
        """
        if self.on_bad_row == "raise" and error.reason not in NO_FAULT:
            if error.reason in _OF_ALL_ROWS:
                raise error
            remedy = "on_bad_row: skip leaves such rows out and counts them"
            raise DataError(f"{error.problem}; {remedy}", error.row_id, error.reason) from error
        self.skipped[error.reason] += 1
        self.first_skipped.setdefault(error.reason, str(error))

    def note(self, what: str, row_id: str) -> None:
        """Counts something that was changed or found in a row that is used."""
        self.notes[what] += 1
        self.first_noted.setdefault(what, row_id)

    def lines(self) -> list[str]:
        """The ledger in words, for the log and for `infopo check`."""
        total_skipped = sum(self.skipped.values())
        lines = [f"{self.source or 'data'}: {self.rows} rows, {self.used} used, {total_skipped} skipped"]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        for what, by_source in (("shape", self.shapes), ("columns", self.columns), ("files", self.files)):
            for name, value in by_source.items():
                where = f" of {name}" if len(by_source) > 1 or what == "files" else ""
                lines.append(f"  {what}{where}: {value if isinstance(value, str) else _listed(value)}")
        lines += [
            f"  skipped {n}: {why} (first: {self.first_skipped[why]})"
            for why, n in self.skipped.most_common()
        ]
        for what, n in self.notes.most_common():
            first = f" (first: {self.first_noted[what]})" if what in self.first_noted else ""
            lines.append(f"  {n} x {what}{first}")
        if self.ignored:
            columns = [f"{name} ({n} rows)" for name, n in self.ignored.most_common()]
            lines.append(f"  ignored columns: {_listed(columns)}")
        return [printable(line) for line in lines]


def _listed(items: list[str]) -> str:
    rest = len(items) - _NAMED_COLUMNS
    return ", ".join(items[:_NAMED_COLUMNS]) + (f" and {rest} more" if rest > 0 else "")
