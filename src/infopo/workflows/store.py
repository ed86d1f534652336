"""`infopo reference --list` and `--prune` show and remove what the reference store contains. No model is loaded."""

import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infopo.errors import ConfigError, ReferenceStoreError
from infopo.output import counted, say
from infopo.reference_store import counts, exclusive, folder_of, live_claims, provenance

SHOWN = 8
"""Number of digits of an identity that are shown."""


@dataclass(frozen=True)
class Shelf:
    """The stored values of one reference function.

    Attributes:
        folder: Folder of the values, whose name is the identity's hash.
        model: Name of the model.
        precision: Types of weights and forward pass, layout and attention.
        responses: Number of responses.
        size: Number of bytes of all files, damaged shards included.
        damaged: Number of damaged shards, which were set aside.
        used: Time at which a run last asked for values (seconds since 1970).
    """

    folder: Path
    model: str
    precision: str
    responses: int
    size: int
    damaged: int
    used: float


def shelves(store: str | None) -> list[Shelf]:
    """Returns all references of a store, the last used first.

    Args:
        store: Folder of the store, or None for the default one.
    """
    root = _root(store)
    references = [_shelf(path) for path in root.iterdir() if _is_shelf(path)] if root.is_dir() else []
    return sorted(references, key=lambda shelf: -shelf.used)


def list_store(store: str | None) -> None:
    """Prints what a store contains, with sizes."""
    references = shelves(store)
    say(f"{_root(store)}: references: {len(references)}, {_size(sum(shelf.size for shelf in references))}")
    for shelf in references:
        used = time.strftime("%Y-%m-%d", time.gmtime(shelf.used))
        damaged = f", {counted(shelf.damaged, 'damaged shard')}" if shelf.damaged else ""
        line = (
            f"{shelf.folder.name[:SHOWN]}  {counted(shelf.responses, 'response')}, {_size(shelf.size)}{damaged}, "
            f"last used {used}: {shelf.model or 'a model without a name'} ({shelf.precision})"
        )
        say(line)


def prune(store: str | None, names: Sequence[str], older_than: float | None = None) -> list[Path]:
    """Removes references from a store, prints their names, and returns their folders.

    Args:
        store: Folder of the store, or None for the default one.
        names: Beginnings of identities, as `--list` shows them, or `all`. If empty, `older_than` applies to all.
        older_than: Number of days. References that a run has used since then are kept.

    Raises:
        ConfigError: Nothing or too much is named.
        ReferenceStoreError: One that is named is being computed at the moment.
    """
    if not names and older_than is None:
        raise ConfigError(
            "--prune: name references as --list shows them, or `all`, or give --older-than DAYS"
        )
    references = shelves(store)
    chosen = references if not names or "all" in names else [_with_prefix(references, name) for name in names]
    if older_than is not None:
        chosen = [shelf for shelf in chosen if shelf.used < time.time() - older_than * 86400]
    removed = []
    for shelf in dict.fromkeys(chosen):
        _remove(shelf.folder)
        removed.append(shelf.folder)
        say(f"removed {shelf.folder.name[:SHOWN]} ({_size(shelf.size)})")
    say(f"references removed: {len(removed)}, {_size(sum(s.size for s in dict.fromkeys(chosen)))}")
    return removed


def _remove(folder: Path) -> None:
    try:
        with exclusive(folder):
            if live_claims(folder):
                raise ReferenceStoreError(
                    f"{folder}: is being computed by another process at the moment; end that first, or wait for it"
                )
            # The folder is renamed at once, so that nobody finds half of it while its files are removed.
            gone = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
            folder.replace(gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise ReferenceStoreError(f"{folder}: cannot be removed: {error.strerror or error}") from error


def _with_prefix(references: Sequence[Shelf], name: str) -> Shelf:
    matching = [shelf for shelf in references if shelf.folder.name.startswith(name)]
    if len(matching) != 1:
        there = ", ".join(shelf.folder.name[:SHOWN] for shelf in references) or "none"
        raise ConfigError(
            f"--prune: {len(matching)} references begin with {name!r}, expected one; there are {there}"
        )
    return matching[0]


def _root(store: str | None) -> Path:
    folder = folder_of("auto" if store is None else store)
    if folder is None:
        raise ConfigError(f"--store: expected a folder, got {store!r}")
    return folder


def _is_shelf(path: Path) -> bool:
    return path.is_dir() and len(path.name) == 32 and not path.name.strip("0123456789abcdef")


def _shelf(folder: Path) -> Shelf:
    record = provenance(folder)
    identity = record.get("identity") or {}
    parts = [identity.get(k) for k in ("dtype", "path", "attention")]
    if identity.get("autocast", "off") != "off":
        parts.insert(1, f"{identity['autocast']} autocast")
    files = [path for path in folder.rglob("*") if path.is_file()]
    provenance_file = folder / "provenance.json"
    return Shelf(
        folder,
        model=str(record.get("model") or ""),
        precision=", ".join(str(part) for part in parts if part) or "no provenance",
        responses=counts(folder)["responses"],
        size=sum(path.stat().st_size for path in files),
        damaged=len(list((folder / "damaged").glob("*"))),
        used=(provenance_file if provenance_file.exists() else folder).stat().st_mtime,
    )


def _size(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
