"""The pages for people who come from other tools show what the converters do."""

import re
from pathlib import Path

import pytest

from infopo.elsewhere import axolotl, axolotl_data, convert, llama_factory

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {
    name: (DOCS / f"from-{name}.md").read_text(encoding="utf-8")
    for name in ("llama-factory", "axolotl", "trl")
}


def shown(page: str, file_name: str, folder: Path) -> tuple[str, str]:
    """The file of another tool that a page shows, converted, and the recipe that the page says comes of it."""
    given, expected = re.findall(r"```yaml\n(.*?)```", PAGES[page], flags=re.DOTALL)[:2]
    (folder / file_name).write_text(given, encoding="utf-8")
    return convert(folder / file_name, page)[1], expected


@pytest.mark.parametrize(
    ("page", "file_name"), [("llama-factory", "dpo.yaml"), ("axolotl", "dpo.yml"), ("trl", "dpo.yaml")]
)
def test_the_example_becomes_the_recipe_that_stands_beneath_it(page: str, file_name: str, tmp_path: Path):
    recipe, expected = shown(page, file_name, tmp_path)
    assert recipe == expected


def test_every_loss_of_llama_factory_has_its_row():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGES["llama-factory"], flags=re.MULTILINE)
    assert dict(rows) == dict(llama_factory.LOSSES)


def test_every_method_and_type_of_axolotl_is_named():
    assert [method for method in axolotl.METHODS if f"| `rl: {method}`" not in PAGES["axolotl"]] == []
    for kind in {*axolotl_data.PAIRED, *axolotl_data.UNPAIRED}:
        assert re.search(rf"\b{kind}\b", PAGES["axolotl"]), kind
