"""A run that was stopped and resumed is the run that was never stopped, and a checkpoint is whole or not there."""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from infopo import checkpoints, run_state
from infopo.errors import CheckpointError, RecipeError
from infopo.hashing import hash_weights
from infopo.lab import policy_path
from infopo.lab.preferences import make_pairs
from infopo.models import load_policy
from infopo.run_files import RunFiles
from infopo.workflows.train import train
from saved_runs import FILES, Killed, tiny_trainer

STEPS, SAVE_STEPS, ROWS = 13, 3, 26  # 7 steps an epoch, the last of 2 rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy = AutoModelForCausalLM.from_pretrained(policy_path(), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    rows = make_pairs(policy, tokenizer, labels="graded", n=ROWS, seed=5).rows
    folder = tmp_path_factory.mktemp("data")
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "other.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[1:]))
    return folder


def write_recipe(path: Path, data: Path, **changes: Any) -> Path:
    recipe: dict[str, Any] = {
        "model": {"name_or_path": "lab:policy"},
        "data": {
            "path": str(data / "pairs.jsonl"),
            "eval_path": str(data / "other.jsonl"),
            "max_length": 128,
        },
        "objective": {"name": "infopo"},
        "reference": {"sides": "both"},
        "train": {
            "max_steps": STEPS,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant_with_warmup",  # a step too many at the end would change the weights
            "warmup_steps": 4,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 16,
            "activation_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": SAVE_STEPS,
            "eval_strategy": "steps",
            "eval_steps": 6,
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "seed": 3,
            "probe_size": 6,
            "probe_steps": 5,
            "gradient_size": 1,
            "gradient_steps": 9,
            "anchor_size": 2,
            "anchor_tokens": 8,
        },
    }
    for place, value in changes.items():
        section, _, key = place.partition("__")
        if key:
            recipe[section][key] = value
        else:
            recipe[section] = value
    path.write_text(yaml.safe_dump(recipe))
    return path


