"""Gives readers, the recipe parser and the reference store damaged input: a result or a named error must come out.

python scripts/fuzz.py --inputs 20000 [--only jsonl csv ...] [--out result.json]

Inputs are valid ones that are changed at random places, so that most of them get past the first check. Exits with 1 if
any of them ended in an error without a name, in one of more than `LONGEST` characters, or in one that would send a
control character to a terminal; the input is then kept beside the result.
"""

import argparse
import hashlib
import io
import json
import logging
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infopo.catalog import DATA_SHAPES
from infopo.config import parse_recipe
from infopo.data.counts import DataCounts
from infopo.data.sources import read_rows
from infopo.errors import InfoPOError, printable
from infopo.reference_store import PROVENANCE, ReferenceIdentity, ReferenceStore, response_key
from infopo.vocabulary import COLUMNS

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 1200
"""Characters of an error, of which a name of a file and the text of a system's error are part."""

Try = Callable[[random.Random, Path], object]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
}
ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "system": None, "id": 7},
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."},
    {"prompt": [_user("Hi")], "chosen": [CALL, {"role": "tool", "content": "1"}, _assistant("Yes.")],
     "rejected": [_assistant("No.")], "tools": [{"type": "function", "function": {"name": "f"}}],
     "chat_template_kwargs": {"x": [{"y": None}]}},
    {"chosen": [_user("Hi"), _assistant("a")], "rejected": [_user("Hi"), _assistant("b")]},
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "a"},
     "rejected": {"from": "gpt", "value": "b"}, "system": "Be brief."},
    {"instruction": "Hi", "input": "you", "history": [["a", "b"]], "chosen": "a", "rejected": "b"},
    {"prompt": "p", "completion": "c", "label": True},
    {"messages": [_user("Hi"), _assistant("a")], "label": "false"},
    {"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"]},
    {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 2.5, -3]},
    {"instruction": "Hi", "response1": "a", "response2": "b", "annotator1": 1, "annotator2": 1},
    {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1},
    {"conversation_a": [_user("Hi"), _assistant("a")], "conversation_b": [_user("Hi"), _assistant("b")],
     "winner": "model_a"},
    {"question": {"full_text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": 0.5, "score_1": -0.5},
    {"info": {"post": "p", "title": "t", "subreddit": "s"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
    {"instruction": "i", "completions": [{"response": "a", "overall_score": 1}, {"response": "b", "rating": 2}]},
    {"input": {"messages": [_user("Hi")], "tools": []}, "preferred_output": [_assistant("a")],
     "non_preferred_output": [_assistant("b")]},
    {"messages": [_user("Hi"), _assistant("a")], "rejected_response": "b"},
    {"chosen": json.dumps([_user("Hi"), _assistant("a")]), "rejected": str([_user("Hi"), _assistant("b")])},
)  # fmt: skip

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", " ", "\x00", "\x1b[2J", "\ud800", "é" * 9,
    "[", "{", '["', "[{'role': 'user', 'content'", '{"messages": [', "\n\nHuman:", [], {}, [[]], [{}], [None], ["a"],
    {"role": "user"}, {"from": "gpt", "value": None}, {"role": "assistant", "content": [{"type": "text"}]},
    [{"type": "image"}], {"content": 1, "role": []}, "model_b", [1, [2, [3]]],
)  # fmt: skip


def changed(value: Any, rng: random.Random) -> Any:
    """The value with something in it replaced, removed, doubled or renamed."""
    if rng.random() < 0.15:
        return rng.choice(ODD)
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        copy = dict(value)
        what = rng.random()
        if what < 0.15:
            del copy[key]
        elif what < 0.3:
            copy[rng.choice(sorted(COLUMNS))] = copy.pop(key) if rng.random() < 0.5 else rng.choice(ODD)
        else:
            copy[key] = changed(copy[key], rng)
        return copy
    if isinstance(value, list) and value:
        place = rng.randrange(len(value))
        what = rng.random()
        if what < 0.15:
            return value[:place] + value[place + 1 :]
        if what < 0.3:
            return [*value, value[place]]
        return [*value[:place], changed(value[place], rng), *value[place + 1 :]]
    if isinstance(value, str) and value:
        return damaged(value.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "replace")
    return rng.choice(ODD)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes with a few places flipped, cut out, doubled, replaced or cut off."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not data:
            break
        start = rng.randrange(len(data))
        end = min(len(data), start + rng.choice((1, 2, 8, 64)))
        match rng.randrange(6):
            case 0:
                data[start] ^= 1 << rng.randrange(8)
            case 1:
                del data[start:end]
            case 2:
                data[start:start] = data[start:end] * rng.choice((1, 3))
            case 3:
                data[start:end] = rng.randbytes(end - start)
            case 4:
                data[start:start] = rng.choice(
                    (b"[", b"{", b'"', b"\x00", b"\xff", b"\n", b",", b"1e999", b"NaN", b"-")
                )
            case _:
                del data[start:]
    return bytes(data)


def some_rows(rng: random.Random) -> list[Any]:
    kind = rng.choice(ROWS)
    return [kind, changed(kind, rng), changed(changed(kind, rng), rng)]


def _read(source: Any, rng: random.Random) -> object:
    options: dict[str, Any] = {}
    if rng.random() < 0.2:
        options["shape"] = rng.choice(list(DATA_SHAPES))
    if rng.random() < 0.2:
        names = sorted(COLUMNS)
        options["columns"] = {
            rng.choice(names): rng.choice([*names, "input.messages", "x.0", None]) for _ in "ab"
        }
    counts = DataCounts(on_bad_row=rng.choice(("raise", "skip")))
    rows = list(read_rows(source, counts, **options))
    return rows, [line for line in counts.lines() if line != printable(line)]


def try_rows(rng: random.Random, folder: Path) -> object:
    return _read(some_rows(rng), rng)


def _as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _as_csv(rows: list[Any]) -> bytes:
    import csv

    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in row.values()])
    return out.getvalue().encode("utf-8", "replace")


