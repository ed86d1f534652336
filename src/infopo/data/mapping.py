"""A mapping of column names: what a file calls its columns -> what the shapes call them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from infopo.data.columns import names
from infopo.errors import DataError
from infopo.vocabulary import ALIASES, OPTIONAL

_ABSENT = object()


@dataclass(frozen=True)
class ColumnMapping:
    """Names of columns that are read as others.

    Attributes:
        columns: The name that shapes know -> the file's own name, or a path into its objects (`input.messages`); None
            leaves the column of that name out.
        is_given: Whether the user gave it; else it was recognised (`recognised`).
        seen: Sources that some row had; with "" once a row was mapped at all.
    """

    columns: Mapping[str, str | None]
    is_given: bool = True
    seen: set[str] = field(default_factory=set, compare=False)

    def in_words(self) -> str:
        """The mapping, for the account of the data."""
        return ", ".join(
            f"{target} is {source!r}" if source else f"{target!r} is left out"
            for target, source in self.columns.items()
        )

    def renamed(self, found: Iterable[str], where: str) -> list[str]:
        """Names of a columnar source's columns once they are mapped.

        Raises:
            DataError: `missing column`, `column collision`.
        """
        found = list(found)
        if self._stands_already(found):
            return found
        roots = {self._root(source, found) for source in self.columns.values() if source}
        rest = [
            column for column in found if column not in roots and self.columns.get(column, "") is not None
        ]
        for target, source in self.columns.items():
            if self._root(source or target, found) not in found:
                raise self._missing(target, source, found, where)
            if source and target in rest:
                raise self._collides(target, source, where)
        return [*rest, *(target for target, source in self.columns.items() if source)]

    def sources(self, found: Iterable[str]) -> set[str]:
        """Columns of the file that the mapping reads."""
        found = list(found)
        return {self._root(source, found) for source in self.columns.values() if source}

    def apply(self, row: Mapping[str, Any], row_id: str) -> dict[str, Any]:
        """The row under the names that shapes know.

        What is left of an object, parts of which are mapped, becomes columns of its own (`input.tools`).

        Raises:
            DataError: `missing column`: the row has none of that name, and no shape does without; `column collision`.
        """
        if self._stands_already(row):
            return dict(row)
        self.seen.add("")
        paths = {target: source for target, source in self.columns.items() if source is not None}
        roots = {self._root(source, row) for source in paths.values()}
        mapped = {
            column: value
            for column, value in row.items()
            if column not in roots and self.columns.get(column, "") is not None
        }
        for target, source in paths.items():
            value = _at(row, source)
            if value is _ABSENT:
                if target not in OPTIONAL:
                    raise self._missing(target, source, row, row_id)
                continue
            self.seen.add(source)
            if mapped.get(target) is not None:
                raise self._collides(target, source, row_id)
            mapped[target] = value
        for root in roots:
            if root not in paths.values() and isinstance(row.get(root), Mapping):
                mapped |= _rest(row[root], root, set(paths.values()))
        return mapped

    def check_seen(self, where: str) -> None:
        """Called when all rows have been read.

        Raises:
            DataError: `missing column`: no row had what a source names.
        """
        missing = [source for source in self.columns.values() if source and source not in self.seen]
        if self.is_given and self.seen and missing:
            problem = f"data.columns: no row has {names(missing)}; check the spelling"
            raise DataError(problem, where, "missing column")

    def _stands_already(self, found: Iterable[str]) -> bool:
        """Whether the source has the shapes' own names, and none of those that the mapping reads.

        So that one mapping serves several sources, of which some need none.
        """
        found = set(found)
        given = {target: source for target, source in self.columns.items() if source}
        return (
            bool(given)
            and found >= given.keys()
            and not found & {self._root(s, found) for s in given.values()}
        )

    @staticmethod
    def _root(source: str, found: Iterable[str]) -> str:
        return source if source in found else source.partition(".")[0]

    @staticmethod
    def _missing(target: str, source: str | None, found: Iterable[str], where: str) -> DataError:
        there_are = names(found) or "none"
        problem = f"data.columns: {target}: expected a column {source or target!r}; columns are: {there_are}"
        return DataError(problem, where, "missing column")

    @staticmethod
    def _collides(target: str, source: str, where: str) -> DataError:
        problem = (
            f"data.columns: {target}: {source!r} would take the place of a column of that name; map that one as "
            "well, or rename it"
        )
        return DataError(problem, where, "column collision")


def recognised(found: Iterable[str]) -> ColumnMapping | None:
    """The mapping of a published data set that names its sides in its own way; None if there is none."""
    found = set(found)
    if {"chosen", "rejected"} & found:
        return None
    for chosen, rejected in ALIASES:
        if {chosen, rejected} <= found:
            return ColumnMapping({"chosen": chosen, "rejected": rejected}, is_given=False)
    return None


def _at(row: Mapping[str, Any], source: str) -> Any:
    """The value at a column's name or, where there is no such column, at a path of names."""
    if source in row:
        return row[source]
    value: Any = row
    for name in source.split("."):
        if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, Mapping) and name in value:
            value = value[name]
        else:
            return None if value is None else _ABSENT
    return value


def _rest(value: Mapping[str, Any], path: str, taken: set[str]) -> dict[str, Any]:
    """What stands beside the mapped parts of an object, by its path."""
    rest: dict[str, Any] = {}
    for key, item in value.items():
        here = f"{path}.{key}"
        if here in taken:
            continue
        if isinstance(item, Mapping) and any(source.startswith(f"{here}.") for source in taken):
            rest |= _rest(item, here, taken)
        elif item is not None:
            rest[here] = item
    return rest
