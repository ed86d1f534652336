"""Rows are encoded once: what is found again is what was made, and is found only if all it depends on is the same."""

import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from infopo import InfoPOConfig
from infopo.build import build_examples
from infopo.data import example_store
from infopo.data.content import examples_key, tokenizer_content
from infopo.data.counts import DataCounts
from infopo.data.encode import Encoder
from infopo.data.example_store import ExampleStore, read, restore, write
from infopo.data.examples import ExampleDataset
from infopo.data.sources import located
from infopo.encoding import encode_once
from infopo.errors import DataError
from infopo.intake import Intake
from infopo.lab.tokenizer import build_tokenizer
from infopo.records import PreferenceExample
from infopo.settings import DataSettings
from worlds import random_examples, with_context

CHAT = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def rows_of(n: int = 100) -> list[dict[str, Any]]:
    """Rows of 3 KB, most of which is in a column that nobody reads; one is not usable, and some are cut."""
    rows = [
        {"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1), "from": "x" * 3000}
        for i in range(n)
    ]
    rows[7]["rejected"] = rows[7]["chosen"]
    rows[11]["chosen"] = "1" * 600
    return rows


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of()))
    return path


def section(file: Path, **more: Any) -> DataSettings:
    settings = {
        "path": str(file),
        "on_bad_row": "skip",
        "cache": str(file.parent / "cache"),
        "max_length": 512,
    }
    return DataSettings(**settings | more)


def entries(file: Path) -> list[Path]:
    return sorted((file.parent / "cache").glob("*"))


def same(a: tuple[ExampleDataset, DataCounts], b: tuple[ExampleDataset, DataCounts]) -> bool:
    return list(a[0]) == list(b[0]) and a[1] == b[1] and a[1].lines() == b[1].lines()


def test_a_second_start_reads_what_the_first_has_made_and_says_the_same_of_the_rows(
    file: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "infopo.encoding")
    without = build_examples(section(file, cache="off"), build_tokenizer())
    assert not entries(file)
    first = build_examples(section(file), build_tokenizer())
    assert not caplog.records
    assert without[1].skipped
    assert without[1].notes
    assert without[1].ignored
    second = build_examples(section(file), build_tokenizer())
    assert "99 examples, encoded before" in caplog.text
    assert same(without, first)
    assert same(without, second)
    assert len(entries(file)) == 1


def _keys(file: Path) -> list[Any]:
    """Keys of the same rows under every change that may change what is made of them."""
    tokenizer = build_tokenizer()
    chat, added, other_eos = build_tokenizer(), build_tokenizer(), build_tokenizer()
    chat.chat_template = CHAT
    added.add_tokens(["1+"])
    other_eos.eos_token = "0"
    rows = located(str(file), str(file))
    encoder = Encoder(tokenizer)
    encoders = [
        encoder,
        *(Encoder(each) for each in (chat, added, other_eos)),
        Encoder(tokenizer, max_length=100),
        Encoder(tokenizer, max_length=None),
        Encoder(tokenizer, max_prompt_length=100),
        Encoder(tokenizer, on_too_long="drop"),
        Encoder(chat, as_chat=True),
        Encoder(chat, chat_template_kwargs={"shout": True}),
        Encoder(chat, chat_template_kwargs={"shout": False}),
    ]
    keys = [examples_key([rows], each, {}) for each in encoders]
    keys += [examples_key([rows], encoder, {"limit": n}) for n in (5, 6)]
    keys += [examples_key([rows, rows], encoder, {})]
    content = file.read_bytes()
    file.write_bytes(content.replace(b"1", b"2", 1))
    keys += [examples_key([rows], encoder, {})]
    file.write_bytes(content)
    file.with_name("other.jsonl").write_bytes(content)
    other = str(file.with_name("other.jsonl"))
    keys += [examples_key([located(other, other)], encoder, {})]
    keys += [examples_key([rows_of()], encoder, {}), examples_key([rows_of()[::-1]], encoder, {})]
    dataset = datasets.Dataset.from_list(rows_of())
    keys += [
        examples_key([each], encoder, {})
        for each in (
            dataset,
            dataset.shuffle(seed=0),
            dataset.select(range(90)),
            dataset.remove_columns("chosen"),
        )
    ]
    assert examples_key([rows], Encoder(build_tokenizer()), {}) == keys[0]
    assert examples_key([rows_of()], encoder, {}) == keys[len(encoders) + 5]
    return keys


def test_a_key_differs_for_everything_that_changes_examples(file: Path):
    keys = _keys(file)
    assert None not in keys
    assert len(set(keys)) == len(keys)


@pytest.mark.long
def test_a_key_is_the_same_in_another_process(file: Path):
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path; from test_encoding import _keys\n"
        f"print(*_keys(Path({str(file)!r})))"
    )
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == _keys(file)