def _compressed(kind: str, content: bytes) -> bytes:
    with pa.BufferOutputStream() as out:
        with pa.CompressedOutputStream(out, kind) as compressed:
            compressed.write(content)
        return bytes(out.getvalue().to_pybytes())


def _as_columns(kind: str, rows: list[Any]) -> bytes:
    table, out = pa.Table.from_pylist(rows), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, out)
        return out.getvalue()
    new = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
    with new(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def file_of(kind: str) -> Try:
    """Tries a file of the kind, damaged as bytes, or whole with damaged rows in it."""
    suffix = {"jsonl.gz": "jsonl.gz", "jsonl.zst": "jsonl.zst", "stream": "arrow"}.get(kind, kind)

    def attempt(rng: random.Random, folder: Path) -> object:
        rows = [rng.choice(ROWS)] * 2
        if kind in ("jsonl", "json", "jsonl.gz", "jsonl.zst"):
            rows = some_rows(rng) if rng.random() < 0.3 else rows
            content = json.dumps(rows).encode() if kind == "json" else _as_lines(rows)
            if rng.random() < 0.5:
                content = damaged(content, rng)
            if kind.endswith((".gz", ".zst")):
                content = _compressed({"gz": "gzip", "zst": "zstd"}[kind.partition(".")[2]], content)
        elif kind == "csv":
            content = _as_csv(rows)
        else:
            content = _as_columns(kind, rows)
        path = folder / f"rows.{suffix}"
        path.write_bytes(damaged(content, rng))
        return _read(path, rng)

    return attempt


def recipe_parser() -> Try:
    from infopo.build import train_fields

    known = train_fields()
    recipes = [path.read_bytes() for path in sorted((ROOT / "src" / "infopo" / "recipes").rglob("*.yaml"))]
    overrides = (
        "data.columns={prompt: a}", "train.learning_rate=1e-6", "objective=dpo", "data.path=[a, b]",
        "model.adapter={r: 8}", "reference.store=", "train.max_steps=10", "data.max_length=!!float x",
        "objective.beta=.nan", "=", "a.b.c=1",
    )  # fmt: skip

    def attempt(rng: random.Random, folder: Path) -> object:
        text = damaged(rng.choice(recipes), rng).decode("utf-8", "replace")
        given = [
            damaged(rng.choice(overrides).encode(), rng).decode("utf-8", "replace")
            for _ in range(rng.randrange(3))
        ]
        return parse_recipe(text, source="fuzz", overrides=given, train_fields=known)

    return attempt


def reference_store() -> Try:
    identity = ReferenceIdentity(**{f.name: _some(f.type) for f in fields(ReferenceIdentity)})
    keys = [response_key([1, 2], [3, n]) for n in range(6)]
    logging.getLogger("infopo").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as made:
        whole = ReferenceStore(Path(made), identity)
        whole.add({key: np.array([-1.0, -2.5], np.float32) for key in keys[:3]})
        whole.add({key: np.array([-0.5], np.float32) for key in keys[3:]})
        whole.note_use()
        shelf = next(path for path in Path(made).iterdir() if path.is_dir())
        kept = {path.name: path.read_bytes() for path in shelf.iterdir() if path.is_file()}

    def attempt(rng: random.Random, folder: Path) -> object:
        place = folder / "store"
        shutil.rmtree(place, ignore_errors=True)
        (place / shelf.name).mkdir(parents=True)
        broken = rng.choice(list(kept))
        for name, content in kept.items():
            content = damaged(content, rng) if name == broken else content
            if name == broken and name.endswith(".safetensors") and rng.random() < 0.7:
                name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
            (place / shelf.name / name).write_bytes(content)
        store = ReferenceStore(place, identity)
        # Nothing damaged is part of it, and asking git and every package for a version takes longer than all the rest.
        store.__dict__["_about"] = whole._about
        store.want(keys)
        found = [store.tokens(key) for key in keys]
        if broken == PROVENANCE:
            store.note_use()
        return [None if each is None else each.tolist() for each in found]

    return attempt


def _some(kind: Any) -> Any:
    return 1 if "int" in str(kind) else True if "bool" in str(kind) else None if "None" in str(kind) else "x"


def targets() -> dict[str, Callable[[], Try]]:
    """What is tried, by name; each makes its own `Try` when it is asked for."""
    kinds = ("jsonl", "json", "csv", "parquet", "arrow", "stream", "jsonl.gz", "jsonl.zst")
    return {
        "rows": lambda: try_rows,
        **{kind: lambda kind=kind: file_of(kind) for kind in kinds},  # type: ignore[misc]
        "recipe": recipe_parser,
        "store": reference_store,
    }


def fuzz(name: str, inputs: int, seed: int = 0) -> dict[str, Any]:
    """Tries so many inputs.

    Returns:
        Counts of results and of named errors by class and reason, and every failure with its input's number.
    """
    attempt, outcomes, failures = targets()[name](), Counter[str](), []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as made:
        for number in range(inputs):
            rng = random.Random(f"{seed} {name} {number}")
            try:
                attempt(rng, Path(made))
                outcomes["result"] += 1
            except InfoPOError as error:
                text = str(error)
                outcomes[f"{type(error).__name__}: {getattr(error, 'reason', '')}".rstrip(": ")] += 1
                longest = max(map(len, getattr(error, "problems", [text])))
                if text != printable(text) or longest > LONGEST:
                    failures.append({"input": number, "error": text})
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                failures.append(
                    {"input": number, "error": f"{type(error).__name__}: {error!s:.200} ({where})"}
                )
    return {
        "seed": seed,
        "inputs": inputs,
        "outcomes": dict(outcomes.most_common()),
        "failures": failures,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=targets())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if arguments.out and arguments.out.exists():  # of targets that are tried another time
        results = json.loads(arguments.out.read_text())
    names = arguments.only or list(targets())
    for name in names:
        results[name] = fuzz(name, arguments.inputs, arguments.seed)
        failures = results[name]["failures"]
        print(
            f"{name}: {arguments.inputs} inputs, {len(failures)} failures, {results[name]['seconds']} s",
            flush=True,
        )
        for failure in failures[:5]:
            print(f"  {failure['input']}: {printable(failure['error'])}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if any(results[name]["failures"] for name in names) else 0


if __name__ == "__main__":
    sys.exit(main())
