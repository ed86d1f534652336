"""What `infopo completion` prints is a script that the shell completes by."""

import shutil
import subprocess
from pathlib import Path

import pytest

from infopo import cli
from infopo.commands.completion import SHELLS

COMMANDS = sorted(cli._parser()._subparsers._group_actions[0].choices)  # type: ignore[union-attr]


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_its_options_are_in_the_script(shell: str, capsys: pytest.CaptureFixture[str]):
    text = script(shell, capsys)
    assert len(COMMANDS) > 12
    assert [command for command in COMMANDS if command not in text] == []
    assert "data-kind" in text
    assert text.endswith("\n")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_takes_the_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script(shell, capsys), encoding="utf-8")
    done = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["infopo", "conv"], {"convert-recipe"}),
        (["infopo", "completion", ""], {"bash", "zsh", "fish", "tcsh"}),
        (["infopo", "demo", "--la"], {"--labels"}),
        (["infopo", "check", "min"], {"mine.yaml"}),
    ],
)
def test_bash_completes_commands_options_choices_and_files(
    typed: list[str], expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The script is sourced, and its function called as bash calls it when somebody presses the tab key."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    (tmp_path / "script").write_text(script("bash", capsys), encoding="utf-8")
    (tmp_path / "mine.yaml").write_text("", encoding="utf-8")
    words = " ".join(f"'{word}'" for word in typed)
    press = (
        f"source ./script; COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; COMP_LINE='{' '.join(typed)}'; "
        "name=$(complete -p infopo | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
        f"$name infopo '{typed[-1]}' '{typed[-2]}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", press], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert expected <= {line.strip() for line in done.stdout.split()}, done.stderr
