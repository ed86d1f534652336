"""Tasks at each evaluation of a run: metric, best checkpoint, files, and what is refused before training."""

import json
import re
from pathlib import Path

import pytest

from infopo.cli import main
from infopo.evaluation.results import read_evaluation
from infopo.runs import read_run

ROOT = Path(__file__).resolve().parents[1]
RECIPE = str(ROOT / "src" / "infopo" / "recipes" / "lab.yaml")
SMALL = [
    "data.limit=32", "train.max_steps=4", "train.eval_strategy=steps", "train.eval_steps=2",
    "train.save_strategy=steps", "train.save_steps=2", "data.eval_split=train",
    "train.probe_size=0", "train.anchor_size=0", "train.gradient_size=0",
]  # fmt: skip


@pytest.mark.long
def test_the_best_checkpoint_is_chosen_by_a_task(tmp_path: Path) -> None:
    asked = ["evaluate={tasks: lab, limit: 24}", "train.learning_rate=1e-3"]
    # The worst one here, which is not the last one.
    best = ["train.load_best_model_at_end=true", "train.metric_for_best_model=eval_tasks/lab"]
    best += ["train.greater_is_better=false"]
    assert main(["train", RECIPE, f"output_dir={tmp_path / 'run'}", *SMALL, *asked, *best]) == 0
    run = read_run(tmp_path / "run")
    steps, shares = run.series("eval_tasks/lab")
    assert steps[:2] == [2, 4]
    assert shares[0] < shares[1]
    found = {
        name: read_evaluation(tmp_path / "run" / "tasks" / name) for name in ("step-2", "step-4", "final")
    }
    for name, step in (("step-2", 0), ("step-4", 1)):
        assert found[name].record["tasks"]["lab"]["rules"]["lab"]["accuracy"] == shares[step]
    assert found["final"].responses == found["step-2"].responses
    assert run.evaluation is not None
    assert run.evaluation["eval_tasks/lab"] == shares[0]
    assert {"eval_loss", "eval_tasks/lab/low", "eval_tasks/lab/high"} <= set(run.evaluation)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["evaluate=lab", "train.eval_strategy=no"], "evaluate.tasks.*train.eval_strategy"),
        (["evaluate=gms8k"], "no task 'gms8k'"),
        (["evaluate={tasks: lab, limt: 5}"], "evaluate.limt.*did you mean"),
        (["evaluate={tasks: lab, limit: 0}"], "evaluate.limit"),
        (["evaluate={tasks: lab, num_samples: 2, temperature: 0}"], "evaluate.temperature above 0"),
        (["evaluate={tasks: lab, data: {gsm8k: x.jsonl}}"], "evaluate.data.*'gsm8k'"),
        (["evaluate=lab", "train.load_best_model_at_end=true", "train.metric_for_best_model=eval_tasks/gsm8k"],
         "metric_for_best_model.*tasks/lab"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_before_training(
    changes: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", RECIPE, f"output_dir={tmp_path / 'run'}", *SMALL, *changes]) == 2
    assert re.search(problem, capsys.readouterr().err, re.DOTALL)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.long
def test_experiment_3_runs_on_stand_in_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two commands of docs/evaluation.md, with another model and other files, and the comparison after them."""
    chats = [f"Name {number} fruits." for number in range(16)]
    rows = [
        {
            "prompt": asked,
            "prompt_id": str(number),
            "chosen": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": "Apples, pears."},
            ],
            "rejected": [{"role": "user", "content": asked}, {"role": "assistant", "content": "No."}],
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": "Apples, pears."},
            ],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        }
        for number, asked in enumerate(chats)
    ]
    problems = [{"question": f"{n}+{n}=?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"} for n in range(11, 17)]
    for name, lines in (("chats.jsonl", rows), ("problems.jsonl", problems)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = ROOT / "src" / "infopo" / "recipes" / "paper" / "llama3-8b-ultrafeedback.yaml"
    smaller = [
        "model.name_or_path=lab:policy", f"data.path={tmp_path / 'chats.jsonl'}", "data.split=train",
        "data.eval_split=train", "data.max_length=200", "data.max_prompt_length=100", "data.num_proc=1",
        "train.gradient_accumulation_steps=2", "train.max_steps=2", "train.activation_checkpointing=false",
        "train.anchor_tokens=8",
    ]  # fmt: skip
    for objective in ("infopo", "dpo"):
        run = tmp_path / objective
        assert main(["train", str(recipe), f"output_dir={run}", f"objective={objective}", *smaller]) == 0
        data = f"gsm8k={tmp_path / 'problems.jsonl'}"
        assert main(["evaluate", str(run), "--tasks", "gsm8k", "--data", data, "--max-new-tokens", "24"]) == 0
        record = read_evaluation(run / "evaluation").record["tasks"]["gsm8k"]
        assert record["items"] == 6
        assert record["overlap"]["exact"] == []
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "infopo"), str(tmp_path / "dpo")]) == 0
    assert "gsm8k" in capsys.readouterr().out


@pytest.mark.long
def test_an_adapter_in_training_answers_as_its_merged_model(tmp_path: Path) -> None:
    run, asked = tmp_path / "run", ["evaluate={tasks: lab, limit: 40}", "train.learning_rate=1e-2"]
    adapter = "model.adapter={r: 4, target_modules: all-linear}"
    assert main(["train", RECIPE, f"output_dir={run}", *SMALL, *asked, adapter]) == 0
    assert main(["evaluate", str(run), "--tasks", "lab", "--limit", "40"]) == 0
    assert (
        main(
            ["evaluate", "lab:policy", "--tasks", "lab", "--limit", "40", "--output", str(tmp_path / "start")]
        )
        == 0
    )
    during, after, start = (
        [each.response for each in read_evaluation(folder).responses]
        for folder in (run / "tasks" / "step-4", run / "evaluation", tmp_path / "start")
    )
    assert during == after
    assert during != start
