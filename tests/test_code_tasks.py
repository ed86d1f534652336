"""HumanEval and MBPP as tasks: rows become items, and responses become marks, with real sandboxes."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infopo.cli import main
from infopo.errors import ConfigError, DataError
from infopo.evaluation import sandbox
from infopo.evaluation.code_tasks import by_value, humaneval_item, mbpp_item
from infopo.evaluation.items import Answered, Item, Mark
from infopo.evaluation.tasks import task
from infopo.evaluation.verifiers import verifier_named

DATA = Path(__file__).parents[2] / "shared" / "data"
HUMANEVAL = DATA / "humaneval" / "HumanEval.jsonl.gz"
MBPP = DATA / "mbpp" / "sanitized-mbpp.json"

COMPLETE = {
    "task_id": "HumanEval/7",
    "prompt": (
        "import math\n\n\ndef twice(x):\n    return 2 * x\n\n\ndef halves(xs):\n"
        '    """ Halve each number, rounded down. """\n'
    ),
    "entry_point": "halves",
    "canonical_solution": "    return [math.floor(x / 2) for x in xs]\n",
    "test": (
        "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([5, 4]) == [2, 2]\n"
        "    assert candidate([twice(3)]) == [3]\n    assert halves([]) == []\n"
    ),
}
DESCRIBED = {
    "task_id": 12,
    "prompt": "Write a function to add up a list.",
    "code": "import sys\ndef sum(xs):\n    s = 0\n    for x in xs: s += x\n    return s",
    "test_imports": ["import math"],
    "test_list": ["assert sum([1, 2]) == 3", "assert math.isclose(sum([]), sys.getsizeof(0) * 0)"],
}


@pytest.fixture
def allowed() -> Iterator[None]:
    before = sandbox._allowed
    try:
        sandbox.allow("uid")
    except ConfigError as error:
        pytest.skip(str(error))
    yield
    sandbox._allowed = before


def marks(item: Item, *responses: str) -> list[Mark]:
    return list(by_value([Answered(item, response) for response in responses]))


def test_a_function_is_completed_and_graded(allowed: None):
    item = humaneval_item(COMPLETE, "file:1")
    assert item.id == "humaneval/7"
    assert item.prompt == COMPLETE["prompt"]
    json.dumps(item.gold)
    body = COMPLETE["canonical_solution"]
    found = marks(
        item, body, f"```python\ndef halves(xs):\n{body}```", "    return xs", "    pass", "I do not know."
    )
    assert [mark.correct for mark in found] == [True, True, False, False, False]
    assert found[0].answer == f"{COMPLETE['prompt']}{body.rstrip()}"
    assert [mark.note for mark in found] == [None, None, None, None, "no code found"]


def test_a_described_function_is_graded(allowed: None):
    item = mbpp_item(DESCRIBED, "file:1")
    assert item.gold["functions"] == ["sum"]
    assert str(item.prompt).endswith("these tests:\n\n" + "\n".join(DESCRIBED["test_list"]))
    right = "def sum(xs):\n    return xs[0] + sum(xs[1:]) if xs else 0"
    found = marks(item, right, f"[BEGIN]\n{right}\n[DONE]\nYou are", "def total(xs): return 0", "def sum(xs: return 0",
                  "import numpy\n" + right, "x" * 10)  # fmt: skip
    assert [(mark.correct, mark.note) for mark in found] == [
        (True, None), (True, None), (False, "no code found"), (False, "does not compile"),
        (False, "fails when loaded"), (False, "no code found"),
    ]  # fmt: skip


def test_files_of_every_form_give_the_same_items(tmp_path: Path):
    rows = [COMPLETE, {**COMPLETE, "task_id": "HumanEval/8"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    # As a repository of the hub looks when it is downloaded.
    hub = tmp_path / "hub" / "openai_humaneval"
    hub.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), hub / "test-00000-of-00001.parquet")
    load = task("humaneval").load
    items = [load(str(tmp_path / name)) for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "hub")]
    assert all(each == items[0] for each in items)
    assert [item.id for item in items[0]] == ["humaneval/7", "humaneval/8"]


def test_the_worked_examples_of_mbpp_are_no_items(tmp_path: Path):
    rows: list[Any] = [{**DESCRIBED, "task_id": number} for number in range(1, 7)]
    full = {**DESCRIBED, "task_id": 11, "text": DESCRIBED["prompt"], "test_setup_code": "import math"}
    rows.append({key: full[key] for key in full if key not in ("prompt", "test_imports")})
    (tmp_path / "mbpp.json").write_text(json.dumps(rows), encoding="utf-8")
    items = task("mbpp").load(str(tmp_path / "mbpp.json"))
    assert [item.id for item in items] == ["mbpp/1", "mbpp/5", "mbpp/6", "mbpp/11"]
    assert items[0].gold == items[3].gold
    assert len(task("mbpp").examples) == 3


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("humaneval", {**COMPLETE, "test": None}, r"a.jsonl:1: test: expected text, got None; columns are task_id"),
        ("humaneval", {**COMPLETE, "entry_point": "other"}, r"prompt: expected Python that defines 'other'"),
        ("humaneval", {**COMPLETE, "task_id": None}, r"task_id: expected the problem's number"),
        ("mbpp", COMPLETE, r"test_list: expected a list of texts, got None"),
        ("mbpp", {**DESCRIBED, "test_list": ["assert 1 == 1"]}, r"test_list: expected calls of a function"),
        ("mbpp", [1], r"expected an? .*object"),
    ],
)  # fmt: skip
def test_rows_of_another_form_are_refused_by_name(name: str, row: Any, message: str, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        task(name).load(str(tmp_path / "a.jsonl"))


@pytest.mark.long
@pytest.mark.skipif(not HUMANEVAL.exists(), reason="needs ../shared/data")
def test_every_canonical_solution_of_humaneval_passes_and_every_empty_body_fails(allowed: None):
    with gzip.open(HUMANEVAL, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    items = task("humaneval").load(str(HUMANEVAL))
    right = [Answered(item, row["canonical_solution"]) for item, row in zip(items, rows, strict=True)]
    empty = [Answered(item, "    pass") for item in items]
    found = list(by_value([*right, *empty]))
    assert [mark.correct for mark in found] == [True] * 164 + [False] * 164


@pytest.mark.long
@pytest.mark.skipif(not MBPP.exists(), reason="needs ../shared/data")
def test_every_canonical_solution_of_mbpp_passes(allowed: None):
    rows = json.loads(MBPP.read_text(encoding="utf-8"))
    items = [mbpp_item(row, "row") for row in rows]
    found = by_value([Answered(item, row["code"]) for item, row in zip(items, rows, strict=True)])
    assert [item.id for item, mark in zip(items, found, strict=True) if not mark.correct] == []


def test_the_command_marks_responses_and_records_the_isolation(
    tmp_path: Path, allowed: None, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "rows.jsonl").write_text(json.dumps(COMPLETE), encoding="utf-8")
    # Two samples, as published files name the problem.
    right, wrong = COMPLETE["canonical_solution"], "    return xs\n"
    given = {"task_id": "HumanEval/7", "completion": [right, wrong]}
    (tmp_path / "given.jsonl").write_text(json.dumps(given), encoding="utf-8")
    command = ["evaluate", "--responses", str(tmp_path / "given.jsonl"), "--tasks", "humaneval",
               "--data", f"humaneval={tmp_path / 'rows.jsonl'}", "--output", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 2
    assert "--allow-code-execution" in capsys.readouterr().err
    assert main([*command, "--allow-code-execution", "--isolation", "walls"]) == 2
    assert "expected one of namespaces, uid, none, got 'walls'" in capsys.readouterr().err
    assert main([*command, "--allow-code-execution"]) == 0
    record = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))["tasks"]["humaneval"]
    assert record["isolation"] == sandbox.allowed().as_record()
    rule = record["rules"]["by_value"]
    assert (rule["correct"], rule["n"], rule["pass@1"]["value"], rule["pass@2"]["value"]) == (1, 2, 0.5, 1.0)


def test_pairs_can_be_verified_by_running_them(
    tmp_path: Path, allowed: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sandbox, "_allowed", None)
    with pytest.raises(ConfigError, match="--allow-code-execution"):
        verifier_named("mbpp")
    verifier = verifier_named("mbpp", allow_code_execution=True)
    (tmp_path / "rows.jsonl").write_text(json.dumps(DESCRIBED), encoding="utf-8")
    (item,) = verifier.load(str(tmp_path / "rows.jsonl"))
    answers = [Answered(item, f"def sum(xs):\n    return {value}") for value in ("3 * bool(xs)", "0")]
    assert verifier.score(answers) == [True, False]
