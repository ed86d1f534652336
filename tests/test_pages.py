"""The documentation on the command line: every page that a message points at is there."""

import ast
import os
import pty
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from infopo.cli import main
from infopo.errors import ConfigError
from infopo.shipped import page, pages

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "infopo").rglob("*.py"))


def test_pages_are_those_of_the_site():
    named = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {each.name for each in pages()} == named - {"index", "api"}
    assert all(each.title and "#" not in each.title for each in pages())


def test_every_page_that_the_source_names_is_there():
    named = {
        name
        for path in SOURCES
        for name in re.findall(r"infopo docs ([a-z][a-z-]+)", path.read_text("utf-8"))
    }
    assert {"data", "recipes", "rounds", "sweeps", "evaluation"} <= named
    assert all(page(name).text for name in named)


def texts(path: Path) -> Iterator[str]:
    """Yields the strings of a module that are no docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


def test_no_message_points_into_a_checkout():
    """A wheel has no folder `docs` where its user would look. Docstrings are for readers of the source."""
    pointers = [
        (path.name, text) for path in SOURCES for text in texts(path) if re.search(r"docs/\S+\.md", text)
    ]
    assert pointers == []


def test_a_wheel_has_the_pages_and_an_editable_environment_finds_the_sources():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["sources"] == {"src": "", "docs": "infopo/docs"}
    assert build["targets"]["wheel"]["only-include"] == ["src/infopo", "docs"]
    assert build["dev-mode-dirs"] == ["src"]


@pytest.mark.parametrize("name", ["data", "data.md", "docs/data.md"])
def test_the_command_prints_the_file(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["docs", name]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_command_lists_all_pages(capsys: pytest.CaptureFixture[str]):
    assert main(["docs"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.partition("\n\n")[0].splitlines()] == [
        each.name for each in pages()
    ]


def test_a_name_that_is_none_is_told_the_nearest():
    with pytest.raises(
        ConfigError, match=r"no page 'sweep' \(did you mean 'sweeps'\?\); there are after-training, "
    ):
        page("sweep")


def test_on_a_terminal_the_users_pager_shows_the_page(tmp_path: Path):
    ours, theirs = pty.openpty()
    paged = tmp_path / "paged.md"
    with subprocess.Popen(
        [sys.executable, "-m", "infopo", "docs", "rounds"],
        stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "TERM": "xterm", "PAGER": f"cat > {paged}"},
    ) as process:  # fmt: skip
        assert process.wait(60) == 0
    os.close(ours)
    os.close(theirs)
    assert paged.read_text("utf-8") == (ROOT / "docs" / "rounds.md").read_text("utf-8")
