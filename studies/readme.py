"""What studies share: tables in Markdown, and a folder whose results, plot and README the script writes."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infopo.runs import write_json_atomic


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


def publish(
    folder: Path,
    results: dict[str, Any],
    tables: Mapping[str, str],
    plot: Callable[[dict[str, Any], Path], None],
) -> None:
    """Writes a study's `results.json` and `plot.png`, and the tables of its `README.md`, where it has one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "results.json", results)
    plot(results, folder / "plot.png")
    readme = folder / "README.md"
    if readme.exists():
        readme.write_text(fill(readme.read_text(encoding="utf-8"), tables), encoding="utf-8")
