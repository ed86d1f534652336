"""The reference store: log π_ref of every token of a response, on disk, found by content alone. Imports no torch.

    <store>/                          $INFOPO_CACHE/reference, else ~/.cache/infopo/reference
      <identity>/                     one reference function (`ReferenceIdentity`), named by its hash
        provenance.json               description of the identity, versions, counts
        <sha256>.safetensors          a shard, named by the hash of its bytes:
                                        keys (responses, 16) uint8, offsets (responses + 1,), logps (tokens,) float32
        damaged/                      shards whose bytes do not have the hash in their name
        claims/                       responses that processes are computing now
        lock                          held while a claim is made

Invariants: A shard is written under another name, fsynced and renamed, so that it is whole or does not exist, and it
never changes. A process that computes responses holds a lock on its claim, which the system releases when the process
ends, however it ends. A claim is removed after its shard is in place, so that at every moment a response is stored,
claimed, or free. Claims are made, and folders removed, under `lock` only.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from infopo import caches, durable
from infopo.errors import ReferenceStoreError
from infopo.output import counted, get_logger
from infopo.provenance import environment
from infopo.runs import write_json_atomic

logger = get_logger(__name__)

PROVENANCE = "provenance.json"
SCHEMA_VERSION = 1
KEY_BYTES = 16
LOCK_SECONDS = 300
"""Seconds to wait for a lock that others hold for moments only."""

Tokens = npt.NDArray[np.floating[Any]]
"""log π_ref of each token of a response (nats), (tokens,)."""


@dataclass(frozen=True)
class ReferenceIdentity:
    """The function that a log-prob was computed with. It contains all that changes a value, and nothing else.

    Attributes:
        weights: Hash of the model's weights, without an adapter's.
        adapter: Hash of the adapter's weights and settings, or None without one.
        config: Hash of the model's class and of the configuration that decides what it computes.
        dtype: Type of the weights.
        autocast: Type that the forward pass casts to, or `off`.
        matmul: Precision of float32 matrix products: `ieee`, `tf32`, ...
        head: Description of how logits become log-probs.
        path: Layout of responses: `forest`, `padded` or `naive`.
        attention: The attention implementation, by transformers' name.
        schema: Version, which rises if the meaning of stored values changes.
    """

    weights: str
    adapter: str | None
    config: str
    dtype: str
    autocast: str
    matmul: str
    head: str
    path: str
    attention: str
    schema: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that identify the function, the same on every machine."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def is_exact(self) -> bool:
        """Whether values are computed in float32 or better throughout."""
        full = self.dtype in ("float32", "float64")
        return full and self.autocast == "off" and self.matmul == "ieee"


def response_key(
    prompt_ids: Sequence[int], response_ids: Sequence[int], context: Sequence[tuple[int, int]] = ()
) -> bytes:
    """Returns 16 bytes that identify the tokens of a response and of its prompt, and which of them are scored.

    Args:
        prompt_ids: Tokens of the prompt.
        response_ids: Tokens of the response.
        context: Begin and end of the spans of the response that are not scored.

    Example:
        >>> len(response_key([1, 2], [3])), response_key([1, 2], [3]) == response_key([1], [2, 3])
        (16, False)
    """
    digest = hashlib.sha256(len(prompt_ids).to_bytes(8, "little"))
    digest.update(np.array([*prompt_ids, *response_ids], dtype="<i4").tobytes())
    # Without context, the key stays that of values which were stored before there was any.
    if context:
        digest.update(np.array([-1, *(place for span in context for place in span)], dtype="<i4").tobytes())
    return digest.digest()[:KEY_BYTES]


def default_folder() -> Path:
    """Returns `$INFOPO_CACHE/reference`, or else `infopo/reference` in the user's cache."""
    return caches.default_folder("reference")


def folder_of(setting: str | None) -> Path | None:
    """Returns the folder that a setting names. `auto` is the default one, and `off` and None are no folder."""
    return caches.folder_of(setting, "reference")


