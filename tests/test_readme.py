"""README's numbers are those of the result file that is kept beside its picture."""

import json
from pathlib import Path

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
    assert min(len(regime["ratio_trl"]["rounds"]) for regime in result["regimes"]) == 9
    assert result["commit"].isalnum()  # not a tree with changes of its own
