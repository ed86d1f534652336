"""What encoded examples depend on, as a key: content of the rows and of the tokenizer, settings, and this very code.

Rows that come out of a function (a stream, a transform of a dataset) have no content before they are read, and a
tokenizer written in Python none that could be listed. Examples of those have no key.
"""

import hashlib
import json
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import xxhash
from transformers import PreTrainedTokenizerBase

from infopo.data.encode import Encoder
from infopo.data.sources import Files, Located

if TYPE_CHECKING:
    import datasets

LEAST_BYTES = 2**18
"""Rows of less than this, some hundred pairs, are encoded in the time that it takes to look for them."""

_LIBRARIES = ("infopo", "transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "numpy")

_CODE_BESIDE = ("records.py", "errors.py", "catalog.py", "vocabulary.py")
"""Modules outside this folder that decide what becomes of a row."""

_NO_CONTENT = {"_tokenizer", "init_kwargs", "init_inputs", "name_or_path", "files_loaded", "verbose",
               "deprecation_warnings", "_in_target_context_manager", "model_max_length", "padding_side",
               "truncation_side", "_processor_class"}  # fmt: skip
"""Attributes of a tokenizer that say where it came from, or what it does in batches and warnings."""

_A_PIECE = 2**20


def examples_key(sources: Sequence[Located], encoder: Encoder, reading: Mapping[str, Any]) -> str | None:
    """Returns 32 hexadecimal digits that identify encoded examples and their account, or None if nothing does.

    Args:
        sources: The rows.
        encoder: What turns them into tokens.
        reading: All other settings that decide what is read and how it is counted, in values of JSON.
    """
    contents = [_content(source) for source in sources]
    known = [content for content in contents if content is not None]
    if len(known) < len(contents) or sum(size for _, size in known) < LEAST_BYTES:
        return None
    tokenizer = tokenizer_content(encoder.tokenizer)
    if tokenizer is None:
        return None
    whole = {
        "sources": [digest for digest, _ in known],
        "tokenizer": tokenizer,
        "encoder": encoder.settings(),
        "reading": dict(reading),
        "code": _code(),
    }
    try:
        # Keys are not sorted: a mixture takes its sources in their order.
        text = json.dumps(whole)
    except (TypeError, ValueError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def stamps(sources: Sequence[Located]) -> list[tuple[str, int, int]]:
    """Returns name, size and time of each file, which tell whether one was changed while it was read."""
    files = [path for source in sources if isinstance(source, Files) for path, _ in source.files]
    states = [(path, path.stat()) for path in files if path.exists()]
    return [(str(path), state.st_size, state.st_mtime_ns) for path, state in states]


def _content(source: Located) -> tuple[str, int] | None:
    """Returns the hash of the rows as they are stored, and their number of bytes."""
    digest, size = xxhash.xxh3_128(), 0
    pieces = _pieces(source)
    if pieces is None:
        return None
    try:
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
    except (OSError, pa.ArrowException, pickle.PicklingError, TypeError, AttributeError, RecursionError):
        # Whoever reads the rows names what is wrong with them.
        return None
    return digest.hexdigest(), size


def _pieces(source: Located) -> Iterator[bytes] | None:
    import datasets

    if isinstance(source, Files):
        return _bytes_of_files(source)
    if isinstance(source, datasets.Dataset) and source.format["type"] != "custom":
        return _bytes_of_dataset(source)
    if isinstance(source, list | tuple):
        # Each row by itself: a pickle of all would depend on which of them share an object.
        return (pickle.dumps(row, protocol=5) for row in source)
    return None


def _bytes_of_files(source: Files) -> Iterator[bytes]:
    for path, name in source.files:
        # Names stand in the names of rows, and their endings say how a file is read.
        yield json.dumps([name, path.suffixes, path.stat().st_size]).encode()
        with path.open("rb") as file:
            while piece := file.read(_A_PIECE):
                yield piece


def _bytes_of_dataset(dataset: "datasets.Dataset") -> Iterator[bytes]:
    for table in (dataset.data.table, dataset._indices and dataset._indices.table):
        if table is not None:
            yield table.schema.serialize().to_pybytes()
            for batch in table.to_batches(max_chunksize=1024):
                yield batch.serialize().to_pybytes()
        yield b"end"


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the hash of all that a tokenizer does to a text, its chat template included, or None if none can be had.

    A tokenizer that is written in Python, or comes with a model, may depend on anything.
    """
    kind = type(tokenizer)
    if not tokenizer.is_fast or kind.__module__.split(".")[0] != "transformers":
        return None
    attributes = {name: value for name, value in vars(tokenizer).items() if name not in _NO_CONTENT}
    described = repr(sorted(attributes.items()))
    if any(callable(value) for value in attributes.values()) or " at 0x" in described:
        return None
    core = tokenizer.backend_tokenizer.to_str()
    digest = hashlib.sha256(
        f"{kind.__module__}.{kind.__qualname__}\n{described}\n".encode("utf-8", "replace")
    )
    digest.update(core.encode("utf-8", "replace"))
    return digest.hexdigest()


@cache
def _code() -> str:
    """Returns the hash of the source text of all that decides what becomes of a row, and of the libraries' versions."""
    here = Path(__file__).parent
    files = [*sorted(here.glob("*.py")), *(here.parent / name for name in _CODE_BESIDE)]
    digest = hashlib.sha256(f"{sys.version_info[:2]} {[version(name) for name in _LIBRARIES]}".encode())
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