def check_folder(folder: Path) -> str | None:
    """Returns why a store cannot be kept in a folder, or None if it can. Makes nothing."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    if not there.is_dir():
        return f"{folder} cannot be made: {there} is a file"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{folder} cannot be written to: no permission to write in {there}"
    return None


@dataclass(frozen=True)
class StoredResponse:
    """A response whose value is stored.

    Attributes:
        logp: log π_ref(y|x) = Σ_t log π_ref(y_t | x, y_<t) (nats), summed in float64.
        shard: Name of the file that contains it.
    """

    logp: float
    shard: str


def summed(tokens: Tokens) -> float:
    """Returns the sum of a response's token log-probs in float64."""
    return float(tokens.sum(dtype=np.float64))


class ReferenceStore:
    """The values of one reference function, as one process sees them.

    Args:
        root: Folder of the store, which is made when the first value is written.
        identity: The function.
        model_name: Name of the model, for provenance only.
        device: Kind of device that computes the values that are added here, for provenance only.

    Attributes:
        folder: Folder of this function's values.
        found: Wanted responses whose values are known.
        computed: Keys of the responses that this process has added.
        reused: Number of responses that were found where they were looked up.
    """

    def __init__(
        self, root: Path, identity: ReferenceIdentity, model_name: str = "", device: str = ""
    ) -> None:
        self.root = root
        self.identity = identity
        self.folder = root / identity.digest
        self.found: dict[bytes, StoredResponse] = {}
        self.computed: set[bytes] = set()
        self.reused = 0
        # The path of a folder means nothing on another machine.
        self._model_name = Path(model_name).name if Path(model_name).is_absolute() else model_name
        self._device = device
        self._wanted: frozenset[bytes] = frozenset()
        self._read: set[str] = set()

    # ---- reading ---------------------------------------------------------------------------------------------------

    def want(self, keys: Collection[bytes]) -> None:
        """Looks these responses up. `found` then contains those that are stored."""
        self._wanted, self._read, self.found = frozenset(keys), set(), {}
        self._read_new_shards()
        self.reused += len(self.found)

    def in_words(self) -> str:
        """Returns the folder and the numbers of responses found and computed, in one line."""
        return f"{self.folder}: {counted(self.reused, 'response')} found, {len(self.computed)} computed"

    def _read_new_shards(self) -> None:
        with self._os_errors_named():
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
            for name in names:
                if name not in self._read:
                    self._read.add(name)
                    self._read_shard(name)

    def _read_shard(self, name: str) -> None:
        for key, tokens in self._shard(name):
            if key in self._wanted:
                self.found[key] = StoredResponse(summed(tokens), name)

    def _shard(self, name: str) -> list[tuple[bytes, Tokens]]:
        """Returns the responses of a shard. If it is gone, there are none. If it is damaged, it is set aside."""
        try:
            content = (self.folder / name).read_bytes()
        except FileNotFoundError:
            # It has been pruned, or set aside by another process.
            return []
        try:
            return _unpacked(name, content)
        except (ValueError, KeyError, SafetensorError) as error:
            self._set_aside(name, str(error))
            return []

    def _set_aside(self, name: str, problem: str) -> None:
        logger.warning(
            "%s: is damaged (%s); it is moved to %s, and its responses are computed anew",
            self.folder / name, problem, self.folder / "damaged",
        )  # fmt: skip
        # Another process may be faster, or the store may be read-only.
        with contextlib.suppress(OSError):
            (self.folder / "damaged").mkdir(exist_ok=True)
            (self.folder / name).replace(self.folder / "damaged" / name)

    def tokens(self, key: bytes) -> Tokens | None:
        """Returns log π_ref of each token of a wanted response (nats, float32), or None if it is not stored."""
        if key not in self.found:
            return None
        return dict(self._shard(self.found[key].shard)).get(key)

    # ---- computing -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(self, queue: deque[list[bytes]], batches: int) -> Iterator[list[list[bytes]]]:
        """Claims responses, which this process and no other computes within the block.

        Args:
            queue: Batches of keys that are not known to be stored. Keys that are found meanwhile are removed from it,
                and so are those that are yielded. Keys that others are computing stay.
            batches: Largest number of batches to claim.

        Yields:
            Batches of keys. There are none if others are computing all that is left.
        """
        claims = self.folder / "claims"
        own = _lock(claims / f"{os.getpid()}-{uuid.uuid4().hex}.lock")
        with self._os_errors_named():
            claims.mkdir(parents=True, exist_ok=True)
            # Most shards are read before the lock is taken, so that others wait for a short time only.
            self._read_new_shards()
            with exclusive(self.folder):
                # Claims are read before shards, because a process that finishes in between puts its shard in place
                # before it removes its claim. In the other order, its responses could be missed in both.
                taken = live_claims(self.folder)
                self._read_new_shards()
                claimed = self._choose(queue, taken, batches)
                if claimed:
                    _make_claim(own, claimed)
        try:
            yield claimed
        finally:
            if claimed:
                _remove_claim(own)

    def claimants(self) -> str:
        """The processes that are computing for this store, e.g. `processes 7, 9`, by their numbers."""
        numbers = {path.name.partition("-")[0] for path in (self.folder / "claims").glob("*-*.lock")}
        named = ", ".join(sorted(numbers - {str(os.getpid())}, key=lambda number: (len(number), number)))
        return f"process{'es' if ',' in named else ''} {named}" if named else "another process"

    def _choose(self, queue: deque[list[bytes]], taken: Collection[bytes], batches: int) -> list[list[bytes]]:
        claimed, left = list[list[bytes]](), deque[list[bytes]]()
        while queue and len(claimed) < batches:
            missing = [key for key in queue.popleft() if key not in self.found]
            if free := [key for key in missing if key not in taken]:
                claimed.append(free)
            if others := [key for key in missing if key in taken]:
                left.append(others)
        queue.extend(left)
        return claimed

    def add(self, values: Mapping[bytes, Tokens]) -> None:
        """Writes values as one shard, which exists as a whole or not at all, and is durable once this returns."""
        content = _packed(values, self._about)
        name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
        with self._os_errors_named():
            self.folder.mkdir(parents=True, exist_ok=True)
            durable.write(self.folder / name, [content])
        # Values are read back from the file, so that what is used is what was written.
        self._read.add(name)
        self._read_shard(name)
        self.computed.update(values)

    def note_use(self) -> None:
        """Updates the provenance file. Does nothing in a store that cannot be written to."""
        if not self.folder.is_dir():
            return
        with contextlib.suppress(OSError, ReferenceStoreError), exclusive(self.folder):
            path = self.folder / PROVENANCE
            record = provenance(self.folder)
            if record.get("identity") != asdict(self.identity):
                record = {"identity": asdict(self.identity), "model": self._model_name, **self._about}
            now = datetime.now(UTC).isoformat(timespec="seconds")
            write_json_atomic(path, record | {"counts": counts(self.folder), "used": now})

    @cached_property
    def _about(self) -> dict[str, Any]:
        """The part of shards and provenance that describes this process. It names neither the machine nor its user."""
        made = environment(seed=None)
        versions = {key: made[key] for key in ("schema_version", "created", "infopo", "python", "packages")}
        return versions | {"device": self._device}

    # ---- the file system -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _os_errors_named(self) -> Iterator[None]:
        """Turns errors of the system into one that names the file and what the store needs."""
        try:
            yield
        except OSError as error:
            raise ReferenceStoreError(
                f"{error.filename or self.folder}: {error.strerror or error}. The reference store needs a folder that "
                "can be written to, on a file system with locks: set reference.store to one, or to off"
            ) from error


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keeps other processes from making a claim in this folder, or removing it, within the block.

    Raises:
        ReferenceStoreError: Another process holds the lock.
    """
    lock = _lock(folder / "lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise ReferenceStoreError(
            f"{folder / 'lock'}: another process has held this lock for {LOCK_SECONDS} s, expected moments. "
            "Is a stopped process using the store? End it, or set reference.store to another folder or to off"
        ) from error
    try:
        yield
    finally:
        lock.release()


def live_claims(folder: Path) -> set[bytes]:
    """Returns the responses that live processes are computing, and removes what dead ones have left.

    This is for use within `exclusive` only.
    """
    taken, nobody = set[bytes](), True
    for path in (folder / "claims").glob("*.lock"):
        lock = _lock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            nobody = False
            # The other process may just have finished.
            with contextlib.suppress(FileNotFoundError):
                content = path.with_suffix(".keys").read_bytes()
                taken.update(content[i : i + KEY_BYTES] for i in range(0, len(content), KEY_BYTES))
        else:
            _remove_claim(lock)
    # A process that writes has a claim, so without claims temporary files are those of dead processes.
    if nobody:
        durable.remove_left_behind(folder)
    return taken


def _lock(path: Path) -> FileLock:
    """Returns a lock that the system releases when its process ends. A mere file would outlive the process."""
    return FileLock(path, fallback_to_soft=False)


def _make_claim(lock: FileLock, batches: Sequence[Sequence[bytes]]) -> None:
    """Makes a claim of these responses, as a whole or not at all."""
    lock.acquire(timeout=0)
    try:
        keys = Path(lock.lock_file).with_suffix(".keys")
        keys.write_bytes(b"".join(key for batch in batches for key in batch))
    except BaseException:
        # Whoever holds the exception holds the lock, and others would wait for what nobody computes.
        _remove_claim(lock)
        raise


def _remove_claim(lock: FileLock) -> None:
    """Ends a claim whose lock this process holds."""
    path = Path(lock.lock_file)
    path.with_suffix(".keys").unlink(missing_ok=True)
    lock.release()
    # No other claim ever has this name, so the file can be removed after the lock is released.
    path.unlink(missing_ok=True)


def _packed(values: Mapping[bytes, Tokens], about: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a shard."""
    tokens = [np.asarray(logps, dtype=np.float32) for logps in values.values()]
    return safetensors.numpy.save(
        {
            "keys": np.frombuffer(b"".join(values), dtype=np.uint8).reshape(-1, KEY_BYTES),
            "offsets": np.cumsum([0, *map(len, tokens)], dtype=np.int64),
            "logps": np.concatenate(tokens),
        },
        metadata={"about": json.dumps(about, sort_keys=True)},
    )


