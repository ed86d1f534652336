"""The command line from outside: what `check` and `train` print, write, and leave alone."""

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from infopo.build import build_policy
from infopo.cli import main
from infopo.commands.shared import importing
from infopo.config import load_recipe
from infopo.losses.catalog import OBJECTIVES
from infopo.run_files import RunFiles
from infopo.runs import read_run
from infopo.workflows import train as train_workflow

ROOT = Path(__file__).resolve().parents[1]
LAB = str(ROOT / "src" / "infopo" / "recipes" / "lab.yaml")
RECIPE = """\
model: {name_or_path: lab:policy}
data: {path: pairs.jsonl, eval_path: held_out.jsonl, max_length: 64}
reference: {sides: both}
train:
  learning_rate: 1e-3
  num_train_epochs: 2
  per_device_train_batch_size: 4
  logging_steps: 1
  save_strategy: epoch
  eval_strategy: epoch
  activation_checkpointing: false
  probe_size: 4
  anchor_size: 2
  anchor_tokens: 8
  gradient_size: 1
output_dir: run
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a recipe, eight pairs to train on and four to evaluate on; temporary files go beside it."""
    folder, temporary = tmp_path / "work", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for name, numbers in (("pairs.jsonl", range(8)), ("held_out.jsonl", range(20, 24))):
        rows = [{"prompt": f"{i}+1=?", "chosen": f"{i}+1={i + 1}", "rejected": f"{i}+1={i}"} for i in numbers]
        Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


def infopo(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "infopo", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, check=False
    )


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- starting ---


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_load_no_torch(argument: str, tmp_path: Path):
    code = (
        "import sys\nfrom infopo.cli import main\n"
        f"try:\n    main([{argument!r}])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: infopo" if argument == "--help" else "infopo 0.")


def test_garbage_is_collected_after_imports_again_also_if_they_fail():
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyboardInterrupt), importing():
        raise KeyboardInterrupt
    assert gc.isenabled()


@pytest.mark.parametrize("command", ["demo", "train", "check", "reference"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: infopo {command}")


def test_infopo_alone_prints_its_help(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    assert "compute the reference log-probs" in capsys.readouterr().err


def test_the_help_of_a_recipe_says_where_keys_stand_and_names_objectives(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert "infopo docs recipes" in printed
    assert all(name in printed for name in OBJECTIVES)


def test_overrides_with_dashes_get_a_hint(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["train", "recipe.yaml", "--train.learning_rate=1e-5"])
    assert "overrides are written without dashes: train.learning_rate=1e-5" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["check", "r.yaml", "--fast"]])
def test_a_command_line_that_is_wrong_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: infopo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("save", "said"),
    [
        ("steps", "interrupted: go on from run/checkpoint-1 with train.resume_from_checkpoint=true\n"),
        ("no", "interrupted: no checkpoint had been saved to run; the same command starts afresh\n"),
    ],
)
def test_ctrl_c_exits_with_130_and_says_how_to_go_on(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], save: str, said: str
):
    plain = RunFiles.on_log

    def interrupt(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        plain(self, args, state, *rest, **more)
        if state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFiles, "on_log", interrupt)
    assert main(["train", "recipe.yaml", f"train.save_strategy={save}", "train.save_steps=1"]) == 130
    assert capsys.readouterr().err.endswith(said)


def test_a_bug_of_ours_is_not_dressed_up_as_a_mistake_of_the_user(
    work: Path, monkeypatch: pytest.MonkeyPatch
):
    def bug(*_: Any) -> None:
        raise ValueError("ours")

    monkeypatch.setattr(train_workflow, "train", bug)
    with pytest.raises(ValueError, match="ours"):
        main(["train", "recipe.yaml"])


# --- check ---


