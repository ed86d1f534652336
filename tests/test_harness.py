"""Tasks of lm-evaluation-harness with the model at hand, from local files, in our result format."""

import json
from pathlib import Path

import pytest
import yaml

from infopo.cli import main
from infopo.evaluation import harness
from infopo.evaluation.lab_task import lab_task
from infopo.evaluation.results import gold_text, read_evaluation
from infopo.evaluation.settings import EvaluationSettings
from infopo.intervals import wilson

pytest.importorskip("lm_eval")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Task files of a generating task, a choice and a group of both, with their data beside them."""
    rows = [
        {"question": f"{a}+{b}=?", "sum": str(a + b), "other": str(a)} for a in (10, 11) for b in (12, 13, 14)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    says = {
        "task": "says", **data, "output_type": "generate_until", "doc_to_target": "Answer: {{sum}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", **mean}],
    }  # fmt: skip
    chooses = {
        "task": "chooses", **data, "output_type": "multiple_choice", "doc_to_choice": ["{{other}}", "{{sum}}"],
        "doc_to_target": 1, "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
    }  # fmt: skip
    both = {
        "group": "both", "task": ["says", "chooses"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True, "filter_list": "none"}],
    }  # fmt: skip
    for name, content in (("says", says), ("chooses", chooses), ("both", both)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return tmp_path


def test_a_group_of_local_tasks_is_evaluated_beside_our_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "out"
    command = ["evaluate", "lab:policy", "--tasks", "both,lab", "--limit", "5", "--prompting", "chat"]
    assert main([*command, "--include-path", str(folder), "--output", str(output)]) == 0
    assert "**acc_norm,none**" in capsys.readouterr().out

    found = read_evaluation(output)
    tasks = found.record["tasks"]
    assert set(tasks) == {"says", "chooses", "lab"}
    assert tasks["chooses"]["headline"] == "acc_norm,none"
    assert tasks["chooses"]["harness"]["lm_eval"] == "0.4.13"
    assert {len(tasks[name]["prompt_sha256"]) for name in tasks} == {64}
    for name, rule in (("says", "exact_match,none"), ("chooses", "acc,none")):
        scores = found.scores(name, rule)
        assert list(scores) == [f"{name}/{place}" for place in range(5)]
        figures = tasks[name]["rules"][rule]
        assert figures["n"] == 5
        assert figures["accuracy"] == sum(map(sum, scores.values())) / 5
        assert 0 <= figures["ci95"][0] <= figures["accuracy"] <= figures["ci95"][1] <= 1
    golds = {each.task: each.gold for each in found.responses if each.item.endswith("/0")}
    assert golds == {
        "says": '"Answer: 22"',
        "chooses": '"1"',
        "lab": gold_text(lab_task().load(None)[0].gold),
    }
    # With the chat template the policy is asked as it was trained, so that it answers.
    said = next(each.response for each in found.responses if each.task == "says")
    assert "=" in said
    group = found.record["groups"]["both"]
    assert group["tasks"] == ["says", "chooses"]
    assert "acc,none" in group["rules"]


def test_figures_without_an_error_are_not_certain() -> None:
    """A group of which everything is right has a standard error of 0. So may a perplexity of equal documents."""
    figures = {"acc,none": 1.0, "acc_stderr,none": 0.0, "ppl,none": 9.0, "ppl_stderr,none": 0.0}
    found = harness.converted(
        {
            "samples": {},
            "groups": {"g": figures},
            "group_subtasks": {"g": ["s"]},
            "n-samples": {"s": {"effective": 8}},
        },
        EvaluationSettings(tasks=["g"]),
    )
    rules = found.groups["g"]["rules"]
    assert rules["acc,none"]["ci95"] == wilson(1.0, 8)
    assert rules["ppl,none"]["ci95"] is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["lab:policy", "--tasks", "chosees"], "no task 'chosees' here, and none in lm-evaluation-harness"),
        (["lab:policy", "--tasks", "says", "--temperature", "0.7"], "--temperature: does not apply to says"),
        (
            ["lab:policy", "--tasks", "says", "--data", "says=x.jsonl"],
            "--data: says is a task of lm-evaluation-harness",
        ),
        (["--responses", "rows.jsonl", "--tasks", "says"], "--responses: says: expected tasks among lab"),
    ],
)
def test_what_the_harness_would_leave_undone_is_refused(
    arguments: list[str],
    problem: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert main(["evaluate", *arguments, "--include-path", str(folder)]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert len(error) < 500


def test_data_that_are_not_there_give_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rows.jsonl").unlink()
    command = [
        "evaluate",
        "lab:policy",
        "--tasks",
        "says",
        "--include-path",
        str(folder),
        "--output",
        str(folder / "out"),
    ]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "--tasks says: lm-evaluation-harness stops with" in error
    assert "Traceback" not in error


def test_without_the_library_its_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert main(["evaluate", "lab:policy", "--tasks", "mmlu"]) == 2
    assert "pip install 'infopo[eval]'" in capsys.readouterr().err
