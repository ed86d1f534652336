"""Options that a command would not read are refused, so that no result says settings that it was not made with."""

import argparse
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from infopo.cli import _parser, main
from infopo.errors import ConfigError
from infopo.evaluation.law import Law
from infopo.evaluation.pairing import Candidate, PairingSettings, pair_up
from infopo.evaluation.settings import DRAWING, EvaluationSettings
from infopo.workflows.ask_judge import JudgeSettings
from infopo.workflows.calibrate import calibrate
from infopo.workflows.compare import compare
from infopo.workflows.evaluate import evaluate
from infopo.workflows.generate import generate
from infopo.workflows.pairs import pairs

NOWHERE = "http://127.0.0.1:9/v1"

LOADING = {"batch-size", "dtype"}
LAW = {"temperature", "top-p", "max-new-tokens", "prompting", "num-fewshot"}
OF_JUDGE = {"judge-model", "key-variable", "concurrency", "per-minute", "timeout", "answer-tokens", "prices"}

# Command and mode -> what is given, and the options that nothing reads then.
MODES: dict[str, tuple[list[str], Collection[str]]] = {
    "evaluate a model": (["lab:policy", "--tasks", "lab"], {"concurrency", "include-path"}),
    "evaluate a server": (["--server", NOWHERE, "--tasks", "lab"], {*LOADING, "include-path"}),
    "evaluate responses": (
        ["--responses", "rows.jsonl", "--tasks", "lab"],
        {*LOADING, *LAW, "concurrency", "include-path", "num-samples", "shard"},
    ),
    "pairs of a model": (
        ["lab:policy", "--prompts", "lab", "--verifier", "lab"],
        {"concurrency", "judge-model", "template"},
    ),
    "pairs of a server": (["--server", NOWHERE, "--prompts", "lab", "--verifier", "lab"], LOADING),
    "pairs of samples": (
        ["--samples", "rows.jsonl", "--prompts", "lab", "--verifier", "lab"],
        {*LOADING, *LAW, "concurrency", "num-generations", "shard"},
    ),
    "pairs by a function that judges": (
        ["lab:policy", "--prompts", "rows.jsonl", "--verifier", "judge:module:judge"],
        {"judge-model"},
    ),
    "pairs in lists": (
        ["lab:policy", "--prompts", "lab", "--verifier", "lab", "--rule", "lists"],
        {"pairs-per-prompt"},
    ),
    "winrate of responses": (
        ["rows.jsonl", "rows.jsonl", "--judge", NOWHERE],
        {"temperature", "max-new-tokens"},
    ),
    "winrate by a function": (["a", "b", "--judge", "module:judge"], OF_JUDGE),
    "winrate of votes": (
        ["--calibrate", "rows.jsonl", "--judge", NOWHERE],
        {"prompts", "temperature", "max-new-tokens", "seed"},
    ),
    "generate by a model": (["lab:policy", "--prompt", "1+1=?"], {"concurrency"}),
    "generate by a server": (["--server", NOWHERE, "--prompt", "1+1=?"], LOADING),
    "compare as json": (["a", "b", "--format", "json"], {"items"}),
    "compare scores": (["rows.jsonl", "rows.jsonl", "--tasks", "lab"], {"data"}),
    "export here": (["lab:policy"], {"private"}),
}  # fmt: skip

# Options that every mode reads, or that allow something which need not come to be asked for.
READ = {
    "evaluate": {
        "tasks", "output", "responses", "data", "limit", "seed", "server", "allow-code-execution", "isolation",
    },
    "pairs": {
        "prompts", "samples", "output", "skip", "verifier", "yes", "allow-code-execution", "isolation", "rule",
        "threshold", "min-pass-rate", "max-pass-rate", "reject-unfinished", "limit", "seed", "server",
    },
    "winrate": {"calibrate", "limit", "output", "format", "judge", "template", "yes"},
    "generate": {
        "prompt", "prompts", "output", "against", "system", "num-samples", "temperature", "top-p", "max-new-tokens",
        "prompting", "limit", "seed", "server",
    },
    "compare": {"tasks", "rule", "seed", "format", "output"},
    "export": {"output", "dtype", "push-to-hub"},
}  # fmt: skip


