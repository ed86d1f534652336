"""`infopo reference --list` and `--prune`: what the reference store holds, and what of it is to go. Loads no model."""

import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infopo.errors import RecipeError, ReferenceStoreError, printable
from infopo.reference_store import counts, exclusive, folder_of, live_claims, provenance

SHOWN = 8
"""Digits of an identity that are shown."""


@dataclass(frozen=True)
class Shelf:
    """The values of one reference function.

    Attributes:
        folder: Where they lie; its name is the identity's hash.
        model: What the model was called.
        precision: Types of weights and forward pass, layout and attention.
        responses: Number of responses.
        size: Bytes of all files, damaged shards included.
        damaged: Number of shards that were set aside.
        used: When a run last asked for values (seconds since 1970).
    """

    folder: Path
    model: str
    precision: str
    responses: int
    size: int
    damaged: int
    used: float


def shelves(store: str | None) -> list[Shelf]:
    """All that a store holds, the last used first.

    Args:
        store: A folder; None is the default one.
    """
    root = _root(store)
    found = [_shelf(path) for path in root.iterdir() if _is_shelf(path)] if root.is_dir() else []
    return sorted(found, key=lambda shelf: -shelf.used)


def list_store(store: str | None) -> None:
    """Prints what a store holds, with sizes."""
    found = shelves(store)
    print(f"{_root(store)}: references: {len(found)}, {_in_words(sum(shelf.size for shelf in found))}")
    for shelf in found:
        used = time.strftime("%Y-%m-%d", time.gmtime(shelf.used))
        damaged = f", {shelf.damaged} damaged shards" if shelf.damaged else ""
        line = (
            f"{shelf.folder.name[:SHOWN]}  {shelf.responses} responses, {_in_words(shelf.size)}{damaged}, last used "
            f"{used}: {shelf.model or 'a model without a name'} ({shelf.precision})"
        )
        print(printable(line))


def prune(store: str | None, names: Sequence[str], older_than: float | None = None) -> list[Path]:
    """Removes references from a store and says so; returns their folders.

    Args:
        store: A folder; None is the default one.
        names: Beginnings of identities, as `--list` shows them, or `all`; empty: all, if `older_than` is given.
        older_than: Removes those only that no run has used for so many days.

    Raises:
        RecipeError: Nothing or too much is named.
        ReferenceStoreError: One that is named is being computed at the moment.
    """
    if not names and older_than is None:
        raise RecipeError(
            "--prune: name references as --list shows them, or `all`, or give --older-than DAYS"
        )
    found = shelves(store)
    chosen = found if not names or "all" in names else [_named(found, name) for name in names]
    if older_than is not None:
        chosen = [shelf for shelf in chosen if shelf.used < time.time() - older_than * 86400]
    removed = []
    for shelf in dict.fromkeys(chosen):
        _remove(shelf.folder)
        removed.append(shelf.folder)
        print(f"removed {shelf.folder.name[:SHOWN]} ({_in_words(shelf.size)})")
    print(f"references removed: {len(removed)}, {_in_words(sum(s.size for s in dict.fromkeys(chosen)))}")
    return removed


def _remove(folder: Path) -> None:
    try:
        with exclusive(folder):
            if live_claims(folder):
                raise ReferenceStoreError(
                    f"{folder}: is being computed by another process at the moment; end that first, or wait for it"
                )
            gone = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
            folder.replace(gone)  # at once: nobody finds half of it
        shutil.rmtree(gone)
    except OSError as error:
        raise ReferenceStoreError(f"{folder}: cannot be removed: {error.strerror or error}") from error


def _named(found: Sequence[Shelf], name: str) -> Shelf:
    matching = [shelf for shelf in found if shelf.folder.name.startswith(name)]
    if len(matching) != 1:
        there = ", ".join(shelf.folder.name[:SHOWN] for shelf in found) or "none"
        raise RecipeError(
            f"--prune: {len(matching)} references begin with {name!r}, expected one; there are {there}"
        )
    return matching[0]


def _root(store: str | None) -> Path:
    folder = folder_of("auto" if store is None else store)
    if folder is None:
        raise RecipeError(f"--store: expected a folder, got {store!r}")
    return folder


def _is_shelf(path: Path) -> bool:
    return path.is_dir() and len(path.name) == 32 and not path.name.strip("0123456789abcdef")


def _shelf(folder: Path) -> Shelf:
    about = provenance(folder)
    identity = about.get("identity") or {}
    parts = [identity.get(k) for k in ("dtype", "path", "attention")]
    if identity.get("autocast", "off") != "off":
        parts.insert(1, f"{identity['autocast']} autocast")
    files = [path for path in folder.rglob("*") if path.is_file()]
    noted = folder / "provenance.json"
    return Shelf(
        folder,
        model=str(about.get("model") or ""),
        precision=", ".join(str(part) for part in parts if part) or "no provenance",
        responses=counts(folder)["responses"],
        size=sum(path.stat().st_size for path in files),
        damaged=len(list((folder / "damaged").glob("*"))),
        used=(noted if noted.exists() else folder).stat().st_mtime,
    )


def _in_words(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
