"""README's numbers are those of the result file that is kept beside its picture."""

import json
from pathlib import Path

import pytest

import speed
from infopo.workflows.demo import table

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_is_that_of_the_kept_result() -> None:
    summary = json.loads((ROOT / "docs" / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert "\n".join(table(summary)) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_all_fifteen_results_are_shown() -> None:
    summary = json.loads((ROOT / "docs" / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert [len(results) for results in summary["methods"].values()] == [3] * 5


def test_the_speed_table_is_that_of_the_kept_result() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))
    assert speed.table(result) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert min(len(regime["ratio_trl"]["rounds"]) for regime in result["regimes"]) == 9  # as README says
    assert result["commit"].isalnum()  # not a tree with changes of its own


@pytest.mark.parametrize("name", ["cpu-32k", "cpu-32k-k", "cpu-32k-k-trl"])
def test_the_tables_of_the_large_vocabulary_are_those_of_the_kept_results(name: str) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert speed.table(result) in (ROOT / "benchmarks" / "LOG.md").read_text(encoding="utf-8")
    assert result["settings"]["model"]["vocab_size"] == 32_000
    assert result["commit"].isalnum()


def test_the_epoch_from_text_to_a_model_is_that_of_the_kept_result() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "end-to-end.json").read_text(encoding="utf-8"))
    log = (ROOT / "benchmarks" / "LOG.md").read_text(encoding="utf-8")
    for peer in ("ratio_trl", "ratio_trl_precomputed"):
        ratio = result["end_to_end"][peer]
        low, high = ratio["range"]
        assert f"| {ratio['median']:.2f} [{low:.2f}, {high:.2f}] |" in log
        assert len(ratio["rounds"]) == 3
    assert result["end_to_end"]["pairs"] == 100
