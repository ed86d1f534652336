"""Writes the tables of the documentation that follow from the code, between marks: settings, and objectives.

`python scripts/recipe_tables.py` rewrites the pages (`make docs` runs it), and a test fails if a page is out of date.
"""

import re
from dataclasses import MISSING, fields
from pathlib import Path

from infopo.config import SECTIONS
from infopo.losses.catalog import OBJECTIVES
from infopo.losses.declaration import REQUIRED
from infopo.settings import TrainSettings
from infopo.validation import Settings
from infopo.yaml_tree import dump_tree

DOCS = Path(__file__).resolve().parents[1] / "docs"
TABLES = {**SECTIONS, "train": TrainSettings}


def table(section: type[Settings]) -> str:
    """Returns the table of a section's settings, with defaults as YAML.

    Example:
        >>> print(table(TrainSettings).splitlines()[-1])
        | `pad_token` | null | Token to pad with. null takes the tokenizer's own, or else its end of sequence. |
    """
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for setting in fields(section):
        default = "required"
        if setting.default is not MISSING:
            default = dump_tree({"value": setting.default}).partition(":")[2].strip()
            default = default if default == "null" else f"`{default}`"
        meaning = setting.metadata["help"]
        see = f" ([more]({meaning.see}))" if meaning.see else ""
        lines.append(f"| `{setting.name}` | {default} | {meaning}{see} |")
    return "\n".join(lines)


def in_yaml(value: object) -> str:
    """Returns a value as a recipe has it."""
    return dump_tree({"value": value}).partition(":")[2].strip()


def table_of_objectives() -> str:
    """Returns what each objective is for, what it bounds and what it needs."""
    lines = ["| name | title | bounds | needs | when to use it | source |", "|---|---|---|---|---|---|"]
    for name, row in OBJECTIVES.items():
        cells = (f"`{name}`", row.title, row.bound or "-", row.needs, row.when, row.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_parameters() -> str:
    """Returns each objective's parameters with their defaults."""
    lines = ["| objective | parameters |", "|---|---|"]
    for name, row in OBJECTIVES.items():
        parameters = [
            f"`{key}` {'required' if p.default is REQUIRED else in_yaml(p.default)}{f' ({p.unit})' if p.unit else ''}"
            for key, p in row.parameters.items()
        ]
        lines.append(f"| `{name}` | {', '.join(parameters) or 'none'} |")
    return "\n".join(lines)


def table_of_equations(before: str) -> str:
    """Returns a row per objective: the one that is there, with its tests, or else one from the declaration."""
    rows = {row.split(" | ")[-2].strip("`"): row for row in before.splitlines()[2:]}
    for name, row in OBJECTIVES.items():
        source = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", row.source)
        formula = row.formula.replace("|", "\\|")
        rows.setdefault(name, f"| {formula} | {source} | `{name}` | `test_losses.py::test_golden_values` |")
    return "\n".join(["| equation | source | function | tests |", "|---|---|---|---|", *rows.values()])


def with_tables(page: str) -> str:
    """Returns the page with what is between `<!-- settings of NAME -->` and `<!-- end -->` written anew.

    The marks of objectives are `<!-- objectives -->`, `<!-- parameters -->` and `<!-- equations -->`.
    """

    def written(mark: str, before: str) -> str:
        if mark == "objectives":
            return table_of_objectives()
        if mark == "parameters":
            return table_of_parameters()
        return table_of_equations(before) if mark == "equations" else table(TABLES[mark.split()[-1]])

    return re.sub(
        r"(<!-- (settings of [\w.]+|objectives|parameters|equations) -->\n\n)(.*?)(\n\n<!-- end -->)",
        lambda found: found[1] + written(found[2], found[3]) + found[4],
        page,
        flags=re.DOTALL,
    )


PAGES = ("recipes.md", "objectives.md", "equations.md")

if __name__ == "__main__":
    for name in PAGES:
        page = DOCS / name
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