def options(command: str) -> dict[str, argparse.Action]:
    commands = next(each for each in _parser()._actions if isinstance(each, argparse._SubParsersAction))
    found = commands.choices[command]._actions
    return {a.option_strings[0][2:]: a for a in found if a.option_strings and a.dest != "help"}


def other_value(action: argparse.Action) -> list[str]:
    """Returns a value of an option that is not its default."""
    if action.nargs == 0:
        return []
    if action.choices:
        return [str(next(each for each in action.choices if each != action.default))]
    value = {int: "3", float: "0.5"}.get(action.type, "1/2" if action.dest == "shard" else "float32")  # type: ignore[call-overload]
    return [value] * (action.nargs if isinstance(action.nargs, int) else 1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows that have an id, a prompt, a response and a score."""
    monkeypatch.chdir(tmp_path)
    rows = [{"item": f"lab/{n}", "prompt": "1+1=?", "response": "2", "score": 1.0} for n in range(3)]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("mode", "option"), [(mode, option) for mode, (_, unread) in MODES.items() for option in sorted(unread)]
)
def test_what_is_not_read_is_refused_by_name(
    folder: Path, capsys: pytest.CaptureFixture[str], mode: str, option: str
) -> None:
    command, given = mode.partition(" ")[0], MODES[mode][0]
    try:
        status: Any = main([command, *given, f"--{option}", *other_value(options(command)[option])])
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status == 2
    assert f"--{option}" in error.partition("error:")[2]
    assert "apply to" in error or "--data: no file" in error
    assert [each.name for each in folder.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("command", sorted(READ))
def test_it_is_known_of_every_option_which_modes_read_it(command: str) -> None:
    unread = {
        name for mode, (_, names) in MODES.items() if mode.partition(" ")[0] == command for name in names
    }
    assert set(options(command)) == READ[command] | unread
    assert not READ[command] & unread


def test_settings_in_python_are_refused_as_well(folder: Path) -> None:
    given: dict[str, Any] = {
        "num_samples": 2, "temperature": 0.5, "top_p": 0.5, "max_new_tokens": 3, "prompting": "plain",
        "num_fewshot": 1, "batch_size": 2, "dtype": "float32", "shard": (1, 4),
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        evaluate(None, EvaluationSettings(["lab"], **given), responses="rows.jsonl")
    assert len(caught.value.problems) == len(given) == len(DRAWING)
    with pytest.raises(ConfigError, match="2 problems") as caught:
        generate(
            "lab:policy", EvaluationSettings(["generate"], num_fewshot=2, shard=(1, 2)), prompts=["1+1=?"]
        )
    settings = EvaluationSettings(["pairs"], num_samples=8, shard=(1, 2))
    with pytest.raises(ConfigError, match="--shard: does not apply to --samples"):
        pairs(None, "lab", settings, PairingSettings(), samples="rows.jsonl")
    for wrong, problem in (
        ({"limit": -1}, "--limit"),
        ({"limit": 0}, "--limit"),
        ({"format": "alpaca_eval"}, "--fo"),
    ):
        with pytest.raises(ConfigError, match=problem):
            calibrate("rows.jsonl", JudgeSettings(NOWHERE, yes=True), output=folder / "out", **wrong)
    assert not (folder / "out").exists()
    with pytest.raises(ConfigError, match="--items"):
        compare(["a", "b"], format="json", items=2)


def test_what_greedy_decoding_and_scores_do_not_read_is_refused() -> None:
    for make in (lambda: Law(5, 0.0, 0.9), lambda: EvaluationSettings(["lab"], top_p=0.9)):
        with pytest.raises(ConfigError, match=r"top.p: does not apply to greedy"):
            make()
    scored = [Candidate(0, "a", 2.0), Candidate(1, "b", 1.0)]
    with pytest.raises(ConfigError, match="set --threshold"):
        pair_up(scored, PairingSettings(min_pass_rate=0.5), "p")
    assert pair_up(scored, PairingSettings(min_pass_rate=0.5, threshold=1.5), "p").pass_rate == 0.5
