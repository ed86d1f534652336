"""Every command line of README and of the documentation is one that `infopo` takes, and every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest

import journey
from infopo import cli
from infopo.shipped import shipped_recipe

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def command_lines(text: str) -> list[str]:
    """What stands behind `infopo` on each line of a shell block, up to where the shell takes over."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.match(r"\s*(?:\$ )?(?:\w+=\S+ )*(?:torchrun .*-m )?infopo\s+(.*)", line) for line in lines]
    return [re.split(r"\s[|>]|\s&&|;", each[1])[0] for each in found if each]


@each_page
def test_every_command_line_is_parsed(page: Path, capsys: pytest.CaptureFixture[str]):
    parser = cli._parser()
    for line in command_lines(page.read_text(encoding="utf-8")):
        if " [-" in line:  # a synopsis, not a command
            continue
        arguments = shlex.split(line, comments=True)
        if arguments in (["--version"], ["--help"]):
            continue
        try:
            parsed = parser.parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{page.name}: infopo {line}: {capsys.readouterr().err}")
        if arguments[0] == "recipes" and parsed.name is not None:
            shipped_recipe(parsed.name)


def test_there_are_commands_to_parse():
    assert sum(len(command_lines(page.read_text(encoding="utf-8"))) for page in PAGES) > 40


def test_the_journey_takes_every_command_but_the_one_that_needs_a_judge(capsys: pytest.CaptureFixture[str]):
    parser = cli._parser()
    all_commands = set(parser._subparsers._group_actions[0].choices)  # type: ignore[union-attr]
    pages = [*journey.blocks("docs/tutorial.md", "bash"), *journey.blocks("docs/after-training.md", "bash")]
    lines = command_lines("".join(f"```bash\n{text}\n```\n" for text in (*pages, *journey.COMMANDS)))
    for line in lines:
        try:
            parser.parse_args(shlex.split(line, comments=True))
        except SystemExit:
            if line != "--version" and " [-" not in line:
                pytest.fail(f"infopo {line}: {capsys.readouterr().err}")
    assert all_commands - {line.split()[0] for line in lines} == {"winrate"}


@each_page
def test_every_link_to_a_file_leads_to_one(page: Path):
    targets = re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []
