"""`infopo compare` compares models on the items that both answered, and says what so many items could have shown."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from infopo.errors import ConfigError
from infopo.evaluation.comparison import Row, comparisons, left_out, p_text, sentence
from infopo.evaluation.contenders import Scored, read_contender
from infopo.output import say, shown
from infopo.runs import to_json, write_text_atomic
from infopo.workflows.new_file import refuse_what_is_read
from infopo.workflows.report import check_output

FORMATS = ("markdown", "json")

SHOWN_ITEMS = 5
"""Number of won and of lost items that are listed."""


def compare(
    sources: Sequence[str],
    tasks: Sequence[str] = (),
    *,
    data: Mapping[str, str] | None = None,
    rule: str | None = None,
    seed: int = 0,
    format: str = "markdown",
    output: str | Path | None = None,
    items: int = SHOWN_ITEMS,
) -> list[Row]:
    """Compares each source with the first, task by task, and prints or writes the result.

    Args:
        sources: Two or more of what `read_contender` reads.
        tasks: Tasks that are compared. By default all that the first and the other have.
        data: Data of tasks that grade files of responses, by name.
        rule: Rule that scores are by, instead of each task's headline.
        seed: Seed of bootstrap and sign flips.
        format: "markdown" or "json".
        output: A file, or None for the terminal.
        items: Number of won and of lost items that Markdown lists. JSON has all.

    Raises:
        ConfigError: There is nothing to compare, or two evaluations asked different questions under one name.
        DataError: A file is damaged.
    """
    if len(sources) < 2:
        raise ConfigError("expected two or more to compare, got one")
    if format not in FORMATS:
        raise ConfigError(f"--format: expected {' or '.join(FORMATS)}, got {format!r}")
    if format == "json" and items != SHOWN_ITEMS:
        raise ConfigError("--items: does not apply to --format json, which lists all")
    if output is not None:
        check_output(Path(output))
        refuse_what_is_read(Path(output), sources)

    graded_tasks = set()

    def grade(path: Path, task: str, by: str | None) -> Scored:
        # Tasks load torch, which comparisons of what is marked already do not need.
        from infopo.evaluation.grading import graded

        graded_tasks.add(task)
        return graded(path, task, by, data or {})

    contenders = [read_contender(source, tasks, rule, grade) for source in sources]
    if unused := sorted(set(data or {}) - graded_tasks):
        raise ConfigError(
            f"--data: no file of responses is graded by {', '.join(unused)}; all have scores already"
        )
    rows = comparisons(contenders, seed)
    notes = [each.note for each in contenders if each.note]
    text = as_json(rows, notes) if format == "json" else "\n".join([*as_markdown(rows, notes, items), ""])
    if output is None:
        sys.stdout.write(shown(text))
    else:
        write_text_atomic(output, shown(text))
        say(f"written: {output}")
    return rows


def as_markdown(rows: Sequence[Row], notes: Sequence[str] = (), items: int = SHOWN_ITEMS) -> list[str]:
    """Returns a table, a sentence per row, what else differs, and some items, as lines of Markdown."""
    first = rows[0].first
    lines = [
        f"A: {first}; each B is compared with it on the items that both answered. A difference is A − B with its 95 % "
        "interval.",
        "",
        "| task | B | n | A | B | difference [95 %] | p | wins / losses of A | smallest difference shown |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        f = row.found
        smallest = "none" if f.smallest is None else f"{f.smallest:.3f}"
        lines.append(
            f"| {_cell(row.task)} ({_cell(row.rule)}) | {_cell(row.other)} | {f.n} | {f.mean_a:.3f} | {f.mean_b:.3f} "
            f"| {f.difference:+.3f} [{f.ci95[0]:+.3f}, {f.ci95[1]:+.3f}] | {p_text(row.p_holm)} "
            f"| {f.wins} / {f.losses} | {smallest} |"
        )
    if len(rows) > 1:
        lines += ["", f"p-values are adjusted for {len(rows)} comparisons (Holm)."]
    lines += ["", *(f"- {sentence(row)}" for row in rows)]
    said = [*notes, *dict.fromkeys(note for row in rows for note in [*left_out(row), *row.notes])]
    lines += ["", *(f"- {note}" for note in said)] if said else []
    for row in rows:
        lines += _listed(row, items)
    return lines


def as_json(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """Returns all numbers and items as JSON, with a `schema_version`."""
    tree: dict[str, Any] = {
        "schema_version": 1,
        "notes": list(notes),
        "comparisons": [asdict(row) for row in rows],
    }
    return f"{to_json(tree, indent=2)}\n"


def _listed(row: Row, count: int) -> list[str]:
    lines = []
    for title, found in (("A wins", row.wins), (f"{row.other} wins", row.losses)):
        if found and count > 0:
            more = f" and {len(found) - count} more" if len(found) > count else ""
            lines.append(f"- {row.task}, {title}: {', '.join(map(_cell, found[:count]))}{more}")
    return ["", *lines] if lines else []


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