def test_what_comes_out_of_a_function_or_is_small_has_no_key(file: Path):
    encoder = Encoder(build_tokenizer())
    dataset = datasets.Dataset.from_list(rows_of())
    assert examples_key([dataset.with_transform(lambda rows: rows)], encoder, {}) is None
    assert examples_key([dataset.to_iterable_dataset()], encoder, {}) is None
    assert examples_key([rows_of(20)], encoder, {}) is None
    assert examples_key([[{"prompt": lambda: 0}] * 99999], encoder, {}) is None
    tokenizer = build_tokenizer()
    tokenizer.apply_chat_template = lambda *a, **b: "changed by hand"  # type: ignore[method-assign]
    assert tokenizer_content(tokenizer) is None
    kind = type(tokenizer)
    own = type(kind.__name__, (kind,), {"__module__": "mine"})(
        tokenizer_object=build_tokenizer().backend_tokenizer
    )
    assert tokenizer_content(own) is None


def test_a_list_and_a_dataset_given_to_a_script_are_kept_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "infopo.encoding")
    args = InfoPOConfig(
        str(tmp_path), use_cpu=True, on_bad_row="skip", max_length=512, dataset_cache=str(tmp_path / "cache")
    )
    seen = []
    for rows in (
        rows_of(),
        rows_of(),
        datasets.Dataset.from_list(rows_of()),
        datasets.Dataset.from_list(rows_of()),
    ):
        intake = Intake.of(args, build_tokenizer())
        examples = intake.training(rows, [])
        assert isinstance(examples, ExampleDataset)
        seen.append((examples, intake.counts["train"]))
    assert all(same(each, seen[0]) for each in seen[:2])
    assert same(*seen[2:])
    assert caplog.text.count("encoded before") == 2


@pytest.mark.parametrize("context", [False, True])
def test_a_file_gives_back_what_was_written(tmp_path: Path, context: bool):
    examples: list[PreferenceExample] = random_examples(20, chosen=(1, 0, 3), rejected=(2, 1))
    examples = [with_context(each) for each in examples] if context else examples
    dataset = ExampleDataset.from_examples(examples)
    dataset.row_ids[3] = "ünd \udc80:1"
    counts = DataCounts(
        "skip", "f", {"f": "x"}, 3, 2, first_skipped={"tie": "f:2"}, files={"f": ["a"]}, warnings=["w"]
    )
    counts.skipped["tie"] += 1
    write(tmp_path / "x", dataset, counts)
    again, stored = read(tmp_path / "x")
    other = DataCounts()
    restore(other, stored)
    assert list(again) == list(dataset)
    assert other == counts
    assert other.skipped.most_common() == [("tie", 1)]
    assert again.content_hash() == dataset.content_hash()
    assert list(again.mismatched(None)) == list(dataset.mismatched(None))
    assert list(pickle.loads(pickle.dumps(again))) == list(dataset)
    assert not again.roles.flags.writeable


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit of the tokens": lambda content: _flipped(content, len(content) // 2),
    "a bit of the account": lambda content: _flipped(content, 60),
    "a bit of the hash": lambda content: _flipped(content, 20),
    "cut off": lambda content: content[:-1],
    "another file": lambda content: b"PK" + content,
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_found_out_and_made_anew(file: Path, what: str, caplog: pytest.LogCaptureFixture):
    first = build_examples(section(file, limit=30), build_tokenizer())
    [entry] = entries(file)
    whole = entry.read_bytes()
    # Not in place: a file that is mapped may not lose its end.
    entry.unlink()
    entry.write_bytes(DAMAGE[what](whole))
    assert same(build_examples(section(file, limit=30), build_tokenizer()), first)
    assert "is damaged" in caplog.text
    assert entry.read_bytes() == whole


def test_an_error_keeps_nothing_and_comes_again(file: Path):
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows\.jsonl:8: expected two different responses"):
            build_examples(section(file, on_bad_row="raise"), build_tokenizer())
    assert not entries(file)


def test_a_file_that_changes_while_it_is_read_is_not_kept(file: Path):
    def encode(counts: DataCounts) -> ExampleDataset:
        with file.open("a") as handle:
            handle.write("\n")
        return ExampleDataset.from_examples(random_examples(3))

    found, encoder = located(str(file), str(file)), Encoder(build_tokenizer())
    cache = str(file.parent / "cache")
    encode_once([found], encoder, DataCounts(), encode, reading={}, cache=cache)
    assert not entries(file)


def test_a_folder_that_cannot_be_written_to_costs_a_warning(file: Path, caplog: pytest.LogCaptureFixture):
    (file.parent / "cache").write_text("a file")
    examples, _ = build_examples(section(file, limit=30), build_tokenizer())
    assert len(examples) == 30
    assert "cannot be kept" in caplog.text
    assert "data.cache" in caplog.text


