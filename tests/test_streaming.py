"""Training on a stream: the same steps as on the rows in memory, in constant memory, with every row accounted for."""

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

from infopo.arguments import InfoPOConfig
from infopo.cli import main
from infopo.data.counts import DataCounts
from infopo.data.encode import Encoder
from infopo.data.streaming import ExampleStream
from infopo.errors import DataError, ModelError, RecipeError
from infopo.lab import policy_path
from infopo.lab.tokenizer import build_tokenizer
from infopo.models import load_policy
from infopo.records import PreferenceRow
from infopo.runs import read_run
from infopo.trainer import InfoPOTrainer
from test_doors import pairs
from test_sources import write_lines
from worlds import PLAIN_SGD

TOKENIZER = build_tokenizer()
SETTINGS: dict[str, Any] = {
    **PLAIN_SGD, "max_steps": 4, "report_to": "none", "per_device_train_batch_size": 2, "reference": "live",
    "train_sampling_strategy": "sequential",
}  # fmt: skip


def stream_of(n: int, **settings: Any) -> ExampleStream:
    def open_rows(counts: DataCounts) -> Iterator[PreferenceRow]:
        for i in range(n):
            counts.rows += 1
            yield PreferenceRow(f"{i}+1=", [f"{i + 1}"], [f"{i}"], f"s:{i + 1}")

    return ExampleStream(open_rows, Encoder(TOKENIZER, **settings), DataCounts(on_bad_row="skip", source="s"))


def trainer_of(folder: Path, train: Any, **settings: Any) -> InfoPOTrainer:
    args = InfoPOConfig(output_dir=str(folder), **{**SETTINGS, **settings})
    model = load_policy(str(policy_path()), dtype="float32")
    return InfoPOTrainer(model=model, args=args, train_dataset=train, processing_class=TOKENIZER)


def losses(trainer: InfoPOTrainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stream_trains_as_its_rows_in_memory_do(tmp_path: Path, accumulation: int):
    rows = Dataset.from_list(pairs(4 * 2 * accumulation))
    settings = {"gradient_accumulation_steps": accumulation}
    memory = trainer_of(tmp_path / "a", rows, **settings)
    streamed = trainer_of(tmp_path / "b", rows.to_iterable_dataset(), **settings)
    for trainer in (memory, streamed):
        trainer.train()
    assert len(losses(memory)) == 4
    assert losses(streamed) == losses(memory)


def test_a_stream_that_is_used_up_begins_again(tmp_path: Path):
    stream = stream_of(3)
    assert [e.row_id for e in islice(stream, 7)] == ["s:1", "s:2", "s:3", "s:1", "s:2", "s:3", "s:1"]
    assert (stream.counts.rows, stream.counts.used) == (7, 7)
    trainer = trainer_of(tmp_path, stream_of(3))
    trainer.train()
    assert trainer.state.global_step == 4


def test_ranks_share_the_usable_rows_and_have_a_batch_each_at_every_step():
    shares = [
        [e.row_id for e in islice(stream_of(5).for_rank(lambda e: None, rank, 2), 4)] for rank in (0, 1)
    ]
    assert shares == [["s:1", "s:3", "s:5", "s:1"], ["s:2", "s:4", "s:2", "s:4"]]
    with pytest.raises(DataError, match="no row can be used by process 1 of 2: too few"):
        next(iter(stream_of(1).for_rank(lambda e: None, 1, 2)))


def test_rows_of_a_stream_are_used_or_skipped_by_reason():
    stream = stream_of(12, max_length=8, on_too_long="drop")  # from 10+1= on, a digit more on each side
    list(islice(stream, 25))
    counts = stream.counts
    assert counts.rows == counts.used + sum(counts.skipped.values())
    assert counts.used == 25
    assert counts.skipped["too long"] == 4
    with pytest.raises(DataError, match="no row can be used by process 0 of 1: 12 x too long"):
        next(iter(stream_of(12, max_length=2, on_too_long="drop")))


def test_looking_at_the_first_example_leaves_the_ledger_alone():
    stream = stream_of(3)
    assert stream.first().row_id == "s:1"
    assert stream.counts == DataCounts(on_bad_row="skip", source="s")


def test_memory_does_not_grow_with_the_rows():
    stream = iter(stream_of(10**9))
    list(islice(stream, 200))
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in islice(stream, 2000):
        pass
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 200_000  # bytes; 2000 examples would hold more than that


def test_a_stream_asks_for_max_steps_and_says_why(tmp_path: Path):
    rows = Dataset.from_list(pairs(4)).to_iterable_dataset()
    with pytest.raises(
        RecipeError, match="max_steps: is required for a stream: how many rows there are"
    ) as caught:
        trainer_of(
            tmp_path, rows, max_steps=-1, dataloader_num_workers=2, train_sampling_strategy="group_by_length"
        )
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "max_steps", "dataloader_num_workers", "train_sampling_strategy",
    ]  # fmt: skip


