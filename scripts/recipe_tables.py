"""Writes the tables of settings in docs/recipes.md from `infopo.settings`, between the marks that name a section.

`python scripts/recipe_tables.py` rewrites the page (`make docs` runs it), and a test fails if the page is out of date.
"""

import re
from dataclasses import MISSING, fields
from pathlib import Path

from infopo.config import SECTIONS
from infopo.settings import TrainSettings
from infopo.validation import Settings
from infopo.yaml_tree import dump_tree

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
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


def with_tables(page: str) -> str:
    """Returns the page with each table between `<!-- settings of NAME -->` and `<!-- end -->` written anew."""
    return re.sub(
        r"(<!-- settings of ([\w.]+) -->\n\n).*?(\n\n<!-- end -->)",
        lambda found: found[1] + table(TABLES[found[2]]) + found[3],
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