def test_what_was_not_used_for_longest_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset, store = ExampleDataset.from_examples(random_examples(20)), ExampleStore(tmp_path)
    size = 0
    for age, key in enumerate(("a", "b", "c")):
        path = store.add(key, dataset, DataCounts())
        assert path is not None
        size = path.stat().st_size
        os.utime(path, (1000 + age, 1000 + age))
    left, fresh = tmp_path / ".left.tmp", tmp_path / ".fresh.tmp"
    left.write_bytes(b"1")
    fresh.write_bytes(b"1")
    os.utime(left, (1000, 1000))
    assert store.find("a") is not None  # and is used now
    monkeypatch.setattr(example_store, "LIMIT_BYTES", 3 * size)
    held = read(store.path("b"))[0]
    store.add("d", dataset, DataCounts())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".fresh.tmp", "a.examples", "c.examples", "d.examples",
    ]  # fmt: skip
    assert list(held) == list(dataset)  # whoever has it open keeps it
    monkeypatch.setattr(example_store, "LIMIT_BYTES", 1)
    store.add("e", dataset, DataCounts())
    assert [path.name for path in tmp_path.glob("*.examples")] == ["e.examples"]


def _write_for_ever(path: Path) -> None:
    dataset = ExampleDataset.from_examples(random_examples(2000))
    while True:
        write(path, dataset, DataCounts())


def test_two_processes_write_at_once_and_are_killed_at_any_time(tmp_path: Path):
    """Whoever reads meanwhile and afterwards finds the whole or nothing."""
    path, expected = tmp_path / "x", list(ExampleDataset.from_examples(random_examples(2000)))
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        writers = [context.Process(target=_write_for_ever, args=(path,)) for _ in range(2)]
        for writer in writers:
            writer.start()
        reads, end = 0, time.monotonic() + 60
        while reads < 20 + 7 * attempt and time.monotonic() < end:
            if path.exists():
                assert len(read(path)[0]) == len(expected)
                reads += 1
        for writer in writers:
            assert writer.pid is not None
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        assert reads
        assert list(read(path)[0]) == expected


RANKS = """
import json, sys, time
from pathlib import Path
folder, tests = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, tests)
from infopo import InfoPOConfig, ranks
from infopo.data.encode import Encoder
from infopo.data.counts import DataCounts
from infopo.data.examples import ExampleDataset
from infopo.encoding import encode_once
from infopo.errors import DataError
from infopo.lab.tokenizer import build_tokenizer
from test_encoding import rows_of
from infopo.settings import DataSettings
from worlds import random_examples
args = InfoPOConfig(str(folder / "run"), use_cpu=True, ddp_timeout=3)
encoder, calls, outcomes = Encoder(build_tokenizer()), [], []

def encode(counts):
    calls.append(1)
    time.sleep(5)  # longer than the run's own group would wait
    counts.used += 20
    return ExampleDataset.from_examples(random_examples(20))

def refuse(counts):
    calls.append(1)
    raise DataError("no good", "f:7", "reason")

def outcome(encode, cache, rows):
    calls.clear()
    counts = DataCounts(source="f")
    try:
        dataset = encode_once([rows], encoder, counts, encode, reading={}, cache=cache)
    except DataError as error:
        outcomes.append([len(calls), str(error), error.reason])
    else:
        outcomes.append([len(calls), dataset.content_hash(), counts.used])

cache = str(folder / "cache")
for rows in (rows_of(), rows_of(), rows_of()[:3]):  # made; found; too small to be kept
    outcome(encode, cache, rows)
outcome(encode, "off", rows_of())
outcome(refuse, cache, rows_of()[:99])
(folder / f"{args.process_index}.json").write_text(json.dumps(outcomes))
"""


@pytest.mark.long
@pytest.mark.skipif(torch.accelerator.is_available(), reason="ranks find each other by their accelerators")
def test_the_first_process_of_a_machine_encodes_and_the_others_have_its_rows_or_its_error(tmp_path: Path):
    script, temporary = tmp_path / "script.py", tmp_path / "tmp"
    script.write_text(RANKS)
    temporary.mkdir()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(
        [*command, str(tmp_path), str(Path(__file__).parent)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [calls for calls, *_ in first] == [1, 0, 1, 1, 1]
    assert [calls for calls, *_ in second] == [0] * 5
    assert [rest for _, *rest in first] == [rest for _, *rest in second]
    made = [ExampleDataset.from_examples(random_examples(20)).content_hash(), 20]
    assert [rest for _, *rest in first] == [made] * 4 + [["f:7: no good", "reason"]]
    assert not list(temporary.glob("infopo-*"))