def test_the_reference_of_a_stream_is_live(tmp_path: Path):
    rows = Dataset.from_list(pairs(4)).to_iterable_dataset()
    with pytest.raises(RecipeError, match="the rows of a stream cannot be enumerated before training"):
        trainer_of(tmp_path, rows, reference="precompute")
    assert trainer_of(tmp_path, rows, reference="auto").ref_model is not None


def test_mismatched_responses_are_not_drawn_from_a_stream(tmp_path: Path):
    rows = Dataset.from_list(pairs(4)).to_iterable_dataset()
    with pytest.raises(
        RecipeError, match=r"KTO .*: responses to other prompts cannot be drawn from a stream"
    ):
        trainer_of(tmp_path, rows, objective="kto")


def test_each_example_of_a_stream_is_judged_when_it_comes(tmp_path: Path):
    unpaired = [
        {"prompt": "1+1=", "chosen": ["2"], "rejected": ["3"]},
        {"prompt": "1+1=", "chosen": ["2"], "rejected": []},
    ]
    rows = IterableDataset.from_generator(lambda: iter(unpaired))
    with pytest.raises(DataError, match="train_dataset:2: has no rejected response; DPO compares pairs"):
        trainer_of(tmp_path, rows, loss_type=["sigmoid"]).train()
    trainer_of(tmp_path, rows).train()
    long = [*pairs(1), {"prompt": "1", "chosen": "2" * 600, "rejected": "3"}]
    with pytest.raises(ModelError, match="reads at most 512 tokens"):
        trainer_of(tmp_path, IterableDataset.from_generator(lambda: iter(long))).train()


def test_a_resumed_stream_goes_on_where_it_was(tmp_path: Path):
    rows = Dataset.from_list(pairs(10)).to_iterable_dataset()
    settings = {"save_strategy": "steps", "save_steps": 2, "save_only_model": False}
    whole = trainer_of(tmp_path / "run", rows, **settings)
    whole.train()
    again = trainer_of(tmp_path / "run", rows, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(again)[-2:] == losses(whole)[-2:]


def test_a_recipe_streams_files_and_its_run_accounts_for_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl.gz", [*pairs(5), {"prompt": "1+1=", "chosen": "", "rejected": "3"}])
    recipe = {
        "model": {"name_or_path": "lab:policy"},
        "data": {"path": "*.gz", "streaming": True, "max_length": 128, "on_bad_row": "skip"},
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
        },
        "output_dir": "run",
    }
    Path("r.yaml").write_text(json.dumps(recipe))
    assert main(["check", "r.yaml"]) == 0, capsys.readouterr().err
    assert "the data are streamed: the first 1000 usable rows are looked at" in capsys.readouterr().out
    assert main(["train", "r.yaml"]) == 0, capsys.readouterr().err
    assert "*.gz: 9 rows, 8 used, 1 skipped\n" in capsys.readouterr().out
    run = read_run(Path("run"))
    assert run.environment is not None
    assert run.environment["rows"][0]["skipped"] == {"empty chosen": 1}
    assert len(run.series("loss")[1]) == 4


@pytest.mark.long
def test_a_hundred_thousand_rows_stream_in_flat_memory(tmp_path: Path):
    """`make soak` does so with ten million."""
    out = tmp_path / "soak.json"
    script = Path(__file__).parents[1] / "scripts" / "soak_stream.py"
    done = subprocess.run([sys.executable, str(script), "--rows", "100000", "--out", str(out)], check=False)
    assert done.returncode == 0
    result = json.loads(out.read_text())
    assert result["rows"] == result["used"] + result["skipped"]["empty rejected"]
    assert result["growth_mib"] <= 32
