"""`infopo evaluate`, from the command line to its files, on the lab's policy."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infopo.cli import main
from infopo.evaluation.grading import graded
from infopo.evaluation.items import Mark
from infopo.evaluation.lab_task import lab_task
from infopo.evaluation.pass_at_k import pass_at_k
from infopo.evaluation.results import Response, read_evaluation, summary
from infopo.intervals import wilson
from infopo.lab import make_problems, policy_path
from infopo.lab.evaluation import accuracy
from infopo.output import counted
from servers import Answer, completion, failure, serving


def run(*arguments: object, tasks: str = "lab") -> int:
    return main(["evaluate", *map(str, arguments), "--tasks", tasks])


def test_the_figures_of_the_lab_are_those_of_its_own_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("lab:policy", "--limit", 60, "--output", tmp_path) == 0
    printed = capsys.readouterr().out
    model, tokenizer = (kind.from_pretrained(policy_path()) for kind in (AutoModelForCausalLM, AutoTokenizer))
    expected = accuracy(model, tokenizer, make_problems(60, 0, "evaluation"))
    found = read_evaluation(tmp_path)
    rule = found.record["tasks"]["lab"]["rules"]["lab"]
    assert (rule["correct"], rule["n"], tuple(rule["ci95"])) == (expected.correct, 60, expected.ci95)
    low, high = expected.ci95
    assert f"| lab | **lab** | {expected.accuracy:.3f} [{low:.3f}, {high:.3f}] | 60 | 0 |" in printed
    assert [sum(scores) for scores in found.scores("lab").values()].count(1) == expected.correct
    assert [each.item for each in found.responses] == [f"lab/{number}" for number in range(60)]

    # Again: everything is found, and comes to the same.
    before = (tmp_path / "items.jsonl").read_bytes()
    assert run("lab:policy", "--limit", 60, "--output", tmp_path, "--batch-size", 5) == 0
    assert "60 samples, 60 of them from the store" in capsys.readouterr().out
    assert (tmp_path / "items.jsonl").read_bytes() == before


def test_shards_draw_what_one_process_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several = ("--limit", 9, "--num-samples", 2, "--seed", 3)
    assert run("lab:policy", *several, "--output", tmp_path / "whole") == 0
    for shard in ("1/2", "2/2"):
        assert run("lab:policy", *several, "--output", tmp_path / "parts", "--shard", shard) == 0
        assert not (tmp_path / "parts" / "eval.json").exists()
    capsys.readouterr()
    assert run("lab:policy", *several, "--output", tmp_path / "parts") == 0
    assert "18 samples, 18 of them from the store" in capsys.readouterr().out
    one, other = (read_evaluation(tmp_path / name) for name in ("whole", "parts"))
    assert one.responses == other.responses
    figures = one.record["tasks"]["lab"]["rules"]["lab"]
    assert figures == other.record["tasks"]["lab"]["rules"]["lab"]
    assert {"pass@1", "pass@2", "majority"} <= set(figures)


def test_a_model_that_was_trained_again_to_the_same_folder_is_asked_again(tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(policy_path(), folder)
    assert run(folder, "--limit", 8, "--output", out) == 0
    first = read_evaluation(out)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(folder)
    assert run(folder, "--limit", 8, "--output", out) == 0
    second = read_evaluation(out)
    assert first.record["model"]["weights"] != second.record["model"]["weights"]
    assert [each.response for each in first.responses] != [each.response for each in second.responses]
    assert second.record["tasks"]["lab"]["rules"]["lab"]["correct"] < 4
    assert len((out / "samples.jsonl").read_text().splitlines()) == 16


def test_an_adapter_is_merged_into_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(policy_path()), config)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(policy_path()).save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(policy_path()).save_pretrained(tmp_path / "merged")
    for name in ("adapter", "merged"):
        assert run(tmp_path / name, "--limit", 6, "--output", tmp_path / f"out-{name}") == 0
    one, other = (read_evaluation(tmp_path / f"out-{name}") for name in ("adapter", "merged"))
    assert one.responses == other.responses


@pytest.mark.parametrize("named", ["id", "short id", "prompt", "order"])
def test_given_responses_are_matched_and_marked(
    named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items, problems = lab_task().load(None)[:5], make_problems(5, 0, "evaluation")
    rows = []
    for number in [0, 1, 2, 3, 4] if named == "order" else [3, 0, 4]:
        about = {
            "id": {"item": f"lab/{number}"},
            "short id": {"id": number},
            "prompt": {"prompt": f"  {problems[number].question} "},
            "order": {},
        }[named]
        text = problems[number].solution if number != 4 else "I do not know."
        rows.append({**about, "response": text})
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--responses", path, "--limit", 5, "--output", tmp_path / "out") == 0
    rule = read_evaluation(tmp_path / "out").record["tasks"]["lab"]["rules"]["lab"]
    assert (rule["correct"], rule["n"], rule["notes"]) == (len(rows) - 1, len(rows), {"no answer": 1})
    assert f"{counted(5 - len(rows), 'item')} without one" in capsys.readouterr().out
    assert len(items) == 5


@pytest.mark.parametrize(
    ("suffix", "written"),
    [
        (".jsonl", lambda rows: "".join(json.dumps(row) + "\n" for row in rows)),
        (
            ".csv",
            lambda rows: (
                "item,response,finished\n" + "".join(",".join(map(str, r.values())) + "\n" for r in rows)
            ),
        ),
    ],
)
def test_a_given_response_that_was_cut_off_is_marked_as_one(
    tmp_path: Path, suffix: str, written: Callable[[list[dict[str, object]]], str]
) -> None:
    """`numeric` reads a number without a marker from a finished response only, as of one that was drawn."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n}?", "answer": "#### 7"}) + "\n" for n in range(2)))
    path = tmp_path / f"responses{suffix}"
    rows: list[dict[str, object]] = [
        {"item": f"gsm8k/{n}", "response": "It is 7", "finished": finished}
        for n, finished in enumerate([True, False])
    ]
    path.write_text(written(rows))
    out = tmp_path / "out"
    assert run("--responses", path, "--data", data, "--output", out, tasks="gsm8k") == 0
    found = read_evaluation(out)
    marks = [
        (each.finished, each.marks["numeric"].correct, each.marks["numeric"].note) for each in found.responses
    ]
    assert marks == [(True, True, None), (False, False, "unfinished")]
    assert found.record["tasks"]["gsm8k"]["finished_share"] == 0.5
    graded_scores = graded(path, "gsm8k", "numeric", {"gsm8k": str(data)}).scores
    assert graded_scores == {"gsm8k/0": [1.0], "gsm8k/1": [0.0]}


