"""`infopo pairs`: a policy's samples become preference data, which a kill, shards and a second rule do not change."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from infopo.build import build_trainer
from infopo.cli import main
from infopo.config import parse_recipe
from infopo.data.counts import DataCounts
from infopo.data.sources import read_rows
from infopo.errors import ConfigError
from infopo.evaluation.settings import EvaluationSettings
from infopo.lab.problems import solve, verify
from infopo.models import load_tokenizer
from infopo.trainer import InfoPOTrainer
from infopo.workflows.ask_judge import JudgeSettings
from infopo.workflows.pairs import marker_of
from servers import Answer, completion, serving

LAB = ["--prompts", "lab", "--verifier", "lab", "--limit", "24"]
SAMPLED = ["pairs", "lab:policy", *LAB, "--num-generations", "4"]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pairs of 24 problems of the lab."""
    folder = tmp_path_factory.mktemp("pairs")
    assert main([*SAMPLED, "--output", str(folder / "pairs.jsonl")]) == 0
    return folder


def lines(path: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_chosen_responses_are_right_and_everything_reads_the_file(sampled: Path) -> None:
    rows = lines(sampled / "pairs.jsonl")
    assert len(rows) >= 3
    for row in rows:
        problem = solve(row["prompt"][-1]["content"])
        assert verify(problem, row["chosen"][0]["content"])
        assert not verify(problem, row["rejected"][0]["content"])
    counts = DataCounts()
    assert len(list(read_rows(str(sampled / "pairs.jsonl"), counts))) == len(rows)
    assert not counts.has_findings
    cache = str(sampled / "cache")
    loaded = datasets.load_dataset(
        "json", data_files=str(sampled / "pairs.jsonl"), split="train", cache_dir=cache
    )
    assert loaded.to_list() == rows


def test_provenance_and_pass_rates_stand_beside_it(sampled: Path) -> None:
    record = json.loads((sampled / "pairs.provenance.json").read_text(encoding="utf-8"))
    assert record["verifier"] == "lab"
    assert record["model"]["name"] == "lab:policy"
    assert len(record["model"]["weights"]) == 48
    assert record["law"]["temperature"] == 1.0
    counts = record["counts"]
    assert (counts["prompts"], counts["samples"]) == (24, 96)
    assert counts["rows"] == len(lines(sampled / "pairs.jsonl"))
    assert counts["rows"] + sum(counts["why_not"].values()) == 24
    rates = [line["pass_rate"] for line in lines(sampled / "pairs.pass-rates.jsonl")]
    assert len(rates) == 24
    assert counts["pass_rate"] == pytest.approx(sum(rates) / 24)


def test_a_kill_shards_and_a_second_look_give_the_same_file(sampled: Path, tmp_path: Path) -> None:
    expected = (sampled / "pairs.jsonl").read_bytes()
    samples = (sampled / "pairs.samples" / "samples.jsonl").read_bytes()

    # What a kill leaves: some whole lines, and the beginning of one.
    killed = tmp_path / "killed.samples"
    killed.mkdir()
    (killed / "samples.jsonl").write_bytes(samples[: len(samples) // 2])
    assert main([*SAMPLED, "--output", str(tmp_path / "killed.jsonl")]) == 0
    assert (tmp_path / "killed.jsonl").read_bytes() == expected

    for shard in ("1/2", "2/2"):
        assert main([*SAMPLED, "--output", str(tmp_path / "shards.jsonl"), "--shard", shard]) == 0
    assert not (tmp_path / "shards.jsonl").exists()
    assert main([*SAMPLED, "--output", str(tmp_path / "shards.jsonl")]) == 0
    assert (tmp_path / "shards.jsonl").read_bytes() == expected

    again = ["pairs", "--samples", str(sampled / "pairs.samples" / "samples.jsonl"), *LAB]
    assert main([*again, "--output", str(tmp_path / "again.jsonl")]) == 0
    assert (tmp_path / "again.jsonl").read_bytes() == expected
    assert main([*again, "--rule", "lists", "--output", str(tmp_path / "lists.jsonl")]) == 0
    counts = DataCounts()
    rows = list(read_rows(str(tmp_path / "lists.jsonl"), counts))
    assert len(rows) == len(lines(sampled / "pairs.jsonl"))
    assert counts.shapes[str(tmp_path / "lists.jsonl")].startswith("lists")


FUNCTIONS = '''
def length(prompts, completions, topic, **columns):
    """As TRL calls reward functions."""
    assert len(prompts) == len(completions) == len(topic) and set(topic) <= {"t"}
    return [float(len(completion[0]["content"])) for completion in completions]

def short(prompts, completions, **columns):
    return [1.0]

def text(prompts, completions, **columns):
    return ["good"] * len(completions)

def fails(prompts, completions, **columns):
    raise KeyError("answer")
'''


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of prompts, with functions of the user's in a module beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS, encoding="utf-8")
    rows = [{"prompt": [{"role": "user", "content": f"{a}+12=?"}], "topic": "t"} for a in range(10, 16)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_function_of_the_users_scores_as_it_would_for_trl(prompts: Path) -> None:
    common = [
        "pairs",
        "lab:policy",
        "--prompts",
        str(prompts),
        "--num-generations",
        "4",
        "--max-new-tokens",
        "40",
    ]
    assert main([*common, "--verifier", "my_rewards:length", "--rule", "best-worst"]) == 0
    rows = lines(Path("pairs.jsonl"))
    assert rows
    assert all(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in rows)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("my_rewards:short", "expected a list of"),
        ("my_rewards:text", "of row/0 got 'good'"),
        ("my_rewards:fails", "raised KeyError: 'answer'"),
        ("my_rewards:none", "there is no such function"),
        ("no_module_here:f", "no_module_here"),
        ("gsm9k", "expected a task"),
        ("judge:http://localhost", "add --yes if it may"),
        ("judge:nobody", "--judge: expected a URL or MODULE:FUNCTION"),
    ],
)
def test_a_verifier_that_cannot_mark_is_named(
    name: str, problem: str, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pairs", "lab:policy", "--prompts", str(prompts), "--verifier", name, "--num-generations", "2"]
    assert main([*command, "--max-new-tokens", "4", "--limit", "2"]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert "Traceback" not in error


def test_a_reward_model_scores_by_its_own_template(prompts: Path) -> None:
    tokenizer = load_tokenizer("lab:policy")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained("reward")
    tokenizer.save_pretrained("reward")
    common = [
        "pairs",
        "lab:policy",
        "--prompts",
        str(prompts),
        "--num-generations",
        "3",
        "--max-new-tokens",
        "40",
    ]
    assert main([*common, "--verifier", "reward:./reward", "--rule", "best-worst"]) == 0
    for row in lines(Path("pairs.jsonl")):
        scores = []
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores.append(model(ids).logits.item())
        assert scores[0] > scores[1]


def test_a_judge_scores_by_wins_against_the_other_responses(prompts: Path) -> None:
    def longer_is_better(body: dict, n: int) -> Answer:  # type: ignore[type-arg]
        _, first, second = re.findall(
            r"BEGINNING OF .*?\n(.*?)\n===== END", body["messages"][1]["content"], re.DOTALL
        )
        winner = "tie" if len(first) == len(second) else "1" if len(first) > len(second) else "2"
        return completion(json.dumps({"comparison": "By length.", "winner": winner}))

    with serving(longer_is_better) as served:
        command = [
            "pairs",
            "lab:policy",
            "--prompts",
            str(prompts),
            "--num-generations",
            "3",
            "--max-new-tokens",
            "40",
        ]
        command += ["--verifier", f"judge:{served.url}", "--rule", "best-worst", "--yes"]
        assert main(command) == 0
        first, asked = Path("pairs.jsonl").read_bytes(), len(served.bodies)
        assert asked
        # Answers and samples are kept.
        assert main(command) == 0
        assert len(served.bodies) == asked
    assert Path("pairs.jsonl").read_bytes() == first
    rows = lines(Path("pairs.jsonl"))
    assert rows
    assert all(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in rows)


@pytest.mark.parametrize(
    ("name", "judge", "problem"),
    [
        ("judge:http://localhost:9/v1", None, r"JudgeSettings\('http://localhost:9/v1'\)"),
        ("judge:my_module:my_judge", None, r"JudgeSettings\('my_module:my_judge'\)"),
        (
            "lab",
            "my_module:my_judge",
            "expected judge:my_module:my_judge beside settings of a judge, got 'lab'",
        ),
        ("judge:other:judge", "my_module:my_judge", "expected judge:my_module:my_judge beside"),
    ],
)
def test_a_judge_by_name_and_its_settings_go_together(
    tmp_path: Path, name: str, judge: str | None, problem: str
) -> None:
    settings = EvaluationSettings(["pairs"], num_samples=2)
    with pytest.raises(ConfigError, match=problem):
        marker_of(name, settings, JudgeSettings(judge) if judge else None, tmp_path, limit=None)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["lab:policy", "--samples", "x.jsonl", *LAB], "expected either a model"),
        (LAB, "expected either a model"),
        (["lab:policy", *LAB, "--num-generations", "1"], "--num-generations: expected at least 2"),
        (["lab:policy", *LAB, "--temperature", "0"], "--num-samples: greedy|--temperature"),
        (["lab:policy", *LAB, "--rule", "best"], "--rule: expected one of random"),
        (["lab:policy", "--verifier", "gsm8k"], "--prompts: expected a file"),
        (["--samples", "no.jsonl", *LAB], "no file"),
    ],
)
def test_what_cannot_be_paired_is_refused_in_one_line(
    arguments: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["pairs", *arguments]) == 2
    assert re.search(problem, capsys.readouterr().err)


def test_samples_of_other_prompts_are_refused(
    sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines_of_file = (sampled / "pairs.samples" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines_of_file]
    other = tmp_path / "samples.jsonl"
    swapped = [
        {**record, "item": "lab/0" if record["item"] == "lab/1" else record["item"]} for record in records
    ]
    other.write_text("".join(json.dumps(record) + "\n" for record in swapped), encoding="utf-8")
    assert main(["pairs", "--samples", str(other), *LAB, "--output", str(tmp_path / "p.jsonl")]) == 2
    assert "name the prompts that were sampled" in capsys.readouterr().err
    assert not (tmp_path / "p.jsonl").exists()


def test_log_probs_of_samples_are_those_of_the_reference_if_a_few_agree(
    sampled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = sampled / "pairs.samples" / "samples.jsonl"
    shifted = tmp_path / "shifted.jsonl"
    records = [{**record, "logp": record["logp"] - 0.1} for record in lines(samples)]
    shifted.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    def reference(model: str, file: Path | None) -> tuple[InfoPOTrainer, np.ndarray]:
        text = f"""
            model: {model}
            data: {{path: {sampled / "pairs.jsonl"}, cache: off}}
            reference: {{store: off, sides: both, samples: {file or "null"}}}
            train: {{probe_size: 0, anchor_size: 0}}
            output_dir: {tmp_path / "run"}
            """
        trainer = build_trainer(parse_recipe(text, source="test"))
        return trainer, trainer.train_dataset.reference

    _, computed = reference("lab:policy", None)
    trainer, taken = reference("lab:policy", samples)
    stored = {record["logp"] for record in lines(samples)}
    assert set(taken) <= stored
    assert not set(computed) <= stored
    np.testing.assert_allclose(taken, computed, atol=1e-4)
    said = "\n".join(trainer.description())
    assert f"whose log-probs of {len(taken)} responses are those of its samples" in said

    # Values that are another function's are not taken, and samples of other weights neither.
    _, again = reference("lab:policy", shifted)
    np.testing.assert_array_equal(again, computed)
    assert "differ by up to 0.1 nats" in caplog.text
    trainer, _ = reference("{name_or_path: lab:policy, dtype: bfloat16}", samples)
    assert "no response is a sample of it" in "\n".join(trainer.description())


@pytest.mark.parametrize("reads_it", [True, False])
def test_a_file_of_the_users_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reads_it: bool
) -> None:
    mine = tmp_path / "pairs.jsonl"
    mine.write_text('{"prompt": "1+1=?"}\n')
    prompts = str(mine) if reads_it else "lab"
    command = ["pairs", "lab:policy", "--prompts", prompts, "--verifier", "lab", "--output", str(mine)]
    assert main(command) == 2
    assert ("is what is read" if reads_it else "was not written by this command") in capsys.readouterr().err
    assert mine.read_text() == '{"prompt": "1+1=?"}\n'