def records(run_dir: Path) -> list[dict[str, Any]]:
    """What was logged of steps and evaluations; how long it took, and the summary of a part of the run, left out."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return [
        {k: v for k, v in line.items() if k not in clock} for line in lines if "train_runtime" not in line
    ]


def final_weights(run_dir: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in run_dir.glob("*.safetensors")
    }


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it with a step to end every later run after it, as a kill would; with None to let runs finish."""
    at: list[int | None] = [None]

    plain = RunFiles.on_log

    def on_log(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        plain(self, args, state, control, **kwargs)  # the file then holds more than the checkpoint
        if state.global_step == at[0]:
            raise Killed

    monkeypatch.setattr(RunFiles, "on_log", on_log)
    return lambda step: at.__setitem__(0, step)


VARIANTS: dict[str, dict[str, Any]] = {
    "infopo": {},
    "mine, whose average goes on": {
        "objective": {"name": "mine", "rate": 0.05},
        "train__learning_rate": 1e-3,
    },
    "beta_dpo, whose mean and deviation go on": {
        "objective": {"name": "beta_dpo", "rate": 0.05},
        "train__learning_rate": 1e-3,
    },
    "dpo, grouped by length, accumulated": {
        "objective": {"name": "dpo"},
        "train__train_sampling_strategy": "group_by_length",
        "train__per_device_train_batch_size": 2,
        "train__gradient_accumulation_steps": 2,
    },
    "adapter, live reference": {
        "model": {"name_or_path": "lab:policy", "adapter": {"r": 4}},
        "reference": {"source": "live", "sides": "both"},
        "train__learning_rate": 1e-3,
    },
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Any:
    """Run directories of the variants, each trained once in one go."""
    done: dict[str, Path] = {}

    def run(variant: str) -> Path:
        if variant not in done:
            folder = tmp_path_factory.mktemp("whole")
            recipe = write_recipe(folder / "recipe.yaml", data, **VARIANTS[variant])
            done[variant] = train(recipe, [f"output_dir={folder / 'run'}"])
        return done[variant]

    return run


@pytest.mark.parametrize(
    ("variant", "stops"),
    [
        ("infopo", [4]),
        pytest.param(
            "infopo", [7, 11], marks=pytest.mark.long
        ),  # at the end of the first epoch, then in the second
        pytest.param(
            "infopo", [2, 13], marks=pytest.mark.long
        ),  # before any checkpoint, then after the last step
        pytest.param("mine, whose average goes on", [7], marks=pytest.mark.long),
        ("beta_dpo, whose mean and deviation go on", [7]),
        pytest.param("dpo, grouped by length, accumulated", [11], marks=pytest.mark.long),
        ("adapter, live reference", [10]),
    ],
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    tmp_path: Path, data: Path, uninterrupted: Any, stop: Any, variant: str, stops: list[int]
) -> None:
    whole = uninterrupted(variant)
    recipe = write_recipe(tmp_path / "recipe.yaml", data, **VARIANTS[variant])
    run_dir = tmp_path / "run"
    overrides = [f"output_dir={run_dir}", "train.resume_from_checkpoint=true"]
    for step in stops:
        stop(step)
        with pytest.raises(Killed):
            train(recipe, overrides)
        assert records(run_dir)[-1]["step"] == step
    stop(None)
    train(recipe, overrides)
    assert final_weights(run_dir) == final_weights(whole)
    assert len(final_weights(run_dir)) == 1
    assert records(run_dir) == records(whole)
    # The reference is the policy before training, not the half-trained one.
    environments = [json.loads((d / "environment.json").read_text()) for d in (run_dir, whole)]
    assert environments[0]["reference"] == environments[1]["reference"]
    if "adapter" not in variant:
        assert environments[0]["reference"]["hash"] == hash_weights(load_policy("lab:policy")).whole


def test_resuming_a_finished_run_trains_no_further(tmp_path: Path, data: Path, uninterrupted: Any) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted("infopo"), run_dir)
    before = final_weights(run_dir)
    recipe = write_recipe(tmp_path / "recipe.yaml", data)
    train(recipe, [f"output_dir={run_dir}", "train.resume_from_checkpoint=true"])
    assert final_weights(run_dir) == before
    assert records(run_dir) == records(uninterrupted("infopo"))


def test_a_moving_average_comes_back_digit_for_digit(tmp_path: Path) -> None:
    averages = [0.1 + 0.2, math.nan, -1e-300, [0.1 + 0.2, 1e-17, 7.0], [math.nan] * 3]
    checkpoints.write_identity(tmp_path, {"objective": ["a", "b", "c", "d", "e"]}, averages)
    back = checkpoints.read_averages(tmp_path)
    assert [back[i] for i in (0, 2, 3)] == [averages[i] for i in (0, 2, 3)]
    assert math.isnan(back[1])
    assert math.isnan(back[4])


@pytest.mark.parametrize("kept", [None, [], [0.5, 0.5], ["0.5"], [[0.5, "1"]], {"0": 0.5}])
def test_a_checkpoint_without_its_moving_average_is_refused_by_name(tmp_path: Path, kept: Any) -> None:
    identity = {"objective": [["mine", {}, 1.0]], checkpoints.AVERAGES: kept}
    (tmp_path / run_state.IDENTITY).write_text(json.dumps(identity))
    with pytest.raises(CheckpointError, match=f"{run_state.IDENTITY}.*{checkpoints.AVERAGES}"):
        checkpoints.read_averages(tmp_path)


# ---- what may not be resumed ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run directory with checkpoint-3 of 3 steps."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = write_recipe(folder / "recipe.yaml", data, train__max_steps=3)
    return train(recipe, [f"output_dir={folder / 'run'}"])


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def other_policy(folder: Path) -> str:
    model = load_policy("lab:policy")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.001)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy_path()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("what", ["objective", "parameter", "data", "policy", "reference", "sides"])
