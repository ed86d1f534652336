"""`infopo rounds`: sampling, training and evaluation by turns, refused before they begin, continued after a kill."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from infopo.adapters import load_for_use
from infopo.cli import main
from infopo.config import load_recipe, parse_recipe, to_yaml
from infopo.evaluation.contenders import read_contender
from infopo.hashing import hash_weights
from infopo.models import load_policy
from infopo.runs import read_run
from infopo.workflows.round_state import first_round, settle_recipe
from infopo.workflows.rounds import recipe_of

RECIPE = """\
model: lab:policy
output_dir: out
objective: infopo
rounds: {prompts: lab, verifier: lab, number: 2, prompts_per_round: 16, num_generations: 4, stop_after: null}
evaluate: {tasks: lab, limit: 12}
train: {learning_rate: 1.0e-4, per_device_train_batch_size: 4, max_steps: 4, save_steps: 2, probe_size: 4,
        anchor_size: 4, gradient_size: 0}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of two small rounds in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFOPO_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["rounds=null", "data.path=lab:verified", "evaluate=null"], "rounds: is required: a section"),
        (["rounds={verifier: lab}"], "rounds.prompts: is required"),
        (["rounds.verifier=gsm9k"], "rounds.verifier: expected a task"),
        (["rounds.verifier=no_module:f"], "no_module"),
        (["rounds.prompts=none.jsonl", "rounds.verifier=gsm8k"], "none.jsonl"),
        (["rounds.limit=20"], "rounds.limit: 2 rounds of 16 prompts take 32, but 20 are used"),
        (["rounds.reference=last"], "rounds.reference: expected one of previous, first"),
        (["rounds.temperature=0"], "rounds.temperature: expected a finite number above 0"),
        (["rounds.temperature=.nan"], "rounds.temperature: expected a finite number above 0"),
        (["rounds.top_p=2"], "rounds.top_p: expected a number in (0, 1]"),
        (["rounds.judge_model=big"], "rounds.judge_model: does not apply to the verifier lab"),
        (
            ["rounds.rule=lists", "rounds.pairs_per_prompt=2"],
            "rounds.pairs_per_prompt: does not apply to the rule",
        ),
        (["rounds.seed=4294967295"], "rounds.seed: expected a number below 2**32"),
        (["output_dir=other"], "other holds a run of its own"),
        (["rounds.rule=best"], "rounds.rule: expected one of random"),
        (["rounds.num_generations=1"], "rounds.num_generations: expected a value >= 2"),
        (["rounds.threshold=x"], "rounds.threshold: expected a number"),
        (["rounds.max_pass_rate=2"], "rounds.max_pass_rate: expected a share"),
        (["rounds.batchsize=2"], "rounds.batchsize: no such setting"),
        (["data.path=pairs.jsonl"], "data.path: rounds make their pairs themselves"),
        (["reference.source=./policy"], "reference.source: rounds.reference says"),
        (["rounds.reference=first", "reference.source=live"], "rounds.reference is first"),
        (["evaluate.tasks=lap"], "evaluate.tasks"),
        (["train.resume_from_checkpoint=out/x"], "rounds go on by themselves"),
        (["train.learning_rate=fast"], "train.learning_rate"),
        (["data.streaming=true", "train.max_steps=3"], "data.streaming"),
        (["rounds.verifier=judge:http://localhost:1/v1"], "rounds.yes"),
    ],
)
def test_what_cannot_be_done_in_rounds_is_refused_before_anything_is_written(
    overrides: list[str], problem: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = recipe.parent / "other"
    other.mkdir()
    (other / "model.safetensors").touch()
    assert main(["rounds", str(recipe), *overrides]) == 2
    error = re.sub(r" \((override|line \d+)\)", "", capsys.readouterr().err)
    assert problem in error
    assert "Traceback" not in error
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["other", "recipe.yaml"]


def test_too_few_prompts_for_all_rounds_are_counted(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"{n}+1=?", "answer": f"#### {n + 1}"} for n in range(20)]
    Path("few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = ["rounds.prompts=few.jsonl", "rounds.verifier=gsm8k"]
    assert main(["rounds", str(recipe), *given]) == 2
    assert "2 rounds of 16 prompts take 32, and few.jsonl has 20" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "check", "reference"])
def test_a_recipe_of_rounds_is_no_recipe_of_one_training(
    command: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(recipe)]) == 2
    assert "this recipe is trained in rounds: infopo rounds RECIPE" in capsys.readouterr().err


