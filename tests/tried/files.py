"""Data: each shape in each kind of file, and rows as well-known public sets write them (the content is ours)."""

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from infopo.catalog import DATA_SHAPES
from infopo.data.counts import DataCounts
from infopo.data.sources import read_rows
from infopo.errors import InfoPOError
from test_data_page import EXAMPLES
from tried.trial import Row, first_sentence, quiet

INTRODUCTION = """The example of each shape in [Data](data.md), from each kind of source; then rows as well-known public
sets write them, as JSON lines (the names are theirs, the content is ours). *Read* means that the rows are those that
[Data](data.md) shows, or that prompt and responses are whole.
"""

Rows = list[dict[str, Any]]


def _json_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _write(name: str, content: Callable[[Rows], bytes]) -> Callable[[Rows, Path], Any]:
    def write(rows: Rows, folder: Path) -> str:
        (folder / name).write_bytes(content(rows))
        return str(folder / name)

    return write


def _csv(rows: Rows, folder: Path) -> str:
    cells = [
        {k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in row.items() if v is not None}
        for row in rows
    ]
    pa_csv.write_csv(pa.Table.from_pylist(cells), folder / "rows.csv")
    return str(folder / "rows.csv")


def _parquet(rows: Rows, folder: Path) -> str:
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def _arrow(rows: Rows, folder: Path) -> str:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return str(folder / "rows.arrow")


def _folder(rows: Rows, folder: Path) -> str:
    (folder / "train.jsonl").write_bytes(_json_lines(rows))
    return str(folder)


def _saved(rows: Rows, folder: Path) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return str(folder / "saved")


SOURCES: dict[str, Callable[[Rows, Path], Any]] = {
    "JSON lines": _write("rows.jsonl", _json_lines),
    "JSON": _write("rows.json", lambda rows: json.dumps(rows).encode()),
    "`.jsonl.gz`": _write("rows.jsonl.gz", lambda rows: gzip.compress(_json_lines(rows))),
    "`.jsonl.zst`": _write(
        "rows.jsonl.zst", lambda rows: pa.compress(_json_lines(rows), "zstd", asbytes=True)
    ),
    "CSV": _csv,
    "Parquet": _parquet,
    "Arrow": _arrow,
    "a folder": _folder,
    "`save_to_disk`": _saved,
    "`Dataset`": lambda rows, folder: datasets.Dataset.from_list(rows),
    "`IterableDataset`": lambda rows, folder: datasets.Dataset.from_list(rows).to_iterable_dataset(),
}


