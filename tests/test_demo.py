"""The demo: its table, pictures and estimators on a world in miniature, and (long) the whole of it as a process."""

import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from infopo import reference_pass
from infopo.config import to_yaml
from infopo.lab.evaluation import accuracy
from infopo.lab.problems import make_problems, solve, verify
from infopo.report import figures
from infopo.report.document import read_report
from infopo.report.figures import draw_demo
from infopo.runs import read_run
from infopo.workers import WorkerPool
from infopo.workflows import demo as workflow
from infopo.workflows.demo import LEARNING_RATES, METHODS, Setting, table, title
from infopo.workflows.demo_pairs import lab_pairs
from infopo.workflows.sweep import sweep
from worlds import interruptible

RESULT = {
    "learning_rate": 1e-5, "beta": 1.0, "accuracy": 0.8, "accuracy_ci95": [0.7, 0.9], "n": 100,
    "chosen_logp_change": 0.1, "rejected_logp_change": -2.0, "kl_from_reference": 0.03, "kl_standard_error": 0.01,
    "seconds": 9.0, "run": "demo/runs/x",
}  # fmt: skip
SUMMARY: dict[str, Any] = {
    "labels": "verified",
    "start": {"accuracy": 0.75, "accuracy_ci95": [0.7, 0.8], "n": 100},
    "methods": {
        name: [
            {**RESULT, "learning_rate": rate, "beta": METHODS[name][1].get("beta"), "kl_from_reference": i}
            for i, rate in enumerate(LEARNING_RATES)
        ]
        for name in METHODS
    },
}


def test_methods_and_rates_are_those_that_the_demo_promises():
    assert list(METHODS) == ["infopo", "dpo_beta0.1", "dpo_beta1", "dpo_nll", "sft"]
    assert METHODS["infopo"] == ("infopo", {"beta": 1.0})
    assert len(LEARNING_RATES) == 3
    assert np.log10(LEARNING_RATES[-1] / LEARNING_RATES[0]) == pytest.approx(1.5, abs=0.02)


def test_table_shows_every_result():
    lines = table(SUMMARY)
    rows = [line for line in lines if re.match(r"\| (?!method|-)", line)]
    assert len(rows) == len(METHODS) * len(LEARNING_RATES)
    assert rows[0] == "| InfoPO (β 1) | 1.0e-05 | 0.800 [0.700, 0.900] | +0.10 | -2.00 | 0.00 ± 0.02 | 9 |"
    assert {row.count("|") for row in rows} == {lines[2].count("|")}


def test_titles_tell_the_methods_apart():
    assert [title(name) for name in METHODS] == [
        "InfoPO (β 1)", "DPO (β 0.1)", "DPO (β 1)", "DPO (β 0.1, NLL 1)", "SFT on chosen",
    ]  # fmt: skip


def test_every_method_has_a_style_of_its_own():
    assert figures.STYLES.keys() == METHODS.keys()
    for column in range(3):
        assert len({style[column] for style in figures.STYLES.values()}) == len(METHODS)


