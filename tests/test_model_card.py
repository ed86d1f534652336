"""The card beside a saved model says how it was made, and holds nothing that its author did not mean to publish."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import infopo
from infopo.arguments import InfoPOConfig
from infopo.lab.tokenizer import build_tokenizer
from infopo.model_card import Card, render
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_dataset, tiny_llama

TOKENIZER = build_tokenizer()


def trained(folder: Path, **settings: Any) -> InfoPOTrainer:
    names = ("model", "peft_config")
    given = {name: settings.pop(name) for name in names if name in settings}
    trainer = InfoPOTrainer(
        args=InfoPOConfig(
            output_dir=str(folder),
            **PLAIN_SGD
            | {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "report_to": "none"}
            | settings,
        ),
        train_dataset=random_dataset(8),
        processing_class=TOKENIZER,
        **{"model": tiny_llama()} | given,
    )
    trainer.train()
    return trainer


def header(text: str) -> dict[str, Any]:
    front = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(front, dict)
    return front


def test_every_saved_model_has_a_card_and_tags(tmp_path: Path) -> None:
    trainer = trained(tmp_path, objective="dpo", beta=0.3)
    trainer.save_final_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert header(card)["library_name"] == "transformers"
        assert {"infopo", "dpo"} <= set(header(card)["tags"])
        for part in ("beta = 0.3", "DPO", "8 rows", "arXiv 2305.18290", "2505.08507", "- transformers: "):
            assert part in card, part
    assert {"infopo", "dpo"} <= set(trainer.model.model_tags)


def test_an_adapters_card_takes_the_place_of_pefts_blank_form_and_its_base_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama().save_pretrained(tmp_path / "sft")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = trained(tmp_path / "out", model="../sft", peft_config=lora)
    trainer.save_final_model()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "More Information Needed" not in card
    assert header(card)["library_name"] == "peft"
    assert "An adapter of `sft`" in card
    assert str(tmp_path) not in card
    monkeypatch.chdir(tmp_path)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str((tmp_path / "sft").resolve())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_card_is_written_on_request_with_the_arguments_of_trl_and_of_transformers(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.create_model_card(model_name="mine", dataset_name="org/pairs", tags="mine-too", language="en")
    front = header((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert (front["model_name"], front["datasets"]) == ("mine", ["org/pairs"])
    assert "mine-too" in front["tags"]


@pytest.mark.parametrize(
    "text",
    [
        "a: b\n---\nc",
        "'\"{}[]#&*!|>%@`",
        "tags: [evil]\n- x",
        "<script>alert(1)</script>",
        "\x1b[31mred",
        "ünïcode 名前",
    ],
)
def test_any_text_leaves_the_card_readable(text: str) -> None:
    card = render(
        Card(name=text, base=text, mixture=[("infopo", {"beta": 1.0}, 1.0)], reference=text, datasets=[text])
    )
    front = header(card)
    assert front["tags"][:3] == ["generated_from_trainer", "preference-optimization", "infopo"]
    assert card.count("\n---\n") == 1
    assert "\x1b" not in card


def test_secrets_and_paths_stay_at_home() -> None:
    card = render(
        Card(
            name="m",
            base="/home/somebody/models/sft",
            mixture=[("infopo", {}, 1.0)],
            reference="",
            datasets=["https://me:pass@host/rows.jsonl?token=abc", "../private/rows.jsonl", "org/public"],
        )
    )
    assert "pass" not in card
    assert "abc" not in card
    assert "somebody" not in card
    assert "private" not in card
    assert header(card)["datasets"] == ["org/public"]


def test_the_paper_and_the_library_are_cited_as_what_they_are() -> None:
    card = render(Card(name="m", base=None, mixture=[("infopo", {}, 1.0)], reference=""))
    paper, library = card.split("```bibtex")[1].split("@software")
    assert "doi = {10.18653/v1/2025.naacl-long.585}" in paper
    assert f"version = {{{infopo.__version__}}}" in library
    assert "arxiv" not in library.lower()