def test_the_recipe_of_a_round_is_an_ordinary_one(recipe: Path) -> None:
    whole = load_recipe(recipe, ["rounds.reference=first"])
    assert parse_recipe(to_yaml(whole), source="written") == whole
    one = first_round(whole)
    two = recipe_of(whole, one.next())
    assert (two.model.name_or_path, two.data.path) == ("out/round-1", "out/round-2/pairs.jsonl")
    assert (two.reference.source, recipe_of(whole, one).reference.source) == ("lab:policy", "auto")
    assert parse_recipe(to_yaml(two), source="written") == two
    previous = recipe_of(load_recipe(recipe), one.next())
    assert previous.reference.source == "auto"


def test_an_adapter_is_merged_before_the_next_round(recipe: Path) -> None:
    whole = load_recipe(recipe, ["model.adapter.r=4"])
    two = recipe_of(whole, first_round(whole).next())
    assert two.model.name_or_path == "out/round-1/merged"
    assert two.model.adapter == whole.model.adapter


def test_other_settings_than_those_that_rounds_were_begun_with_are_refused(recipe: Path) -> None:
    Path("out").mkdir()
    settle_recipe(load_recipe(recipe), "hash")
    settle_recipe(load_recipe(recipe, ["rounds.temperature=0.7"]), "another hash")  # no round has begun
    with pytest.raises(Exception, match="begun with other settings: learning_rate"):
        settle_recipe(load_recipe(recipe, ["train.learning_rate=1e-3"]), "hash")
    settle_recipe(load_recipe(recipe), "hash")
    pairs = Path("out/round-1/pairs.jsonl")
    pairs.parent.mkdir()
    pairs.write_text("{}\n")
    pairs.with_suffix(".provenance.json").write_text('{"counts": {"rows": 1}}')
    settle_recipe(load_recipe(recipe, ["rounds.number=5", "rounds.stop_after=2"]), "hash")
    with pytest.raises(Exception, match=r"begun with other settings: temperature: 1\.0 was there, now"):
        settle_recipe(load_recipe(recipe, ["rounds.temperature=0.7"]), "hash")
    with pytest.raises(Exception, match="prompts"):
        settle_recipe(load_recipe(recipe), "another hash")


# --- whole rounds ---


SAME = (
    "round-*/pairs.jsonl", "round-*/pairs.samples/samples.jsonl", "round-*/pairs.pass-rates.jsonl",
    "round-*/model.safetensors", "round-*/recipe.yaml", "round-*/evaluation/items.jsonl",
    "round-*/evaluation/samples.jsonl", "start/items.jsonl", "start/samples.jsonl", "comparison.md", "comparison.json",
    "rounds.json",
)  # fmt: skip
"""Files that say nothing of the time or the machine."""


def contents(folder: Path, patterns: Sequence[str] = SAME) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
    }


