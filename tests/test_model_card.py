"""The card beside a saved model says how it was made, and holds nothing that its author did not mean to publish."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import infopo
from infopo.arguments import InfoPOConfig
from infopo.citations import entry, paper_of
from infopo.data.counts import DataCounts
from infopo.hashing import hash_weights
from infopo.lab.tokenizer import build_tokenizer
from infopo.losses.catalog import OBJECTIVES
from infopo.model_card import Card, refresh, render
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
        for part in (
            "beta = 0.3",
            "DPO",
            "8 rows",
            "arXiv 2305.18290",
            "Secretly a Reward Model",
            "- transformers: ",
        ):
            assert part in card, part
        assert "2505.08507" not in card, "DPO is not InfoPO's"
        assert f"| weights of the base | hash {trainer.policy_hash} |" in card
        assert f"| tokens trained on | SHA-256 {trainer.data_hash()} |" in card
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
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "sft", dtype="float32")
    assert f"| weights of the base | hash {hash_weights(base).whole} |" in card
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


def test_results_stand_in_the_card_and_in_its_metadata_and_are_replaced_when_there_are_others(
    tmp_path: Path,
) -> None:
    trainer = trained(tmp_path / "run", probe_size=8, objective="dpo")
    trainer.save_final_model()
    path = tmp_path / "run" / "README.md"
    first = path.read_text(encoding="utf-8")
    assert "| chosen log-prob | " in first
    assert "verdicts: length bias, " in first
    assert "- length bias: Chosen responses are shorter" in first
    assert "model-index" not in header(first)
    path.write_text(first.replace("## Training", "## My words\n\nKept.\n\n## Training"), encoding="utf-8")
    folder = tmp_path / "run" / "evaluation"
    folder.mkdir()
    for accuracy in (0.25, 0.5):
        task = {
            "headline": "numeric",
            "items": 8,
            "data": {"source": str(tmp_path / "problems.jsonl")},
            "rules": {"numeric": {"accuracy": accuracy, "ci95": [0.1, 0.9]}},
        }
        record = {"schema_version": 2, "tasks": {"gsm8k": task}}
        (folder / "eval.json").write_text(json.dumps(record), encoding="utf-8")
        assert refresh(tmp_path / "run")
    card = ModelCard.load(path)
    [result] = card.data.eval_results or []
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("gsm8k", "accuracy", 0.5)
    assert result.metric_name == "numeric, 95 % interval 0.100 to 0.900, 8 items"
    assert "| gsm8k | 0.500 [0.100, 0.900] | 8 | numeric |" in card.text
    assert "0.250" not in card.text
    assert "\n\nKept.\n\n" in card.text
    assert str(tmp_path) not in str(card)
    assert card.text.count("## Results") == 1


def test_a_card_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    for text in ("# Mine", "---\ntags: [a]\n---\n# Mine", "---\n[unclosed\n---\n"):
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        assert not refresh(tmp_path)
        assert (tmp_path / "README.md").read_text(encoding="utf-8") == text


def test_rows_that_were_skipped_are_told_with_their_reason(tmp_path: Path) -> None:
    counts = DataCounts(source="/home/me/a.jsonl + org/b", rows=5, used=3)
    counts.skipped["tie"] = 2
    card = render(Card("m", None, [("sft", {}, 1.0)], "none", accounts={"train": counts}, data_hash="abc"))
    assert "| rows, train | a.jsonl + org/b: 5 read, 3 used, 2 skipped; 2 skipped: tie |" in card
    assert "@misc" not in card, "likelihood has no paper of its own"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_paper_of_a_loss_is_cited_with_title_and_author(name: str) -> None:
    number = paper_of(OBJECTIVES[name].source)
    if number is None:
        assert name in ("sft", "repo")
        return
    text = entry(number)
    assert "title = {" in text
    assert "author = {" in text
    assert number in text


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
