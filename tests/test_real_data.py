"""Real human preferences, from the file as it was published to a trained model, with what the scripts build."""

import gzip
import importlib.util
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from infopo.cli import main
from infopo.losses.catalog import OBJECTIVES
from infopo.runs import read_run
from worlds import quick

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = ROOT / "tests" / "fixtures" / "hh" / "harmless-24.jsonl"
RECIPE = str(ROOT / "src" / "infopo" / "recipes" / "hh.yaml")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    """Builds tokenizer and model, and trains one epoch."""
    monkeypatch.setattr(sys, "argv", ["hh_tokenizer.py", str(data), str(out / "model")])
    script("hh_tokenizer").main()
    paths = [f"model.name_or_path={out / 'model'}", f"data.path={data}", f"output_dir={out / 'run'}"]
    assert main(["train", RECIPE, *paths, *overrides]) == 0


@pytest.mark.parametrize("compressed", [False, True])
def test_an_epoch_over_the_fixture_counts_every_row(
    compressed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    data = FIXTURE
    if compressed:
        data = tmp_path / "harmless-24.jsonl.gz"
        data.write_bytes(gzip.compress(FIXTURE.read_bytes()))
    train(data, tmp_path, monkeypatch, "train.logging_steps=1", "objective.length_normalized=true")
    printed = capsys.readouterr().out
    assert f"{data}: 24 rows, 22 used, 2 skipped\n" in printed
    assert "  skipped 1: no common prompt (first: " in printed
    assert "  skipped 1: empty chosen (first: " in printed
    steps, losses = read_run(tmp_path / "run").series("loss")
    assert steps == [1, 2]
    assert all(8 < loss < 10 for loss in losses)  # -log(1/3000) = 8.0 a token, and a ratio of 1
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run")) <= 3000
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.hidden_size == 64


def test_transcripts_become_conversations_that_the_template_writes_and_the_responses_alone_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["hh_tokenizer.py", str(FIXTURE), str(tmp_path / "model")])
    script("hh_tokenizer").main()
    capsys.readouterr()
    arguments = [f"model.name_or_path={tmp_path / 'model'}", f"data.path={FIXTURE}"]
    assert main(["check", RECIPE, *arguments, "train.per_device_train_batch_size=2"]) == 0
    prompts, sides = [], []
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  prompt "):
            prompts.append(line.split(maxsplit=2)[2])
        if line.startswith(("  chosen ", "  rejected ")):
            sides.append(line.split(maxsplit=2)[2])
    assert len(prompts) == 3
    assert len(sides) == 6
    for prompt in prompts:
        assert prompt.startswith("<|bos|><|user|>")
        assert prompt.endswith("<|end|><|assistant|>")
        assert prompt.count("<|bos|>") == 1
    for text in sides:
        assert text.endswith("<|end|>")
        assert "⟪" not in text  # all of it is scored
        assert "Human:" not in text


@pytest.fixture(scope="module")
def model_of_the_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hh") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hh_tokenizer.py", str(FIXTURE), str(folder)])
        script("hh_tokenizer").main()
    return folder


@pytest.mark.parametrize("on", quick(["real rows", "the lab"], "real rows"))
@pytest.mark.parametrize("objective", quick(OBJECTIVES, "infopo", "dpo", "kto", "mine"))
def test_every_objective_trains(objective: str, on: str, model_of_the_fixture: Path, tmp_path: Path) -> None:
    original = RECIPE if on == "real rows" else str(ROOT / "src" / "infopo" / "recipes" / "lab.yaml")
    recipe, text = tmp_path / "recipe.yaml", Path(original).read_text(encoding="utf-8")
    text = re.sub(r"(?m)^objective:\n(  .*\n)+", f"objective: {objective}\n", text)
    recipe.write_text(text, encoding="utf-8")
    changes = [f"model.name_or_path={model_of_the_fixture}", f"data.path={FIXTURE}"]
    if on == "the lab":
        changes = ["train.max_steps=2", "train.eval_strategy=no", "data.eval_split=null"]
    changes += [f"output_dir={tmp_path / 'run'}", "train.logging_steps=1"]
    changes += ["train.probe_size=4", "train.anchor_size=2", "train.anchor_tokens=8", "train.gradient_size=1"]
    assert main(["train", str(recipe), *changes]) == 0
    run = read_run(tmp_path / "run")
    steps, losses = run.series("loss")
    assert steps == [1, 2]
    assert all(math.isfinite(loss) for loss in losses)
    _, norms = run.series("grad_norm")
    assert all(norm > 0 for norm in norms)


@pytest.mark.long
def test_an_epoch_over_all_of_harmless_base_takes_minutes_and_accounts_for_every_row(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    data = shared_data / "hh_harmless" / "harmless-base-test.jsonl.gz"
    if not data.is_file():
        pytest.skip(f"no {data}")
    train(data, tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert f"{data}: 2312 rows, 2303 used, 9 skipped\n" in printed
    assert "  skipped 5: no common prompt (first: " in printed
    assert "  skipped 4: empty chosen (first: " in printed
    run = read_run(tmp_path / "run")
    assert run.environment is not None
    (rows,) = run.environment["rows"]
    assert (rows["rows"], rows["used"], rows["skipped"]) == (
        2312,
        2303,
        {"no common prompt": 5, "empty chosen": 4},
    )
    assert run.metrics[-1]["step"] == -(-2303 // 16)
    _, losses = run.series("loss")
    assert len(losses) == 14
    assert all(map(math.isfinite, losses))
    # Losses of different rows cannot be compared, because a sum grows with the length of a response. The probe set is
    # the same at each step.
    _, changes = run.series("probe/change/chosen")
    _, uncertain = run.series("probe/change/chosen_ci95")
    assert changes[-1] - uncertain[-1] > 0
