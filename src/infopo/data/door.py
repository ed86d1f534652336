"""What rows pass between source and shape: names are mapped, cells opened, nulls of columnar files removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from infopo.data.cells import lists_in_text, open_cells, without_nulls
from infopo.data.columns import shown
from infopo.data.counts import DataCounts
from infopo.data.mapping import ColumnMapping, recognised
from infopo.data.strays import columns_to_read
from infopo.errors import DataError

NULLS_REMOVED = "tools or tool calls with null keys, as columnar files fill them in: left out"

LISTS_AS_TEXT = (
    "chosen and rejected are JSON lists, trained on as text: name data.shape: lists to read the responses"
)


class Door:
    """The entrance of one source. Readers ask it which columns to read, and hand it what they read.

    Args:
        name: The source, as the account of the data calls it.
        shape: The shape that the user names; None: any.
        columns: Mapping of column names that the user gives; None: none.
        counts: Ledger.
    """

    def __init__(
        self,
        name: str,
        shape: str | None,
        columns: Mapping[str, str | None] | None,
        counts: DataCounts,
    ) -> None:
        self.name = name
        self.shape = shape
        self.counts = counts
        self._mapping = ColumnMapping(columns) if columns else None
        self._is_decided = False
        self._unread: list[str] = []
        if self._mapping:
            counts.columns[name] = self._mapping.in_words()

    def columns(self, found: Sequence[str], where: str, texts: Iterable[str] = ()) -> list[str]:
        """Columns of a source, all of whose rows have the same, that need to be read.

        Args:
            found: All its columns.
            where: The source or file, for errors.
            texts: Those that hold text.

        Raises:
            DataError: No shape has these columns, or the mapping does not fit them.
        """
        self._recognise(found)
        if self._mapping is None:
            read = columns_to_read(found, where, self.shape, texts)
            dropped: set[str] = set()
        else:
            mapped = columns_to_read(self._mapping.renamed(found, where), where, self.shape, texts)
            roots = self._mapping.sources(found)
            read = [column for column in found if column in roots or column in mapped]
            dropped = {target for target, source in self._mapping.columns.items() if source is None}
        self._unread = [column for column in found if column not in read and column not in dropped]
        return read

    def columnar(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row of a columnar file, without the nulls that such a file fills in; notes which columns were not read."""
        row, had_nulls = without_nulls(row)
        if had_nulls:
            self.counts.notes[NULLS_REMOVED] += 1
        self.counts.ignored.update(self._unread)
        return row

    def opened(self, raw: object, row_id: str) -> Mapping[str, Any]:
        """The row as shapes know it.

        Raises:
            DataError: It is no object, the mapping does not fit it, or text of a conversation cannot be read.
        """
        row = check_object(raw, row_id)
        self._recognise(row)
        row = open_cells(self._mapping.apply(row, row_id) if self._mapping else row, row_id)
        if lists := lists_in_text(row):
            if self.shape == "lists":
                return {**row, **lists}
            self.counts.note(LISTS_AS_TEXT, row_id)
        return row

    def close(self) -> None:
        """Called when all rows have been read.

        Raises:
            DataError: No row had a column that the mapping names.
        """
        if self._mapping:
            self._mapping.check_seen(self.name)

    def _recognise(self, found: Iterable[str]) -> None:
        """Takes the mapping of a published data set, if the first columns are its and the user gave none."""
        if self._mapping is None and not self._is_decided and self.shape is None:
            self._mapping = recognised(found)
            if self._mapping:
                self.counts.columns[self.name] = self._mapping.in_words()
        self._is_decided = True


def check_object(row: object, row_id: str) -> Mapping[str, Any]:
    """The row, if it is an object with columns.

    Raises:
        DataError: It is anything else.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"expected an object with columns, got {shown(row)}", row_id, "not an object")
    if not all(isinstance(column, str) for column in row):
        raise DataError("expected names of columns that are text", row_id, "not an object")
    return row