def test_a_checkpoint_of_another_run_is_refused_by_name_and_the_run_is_left_as_it_was(
    tmp_path: Path, data: Path, copied: Path, what: str
) -> None:
    changes: dict[str, Any] = {
        "objective": {"objective": {"name": "dpo"}},
        "parameter": {"objective": {"name": "infopo", "beta": 0.5}},
        "data": {"data__path": str(data / "other.jsonl")},
        "policy": {"model": {"name_or_path": other_policy(tmp_path / "policy")}},
        "reference": {"reference": {"source": other_policy(tmp_path / "policy"), "sides": "both"}},
        "sides": {"reference": {"sides": "needed"}},
    }[what]
    named = {"parameter": "objective", "policy": "reference", "sides": "reference_sides"}.get(what, what)
    recipe = write_recipe(tmp_path / "recipe.yaml", data, **changes)
    before = {path: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    with pytest.raises(
        CheckpointError, match=rf"checkpoint-3: was made with another {named} \(then .*, now .*\)"
    ):
        train(recipe, [f"output_dir={copied}", "train.resume_from_checkpoint=true"])
    assert {path: path.read_bytes() for path in copied.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"reference": ', "is damaged"),
        ("[]", "is damaged"),
        ("\udcff", "is damaged"),
        (None, "has no infopo_state"),
    ],
    ids=["cut short", "no object", "no text", "missing"],
)
def test_a_damaged_identity_is_refused(
    tmp_path: Path, data: Path, copied: Path, content: str | None, message: str
) -> None:
    path = copied / "checkpoint-3" / run_state.IDENTITY
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    recipe = write_recipe(tmp_path / "recipe.yaml", data, train__max_steps=6)
    with pytest.raises(CheckpointError, match=message):
        train(recipe, [f"output_dir={copied}", "train.resume_from_checkpoint=true"])


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, data: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", data)
    with pytest.raises(
        CheckpointError, match=r"nowhere: is no checkpoint \(it holds no trainer_state.json\)"
    ):
        train(
            recipe, [f"output_dir={tmp_path / 'run'}", f"train.resume_from_checkpoint={tmp_path / 'nowhere'}"]
        )
    with pytest.raises(CheckpointError, match="there is no checkpoint to resume from"):
        run_state.find(True, str(tmp_path / "run"))


def test_with_nothing_to_resume_from_a_run_starts_and_says_so(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", data, train__max_steps=1, train__save_strategy="no")
    train(recipe, [f"output_dir={tmp_path / 'run'}", "train.resume_from_checkpoint=true"])
    assert f"{tmp_path / 'run'}: no checkpoint yet, starting afresh\n" in capsys.readouterr().out
    assert next(record["step"] for record in records(tmp_path / "run") if "loss" in record) == 1


@pytest.mark.parametrize("left", ["model.safetensors", "checkpoint-3"])
def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path, data: Path, copied: Path, left: str) -> None:
    for path in list(copied.iterdir()):
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    recipe = write_recipe(tmp_path / "recipe.yaml", data)
    with pytest.raises(
        RecipeError, match=r"already holds a run. Continue it with train.resume_from_checkpoint=true"
    ):
        train(recipe, [f"output_dir={copied}"])
    assert [path.name for path in copied.iterdir()] == [left]