@pytest.mark.long
def test_rounds_leave_runs_that_every_command_reads(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rounds", str(recipe)]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "round 2 of 2: out/round-2, from out/round-1" in out
    assert "report.html" in out
    first, second = (Path("out") / f"round-{n}" for n in (1, 2))
    prompts = [
        {
            json.loads(line)["prompt"]
            for line in (f / "pairs.pass-rates.jsonl").read_text(encoding="utf-8").splitlines()
        }
        for f in (first, second)
    ]
    assert len(prompts[0]) == len(prompts[1]) == 16
    assert not prompts[0] & prompts[1]  # each round has a slice of its own
    for folder in (first, second):
        assert read_run(folder).recipe is not None
        assert read_contender(str(folder)).tasks.keys() == {"lab"}
    models = {
        json.loads((f / "pairs.provenance.json").read_text(encoding="utf-8"))["model"]["weights"]
        for f in (first, second)
    }
    assert len(models) == 2  # the second round's samples are of the first round's policy
    assert main(["compare", "out/start", "out/round-1", "out/round-2"]) == 0
    assert main(["report", "out/round-1", "out/round-2", "--output", "again.html"]) == 0

    # The same command finds everything finished, and more rounds may be asked for, fewer or other settings not.
    before = contents(Path("out"))
    assert main(["rounds", str(recipe)]) == 0
    assert contents(Path("out")) == before
    assert main(["rounds", str(recipe), "rounds.seed=3"]) == 2
    assert "seed: 0 was there, now seed: 3" in capsys.readouterr().err
    assert main(["rounds", str(recipe), "rounds.number=1"]) == 2
    assert "2 rounds are trained in out" in capsys.readouterr().err


@pytest.mark.long
def test_rounds_of_adapters_train_a_new_one_on_what_the_last_became(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Base and adapter of a round, merged, are the base of the next one's adapter."""
    assert main(["rounds", str(recipe), "model.adapter.r=4", "train.learning_rate=1e-2"]) == 0, (
        capsys.readouterr().err
    )
    merged = load_policy("out/round-1/merged")
    assert hash_weights(merged) == hash_weights(load_for_use("out/round-1"))
    assert hash_weights(merged) != hash_weights(load_policy("lab:policy"))
    settings = json.loads(Path("out/round-2/adapter_config.json").read_text(encoding="utf-8"))
    assert Path(settings["base_model_name_or_path"]) == Path("out/round-1/merged").resolve()


@pytest.mark.long
def test_a_round_without_pairs_ends_rounds_and_loses_nothing(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("marks.py").write_text(
        "def marks(prompts, completions, **columns):\n"
        "    # Everything is right but for other answers to the first prompt.\n"
        "    first = '78+97-59=?' in str(prompts[0])\n"
        "    return ['Answer: 116' in str(c) or not first for c in completions]\n",
        encoding="utf-8",
    )
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("78+97-59=?", "3+3=?")]
    Path("two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = ["rounds.prompts=two.jsonl", "rounds.verifier=marks:marks", "rounds.prompts_per_round=1",
             "rounds.num_generations=12", "rounds.max_new_tokens=40", "rounds.temperature=1.5",
             "train.max_steps=2"]  # fmt: skip
    assert main(["rounds", str(recipe), *given]) == 0
    out = capsys.readouterr().out
    assert "round 2 has no pairs" in out
    assert "1 round; the best is" in out
    assert (Path("out") / "round-1" / "model.safetensors").is_file()

    # In the first round it is an error.
    Path("two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]), encoding="utf-8")
    assert main(["rounds", str(recipe), *given, "output_dir=none"]) == 2
    assert "no prompt gives a pair" in capsys.readouterr().err


def killed_and_continued(command: list[str], folder: Path, seconds: Sequence[float], done: Path) -> int:
    """Starts a command and kills it, as often as there are seconds, and then lets it end. Returns how many died."""
    died = 0
    environment = {**os.environ, "INFOPO_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    for limit in (*seconds, None):
        process = subprocess.Popen(
            [sys.executable, "-m", "infopo", *command], cwd=folder, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        begin = time.monotonic()
        while limit is not None and process.poll() is None and time.monotonic() - begin < limit:
            time.sleep(0.02)
        if limit is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            died += 1
        _, error = process.communicate()
        if limit is None:
            assert process.returncode == 0, error.decode()
    assert done.exists()
    return died


@pytest.mark.long
def test_killed_pairs_continue_to_the_same_files(tmp_path: Path) -> None:
    command = [
        "pairs",
        "lab:policy",
        "--prompts",
        "lab",
        "--verifier",
        "lab",
        "--limit",
        "160",
        "--num-generations",
        "4",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    begin = time.monotonic()
    assert killed_and_continued(command, whole, (), whole / "pairs.jsonl") == 0
    length = time.monotonic() - begin
    draw = random.Random(0)
    moments = [length * share for share in (0.6, 0.8, draw.uniform(0.4, 1.0))]
    assert killed_and_continued(command, killed, moments, killed / "pairs.jsonl") > 0
    files = ("pairs.jsonl", "pairs.pass-rates.jsonl", "pairs.samples/samples.jsonl")
    assert contents(killed, files) == contents(whole, files)
    assert len(contents(whole, files)) == 3


@pytest.mark.long
def test_killed_rounds_continue_to_the_same_files(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    begin = time.monotonic()
    assert killed_and_continued(["rounds", "recipe.yaml"], whole, (), whole / "out" / "rounds.json") == 0
    length = time.monotonic() - begin
    draw = random.Random(1)
    moments = [length * draw.uniform(0.35, 0.9) for _ in range(3)]
    assert (
        killed_and_continued(["rounds", "recipe.yaml"], killed, moments, killed / "out" / "rounds.json") > 0
    )
    ours, theirs = contents(killed / "out"), contents(whole / "out")
    assert len(theirs) >= 18
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    shutil.rmtree(killed)
