"""The page on data does what it says: each example is read from a file and becomes what stands beneath it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from infopo.catalog import DATA_SHAPES, ON_TOO_LONG, SCORE_RULES
from infopo.data.counts import DataCounts
from infopo.data.files import SUFFIXES
from infopo.data.published import VERDICTS
from infopo.data.sources import read_rows
from infopo.losses.catalog import UNPAIRED
from infopo.vocabulary import ALIASES, NEEDED, PROMPTS
from test_sources import write_lines

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = {
    name: [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)]
    for name, text in re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", PAGE, flags=re.MULTILINE | re.DOTALL)
}


def test_every_shape_has_an_example_and_a_line_in_the_table():
    assert list(EXAMPLES) == sorted(DATA_SHAPES, key=list(EXAMPLES).index)
    assert re.findall(r"^\| `(\w+)` \| `", PAGE, flags=re.MULTILINE)[: len(DATA_SHAPES)] == list(DATA_SHAPES)
    assert all(len(blocks) == 2 for blocks in EXAMPLES.values())


@pytest.mark.parametrize("shape", DATA_SHAPES)
def test_each_example_becomes_what_the_page_says(tmp_path: Path, shape: str):
    row, expected = EXAMPLES[shape]
    counts = DataCounts()
    (read,) = read_rows(write_lines(tmp_path / "rows.jsonl", [row]), counts)
    assert {"prompt": read.prompt, "chosen": read.chosen, "rejected": read.rejected} == expected
    assert next(iter(counts.shapes.values())).startswith(f"{shape} (detected)")


@pytest.mark.parametrize(
    "words", [SCORE_RULES, ON_TOO_LONG, SUFFIXES[:3], (".gz", ".zst", ".parquet", ".arrow")]
)
def test_rules_and_endings_are_named(words: Any):
    assert [word for word in words if word not in PAGE] == []


def test_columns_and_objectives_are_named():
    published = [name for name in NEEDED if name in ("compared", "openai", "swift")]
    columns = {
        name for shape in published for needed in NEEDED[shape] for c in needed for name in c.split("|")
    }
    columns |= {verdict.first for verdict in VERDICTS} | {name for pair in ALIASES[:3] for name in pair}
    for word in (*columns, *PROMPTS, *UNPAIRED, *(f"| `{name}`" for name in DATA_SHAPES)):
        assert word in PAGE, word
    unpaired = re.search(r"objectives that compare no pairs: (.*?)\.", PAGE, flags=re.DOTALL)
    assert unpaired
    assert tuple(re.findall(r"`(\w+)`", unpaired[1])) == UNPAIRED