def test_check_prints_counts_lengths_examples_and_a_loss_and_leaves_nothing(
    work: Path, capsys: pytest.CaptureFixture[str]
):
    before = sorted(work.iterdir())
    assert main(["check", "recipe.yaml"]) == 0
    printed = capsys.readouterr().out.splitlines()
    for line in (
        "recipe: recipe.yaml is valid",
        "pairs.jsonl: 8 rows, 8 used, 0 skipped",
        "held_out.jsonl: 4 rows, 4 used, 0 skipped",
        "tokens of examples     8      18      18      18      18      18",
        "pairs.jsonl:1",
        "  prompt        6  <|bos|>0+1=?",
        "  chosen        6  0+1=1<|end|>",
        "  rejected      6  0+1=0<|end|>",
        "objective: InfoPO (beta=1.0, length_normalized=False, cap=5.0)",
        "check passed",
    ):
        assert line in printed
    assert any(line.startswith("one step: loss ") for line in printed)
    assert sorted(work.iterdir()) == before
    assert list(Path(tempfile.gettempdir()).iterdir()) == []


def test_check_says_the_loss_that_the_first_step_of_train_has(work: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", "recipe.yaml", "train.per_device_train_batch_size=8"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("one step")]
    assert main(["train", "recipe.yaml", "train.per_device_train_batch_size=8"]) == 0
    _, losses = read_run("run").series("loss")
    assert line.startswith(f"one step: loss {losses[0]:.4f},")


def test_check_notes_a_run_that_is_in_the_way_and_leaves_it_alone(
    work: Path, capsys: pytest.CaptureFixture[str]
):
    Path("run").mkdir()
    Path("run/model.safetensors").touch()
    assert main(["check", "recipe.yaml"]) == 0
    assert "note: run already holds a run" in capsys.readouterr().out
    assert [path.name for path in Path("run").iterdir()] == ["model.safetensors"]


def test_skipped_rows_are_counted_by_reason(work: Path, capsys: pytest.CaptureFixture[str]):
    with Path("pairs.jsonl").open("a") as file:
        for row in (
            {"prompt": "a", "chosen": "", "rejected": "b"},
            {"prompt": "a"},
            {"prompt": "a", "chosen": "", "rejected": "c"},
        ):
            file.write(f"{json.dumps(row)}\n")
    assert main(["check", "recipe.yaml", "data.on_bad_row=skip"]) == 0
    printed = capsys.readouterr().out
    assert "pairs.jsonl: 11 rows, 8 used, 3 skipped\n" in printed
    assert "  skipped 2: empty chosen (first: pairs.jsonl:9: expected a chosen response" in printed
    assert "  skipped 1: missing column (first: pairs.jsonl:10: expected a column 'chosen'" in printed


def test_a_terminal_without_unicode_shows_escapes(work: Path):
    (work / "pairs.jsonl").rename(work / "pâirs.jsonl")
    done = infopo("check", "recipe.yaml", "data.path=pâirs.jsonl", cwd=work, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr.decode()
    assert rb"p\xe2irs.jsonl: 8 rows" in done.stdout


def test_a_reader_that_goes_away_is_no_error(work: Path):
    command = [sys.executable, "-m", "infopo", "check", "recipe.yaml"]
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate()
    assert process.returncode == 141
    assert b"Traceback" not in error
    assert b"Exception ignored" not in error


# --- train ---


def test_train_writes_a_run_that_loads_and_that_its_own_recipe_repeats(
    work: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", "recipe.yaml", "objective.beta=0.5", "train.seed=3"]) == 0
    printed = capsys.readouterr().out
    assert "pairs.jsonl: 8 rows, 8 used, 0 skipped\n" in printed
    assert "held_out.jsonl: 4 rows, 4 used, 0 skipped\n" in printed
    assert "objective: InfoPO (beta=0.5, length_normalized=False, cap=5.0)\n" in printed
    assert "reference: the policy as it is now, for chosen and rejected responses\n" in printed

    model, tokenizer = AutoModelForCausalLM.from_pretrained("run"), AutoTokenizer.from_pretrained("run")
    assert equal(dict(model.state_dict()), {**model.state_dict(), **weights("run")})
    assert not equal(weights("run"), weights(str(ROOT / "src/infopo/lab/policy")))
    assert tokenizer.decode(tokenizer("1+1=2")["input_ids"]) == "<|bos|>1+1=2"
    assert tokenizer.chat_template

    run = read_run("run")
    assert run.series("loss")[0] == [1, 2, 3, 4]
    assert run.series("eval_loss")[0] == [2, 4]  # the last one once
    names = {"logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins",
             "rewards/accuracies", "ratio/mean", "ratio/max", "ratio/capped"}  # fmt: skip
    assert run.metrics[0]["step"] == 0  # what is measured before the first update
    assert names <= run.metrics[1].keys()
    assert run.evaluation is not None
    assert {f"eval_{name}" for name in names} | {"eval_loss"} <= run.evaluation.keys()
    assert {path.name for path in Path("run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}

    environment = run.environment
    assert environment is not None
    assert environment["seed"] == 3
    # An index's build of torch may leave the platform out of its metadata.
    assert environment["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert environment["hardware"]["cores"] == os.cpu_count()
    assert "git" in environment
    assert environment["model"]["name_or_path"] == "lab:policy"
    assert environment["data"]["path"] == "pairs.jsonl"
    assert all(len(environment[key]["hash"]) == 64 for key in ("model", "reference", "data"))
    assert [(rows["source"], rows["used"]) for rows in environment["rows"]] == [
        ("pairs.jsonl", 8),
        ("held_out.jsonl", 4),
    ]

    assert main(["train", "run/recipe.yaml", "output_dir=again"]) == 0
    assert equal(weights("again"), weights("run"))
    assert read_run("again").recipe == (run.recipe or "").replace("output_dir: run", "output_dir: again")
    assert main(["train", "run/recipe.yaml", "output_dir=other", "train.seed=4"]) == 0
    assert not equal(weights("other"), weights("run"))


def test_a_lora_recipe_trains_an_adapter_that_loads(work: Path, capsys: pytest.CaptureFixture[str]):
    peft = pytest.importorskip("peft")
    overrides = ["model.adapter={r: 2, target_modules: [q_proj, v_proj]}", "reference=adapter-off"]
    assert main(["train", "recipe.yaml", *overrides]) == 0
    assert "reference: the policy without its adapter, for rejected responses\n" in capsys.readouterr().out
    base = build_policy(load_recipe("recipe.yaml"))
    model = peft.PeftModel.from_pretrained(base, "run")
    ids = torch.tensor([AutoTokenizer.from_pretrained("run")("1+1=?")["input_ids"]])
    with torch.no_grad():
        trained = model(ids).logits
        with model.disable_adapter():
            untrained = model(ids).logits
    assert not torch.allclose(trained, untrained)
    assert not Path("run/model.safetensors").exists()


def test_the_lab_recipe_trains_without_network(tmp_path: Path):
    few = ("train.gradient_size=2", "train.anchor_size=8", "train.probe_size=16")  # for time
    done = infopo("train", LAB, "output_dir=run", *few, cwd=tmp_path, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr.decode()
    printed = done.stdout.decode()
    for rows in (600, 200):
        assert (
            f"lab:verified: {rows} rows, {rows} used, 0 skipped\n  shape: conversational (detected)"
            in printed
        )
    assert printed.endswith(
        "run: model, metrics.jsonl, verdicts.json, recipe.yaml, environment.json and eval.json written\n"
        "next:\n  infopo chat run --against lab:policy\n  infopo evaluate run --tasks lab\n  infopo report run\n"
    )
    assert re.search(r"^  chosen log-prob +−.* → −.*, change ", printed, re.MULTILINE)
    assert b"Warning" not in done.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").num_parameters() > 300_000


@pytest.mark.parametrize(
    ("arguments", "status"), [(["reference", "--list"], 0), (["check", "absent.yaml"], 2)]
)
def test_a_rank_ends_with_its_status_after_what_waits_for_the_end_and_before_the_teardown(
    tmp_path: Path, arguments: list[str], status: int
) -> None:
    """In the teardown a thread of the process group can abort the rank, and with it all others."""
    script = f"""
import atexit, threading, time
from infopo.cli import main
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.5), print("thread"))).start()
class TornDown:
    def __del__(self): print("torn down")
kept = TornDown()
main({arguments!r})
print("returned")
"""
    environment = {**os.environ, "INFOPO_CACHE": str(tmp_path), "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stderr
    said = done.stdout.splitlines()
    assert said[-1] == "at exit"
    assert "thread" in said  # before or after what the command says: its sleep is no clock for a slow machine
    assert not {"torn down", "returned"} & set(said)
    assert ("error: " in done.stderr) == (status == 2)
