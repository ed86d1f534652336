"""A command that would replace a result by a smaller one of the same kind refuses, or says so."""

import contextlib
import json
from pathlib import Path

import pytest

from infopo.cli import main
from infopo.config import load_recipe
from infopo.errors import ConfigError
from infopo.evaluation.results import read_evaluation, refuse_smaller
from infopo.lab.problems import make_problems
from infopo.runs import write_json_atomic
from infopo.workflows.round_state import first_round, refuse_fewer
from infopo.workflows.winrate import WINRATE, JudgeSettings, winrate


def command(*words: object) -> int:
    return main(list(map(str, words)))


def test_fewer_items_do_not_replace_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = ["evaluate", "lab:policy", "--tasks", "lab", "--output", tmp_path, "--limit"]
    assert command(*evaluate, 6) == 0
    before = (tmp_path / "eval.json").read_bytes()
    assert command(*evaluate, 2) == 2
    assert "holds the result of lab on 6 items, which one on 2 items would replace" in capsys.readouterr().err
    assert (tmp_path / "eval.json").read_bytes() == before
    assert command(*evaluate, 2, "--shard", "1/2") == 0  # which marks nothing
    capsys.readouterr()
    assert command(*evaluate, 6) == 0
    assert "replaced" not in capsys.readouterr().out
    assert command(*evaluate, 7) == 0
    said = capsys.readouterr().out
    assert "replaced: lab: " in said
    assert "of 6 items" in said
    assert len(read_evaluation(tmp_path).responses) == 7


@pytest.mark.parametrize(
    ("model", "sizes", "is_refused"),
    [
        ({"weights": "a"}, {"gsm8k": (99, 4)}, True),
        ({"weights": "a"}, {"gsm8k": (100, 1)}, True),
        ({"weights": "a"}, {"gsm8k": (100, 4)}, False),
        ({"weights": "b"}, {"gsm8k": (1, 1)}, False),  # trained since
        ({"weights": "a"}, {"svamp": (1, 1)}, False),
        ({"weights": "a"}, {"mmlu": (4, 1)}, True),
        ({"weights": "a"}, {"mmlu": (5, 1)}, False),
        ({"weights": "a"}, {"gsm": (1, 1)}, False),
    ],
)
def test_the_same_model_and_task_are_compared(
    tmp_path: Path, model: dict[str, str], sizes: dict[str, tuple[int, int]], is_refused: bool
) -> None:
    tasks = {"gsm8k": {"items": 100, "samples": 4}, "mmlu_law": {"items": 5, "harness": {}}}
    write_json_atomic(
        tmp_path / "eval.json", {"schema_version": 2, "model": {"weights": "a"}, "tasks": tasks}
    )
    with pytest.raises(ConfigError, match="remove that one") if is_refused else contextlib.nullcontext():
        refuse_smaller(tmp_path, model, sizes)


def test_fewer_given_responses_do_not_replace_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "responses.jsonl"
    rows = [
        {"item": f"lab/{i}", "response": each.solution}
        for i, each in enumerate(make_problems(5, 0, "evaluation"))
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    evaluate = ["evaluate", "--responses", path, "--tasks", "lab", "--output", tmp_path / "out", "--limit"]
    assert command(*evaluate, 5) == 0
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:3]), encoding="utf-8")
    assert command(*evaluate, 5) == 0  # another file
    assert "replaced: lab: " in capsys.readouterr().out
    assert len(read_evaluation(tmp_path / "out").responses) == 3


def test_fewer_pairs_and_responses_say_where_the_others_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, pairs = tmp_path / "samples.jsonl", tmp_path / "pairs.jsonl"
    made = ["pairs", "lab:policy", "--prompts", "lab", "--verifier", "lab", "--num-generations", "4"]
    assert command(*made, "--output", pairs, "--limit", 24) == 0
    rows = len(pairs.read_bytes().splitlines())
    assert command(*made, "--output", pairs, "--limit", 16) == 0
    fewer = len(pairs.read_bytes().splitlines())
    assert 0 < fewer < rows
    assert (
        f"{pairs}: {fewer} rows in place of {rows}, whose samples are kept in {tmp_path / 'pairs.samples'}"
        in (capsys.readouterr().out)
    )
    before = {path.name: path.read_bytes() for path in tmp_path.glob("pairs.*") if path.is_file()}
    assert command(*made, "--output", pairs, "--limit", 1, "--max-new-tokens", 1) == 2
    assert "the earlier file is left as it was" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.glob("pairs.*") if path.is_file()} == before
    generate = ["generate", "lab:policy", "--output", samples, "--max-new-tokens", 2, "--prompt", "1+1=?"]
    assert command(*generate, "--prompt", "2+2=?") == 0
    assert command(*generate) == 0
    assert f"{samples}: 1 row in place of 2" in capsys.readouterr().out


def test_fewer_duels_do_not_replace_more(tmp_path: Path) -> None:
    for side in "ab":
        rows = [{"prompt": f"{number}?", "response": f"{side} {number}"} for number in range(3)]
        (tmp_path / f"{side}.jsonl").write_text(
            "".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8"
        )
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    write_json_atomic(tmp_path / WINRATE, {"schema_version": 1, "a": a, "b": b, "result": {"asked": 6}})
    with pytest.raises(ConfigError, match=r"holds the result of 6 duels, which one of [23] would replace"):
        winrate(a, b, JudgeSettings("no_such_module:judge"), output=tmp_path)


def test_fewer_rounds_than_are_trained_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(
        "{model: lab:policy, output_dir: out, rounds: {prompts: lab, verifier: lab, number: 2}}",
        encoding="utf-8",
    )
    this = first_round(load_recipe("recipe.yaml"))
    for each in (this, this.next()):
        each.folder.mkdir(parents=True)
        each.note_trained()
    refuse_fewer(load_recipe("recipe.yaml"))
    with pytest.raises(ConfigError, match=r"rounds\.number: 1, but 2 rounds are trained in out"):
        refuse_fewer(load_recipe("recipe.yaml", ["rounds.number=1"]))
