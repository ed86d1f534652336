"""The sample store: every response that was drawn, a line each, found again by what it depends on.

Generation is the expensive half of an evaluation. A sample is found by the values of the weights, the token ids of the
prompt, the law it was drawn from, the seed and its number. A killed evaluation therefore goes on where it stood, and a
model that was trained again to the same folder is asked again. Imports no torch.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from infopo.errors import ConfigError, DataError
from infopo.evaluation.items import Item
from infopo.evaluation.spooled import Places
from infopo.runs import JsonLines, os_errors_named
from infopo.texts import Text

SAMPLES = "samples.jsonl"

_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "key": str, "task": str, "item": str, "sample": int, "text": str, "tokens": (int, type(None)), "finished": bool,
    "logp": (int, float, type(None)), "prompt": (str, list), "seed": int,
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One stored response.

    Attributes:
        key: What it is found by (`key_of`).
        task: Name of the task.
        item: Id of the item.
        sample: Its number among the samples of this item, from 0.
        seed: Seed that it was drawn with.
        weights: Hash of the model's values, or the name of a served model.
        law: Settings of the draw.
        prompt: What was asked, before it was rendered.
        text: The response without special tokens.
        token_ids: Tokens drawn, with the one that ends the response. Empty if a server drew it.
        tokens: Number of tokens, or None if a server did not say.
        finished: Whether the model ended the response itself.
        logp: Σ log π(token) at temperature 1 (nats), or None if a server did not say.
        prompt_sha256: `prompt_hash` of the prompt as the model got it. Empty in files of earlier versions.
    """

    key: str
    task: str
    item: str
    sample: int
    seed: int
    weights: str
    law: Mapping[str, Any]
    prompt: Text
    text: str
    token_ids: Sequence[int]
    tokens: int | None
    finished: bool
    logp: float | None
    prompt_sha256: str = ""


def prompt_hash(prompt: Sequence[Any]) -> str:
    """Returns the SHA-256 of a prompt's token ids, or of its messages if a server renders them."""
    return hashlib.sha256(json.dumps(prompt, ensure_ascii=True).encode()).hexdigest()


def key_of(weights: str, prompt: str, law: Mapping[str, Any], seed: int, sample: int) -> str:
    """Returns the key of a sample.

    Args:
        weights: Hash of the model's values.
        prompt: `prompt_hash` of the prompt.
        law: Settings of the draw.
        seed: Seed of the evaluation. Greedy samples do not depend on it.
        sample: Number of the sample.
    """
    drawn = [0, 0] if law.get("temperature") == 0 else [seed, sample]
    parts = json.dumps([weights, prompt, dict(law), *drawn], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def seed_of(seed: int, prompt: str, sample: int) -> int:
    """Returns the seed of one sample, in [0, 2^63), which neither other prompts nor other samples share.

    Example:
        >>> seed_of(0, "a prompt's hash", 0) == seed_of(0, "a prompt's hash", 1)
        False
    """
    digest = hashlib.sha256(f"{seed}:{prompt}:{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class SampleStore:
    """Samples in a folder. Lines stay on disk, and so do their keys.

    A shard writes a file of its own, and everybody reads all of them.

    Args:
        folder: Where the files are. It is made.
        shard: (number from 1, count), or None.

    Raises:
        ConfigError: Another process writes to the same file.
        DataError: A line is no sample.
        RunDirectoryError: The folder cannot be written to.
    """

    def __init__(self, folder: Path, shard: tuple[int, int] | None = None) -> None:
        name = SAMPLES if shard is None else f"samples-{shard[0]}-of-{shard[1]}.jsonl"
        self.path = folder / name
        self._lines = JsonLines(self.path)
        self._places = Places()
        self._lock = FileLock(folder / f".{name}.lock")
        self._take_lock()
        try:
            self._read()
        except BaseException:
            # Whoever holds the exception holds this store, and the file may be mended and opened again meanwhile.
            self._lock.release()
            raise

    def _take_lock(self) -> None:
        with os_errors_named(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                raise ConfigError(
                    f"--output: another process draws samples into {self.path}; wait for it, name another folder, or "
                    "divide the work with --shard"
                ) from None

    def _read(self) -> None:
        # An empty append ends half a line that a kill has left. Of a process that is writing, it would end a whole one.
        self._lines.append()
        for number, path in enumerate(sorted(self.path.parent.glob("samples*.jsonl"))):
            # Of two lines with one key, that of the first file is taken.
            self._places.add((record["key"], number, path, place) for place, record in _records(path))

    def __enter__(self) -> "SampleStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: str) -> Sample:
        path, place = self._places.of(key)[0]
        with path.open("rb") as file:
            file.seek(place)
            return to_sample(json.loads(file.readline()))

    def add(self, samples: Sequence[Sample]) -> None:
        """Adds samples, which survive the end of the process at once.

        Raises:
            RunDirectoryError: The file cannot be written to. What was there before is kept.
        """
        if not samples:
            return
        self._lines.append()  # ends half a line that a full disk has left
        place = self.path.stat().st_size
        records = [_to_record(sample) for sample in samples]
        self._lines.append(*records)
        with self.path.open("rb") as file:
            file.seek(place)
            lines = []
            for sample in samples:
                lines.append((sample.key, 0, self.path, file.tell()))
                file.readline()
        self._places.add(lines)


def read_samples(path: Path) -> Iterator[Sample]:
    """Yields the samples of a file, in its order, without holding them in memory.

    A last line that was cut off is left out.

    Raises:
        DataError: The file cannot be read, or a line of it is no sample.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}", str(path), "no such file")
    for _, record in _records(path):
        yield to_sample(record)


def samples_by_item(path: Path, items: Sequence[Item]) -> Iterator[tuple[Item, list[Sample]]]:
    """Yields each item with its samples in a file, in the order of the items. No more than those are in memory.

    Raises:
        DataError: The file cannot be read, or a line of it is no sample.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}", str(path), "no such file")
    places = Places()
    places.add((record["item"], record["sample"], path, place) for place, record in _records(path))
    with path.open("rb") as file:
        for item in items:
            found = []
            for _, place in places.of(item.id):
                file.seek(place)
                found.append(to_sample(json.loads(file.readline())))
            yield item, found


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the samples of a file with the byte that each begins at."""
    place = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            record = _parsed(line)
            if record is None and line.endswith(b"\n"):
                raise DataError(
                    "is no sample of this version; remove the line, or the file to draw all samples anew",
                    f"{path}:{number}",
                    "damaged line",
                )
            if record is not None:
                yield place, record
            place += len(line)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    good = isinstance(record, dict) and all(
        name in record and isinstance(record[name], kind) for name, kind in _FIELDS.items()
    )
    return record if good else None


def _to_record(sample: Sample) -> dict[str, Any]:
    return {**vars(sample), "law": dict(sample.law), "token_ids": list(sample.token_ids)}


def to_sample(record: Mapping[str, Any]) -> Sample:
    """Returns a line's sample."""
    logp = record["logp"]
    return Sample(
        key=record["key"],
        task=record["task"],
        item=record["item"],
        sample=record["sample"],
        seed=record["seed"],
        weights=record.get("weights") or "",
        law=record.get("law") or {},
        prompt=record["prompt"],
        text=record["text"],
        token_ids=tuple(record.get("token_ids") or ()),
        tokens=record["tokens"],
        finished=record["finished"],
        logp=None if logp is None else float(logp),
        prompt_sha256=record.get("prompt_sha256") or "",
    )
