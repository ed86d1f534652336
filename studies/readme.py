"""What studies share: tables in Markdown, and READMEs whose tables are written by the script."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def fill(text: str, tables: Mapping[str, str]) -> str:
    """`text` with each table put between `<!-- table: name -->` and `<!-- end of table -->`.

    Raises:
        ValueError: A table has no place.
    """
    for name, content in tables.items():
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)
        if not place.search(text):
            raise ValueError(f"no place for table {name!r}")
        text = place.sub(lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text)
    return text


def fill_file(path: Path, tables: Mapping[str, str]) -> None:
    """As `fill`, in a file, where there is one."""
    if path.exists():
        path.write_text(fill(path.read_text(encoding="utf-8"), tables), encoding="utf-8")