def test_pictures_hold_every_result_and_accept_a_method_that_collapsed(tmp_path: Path):
    summary = json.loads(json.dumps(SUMMARY))
    summary["methods"]["dpo_beta0.1"][2] |= {"kl_from_reference": 60.0, "chosen_logp_change": -40.0, "accuracy": 0.0,
                                              "accuracy_ci95": [0.0, 0.02]}  # fmt: skip
    paths = draw_demo(summary, tmp_path)
    assert [path.name for path in paths] == ["demo.png", "demo.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in paths[1].read_text(encoding="utf-8")


# --- a world in miniature ---


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    patch = pytest.MonkeyPatch()
    for name, value in (
        ("TRAIN_PAIRS", 32),
        ("HELD_OUT_PAIRS", 8),
        ("EVALUATION_PROBLEMS", 16),
        ("KL_SAMPLES", 16),
        ("LEARNING_RATES", (1e-3, 2e-3)),
    ):
        patch.setattr(workflow, name, value)
    setting = Setting(tmp_path_factory.mktemp("demo"), "graded", 0)
    workflow._sample_pairs(setting)
    yield setting
    workflow._world.cache_clear()
    patch.undo()


def test_pairs_are_written_as_they_are_told_and_none_is_both_trained_on_and_held_out(small: Setting):
    said = workflow._sample_pairs(small)
    parts = [
        small.pairs_path(part).read_text(encoding="utf-8").splitlines() for part in ("train", "held_out")
    ]
    assert [len(lines) for lines in parts] == [32, 8]
    assert said.startswith("40 graded pairs from ")
    asked = [json.loads(line)["prompt"][0]["content"] for lines in parts for line in lines]
    assert len(set(asked)) == 40


def test_kl_of_the_reference_from_itself_is_exactly_zero(small: Setting):
    world = workflow._world(small)
    log_ratios = workflow._log_ratios_of_samples(world, world.reference, seed=0)
    assert log_ratios.shape == (16,)
    assert (log_ratios == 0).all()


def test_changes_of_the_reference_from_itself_are_zero(small: Setting, tmp_path: Path):
    world = workflow._world(small)
    result = workflow._measure(world, world.reference, 1e-5, 1.0, 0.0, str(tmp_path / "run"), 0)
    assert (result.chosen_logp_change, result.rejected_logp_change, result.kl_from_reference) == (0, 0, 0)
    assert result.n == 16


def test_kl_of_another_policy_is_estimated_from_its_own_samples(small: Setting):
    world = workflow._world(small)
    policy = workflow.load_policy(workflow.LAB_POLICY)
    with torch.no_grad():  # the law of the reference at temperature 2
        policy.lm_head.weight.copy_(policy.lm_head.weight / 2)
    kl = workflow._log_ratios_of_samples(world, policy, seed=0)
    back = workflow._log_ratios_of_samples(replace(world, reference=policy), world.reference, seed=0)
    assert kl.mean() > 3 * kl.std(ddof=1) / 4
    assert back.mean() > 0


def test_the_runs_are_those_of_the_sweep_that_is_written(small: Setting):
    made = workflow.recipes(small)
    assert len(made) == len(METHODS) * 2
    for (method, rate), recipe in made.items():
        objective, parameters = METHODS[method]
        (term,) = recipe.objective
        assert (term.name, recipe.train["learning_rate"]) == (objective, rate)
        assert parameters.items() <= term.parameters.items()
        assert recipe.sweep is None
        assert recipe.output_dir == str(small.run_dir(method, rate))


@pytest.mark.long
def test_sweep_trains_the_same_models_from_the_demos_file(small: Setting):
    small.sweep_path.write_text(to_yaml(workflow.sweep_of(small)), encoding="utf-8")
    workflow._run(small, "dpo_nll", 2e-3)
    folder = sweep(small.sweep_path, ["sweep.objective=[{name: dpo, beta: 0.1, nll_weight: 1}]"])
    (run,) = folder.glob("*0.002")
    weights = [load_file(each / "model.safetensors") for each in (run, small.run_dir("dpo_nll", 2e-3))]
    assert_close(*weights, rtol=0, atol=0)


@pytest.mark.long
def test_a_run_is_made_once_and_made_again_where_it_was_cut_short(
    small: Setting, monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []
    build = workflow.build_trainer_on

    def counted(recipe: Any, *rest: Any) -> Any:
        calls.append(recipe.output_dir)
        return build(recipe, *rest)

    monkeypatch.setattr(workflow, "build_trainer_on", counted)
    first = workflow._run(small, "infopo", 1e-3)
    run_dir = small.run_dir("infopo", 1e-3)
    assert first.run == str(run_dir)
    assert first.beta == 1.0
    assert first.kl_from_reference != 0
    assert asdict(first).keys() == RESULT.keys()
    assert AutoModelForCausalLM.from_pretrained(run_dir).num_parameters() > 0
    assert workflow._run(small, "infopo", 1e-3) == first
    assert len(calls) == 1
    assert list(small.directory.glob("reference/*/*.safetensors"))  # beside the runs that share it,
    assert not Path(os.environ["INFOPO_CACHE"]).exists()  # and not in the user's cache

    def again() -> dict[str, Any]:
        return {**asdict(workflow._run(small, "infopo", 1e-3)), "seconds": first.seconds}

    (run_dir / "eval.json").unlink()  # killed before its end
    assert again() == asdict(first)
    (run_dir / "recipe.yaml").write_text("another: recipe\n")
    assert again() == asdict(first)
    shutil.rmtree(run_dir / "evaluation")  # of a version that kept no marks
    assert again() == asdict(first)
    for path in run_dir.iterdir():  # killed before it wrote anything
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert again() == asdict(first)
    (run_dir / "eval.json").write_text('{"accuracy": 1}')  # of another version
    assert again() == asdict(first)
    assert len(calls) == 6
    steps = [record["step"] for record in read_run(run_dir).metrics]
    assert steps == sorted(steps)


@pytest.mark.long
def test_a_verdict_says_which_run_it_is_of(
    small: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(workflow, "LEARNING_RATES", (1e-1,))
    workflow._run(small, "dpo_beta0.1", 1e-1)
    verdicts = [line for line in capsys.readouterr().out.splitlines() if "verdict: " in line]
    assert verdicts
    assert all(line.startswith("DPO (β 0.1), lr 1.0e-01: verdict: ") for line in verdicts)


def test_runs_are_compared_with_the_start_problem_by_problem(small: Setting, tmp_path: Path):
    """The start against itself differs nowhere. A policy that is worse loses what it gets wrong, and nothing else."""
    world = workflow._world(small)
    policy = workflow.load_policy(workflow.LAB_POLICY)
    with torch.no_grad():
        policy.lm_head.weight.mul_(-1)
    folders = [tmp_path / name for name in ("start", "same", "worse")]
    scores = [
        workflow.solve(model, world.tokenizer, world.problems, folder, folder.name)
        for model, folder in zip((world.reference, world.reference, policy), folders)
    ]
    assert scores[0] == workflow.AccuracyResult(
        **vars(accuracy(world.reference, world.tokenizer, world.problems))
    )
    same, worse = workflow.against_start(folders[0], folders[1:])
    assert (same["difference"], same["wins"], same["losses"], same["p_holm"]) == (0, 0, 0, 1)
    assert (worse["wins"], worse["losses"]) == (0, scores[0].correct)
    assert worse["difference"] == -scores[0].accuracy
    assert worse["ci95"][0] <= worse["difference"] <= worse["ci95"][1]
    lines = workflow.comparison_lines([same, worse], ["same", "worse"])
    assert lines[-1].startswith(f"| worse | {-scores[0].accuracy:+.3f} [")
    assert lines[-1].endswith(f"| 0 / {scores[0].correct} | {worse['smallest']:.3f} |")


@pytest.mark.long
def test_a_worker_does_not_warn_of_runs_that_compute_the_same_reference():
    lock = multiprocessing.get_context("spawn").RLock()
    with WorkerPool(1, "spawn", workflow._start_worker, (lock,)) as pool:
        warns = pool.submit(reference_pass.logger.isEnabledFor, logging.WARNING).result()
    assert reference_pass.logger.isEnabledFor(logging.WARNING)
    assert not warns


# --- the whole of it ---


FIELDS = {"learning_rate", "beta", "accuracy", "accuracy_ci95", "n", "chosen_logp_change", "rejected_logp_change",
          "kl_from_reference", "kl_standard_error", "seconds", "run"}  # fmt: skip


def start_demo(output: Path) -> subprocess.Popen[bytes]:
    """Prints into `log` beside the output folder; a pipe that nobody reads would fill up."""
    command = [sys.executable, "-m", "infopo", "demo", "--output", str(output), "--labels", "graded"]
    with log_of(output).open("wb") as log, interruptible():
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def log_of(output: Path) -> Path:
    return output.with_suffix(".log")


def wait_for_runs(process: subprocess.Popen[bytes], output: Path, count: int) -> None:
    while finished_runs(output) < count:
        assert process.poll() is None, log_of(output).read_text(encoding="utf-8")
        time.sleep(0.5)


def finished_runs(output: Path) -> int:
    return len(list(output.glob("runs/*/*/eval.json")))


def without_times(summary: dict[str, Any]) -> Any:
    return {"start": summary["start"], "methods": summary["methods"], "settings": summary["settings"]}


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_demo_survives_a_kill_and_keeps_what_it_has(tmp_path: Path):
    output = tmp_path / "demo"
    process = start_demo(output)
    wait_for_runs(process, output, 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.read_bytes() for path in output.glob("runs/*/*/eval.json")}

    process = start_demo(output)
    assert process.wait() == 0, log_of(output).read_text(encoding="utf-8")
    assert {path: path.read_bytes() for path in kept} == kept
    summary = json.loads((output / "summary.json").read_text())

    assert list(summary["methods"]) == ["infopo", "dpo_beta0.1", "dpo_beta1", "dpo_nll", "sft"]
    assert {"accuracy", "accuracy_ci95", "n"} <= summary["start"].keys()
    for name, results in summary["methods"].items():
        assert [result["learning_rate"] for result in results] == list(LEARNING_RATES)
        for result in results:
            assert result.keys() == FIELDS
            assert result["beta"] == METHODS[name][1].get("beta")
            low, high = result["accuracy_ci95"]
            assert 0 <= low <= result["accuracy"] <= high <= 1
            assert result["n"] == summary["start"]["n"] == 1000
            assert np.isfinite([result["chosen_logp_change"], result["rejected_logp_change"]]).all()
            assert result["kl_from_reference"] > -4 * result["kl_standard_error"]
            assert AutoModelForCausalLM.from_pretrained(result["run"]).num_parameters() > 300_000
    assert (output / "demo.png").stat().st_size > 10_000
    assert (output / "demo.svg").stat().st_size > 10_000
    page = output / "report.html"
    assert page.stat().st_size > 1_000_000
    assert (
        len(read_report(list(output.glob("runs/*/*"))).plots[0].series) == 30
    )  # chosen and rejected, same axes
    printed = log_of(output).read_text(encoding="utf-8")
    assert f"open {page.resolve()} in a browser" in printed
    assert "being computed by another run" not in printed
    for line in table(summary):
        assert line in printed
    assert len(summary["against_start"]) == 15
    for row, result in zip(
        summary["against_start"], (r for each in summary["methods"].values() for r in each)
    ):
        assert row["difference"] == pytest.approx(result["accuracy"] - summary["start"]["accuracy"])
        assert f"| {row['wins']} / {row['losses']} |" in printed

    process = start_demo(output)
    assert process.wait() == 0, log_of(output).read_text(encoding="utf-8")
    assert without_times(json.loads((output / "summary.json").read_text())) == without_times(summary)


@pytest.mark.long
def test_ctrl_c_ends_the_demo_at_once(tmp_path: Path):
    output = tmp_path / "demo"
    process = start_demo(output)
    wait_for_runs(process, output, 1)
    os.killpg(process.pid, signal.SIGINT)
    try:
        assert process.wait(timeout=30) == 130
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in log_of(output).read_text(encoding="utf-8")
    assert finished_runs(output) < 5


@pytest.mark.long
def test_verified_pairs_are_sampled_by_the_workflow_behind_pairs(tmp_path: Path):
    rows, said = lab_pairs("verified", 8, 3, tmp_path)
    assert len(rows) == 8
    assert said.startswith("8 verified pairs")
    own = {problem.question for problem in make_problems(216, 3, "preference")}
    for row in rows:
        problem = solve(row["prompt"][-1]["content"])
        assert problem.question in own  # the seed draws another world
        assert verify(problem, row["chosen"][0]["content"])
        assert not verify(problem, row["rejected"][0]["content"])
    assert lab_pairs("verified", 8, 3, tmp_path)[0] == rows
