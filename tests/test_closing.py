"""What a run says of itself at its end: figures of the report's headline, verdicts, and commands that a shell takes."""

import json
import logging
import re
import shlex
from pathlib import Path

import pytest
import yaml

from infopo.cli import _parser
from infopo.ending import ClosingSummary
from infopo.report.closing import changes, closing_lines
from infopo.report.headline import headline
from infopo.report.reading import read_runs
from run_files import write_run
from trainers import trainer_of

FALLING = {
    "name": "chosen falling", "fired": True, "step": 40, "effect": -0.3, "interval": [-0.4, -0.2],
    "unit": "nats per token", "threshold": "t", "text": "Chosen responses fall.",
    "advice": "Lower the learning rate.", "not_checked": None,
}  # fmt: skip


def test_figures_are_those_of_the_reports_headline(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", fall=3.0)
    [run] = read_runs([run_dir])
    found = headline([run])
    by_title = {column.title.lower(): estimate for column, estimate in zip(found.columns, found.rows[0])}
    rows = {row.title.lower(): row for row in changes(run)}
    assert rows["chosen log-prob"].change == by_title["chosen"]
    assert rows["rejected log-prob"].change == by_title["rejected"]
    for title in ("margin", "reward accuracy", "ranking accuracy", "forward kl"):
        assert rows[title].after == by_title[title] is not None
    for row in rows.values():
        assert row.before is not None
        assert ", step 0: " in row.before.source


def test_what_was_not_measured_is_named_and_not_zero(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    bare = [{"step": 1, "time": 1.0, "loss": 0.5}, {"step": 2, "time": 2.0, "train_runtime": 1.0}]
    (run_dir / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(record)}\n" for record in bare), encoding="utf-8"
    )
    (run_dir / "eval.json").unlink()
    lines = closing_lines(run_dir)
    assert lines[0].startswith("not measured: chosen log-prob, rejected log-prob, margin")
    assert not any("→" in line for line in lines)


def test_a_run_that_was_measured_at_its_start_only_says_nothing_of_a_change(tmp_path: Path) -> None:
    """As one that was killed between measurements, or the card of its checkpoint."""
    run_dir = write_run(tmp_path / "run")
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [
        line for line in lines
        if json.loads(line)["step"] == 0 or not any(n.startswith(("probe/", "kl/")) for n in json.loads(line))
    ]  # fmt: skip
    assert 0 < len(kept) < len(lines)
    (run_dir / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    [run] = read_runs([run_dir])
    assert run.step > 0
    assert not any(row.is_measured for row in changes(run))


def test_verdicts_stand_with_their_meaning(tmp_path: Path) -> None:
    lines = closing_lines(write_run(tmp_path / "run", verdicts=(FALLING,)))
    place = next(i for i, line in enumerate(lines) if line.startswith("verdicts: chosen falling ("))
    assert lines[place + 1] == "  chosen falling: Chosen responses fall. Lower the learning rate."


@pytest.mark.parametrize("name", ["run", "a run; with 'signs' $HOME", "-dash"])
def test_commands_are_what_a_shell_hands_to_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = write_run(Path(name))
    (run_dir / "model.safetensors").touch()
    lines = closing_lines(name, base="models/my sft")
    commands = [shlex.split(line) for line in lines[lines.index("next:") + 1 :]]
    assert [words[:2] for words in commands] == [
        ["infopo", "chat"],
        ["infopo", "evaluate"],
        ["infopo", "report"],
    ]
    for words in commands:
        assert "run" in _parser().parse_args(words[1:])
        assert Path(words[2]).samefile(run_dir)
        assert not words[2].startswith("-")
    assert commands[0][3:] == ["--against", "models/my sft"]


def test_the_tasks_of_a_recipe_are_evaluated_next_and_their_results_are_shown(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    (run_dir / "model.safetensors").touch()
    with (run_dir / "recipe.yaml").open("a", encoding="utf-8") as recipe:
        recipe.write("evaluate:\n  tasks: [gsm8k, svamp]\n  data: {gsm8k: my data.jsonl}\n")
    folder = run_dir / "tasks" / "step-60"
    folder.mkdir(parents=True)
    task = {"headline": "numeric", "items": 8, "rules": {"numeric": {"accuracy": 0.5, "ci95": [0.2, 0.8]}}}
    (folder / "eval.json").write_text(
        json.dumps({"schema_version": 2, "tasks": {"gsm8k": task}}), encoding="utf-8"
    )
    lines = closing_lines(run_dir)
    assert "task gsm8k: 0.500 [0.200, 0.800] of 8 items (numeric)" in lines
    words = shlex.split(lines[-2])
    assert words[3:] == ["--tasks", "gsm8k,svamp", "--data", "gsm8k=my data.jsonl"]


def evaluated_next(run_dir: Path, **recipe: object) -> list[str]:
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    words = shlex.split(closing_lines(run_dir)[-2])
    assert "run" in _parser().parse_args(words[1:])
    return words


@pytest.mark.parametrize(
    "path", ["mine.jsonl", ["a.jsonl", "b.jsonl"], "org/pairs", "", ".", "gone/round-1/pairs.jsonl"]
)
def test_no_task_is_named_if_none_is_known_to_fit(tmp_path: Path, path: object) -> None:
    run_dir = write_run(tmp_path / "my run")
    (run_dir / "model.safetensors").touch()
    words = evaluated_next(run_dir, model={"name_or_path": "models/sft"}, data={"path": path})
    assert words == ["infopo", "export", str(run_dir)]


@pytest.mark.parametrize(
    ("verifier", "expected"), [("lab", "evaluate"), ("expressions", "evaluate"), ("gsm8k", "export")]
)
def test_a_later_round_is_evaluated_by_the_task_that_marked_its_pairs(
    tmp_path: Path, verifier: str, expected: str
) -> None:
    run_dir = write_run(tmp_path / "round-2")
    (run_dir / "model.safetensors").touch()
    (run_dir / "pairs.provenance.json").write_text(json.dumps({"verifier": verifier}), encoding="utf-8")
    model, data = {"name_or_path": "out/round-1"}, {"path": str(run_dir / "pairs.jsonl")}
    words = evaluated_next(run_dir, model=model, data=data)
    assert words[1] == expected
    assert words[3:] == (["--tasks", verifier] if expected == "evaluate" else [])


def test_a_recipes_evaluation_is_asked_for_as_it_was_made(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    (run_dir / "model.safetensors").touch()
    evaluate = {
        "tasks": "gsm8k", "data": {"gsm8k": "-my data.jsonl"}, "limit": 50, "num_samples": 4, "temperature": 0.7,
        "num_fewshot": 2, "prompting": "plain", "max_new_tokens": 99, "isolation": "none", "seed": 0,
        "allow_code_execution": True, "batch_size": 8,
    }  # fmt: skip
    asked = _parser().parse_args(evaluated_next(run_dir, evaluate=evaluate)[1:])
    for name in ("tasks", "limit", "num_samples", "temperature", "num_fewshot", "prompting", "max_new_tokens",
                 "isolation", "allow_code_execution"):  # fmt: skip
        assert getattr(asked, name) == evaluate[name]
    assert asked.data == ["gsm8k=-my data.jsonl"]


def test_a_revision_of_the_base_is_not_compared_with_another(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    (run_dir / "model.safetensors").touch()
    for model, words in (
        ({"name_or_path": "org/base", "revision": "v2"}, []),
        ({"name_or_path": "-base"}, ["--against=-base"]),
        ({"name_or_path": "my base", "revision": None}, ["--against", "my base"]),
    ):
        (run_dir / "recipe.yaml").write_text(yaml.safe_dump({"model": model}), encoding="utf-8")
        found = shlex.split(closing_lines(run_dir)[-3])
        assert found == ["infopo", "chat", str(run_dir), *words]
        _parser().parse_args(found[1:])


def test_a_script_has_the_summary_in_its_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="infopo")
    trainer = trainer_of(tmp_path / "run", probe_size=8, max_steps=2)
    trainer.train()
    said = [record.getMessage() for record in caplog.records if record.name == ClosingSummary.__module__]
    assert said[0] == "what changed until step 2, on 8 examples of the probe set:"
    assert re.match(r"  chosen log-prob +−.* → −.*, change .*nats per response", said[1])
    assert any("no model is saved yet" in line for line in said)
    assert said[-1] == f"next: infopo report {tmp_path / 'run'}"
