"""An export loads with transformers alone, holds nothing private, and is whole or not there."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from infopo.cli import main
from infopo.errors import ConfigError, ModelError, SaveError
from infopo.lab import policy_path
from infopo.trainer import InfoPOTrainer
from infopo.workflows import export as workflow
from infopo.workflows.export import MARK, export
from test_merging import FLOAT32, lora, saved
from trainers import TOKENIZER, trainer_of
from worlds import tiny_llama


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40).reshape(1, -1)).logits


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, `full` and `adapter`, of the policy that lies there as `sft`."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_llama().save_pretrained(folder / "sft")
    TOKENIZER.save_pretrained(folder / "sft")
    for name, config in (
        ("full", None),
        ("adapter", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")),
    ):
        trainer: InfoPOTrainer = trainer_of(
            folder / name, model=str(folder / "sft"), peft_config=config, save_strategy="steps", save_steps=3,
            learning_rate=0.01, probe_size=4,
        )  # fmt: skip
        trainer.train()
        trainer.save_final_model()
    return folder


def test_a_full_run_is_exported_as_it_is_and_without_what_is_private(runs: Path, tmp_path: Path) -> None:
    export(str(runs / "full"), output=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", MARK,
    }  # fmt: skip
    trained, exported = (AutoModelForCausalLM.from_pretrained(f) for f in (runs / "full", tmp_path / "out"))
    assert torch.equal(logits(exported), logits(trained))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == TOKENIZER.get_vocab()
    for path in (tmp_path / "out").iterdir():
        assert str(runs).encode() not in path.read_bytes(), path.name
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "| chosen log-prob |" in card.text


@pytest.mark.parametrize("of", ["adapter", "adapter/checkpoint-3"])
def test_an_adapter_is_exported_merged_with_its_card(runs: Path, tmp_path: Path, of: str) -> None:
    export(str(runs / of), output=tmp_path / "mine")
    # Not by AutoPeftModel, which adds random embeddings for the tokens that the tokenizer alone has.
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runs / "sft"), runs / of).eval()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "mine").eval()
    torch.testing.assert_close(logits(exported), logits(adapted), rtol=0, atol=FLOAT32)
    assert not torch.allclose(
        logits(exported), logits(AutoModelForCausalLM.from_pretrained(runs / "sft")), atol=1e-2
    )
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.library_name == "transformers"
    assert "An adapter, merged into its base `sft`, aligned with preference data by InfoPO." in card.text
    about = json.loads((tmp_path / "mine" / MARK).read_text(encoding="utf-8"))
    assert about["merged_adapter"] is True
    assert str(runs) not in json.dumps(about)


def test_another_type_is_that_of_all_weights(runs: Path, tmp_path: Path) -> None:
    export(str(runs / "adapter"), output=tmp_path / "out", dtype="bfloat16")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {weight.dtype for weight in exported.parameters()} == {torch.bfloat16}


def test_a_run_that_was_killed_gives_its_last_checkpoint(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-3").symlink_to(runs / "full" / "checkpoint-3")
    assert main(["export", str(tmp_path / "run")]) == 0
    assert "checkpoint-3 is taken" in capsys.readouterr().out
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run-export")),
        logits(AutoModelForCausalLM.from_pretrained(runs / "full")),
    )


def test_responses_end_where_training_ended_them(tmp_path: Path) -> None:
    """A base model whose configuration names the end of text alone would not stop at the template's end of turn."""
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|stop|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model = AutoModelForCausalLM.from_pretrained(policy_path())
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    export(str(tmp_path / "run"))
    ends = json.loads((tmp_path / "run-export" / "generation_config.json").read_text(encoding="utf-8"))[
        "eos_token_id"
    ]
    assert set(ends) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|stop|>")}


def test_a_folder_with_something_else_is_refused_and_an_earlier_export_replaced(
    runs: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no earlier export"):
        export(str(runs / "full"), output=tmp_path / "out")
    with pytest.raises(ConfigError, match="is not empty"):
        export(str(runs / "full"), output=runs / "full")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    (tmp_path / "out" / "thesis.tex").unlink()
    export(str(runs / "adapter"), output=tmp_path / "out")
    (tmp_path / "out" / "stale.safetensors").touch()
    export(str(runs / "full"), output=tmp_path / "out")
    assert not (tmp_path / "out" / "stale.safetensors").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("when", ["_write", "_card", "_forget_places"])
def test_an_export_that_fails_leaves_nothing_and_keeps_an_earlier_one(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    export(str(runs / "full"), output=tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workflow, when, full)
    with pytest.raises(SaveError, match="No space left on device"):
        export(str(runs / "adapter"), output=tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(SaveError):
        export(str(runs / "adapter"), output=tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_on_quantised_weights_is_warned_about(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "adapter" / "recipe.yaml").write_text(
        "model: {name_or_path: sft, quantization: 4bit}\n", encoding="utf-8"
    )
    try:
        export(str(runs / "adapter"), output=tmp_path / "out")
    finally:
        (runs / "adapter" / "recipe.yaml").unlink()
    assert "warning: it was trained on a base of 4bit weights" in capsys.readouterr().out


def test_an_adapter_without_merged_form_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    adapter = saved(tmp_path, lora(alora_invocation_tokens=[5]))
    TOKENIZER.save_pretrained(adapter)
    with pytest.raises(ModelError, match="the adapter cannot be merged into its base: LORA with alora"):
        export(str(adapter), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_hub_is_asked_before_anything_is_computed_and_gets_the_export_alone(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match="--push-to-hub me/mine: the repository cannot be made: OfflineMode"
    ):
        export(str(runs / "full"), output=tmp_path / "out", push_to_hub="me/mine")
    assert not (tmp_path / "out").exists()
    calls: list[tuple[str, dict[str, Any]]] = []

    class Url:
        repo_id = "me/mine"

    def create(self: HfApi, name: str, **kwargs: Any) -> Url:
        calls.append((name, kwargs))
        return Url()

    def upload(self: HfApi, **kwargs: Any) -> None:
        calls.append(("upload", kwargs))

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    export(str(runs / "full"), output=tmp_path / "out", push_to_hub="mine", private=True)
    assert calls[0] == ("mine", {"private": True, "exist_ok": True})
    assert (calls[1][1]["repo_id"], calls[1][1]["folder_path"]) == ("me/mine", tmp_path / "out")


@pytest.mark.long
def test_a_killed_export_leaves_no_folder_that_looks_whole_and_the_same_command_begins_anew(
    runs: Path, tmp_path: Path
) -> None:
    folder, staging = tmp_path / "out", tmp_path / ".out.staging"
    command = [sys.executable, "-m", "infopo", "export", str(runs / "full"), "--output", str(folder)]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not staging.exists():
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.0005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not folder.exists()
    assert staging.exists()
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert not staging.exists()
    AutoModelForCausalLM.from_pretrained(folder)