def _unpacked(name: str, content: bytes) -> list[tuple[bytes, Tokens]]:
    """Returns key and tokens of each response of a shard.

    Raises:
        ValueError, KeyError, SafetensorError: The bytes do not have the hash in the name, or are no shard.
    """
    digest = hashlib.sha256(content).hexdigest()
    if name != f"{digest}.safetensors":
        raise ValueError(f"its bytes have the SHA-256 {digest[:12]}..., not that of its name")
    arrays = safetensors.numpy.load(content)
    offsets, logps = arrays["offsets"].tolist(), arrays["logps"]
    return [
        (key.tobytes(), logps[begin:end])
        for key, begin, end in zip(arrays["keys"], offsets, offsets[1:], strict=False)
    ]


def provenance(folder: Path) -> dict[str, Any]:
    """Returns the content of the provenance file, or an empty dict if there is none that can be read."""
    try:
        record = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def counts(folder: Path) -> dict[str, int]:
    """Returns the numbers of shards, responses and tokens, from the shards' headers."""
    totals = {"shards": 0, "responses": 0, "tokens": 0}
    for path in folder.glob("*.safetensors"):
        try:
            with safetensors.safe_open(path, "numpy") as shard:
                shapes = {name: shard.get_slice(name).get_shape() for name in ("keys", "logps")}
        except (OSError, SafetensorError):
            # The shard is gone or damaged, which is reported when its values are read.
            continue
        totals["shards"] += 1
        totals["responses"] += shapes["keys"][0]
        totals["tokens"] += shapes["logps"][0]
    return totals