def test_a_run_that_left_nothing_but_metrics_is_not_in_the_way(
    tmp_path: Path, data: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in list(copied.iterdir()):
        if path.name != "metrics.jsonl":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = (copied / "metrics.jsonl").read_bytes()
    recipe = write_recipe(tmp_path / "recipe.yaml", data, train__max_steps=1)
    train(recipe, [f"output_dir={copied}"])
    assert (copied / "metrics.before-1.jsonl").read_bytes() == before
    assert "its metrics are kept as metrics.before-1.jsonl" in capsys.readouterr().out
    assert [record["step"] for record in records(copied) if "loss" in record] == [1]


# ---- settings of a resumed run -------------------------------------------------------------------------------------


def recipe_of(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train__seed": 4}, r"seed \(then 3, now 4\)"),
        ({"train__data_seed": 4}, r"data_seed \(then None, now 4\)"),
        ({"train__per_device_train_batch_size": 2}, r"rows of an optimizer step \(then 4, now 2\)"),
        ({"train__gradient_accumulation_steps": 2}, r"rows of an optimizer step \(then 4, now 8\)"),
        ({"train__optim": "sgd"}, r"optim \(then adamw_torch\w*, now sgd\)"),
        ({"train__weight_decay": 0.1}, r"weight_decay \(then 0.0, now 0.1\)"),
        ({"train__adam_beta2": 0.95}, r"adam_beta2 \(then 0.999, now 0.95\)"),
        ({"train__train_sampling_strategy": "sequential"}, r"train_sampling_strategy \(then random, now seq"),
        (
            {"train__max_steps": 2},
            r"has 3 steps behind it, but only 2 are asked for \(max_steps \(then 3, now 2",
        ),
    ],
)
def test_settings_that_a_resumed_run_cannot_change_are_refused_and_the_run_is_left_as_it_was(
    tmp_path: Path, data: Path, copied: Path, changes: dict[str, Any], named: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", data, **{"train__max_steps": 6, **changes})
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=rf"checkpoint-3: .*{named}"):
        train(recipe, [f"output_dir={copied}", "train.resume_from_checkpoint=true"])
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_the_same_rows_a_step_by_another_split_are_the_same_run(
    tmp_path: Path, data: Path, copied: Path, uninterrupted: Any
) -> None:
    changes = {"train__per_device_train_batch_size": 2, "train__gradient_accumulation_steps": 2}
    recipe = write_recipe(tmp_path / "recipe.yaml", data, **changes)
    train(recipe, [f"output_dir={copied}", "train.resume_from_checkpoint=true"])
    ours, whole = (
        [[r["step"], r["loss"]] for r in records(folder) if "loss" in r]
        for folder in (copied, uninterrupted("infopo"))
    )
    assert [step for step, _ in ours] == [step for step, _ in whole]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in whole], rel=1e-4)