def test_an_empty_cell_says_nothing_of_whether_a_response_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "responses.csv"
    path.write_text("item,response,finished\nlab/0,Answer: 7,\nlab/1,Answer: 7,false\n")
    assert run("--responses", path, "--output", tmp_path / "out") == 0
    assert [each.finished for each in read_evaluation(tmp_path / "out").responses] == [True, False]


def test_samples_of_given_responses_are_counted(tmp_path: Path) -> None:
    """Of items with more and with fewer, each has the fewest."""
    path = tmp_path / "responses.jsonl"
    rows = [{"item": f"lab/{n}", "response": ["Answer: 7"] * (3 + n % 2)} for n in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--responses", path, "--output", tmp_path / "out") == 0
    record = read_evaluation(tmp_path / "out").record
    task = record["tasks"]["lab"]
    assert (task["items"], task["samples"], task["rules"]["lab"]["n"]) == (5, 3, 17)
    assert "temperature" not in record["settings"], "nothing was drawn"


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"item": "lab/0"}], "expected a column"),
        (
            [{"item": "lab/0", "response": "7", "finished": "maybe"}],
            r"responses\.jsonl:1.*finished: expected true",
        ),
        (
            [{"item": "lab/0", "response": ["7", "8"], "finished": [True]}],
            "finished: expected true or false, or 2",
        ),
        ([{"item": "lab/0", "response": {"a": 1}}], r"responses\.jsonl:1.*expected a text"),
        (
            [{"item": "lab/0", "response": "7"}, {"item": "lab/1", "reply": "7"}],
            r"responses\.jsonl:2.*got item, reply",
        ),
        (
            [{"id": 1, "prompt": "39+69*6-70=?", "response": "7"}],
            r"responses\.jsonl:1.*is item lab/1.*'39\+69",
        ),
        (
            [{"item": "lab/0", "response": ""}, {"item": "lab/9999", "response": ""}],
            r":2.*no item of the task",
        ),
        ([{"response": "Answer: 7"}], "has 1 response to 5 items"),
        ([{"task": "gsm8k", "response": "Answer: 7"}], "no responses to task lab"),
        ([], "no responses"),
        (["text"], "expected an object"),
    ],
)
def test_responses_that_cannot_be_matched_are_named(
    rows: list[object], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--responses", path, "--limit", 5, "--output", tmp_path / "out") == 2
    assert re.search(problem, capsys.readouterr().err)
    assert not (tmp_path / "out" / "eval.json").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["lab:policy", "--tasks", "gms8k"], "no task 'gms8k'"),
        (["lab:policy", "--tasks", ""], "at least one"),
        (["lab:policy", "--tasks", "lab,lab"], "named twice"),
        (["lab:policy", "--tasks", "lab", "--limit", "0"], "--limit"),
        (["lab:policy", "--tasks", "lab", "--num-samples", "2", "--temperature", "0"], "--temperature above 0"),
        (["lab:policy", "--tasks", "lab", "--temperature", "nan"], "--temperature: expected"),
        (["lab:policy", "--tasks", "lab", "--top-p", "1.5"], "--top-p: expected"),
        (["lab:policy", "--tasks", "lab", "--seed", "-1"], "--seed"),
        (["lab:policy", "--tasks", "lab", "--shard", "3/2"], "--shard"),
        (["lab:policy", "--tasks", "lab", "--num-fewshot", "3"], "--num-fewshot"),
        (["lab:policy", "--tasks", "lab", "--max-new-tokens", "600"], "lab/0.*context of 512"),
        (["lab:policy", "--tasks", "lab", "--dtype", "int3"], "dtype"),
        (["lab:policy", "--tasks", "lab", "--data", "lab=x.jsonl"], "makes its own problems"),
        (["lab:policy", "--tasks", "lab", "--output", "/dev/null"], "--output"),
        (["./no-such-model", "--tasks", "lab"], "no such folder"),
        (["--tasks", "lab"], "either a model .* or --responses"),
        (["lab:policy", "--responses", "x.jsonl", "--tasks", "lab"], "either a model .* or --responses"),
        (["--responses", "no.jsonl", "--tasks", "lab"], "no such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(problem, error, re.DOTALL), error
    assert "Traceback" not in error


def test_an_evaluation_of_a_run_goes_to_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoint-12"
    shutil.copytree(policy_path(), checkpoint)
    (folder / "recipe.yaml").write_text("objective: infopo\n")
    assert run(folder, "--limit", 3) == 0
    assert "checkpoint-12 is taken" in capsys.readouterr().out
    assert read_evaluation(folder / "evaluation").record["model"]["name"] == str(folder)
    shutil.rmtree(checkpoint)
    assert run(folder, "--limit", 3) == 2
    assert "holds no model" in capsys.readouterr().err


def response(item: str, sample: int, correct: bool, answer: str | None = None) -> Response:
    return Response("t", item, sample, "q", "r", 1, True, {"rule": Mark(correct, answer)})


def test_one_sample_an_item_gets_wilsons_interval() -> None:
    found = summary([response(str(number), 0, number < 3) for number in range(4)], "rule")
    assert (found["accuracy"], found["correct"], found["n"]) == (0.75, 3, 4)
    assert found["ci95"] == wilson(0.75, 4)
    assert "pass@1" not in found
    assert summary([], "rule")["accuracy"] is None


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples() -> None:
    for n in range(1, 7):
        for correct in range(n + 1):
            marks = [number < correct for number in range(n)]
            for k in range(1, n + 1):
                chosen = [any(choice) for choice in combinations(marks, k)]
                assert pass_at_k(n, correct, k) == pytest.approx(sum(chosen) / len(chosen))
    for wrong in ((3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)):
        with pytest.raises(ValueError, match="expected"):
            pass_at_k(*wrong)


def test_several_samples_are_no_independent_observations() -> None:
    """All samples of an item agree: ten samples of each of four items say no more than one."""
    alike = [response(str(item), sample, item < 2, str(item)) for item in range(4) for sample in range(10)]
    found = summary(alike, "rule")
    low, high = found["ci95"]
    assert high - low > 0.7  # Wilson's for 20 of 40 has a width of 0.3
    assert found["pass@8"]["value"] == found["majority"]["value"] == found["accuracy"] == 0.5


def test_items_that_are_all_right_leave_doubt() -> None:
    """Two right samples of each of twenty items say what twenty right items say."""
    found = summary(
        [response(str(item), sample, True, "1") for item in range(20) for sample in range(2)], "rule"
    )
    for ends in (found["ci95"], *(found[name]["ci95"] for name in ("pass@1", "pass@2", "majority"))):
        assert ends == wilson(1.0, 20)


@pytest.mark.long
def test_a_killed_evaluation_goes_on_to_the_same_files(tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        settings = ["--limit", "120", "--num-samples", "2", "--batch-size", "2", "--output", str(out)]
        return [sys.executable, "-m", "infopo", "evaluate", "lab:policy", "--tasks", "lab", *settings]

    assert main([*command(tmp_path / "whole")[3:]]) == 0
    killed, path = tmp_path / "killed", tmp_path / "killed" / "samples.jsonl"
    for part in range(2):
        process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, begin = path.stat().st_size if path.exists() else 0, time.monotonic()
        while time.monotonic() - begin < 120 and process.poll() is None:
            if path.exists() and path.stat().st_size > before + 10_000 * (part + 1):
                break
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
        assert not (killed / "eval.json").exists()
    drawn = len(path.read_bytes().split(b"\n")) - 1
    assert 10 < drawn < 240
    assert main([*command(killed)[3:]]) == 0
    assert (killed / "items.jsonl").read_bytes() == (tmp_path / "whole" / "items.jsonl").read_bytes()
    assert path.read_bytes().count(b"\n") == 240


def test_a_served_model_is_asked_and_what_it_answered_before_it_failed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    solutions = {problem.question: problem.solution for problem in make_problems(40, 0, "evaluation")}
    is_well = False

    def answer(body: dict[str, Any], number: int) -> Answer:
        if number >= 36 and not is_well:
            return failure(401, "the key has expired")
        return completion(solutions[body["messages"][-1]["content"]])

    with serving(answer) as served:
        arguments = ("--server", served.url, "--limit", 40, "--output", tmp_path, "--concurrency", 2)
        assert run(*arguments) == 2
        assert "expired" in capsys.readouterr().err
        kept = (tmp_path / "samples.jsonl").read_bytes().count(b"\n")
        assert 30 <= kept <= 36
        is_well = True
        assert run(*arguments) == 0
        assert f"40 samples, {kept} of them from the store" in capsys.readouterr().out
        assert len(served.bodies) <= 42
    found = read_evaluation(tmp_path).record
    assert found["tasks"]["lab"]["rules"]["lab"]["correct"] == 40
    assert (found["model"]["name"], found["model"]["weights"]) == ("served-model", None)
    assert served.bodies[0]["temperature"] == 0
    assert "seed" not in served.bodies[0]


def test_bare_numbers_and_ids_that_a_format_made_floats_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps({"id": float(n), "response": 7}) + "\n" for n in range(3)))
    assert run("--responses", path, "--limit", 5, "--output", tmp_path / "out") == 0
    assert [each.response for each in read_evaluation(tmp_path / "out").responses] == ["7", "7", "7"]


def test_tasks_of_the_same_model_stay_and_other_subjects_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(policy_path(), model)
    assert run(model, "--limit", 3, "--output", out) == 0
    assert run(model, "--limit", 2, "--output", out, tasks="expressions") == 0
    found = read_evaluation(out)
    assert {name: task["items"] for name, task in found.record["tasks"].items()} == {
        "lab": 3,
        "expressions": 2,
    }
    assert sorted(each.item for each in found.responses) == [
        "expressions/0", "expressions/1", "lab/0", "lab/1", "lab/2",
    ]  # fmt: skip
    before = (out / "eval.json").read_bytes()
    assert run("lab:policy", "--limit", 3, "--output", out) == 2
    assert "holds the evaluation of" in capsys.readouterr().err
    assert (out / "eval.json").read_bytes() == before

    # A model that has changed since keeps no results of the old one.
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.lm_head.weight.mul_(0.5)
    changed.save_pretrained(model)
    assert run(model, "--limit", 3, "--output", out) == 0
    assert (
        "left out, because the model has changed since, or cannot be told: expressions"
        in capsys.readouterr().out
    )
    assert set(read_evaluation(out).record["tasks"]) == {"lab"}