def _turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _from(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


ASKED, GOOD, BAD = "What is one and one?", "It is two.", "It is three."
PUBLIC: dict[str, dict[str, Any]] = {
    "Anthropic/hh-rlhf": {"chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {GOOD}",
                          "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {BAD}"},
    "HuggingFaceH4/ultrafeedback_binarized": {
        "prompt": ASKED, "prompt_id": "1", "chosen": _turns(ASKED, GOOD), "rejected": _turns(ASKED, BAD),
        "messages": _turns(ASKED, GOOD), "score_chosen": 8.0, "score_rejected": 4.0},
    "trl-lib/ultrafeedback_binarized": {"chosen": _turns(ASKED, GOOD), "rejected": _turns(ASKED, BAD),
                                        "score_chosen": 8.0, "score_rejected": 4.0},
    "trl-lib/kto-mix-14k": {"prompt": _turns(ASKED), "completion": [{"role": "assistant", "content": GOOD}],
                            "label": True},
    "argilla/dpo-mix-7k": {"dataset": "one", "chosen": _turns(ASKED, GOOD), "rejected": _turns(ASKED, BAD),
                           "chosen_rating": 5.0, "rejected_rating": 3.0},
    "mlabonne/orpo-dpo-mix-40k": {"source": "one", "chosen": _turns(ASKED, GOOD), "rejected": _turns(ASKED, BAD),
                                  "prompt": ASKED, "question": None},
    "Intel/orca_dpo_pairs": {"system": "Be brief.", "question": ASKED, "chosen": GOOD, "rejected": BAD},
    "argilla/distilabel-intel-orca-dpo-pairs": {
        "system": "Be brief.", "input": ASKED, "chosen": GOOD, "rejected": BAD, "status": "unchanged",
        "rating": [9.0, 5.0]},
    "jondurbin/truthy-dpo-v0.1": {"id": "1", "source": "one", "system": "Be brief.", "prompt": ASKED, "chosen": GOOD,
                                  "rejected": BAD},
    "hiyouga/DPO-En-Zh-20k": {"conversations": _from(ASKED), "chosen": {"from": "gpt", "value": GOOD},
                              "rejected": {"from": "gpt", "value": BAD}},
    "openbmb/UltraFeedback": {
        "source": "one", "instruction": ASKED, "models": ["a", "b"], "correct_answers": ["None"],
        "completions": [{"model": "a", "response": GOOD, "overall_score": 8.0, "annotations": {}},
                        {"model": "b", "response": BAD, "overall_score": 3.0, "annotations": {}}]},
    "nvidia/HelpSteer2": {"prompt": ASKED, "response": GOOD, "helpfulness": 4, "correctness": 4, "coherence": 4,
                          "complexity": 1, "verbosity": 1},
    "nvidia/HelpSteer3": {"domain": "general", "language": "english", "context": _turns(ASKED), "response1": GOOD,
                          "response2": BAD, "overall_preference": -2, "individual_preference": []},
    "berkeley-nest/Nectar": {
        "prompt": f"\n\nHuman: {ASKED}\n\nAssistant: ", "num_responses": 2, "turns": 1, "good_natured": True,
        "answers": [{"answer": GOOD, "model": "a", "rank": 1.0}, {"answer": BAD, "model": "b", "rank": 2.0}]},
    "PKU-Alignment/PKU-SafeRLHF": {
        "prompt": ASKED, "response_0": GOOD, "response_1": BAD, "is_response_0_safe": True, "is_response_1_safe": True,
        "better_response_id": 0, "safer_response_id": 0},
    "lmsys/chatbot_arena_conversations": {
        "question_id": "1", "model_a": "a", "model_b": "b", "winner": "model_a", "judge": "j", "turn": 1,
        "conversation_a": _turns(ASKED, GOOD), "conversation_b": _turns(ASKED, BAD)},
    "stanfordnlp/SHP": {"post_id": "1", "history": ASKED, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1,
                        "score_A": 9, "score_B": 2, "score_ratio": 4.5},
    "openai/summarize_from_feedback": {
        "info": {"id": "1", "post": ASKED, "title": "Sums"}, "choice": 0,
        "summaries": [{"text": GOOD, "policy": "a"}, {"text": BAD, "policy": "b"}], "worker": "w"},
    "lvwerra/stack-exchange-paired": {"qid": 1, "question": ASKED, "response_j": GOOD, "response_k": BAD,
                                      "date": "2020-01-01", "metadata": ["m"]},
    "OpenAI's preference format": {
        "input": {"messages": _turns(ASKED), "tools": [], "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": GOOD}],
        "non_preferred_output": [{"role": "assistant", "content": BAD}]},
    "ms-swift": {"messages": _turns(ASKED, GOOD), "rejected_response": BAD},
    "LLaMA-Factory, Alpaca": {"instruction": ASKED, "input": "", "chosen": GOOD, "rejected": BAD},
    "LLaMA-Factory, ShareGPT": {"conversations": _from(ASKED), "chosen": {"from": "gpt", "value": GOOD},
                                "rejected": {"from": "gpt", "value": BAD}, "system": "Be brief."},
    "LLaMA-Factory, KTO": {"messages": _turns(ASKED, GOOD), "label": True},
    "allenai/reward-bench": {"prompt": ASKED, "chosen": GOOD, "chosen_model": "a", "rejected": BAD,
                             "rejected_model": "b", "subset": "sums", "id": 1},
    "snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset": {
        "prompt_id": "1", "prompt": ASKED, "chosen": _turns(ASKED, GOOD), "rejected": _turns(ASKED, BAD),
        "all_generated_responses": [GOOD, BAD], "all_rm_scores": [0.5, -0.5]},
}  # fmt: skip


SHAPE_NAMED = {("`lists`", "CSV"): "lists"}
"""A cell of a CSV file is text, and a list of texts may be what the policy is to write: there the shape is named."""


def names() -> list[str]:
    return [*(f"`{shape}`" for shape in DATA_SHAPES), *PUBLIC]


def row(name: str) -> Row:
    return _public(name) if name in PUBLIC else _shape(name)


def _shape(name: str) -> Row:
    """One shape in every kind of source; the example of `docs/data.md` says what it is to become."""
    given, expected = EXAMPLES[name.strip("`")]
    outcomes = {
        source: _read([given], write, [expected], SHAPE_NAMED.get((name, source)))
        for source, write in SOURCES.items()
    }
    refused = {source: outcome for source, outcome in outcomes.items() if outcome != "read"}
    named = {s: f"{s} (with `data.shape: {shape}`)" for (n, s), shape in SHAPE_NAMED.items() if n == name}
    read = ", ".join(named.get(source, source) for source in SOURCES if source not in refused)
    if any(outcome.startswith("fault") for outcome in refused.values()):
        return Row(name, "fault", "; ".join(f"{s}: {outcome}" for s, outcome in refused.items()))
    return Row(name, "read", "; ".join([read, *(f"not from {s}: {o}" for s, o in refused.items())]))


def _read(rows: Rows, write: Callable[[Rows, Path], Any], expected: Rows, shape: str | None = None) -> str:
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            got = list(read_rows(write(rows, Path(folder)), DataCounts(), shape=shape))
    except InfoPOError as error:
        return first_sentence(error)
    except Exception as error:
        return f"fault: {type(error).__name__}: {first_sentence(error)}"
    same = [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in got] == expected
    return "read" if same else "fault: other rows than from JSON lines"


def _public(name: str) -> Row:
    counts = DataCounts()
    try:
        with tempfile.TemporaryDirectory() as folder:
            got = list(read_rows(SOURCES["JSON lines"]([PUBLIC[name]], Path(folder)), counts))
    except InfoPOError as error:
        return Row(name, "refused", first_sentence(error))
    except Exception as error:
        return Row(name, "fault", f"{type(error).__name__}: {first_sentence(error)}")
    whole = json.dumps([[r.prompt, r.chosen, r.rejected] for r in got])
    if GOOD not in whole or "one and one" not in whole:
        return Row(name, "fault", f"read as {whole}")
    return Row(name, "read", f"as `{next(iter(counts.shapes.values())).split()[0]}`")
