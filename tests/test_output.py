"""What the package says of texts that strangers wrote: log lines, printed lines and the command line's errors."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

import infopo
from infopo.output import get_logger, say

SOURCE = Path(infopo.__file__).parent
HOSTILE = "https://me:password@host/x?token=abcdef \x1b[31mred \u202e"
HARMLESS = "https://***@host/x?token=*** \\x1b[31mred \\u202e"


def test_every_logger_of_the_package_is_one_that_shows_nothing_secret():
    """Handlers belong to the user, and a filter of the package's root would not see what modules log."""
    for path in SOURCE.rglob("*.py"):
        makes = re.findall(r"logging\.getLogger\((.*)\)", path.read_text(encoding="utf-8"))
        # Levels and handlers may be set by name anywhere.
        assert not [name for name in makes if "__name__" in name], path


def test_log_lines_are_masked_and_escaped_however_they_are_written(caplog: pytest.LogCaptureFixture):
    logger = get_logger("infopo.test_output")
    assert get_logger("infopo.test_output") is logger
    with caplog.at_level(logging.INFO, logger="infopo"):
        logger.info("read %s, %d %%", HOSTILE, 5)
        logger.warning(HOSTILE)
    assert caplog.messages == [f"read {HARMLESS}, 5 %", HARMLESS]


def test_printed_lines_are_masked_and_escaped(capsys: pytest.CaptureFixture[str]):
    say(HOSTILE, "next")
    say(HOSTILE, file=sys.stderr)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{HARMLESS}\nnext\n", f"{HARMLESS}\n")


@pytest.mark.parametrize(
    "arguments", [["train", "a.yaml", f"--{HOSTILE}"], [HOSTILE], ["demo", "--seed", HOSTILE]]
)
def test_arguments_that_are_refused_do_not_reach_the_terminal_as_they_are(arguments: list[str]):
    process = subprocess.run(
        [sys.executable, "-m", "infopo", *arguments], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert "\x1b" not in process.stderr
    assert "password" not in process.stderr
