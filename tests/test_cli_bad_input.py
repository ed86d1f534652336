"""Whatever is wrong with the input, `infopo check` names it and its place, exits with 2, and leaves nothing behind."""

import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from infopo.cli import main
from infopo.models import LAB_POLICY_FOLDER

ROOT = Path(__file__).resolve().parents[1]
LAB = str(ROOT / "src" / "infopo" / "recipes" / "lab.yaml")

GOOD = {"prompt": "1+1=?", "chosen": "2", "rejected": "3"}
USER, ASSISTANT = {"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}
CHAT = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "3"}]}
MINIMAL = "model: {name_or_path: lab:policy}\ndata: {path: good.jsonl, max_length: 128}\noutput_dir: run\ntrain: {}\n"

Refused = Callable[..., str]


def lines(*rows: Any) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def parquet(**columns: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command in an empty folder that holds `good.jsonl` and `recipe.yaml`; gives its one error message."""
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    Path("good.jsonl").write_bytes(lines(*[GOOD] * 4))
    Path("recipe.yaml").write_text(MINIMAL, encoding="utf-8")

    def run(*arguments: str, command: str = "check") -> str:
        before = sorted(work.rglob("*"))
        status = main([command, *arguments])
        error = capsys.readouterr().err
        assert status == 2, error
        assert "Traceback" not in error
        assert sorted(work.rglob("*")) == before
        assert list(temporary.iterdir()) == []
        _, mark, message = error.rpartition("error: ")
        assert mark, error
        return message.strip()

    return run


# --- data ---


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty chosen": ("f.jsonl", lines(GOOD, {**GOOD, "chosen": " "}), ":2: expected a chosen response, it is e"),
    "empty rejected": ("f.jsonl", lines(GOOD, {**GOOD, "rejected": ""}), ":2: expected a rejected response, it is e"),
    "end of turn alone": ("f.jsonl", lines({**GOOD, "chosen": "<|end|>"}), ":1: expected a chosen response, it has no"),
    "chosen = rejected": ("f.jsonl", lines(GOOD, {**GOOD, "rejected": "2"}), ":2: expected two different responses"),
    "missing column": ("f.jsonl", lines(GOOD, {"prompt": "a", "chosen": "b"}), ":2: expected a column 'rejected'"),
    "wrong type": ("f.jsonl", lines(GOOD, {**GOOD, "chosen": 3}), ":2: column 'chosen': expected text, got int 3"),
    "null": ("f.jsonl", lines(GOOD, {**GOOD, "rejected": None}), ":2: column 'rejected': expected a value, got null"),
    "not an object": ("f.jsonl", lines(GOOD, [1]), ":2: expected an object with columns, got a list"),
    "wrong role": ("f.jsonl", lines(CHAT, {**CHAT, "chosen": [USER]}), ":2: chosen response: expected assistant turns"),
    "unknown role": (
        "f.jsonl", lines(CHAT, {**CHAT, "prompt": [{"role": "bot", "content": "x"}]}),
        ":2: column 'prompt', message 1: expected role system, developer, user, assistant, tool",
    ),
    "role the template has not": (
        "f.jsonl", lines(CHAT, {**CHAT, "prompt": [{"role": "system", "content": "x"}, USER]}),
        ":2: the tokenizer's chat template cannot render it: the lab chat has the roles user and assistant",
    ),
    "another shape": ("f.jsonl", lines(GOOD, CHAT), ":2: column 'prompt': expected text, got a list"),
    "images": ("f.jsonl", lines({**GOOD, "images": ["x"]}), ":1: column 'images': images are not supported"),
    "broken JSON": ("f.jsonl", lines(GOOD) + b'{"prompt": \n', ":2: expected one JSON object a line, got invalid"),
    "broken JSON array": ("f.json", b'[{"prompt": ', ": expected a JSON array of rows, got invalid JSON"),
    "invalid UTF-8": ("f.jsonl", lines(GOOD) + b'{"prompt": "\xff"}\n', ":2: expected UTF-8, but byte 13 is 0xff"),
    "half a surrogate pair": ("f.jsonl", lines({**GOOD, "chosen": "\ud800"}), ":1: column 'chosen': character 1"),
    "empty file": ("f.jsonl", b"", ": expected rows, got none"),
    "blank lines": ("f.jsonl", b"\n\n", ": expected rows, got none"),
    "empty array": ("f.json", b"[]", ": expected rows, got none"),
    "unknown suffix": ("f.txt", b"a,b", ": expected a file that ends in .json, .jsonl"),
    "broken gzip": ("f.jsonl.gz", b"no gzip", ": cannot be read: Not a gzipped file"),
    "cut gzip": ("f.jsonl.gz", gzip.compress(lines(*[GOOD] * 99))[:-9], ": cannot be read: Compressed file ended"),
    "broken parquet": ("f.parquet", b"PAR1 no PAR1", ": cannot be read: Parquet"),
    "parquet without a column": ("f.parquet", parquet(prompt=["a"], chosen=["b"]), ": expected the columns prompt, c"),
    "parquet with null": (
        "f.parquet", parquet(prompt=["a", "a"], chosen=["b", None], rejected=["c", "c"]),
        ":2: column 'chosen': expected a value, got null",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_data_are_named_by_file_and_row(fault: str, refused: Refused):
    name, content, expected = BAD_FILES[fault]
    Path(name).write_bytes(content)
    assert refused(LAB, f"data.path={name}").startswith(f"{name}{expected}")


@pytest.mark.parametrize("fault", ["empty chosen", "broken gzip"])
def test_train_refuses_bad_data_likewise_and_makes_no_folder(fault: str, refused: Refused):
    name, content, expected = BAD_FILES[fault]
    Path(name).write_bytes(content)
    assert refused("recipe.yaml", f"data.path={name}", command="train").startswith(f"{name}{expected}")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("none.jsonl", "none.jsonl: no such file (looked in "),
        ("sub/none", "sub/none: no such file here, and it cannot be loaded from the Hugging Face hub (split 'train')"),
        ("some/dataset", "some/dataset: no such file here, and it cannot be loaded from the Hugging Face hub"),
        ("no*.csv", "no*.csv: no file matches (looked in "),
        ("a" * 5000, "a" * 5000 + ": cannot be read: "),
        ("lab:nonsense", "lab:nonsense: no such data; the lab has lab:verified and lab:graded"),
    ],
)  # fmt: skip
def test_bad_paths_of_data_are_named(path: str, expected: str, refused: Refused):
    place = "" if path.startswith("lab:") else "data.path (override): "
    assert refused(LAB, f"data.path={path}").startswith(f"{place}{expected}")


def test_invalid_json_is_placed_within_its_line(refused: Refused):
    Path("f.jsonl").write_bytes(lines(GOOD) + b'{"prompt": x}\n')
    message = refused(LAB, "data.path=f.jsonl")
    assert message == (
        "f.jsonl:2: expected one JSON object a line, got invalid JSON: Expecting value at character 12"
        "; on_bad_row: skip leaves such rows out and counts them"
    )


def test_a_hub_name_offline_says_what_to_do(refused: Refused):
    message = refused(LAB, "data.path=some/dataset")
    assert "give the path of a file" in message


def test_an_unknown_split_of_the_lab_is_named(refused: Refused):
    assert (
        refused(LAB, "data.split=nonsense") == "lab:verified: no split 'nonsense'; there are train and test"
    )


def test_a_prompt_that_leaves_no_room_is_named_by_row(refused: Refused):
    Path("f.jsonl").write_bytes(lines(GOOD, {**GOOD, "prompt": "1" * 20}))
    message = refused(LAB, "data.path=f.jsonl", "data.max_length=20")
    assert message.startswith(
        "f.jsonl:2: the prompt's 21 tokens leave no room for a response in max_length=20"
    )


def test_responses_that_differ_only_behind_the_cut_are_named(refused: Refused):
    Path("f.jsonl").write_bytes(lines({**GOOD, "chosen": "aaaab", "rejected": "aaaac"}))
    message = refused(LAB, "data.path=f.jsonl", "data.max_length=9")
    assert message.startswith("f.jsonl:1: expected different responses") and "raise it" in message  # noqa: PT018


def test_bad_rows_of_the_evaluation_data_are_named(refused: Refused):
    Path("f.jsonl").write_bytes(lines(GOOD, {**GOOD, "chosen": ""}))
    assert refused(LAB, "data.path=good.jsonl", "data.eval_path=f.jsonl").startswith("f.jsonl:2: ")


def test_rows_beyond_the_first_step_are_held_against_the_models_context_too(refused: Refused):
    Path("f.jsonl").write_bytes(lines(*[GOOD] * 40, {**GOOD, "chosen": "2" * 600}))
    message = refused("recipe.yaml", "data.path=f.jsonl", "data.max_length=1024")
    assert message.startswith(
        "LlamaForCausalLM reads at most 512 tokens, but a prompt with its response has 607"
    )


def test_when_all_rows_are_skipped_the_reasons_are_given(refused: Refused):
    message = refused(LAB, "data.path=good.jsonl", "data.max_length=3", "data.on_bad_row=skip")
    assert message == "good.jsonl: no row can be used: 4 x prompt too long"


def test_a_bad_row_is_named_from_a_worker_process_too(refused: Refused):
    Path("f.jsonl").write_bytes(lines(GOOD, {**GOOD, "chosen": "<|end|>"}))
    assert refused(LAB, "data.path=f.jsonl", "data.num_proc=2").startswith("f.jsonl:2: ")


# --- recipes ---


BAD_RECIPES = {
    "unknown key": (MINIMAL + "objectiv: dpo\n", "objectiv (line 5): no such setting (did you mean 'objective'?)"),
    "wrong type": (MINIMAL.replace("128", "many"), "data.max_length (line 2): expected an integer or null, got 'many'"),
    "duplicate key": (MINIMAL + "output_dir: b\n", "output_dir (line 3): given twice, on lines 3 and 5"),
    "impossible combination": (MINIMAL + "reference: adapter-off\n", "reference.source (line 5): adapter-off takes"),
    "empty": ("", "recipe: is empty"),
    "only comments": ("# nothing\n", "recipe: is empty"),
    "a list": ("- model\n", "recipe: expected `key: value` lines at the top level"),
    "broken YAML": ("model: [\n", "line 2: not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_RECIPES)
def test_bad_recipes_are_named_by_key_and_line(fault: str, refused: Refused):
    text, expected = BAD_RECIPES[fault]
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    message = refused("recipe.yaml")
    assert message.startswith(expected)
    assert message.endswith(" in recipe.yaml")


def test_a_recipe_that_is_not_there_is_named(refused: Refused):
    assert refused("none.yaml") == "none.yaml: no such file; expected a YAML recipe"
    assert refused(".") == ".: is a directory; expected a YAML recipe"


def test_all_problems_are_reported_at_once(refused: Refused):
    overrides = [
        "train.per_device_train_batch_size=0", "train.seed=-1", "objective.beta=0", "data.path=", "train.lr=1",
        "data.eval_split=test", "model.dtype=int8", "reference=lve", "nonsense",
    ]  # fmt: skip
    message = refused("recipe.yaml", *overrides)
    assert message.startswith("8 problems in recipe.yaml:\n")
    for place in ("train.per_device_train_batch_size", "train.seed", "objective.beta", "data.path", "train.lr",
                  "model.dtype", "reference.source", "override 'nonsense'"):  # fmt: skip
        assert f"  - {place}" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective=infpo", "objective.name (override): no objective 'infpo' (did you mean 'infopo'?)"),
        ("objective.bta=1", "objective.bta (override): infopo has no such parameter (did you mean 'beta'?)"),
        ("train.learning_rat=1", "train.learning_rat (override): no such training argument (did you mean"),
        ("data.shape=chat", "data.shape (override): expected one of standard, "),
        ("model.attn_implementation=foo", "model 'lab:policy' cannot be loaded: Specified `attn_implementation="),
        ("model.adapter.target_modules=nope", "peft_config does not fit LlamaForCausalLM: Target modules nope"),
        ("model.adapter.target_modules='('", "model.adapter.target_modules: '(' is no regular expression"),
        ("model.quantization=4bit", "model.quantization (override): quantized weights cannot be trained; add model.ad"),
        ("train.pad_token=zzz", "pad_token: 'zzz' is not in the tokenizer's vocabulary"),
        ("train.report_to=foo", "train.report_to: 'foo' is unknown or not installed"),
        ("train.fsdp=2", "train.fsdp (override): expected text or true or false or null, got 2 in recipe.yaml"),
        ("train.padding_free=true", "train.padding_free=True: nothing is padded already"),
        ("train.logps_path=fast", "train.logps_path (override): expected one of auto, naive"),
        ("train.resume_from_checkpoint=none", "none: is no checkpoint"),
        ("output_dir=good.jsonl", "output_dir: good.jsonl cannot be made: good.jsonl is a file"),
        ("output_dir=good.jsonl/run", "output_dir: good.jsonl/run cannot be made: "),
        ("output_dir=" + "a" * 300, "output_dir: " + "a" * 300 + " cannot be made: File name too long"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(override: str, expected: str, refused: Refused):
    assert refused("recipe.yaml", override).startswith(expected)


@pytest.mark.skipif(os.geteuid() == 0, reason="everything may be written by root")
def test_a_folder_without_permission_is_named(refused: Refused):
    Path("locked").mkdir(mode=0o500)
    assert refused("recipe.yaml", "output_dir=locked/run").startswith(
        "output_dir: locked/run cannot be written to"
    )


def test_a_metric_that_evaluation_does_not_give_is_refused(refused: Refused):
    overrides = ["data.eval_path=good.jsonl", "train.metric_for_best_model=accuracy", "train.eval_strategy=epoch",
                 "train.save_strategy=best"]  # fmt: skip
    message = refused("recipe.yaml", *overrides)
    assert message.startswith("train.metric_for_best_model: ")
    assert "It gives: loss, " in message


@pytest.mark.parametrize("source", ["./nowhere", "no/where"])
def test_a_reference_that_is_not_there_is_named_and_train_makes_no_folder(source: str, refused: Refused):
    assert refused("recipe.yaml", f"reference={source}", command="train").startswith(
        f"reference.source (override): there is no folder {source} here"
    )


def test_a_second_run_in_the_same_folder_is_refused(refused: Refused):
    Path("run").mkdir()
    Path("run/model.safetensors").touch()
    message = refused("recipe.yaml", command="train")
    assert message.startswith(
        "output_dir: run already holds a run. Continue it with train.resume_from_checkpoint=true"
    )


# --- models ---


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def without_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layers.0." not in k},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def of_another_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))


def configured(**settings: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))

    return damage


def with_nan(folder: Path) -> None:
    weights = {k: torch.full_like(v, torch.nan) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (without_weights, "model 'sft' cannot be loaded: Error no file named model.safetensors"),
    "no tokenizer": (without_tokenizer, "tokenizer of 'sft' cannot be loaded"),
    "weights missing": (without_a_layer, "model 'sft': 9 weights are not in its files and would be random"),
    "unknown architecture": (of_another_kind, "model 'sft' cannot be loaded"),
    "no chat template": (
        without_template,
        "tokenizer 'sft' has no chat template, and the data are conversations",
    ),
    "layers without end": (
        configured(num_hidden_layers=10**9),
        "model 'sft' has num_hidden_layers=1000000000 in its configuration; expected 1 to 10000",
    ),
    "a text for a number": (
        configured(num_hidden_layers="two"),
        "tokenizer of 'sft' cannot be loaded: its configuration describes no model that can be built",
    ),
    "no heads": (
        configured(num_attention_heads=0),
        "tokenizer of 'sft' cannot be loaded: its configuration describes no model that can be built",
    ),
    "other shapes": (
        configured(num_key_value_heads=7),
        "model 'sft' cannot be loaded: weights in its files have other shapes than its configuration gives",
    ),
    "an unknown activation": (
        configured(hidden_act="nope"),
        "model 'sft' cannot be loaded: it needs 'nope', which is not known",
    ),
    "NaN in its weights": (with_nan, "LlamaForCausalLM: log-probs are not finite before the first update"),
}


@pytest.mark.parametrize("fault", BAD_MODELS)
def test_models_that_cannot_be_used_are_named(fault: str, refused: Refused):
    damage, expected = BAD_MODELS[fault]
    Path("chat.jsonl").write_bytes(lines(CHAT))
    shutil.copytree(LAB_POLICY_FOLDER, "sft")
    damage(Path("sft"))
    assert refused("recipe.yaml", "model.name_or_path=sft", "data.path=chat.jsonl").startswith(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./nowhere", "there is no folder ./nowhere here (looked in "),
        ("models/hh/step-9", "there is no folder models/hh/step-9 here (looked in "),
        ("models/hh", "there is no folder models/hh here, and the hub is switched off (HF_HUB_OFFLINE)"),
        ("lab:nonsense", "'lab:nonsense': the lab has only lab:policy"),
        ("good.jsonl", "good.jsonl is a file; expected the folder of a saved model"),
    ],
)
def test_models_that_are_not_there_are_named_with_setting_and_line(
    name: str, expected: str, refused: Refused
):
    assert refused("recipe.yaml", f"model.name_or_path={name}").startswith(
        f"model.name_or_path (override): {expected}"
    )
    Path("recipe.yaml").write_text(MINIMAL.replace("lab:policy", name), encoding="utf-8")
    assert refused("recipe.yaml").startswith(f"model.name_or_path (line 1): {expected}")


@pytest.mark.long
def test_a_hub_that_does_not_answer_is_told_with_setting_and_line(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
):
    """As on a machine that is on line: `transformers`, which is off line in tests, is asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    message = refused("recipe.yaml", "model.name_or_path=models/hh")
    assert message.startswith(
        "model.name_or_path (override): tokenizer of 'models/hh' cannot be loaded: there is no "
    )
    assert "there is no folder models/hh here, and the hub has no answer (" in message


# --- the demo ---


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--output", "good.jsonl"], "--output: good.jsonl cannot be made: File exists"),
        (["--output", "good.jsonl/demo"], "--output: good.jsonl/demo cannot be made: Not a directory"),
        (["--output", ".", "--seed", "-1"], "--seed: expected a number in [0, 2**32), got -1"),
        (
            ["--output", ".", "--seed", "4294967296"],
            "--seed: expected a number in [0, 2**32), got 4294967296",
        ),
    ],
)
def test_the_demo_refuses_what_it_cannot_use(arguments: list[str], expected: str, refused: Refused):
    assert refused(*arguments, command="demo") == expected


def test_the_demo_asks_for_what_draws_before_it_trains(refused: Refused, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = "the demo needs matplotlib and Bokeh: pip install 'infopo[demo]'"
    assert refused("--output", ".", command="demo") == expected


@pytest.mark.parametrize("arguments", [["--labels", "noisy"], ["--seed", "one"]])
def test_the_demo_shows_its_usage_for_arguments_of_the_wrong_kind(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments])
    assert stop.value.code == 2
    assert "usage: infopo demo" in capsys.readouterr().err


# --- as a process ---


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.path=f.jsonl", "error: f.jsonl:2: expected a chosen response, it is empty (text '')"),
        ("train.seed=-1", "error: train.seed (override): expected a value in [0, 2**32), got -1 in "),
    ],
)  # fmt: skip
def test_a_process_prints_the_error_alone_and_exits_with_2(tmp_path: Path, override: str, expected: str):
    (tmp_path / "f.jsonl").write_bytes(lines(GOOD, {**GOOD, "chosen": ""}))
    done = subprocess.run(
        [sys.executable, "-m", "infopo", "check", LAB, override],
        cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(expected)
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["f.jsonl"]
