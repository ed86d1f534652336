"""Counts what happens to rows, from file to token ids: used, skipped and why, cut and how."""

from collections import Counter
from dataclasses import dataclass, field

from infopo.errors import DataError
from infopo.output import counted, shown

TIE = "tie"
TOO_LONG = "too long"
NO_FAULT = (TIE, TOO_LONG)
"""Reasons to leave out a row without a fault. Such rows are dropped and counted, whatever `on_bad_row` is."""

_OF_ALL_ROWS = ("missing column", "column collision", "ignored column")
"""Reasons that apply to all rows of a file, so that leaving out such rows would leave none."""

_NAMED_COLUMNS = 12


@dataclass
class DataCounts:
    """Ledger of one dataset, in which each row is either used, or skipped for a reason.

    Attributes:
        on_bad_row: `raise` stops at the first row that cannot be used, and `skip` counts it and continues. Rows that
            are left out without a fault (`NO_FAULT`) are counted under both.
        source: Name of the dataset, for messages.
        shapes: Shape of the rows of each source by its name, and whether it was `detected` or `named`.
        rows: Number of rows read.
        used: Number of rows that became examples.
        skipped: Number of skipped rows, by reason.
        first_skipped: The first error of each reason, as an example.
        notes: Number of changes and findings in rows that are used, by name, e.g. `response cut`.
        columns: Description of how columns of other names are read, by source.
        files: Files of a folder or pattern that rows are read from, by source.
        ignored: Number of rows that have a value in a column which is not read, by column.
        warnings: Sentences about the data as a whole that users should see.
        first_noted: The first row of each note, as an example.

    Example:
        >>> counts = DataCounts(on_bad_row="skip", source="pairs.jsonl", rows=2, used=1)
        >>> counts.bad_row(DataError("expected text, got null", "pairs.jsonl:2", "null value"))
        >>> print(*counts.lines(), sep=chr(10))
        pairs.jsonl: 2 rows, 1 used, 1 skipped
          skipped 1: null value (first: pairs.jsonl:2: expected text, got null)
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
        """Counts a row that cannot be used, or raises.

        Raises:
            DataError: `error`, unless `on_bad_row` is `skip` or its reason is in `NO_FAULT`.
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

    @property
    def has_findings(self) -> bool:
        """Whether a row was skipped or changed, a column is not read, or something else should be looked at."""
        return bool(self.warnings or self.skipped or self.notes or self.ignored)

    def lines(self) -> list[str]:
        """Returns the ledger as lines of text, for the log and for `infopo check`."""
        total_skipped = sum(self.skipped.values())
        lines = [
            f"{self.source or 'data'}: {counted(self.rows, 'row')}, {self.used} used, {total_skipped} skipped"
        ]
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
            columns = [f"{name} ({counted(n, 'row')})" for name, n in self.ignored.most_common()]
            lines.append(f"  ignored columns: {_listed(columns)}")
        return [shown(line) for line in lines]


def _listed(items: list[str]) -> str:
    rest = len(items) - _NAMED_COLUMNS
    return ", ".join(items[:_NAMED_COLUMNS]) + (f" and {rest} more" if rest > 0 else "")