def test_another_learning_rate_takes_effect_and_both_recipes_are_kept(
    tmp_path: Path, data: Path, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = (copied / "recipe.yaml").read_text()
    recipe = write_recipe(tmp_path / "recipe.yaml", data, train__max_steps=6, train__learning_rate=5e-5)
    train(recipe, [f"output_dir={copied}", "train.resume_from_checkpoint=true"])
    assert "from step 4 on, other settings hold: learning_rate (then 0.0001, now 5e-05)" in caplog.text
    assert "max_steps (then 3, now 6)" in caplog.text
    # A warm-up of 4 steps, logged as the rate of the step that follows.
    rates = {record["step"]: record["learning_rate"] for record in records(copied) if "loss" in record}
    assert [rates[step] for step in range(1, 4)] == pytest.approx([0, 2.5e-5, 5e-5])
    assert [rates[step] for step in range(4, 7)] == pytest.approx([3.75e-5, 5e-5, 5e-5])
    assert (copied / "recipe.yaml").read_text() == first
    assert recipe_of(copied / "recipe-from-step-4.yaml")["train"]["learning_rate"] == 5e-5
    (resumed,) = json.loads((copied / "environment.json").read_text())["resumed"]
    assert resumed["from_step"] == 4
    # What is logged would be the same if the optimizer went on with the old rate.
    optimizer = torch.load(copied / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert {group["initial_lr"] for group in optimizer["param_groups"]} == {5e-5}


def test_resuming_with_the_same_recipe_writes_no_other(tmp_path: Path, data: Path, copied: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", data, train__max_steps=3)
    before = {name: (copied / name).read_bytes() for name in ("recipe.yaml", "environment.json")}
    train(recipe, [f"output_dir={copied}", "train.resume_from_checkpoint=true"])
    assert not list(copied.glob("recipe-*"))
    assert {name: (copied / name).read_bytes() for name in before} == before


def test_a_trainer_does_not_write_where_another_process_trains(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from infopo.run_state import in_use\n"
        "with in_use(sys.argv[1]):\n"
        "    print(flush=True)\n"
        "    time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    trainer = tiny_trainer(tmp_path)
    try:
        for write in (trainer.train, trainer.save_final_model):
            with pytest.raises(RecipeError, match=rf"is in use by another run \(process {holder.pid} on"):
                write()
        assert [path.name for path in tmp_path.iterdir()] == [run_state.LOCK]
        tiny_trainer(tmp_path, save_strategy="no").train()  # which writes nothing
    finally:
        holder.kill()
        holder.communicate()
    trainer.train()


def test_half_a_checkpoint_is_refused(tmp_path: Path, data: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", data, train__save_only_model=True)
    overrides = [f"output_dir={tmp_path / 'run'}"]
    train(recipe, [*overrides, "train.max_steps=3"])
    with pytest.raises(CheckpointError, match="optimizer and schedule were not saved"):
        train(recipe, [*overrides, "train.resume_from_checkpoint=true"])


def test_what_a_killed_save_left_is_ignored_and_cleaned(tmp_path: Path, data: Path, copied: Path) -> None:
    half = copied / run_state.STAGING / "checkpoint-6"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    (half / "model-00001-of-00002.safetensors").write_bytes(b"of another save")
    assert run_state.last(str(copied)) == str(copied / "checkpoint-3")
    recipe = write_recipe(tmp_path / "recipe.yaml", data, train__max_steps=6)
    train(recipe, [f"output_dir={copied}", "train.resume_from_checkpoint=true"])
    assert sorted(p.name for p in copied.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert [p.name for p in (copied / "checkpoint-6").glob("*.safetensors")] == ["model.safetensors"]
    assert not list(copied.glob(".*"))


# ---- real kills ----------------------------------------------------------------------------------------------------


def stop_in_a_save(process: subprocess.Popen[bytes], staging: Path) -> None:
    """Leave the process stopped while it writes a checkpoint, or ended if it writes none any more."""
    while process.poll() is None:
        if staging.exists():
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if staging.exists():
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.0005)


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_again_and_again_ends_like_the_one_that_was_not(
    tmp_path: Path, data: Path, seed: int
) -> None:
    """SIGKILL at a random moment, then within a save, in turn; every step saves."""
    changes = {"train__save_steps": 1, "train__max_steps": 40, "train__save_total_limit": 2}
    recipe = write_recipe(tmp_path / "recipe.yaml", data, **changes)
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def start(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "infopo", "train", str(recipe), f"output_dir={folder}"]
        resume = "train.resume_from_checkpoint=true"
        log = (tmp_path / f"{folder.name}.log").open("ab")
        return subprocess.Popen([*command, resume], env=environment, stdout=log, stderr=log)

    assert start(whole).wait(timeout=300) == 0
    rng, kills, mid_save = random.Random(seed), 0, 0
    for _ in range(80):  # on a slow machine a start may get one step on
        process = start(run_dir)
        begin = run_state.last(str(run_dir))
        deadline = time.monotonic() + 120
        while process.poll() is None and run_state.last(str(run_dir)) == begin:  # it has begun to train
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if kills % 2:
            stop_in_a_save(process, run_dir / run_state.STAGING)
        else:
            time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, (tmp_path / "run.log").read_text()[-3000:]
        kills += 1
        mid_save += (run_dir / run_state.STAGING).exists()
        for folder in run_dir.glob("checkpoint-*"):
            if str(folder) == run_state.last(str(run_dir)):
                assert {"model.safetensors", "optimizer.pt", *FILES} <= {
                    path.name for path in folder.iterdir()
                }
    assert process.returncode == 0
    assert kills >= 3
    assert mid_save >= kills // 2
    assert final_weights(run_dir) == final_weights(whole)
    assert records(run_dir) == records(whole)
    assert [r["step"] for r in records(run_dir) if "loss" in r] == list(range(1, 41))


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_two_ranks_resume_in_the_order_of_rows_that_they_left(tmp_path: Path, strategy: str) -> None:
    """In the second epoch: no `set_epoch` of accelerate reaches a sampler beneath a rank's share and skipped rows."""
    script = Path(__file__).with_name("two_ranks_resume.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]

    def run(folder: str, stop: int) -> list[dict[str, Any]]:
        subprocess.run([*command, str(tmp_path / folder), strategy, str(stop)], check=True, timeout=300)
        return [json.loads((tmp_path / folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]

    whole = run("whole", 99)
    assert whole[0]["weights"] == whole[1]["weights"]
    run("parts", 6)
    parts = run("parts", 99)
    assert parts == json.loads(json.dumps(whole).replace("/whole/", "/parts/"))
    best = whole[0]["best"]
    assert whole[1]["best"] == best
    assert Path(best).parent == tmp_path / "whole"
