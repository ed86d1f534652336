"""The page `docs/tried.md`: its sections, each row made anew by a run, and its text."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from tried import adapters, architectures, files, templates
from tried.trial import Row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tried.md"

SECTIONS: dict[str, ModuleType] = {
    "Architectures": architectures,
    "Adapters": adapters,
    "Chat templates": templates,
    "Data": files,
}
"""Title -> module with `INTRODUCTION`, `names()` and `row(name)`."""

_BEGINNING = """# What was tried

Each row of this page is a run, made by a test that fails when the row comes out otherwise. `make test` makes those of
templates and data anew, and four architectures; `make test-long` every seventh architecture and adapter; `make soak`
all. `make tried` makes all of them anew and writes this page. It was written with
transformers {transformers}, PEFT {peft}, TRL {trl} and
datasets {datasets}.

A row says *trained* or *read* if everything that its section asks for held, and *refused* if the trainer stopped with
an error that names the cause. *Not tried* has the reason beside it. *Fault* would be a raw error, or a wrong number.
"""


def key(section: str, name: str) -> str:
    return f"{section}: {name}"


def all_names() -> list[tuple[str, str]]:
    return [(title, name) for title, module in SECTIONS.items() for name in module.names()]


def make(section: str, name: str) -> Row:
    return SECTIONS[section].row(name)


def written() -> dict[str, str]:
    """`section: name` -> line of the page as it stands."""
    lines, title = dict[str, str](), ""
    if not PAGE.exists():
        return lines
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        title = line.removeprefix("## ") if line.startswith("## ") else title
        if line.startswith("| ") and not line.startswith(("| What", "|---")):
            lines[key(title, line.split(" | ")[0].removeprefix("| ").replace("\\|", "|"))] = line
    return lines


def line(row: Row) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (row.name, row.result, row.note)) + " |"


def text(lines: Mapping[str, str]) -> str:
    """The page of these lines."""
    parts = [
        _BEGINNING.format(**{name: version(name) for name in ("transformers", "peft", "trl", "datasets")})
    ]
    for title, module in SECTIONS.items():
        table = [lines[key(title, name)] for name in module.names()]
        results = [line.split(" | ")[1] for line in table]
        counts = ", ".join(
            f"{results.count(result)} {result}" for result in sorted(set(results), reverse=True)
        )
        head = ["| What | Result | How, or why not |", "|---|---|---|"]
        parts.append(
            "\n".join(
                [
                    f"## {title}",
                    "",
                    module.INTRODUCTION,
                    f"{len(table)} in all: {counts}.",
                    "",
                    *head,
                    *table,
                    "",
                ]
            )
        )
    return "\n".join(parts)
