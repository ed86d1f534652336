"""The store on disk: what is written is found by content, whole or not at all, by whoever looks."""

import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from infopo import reference_store
from infopo.errors import RecipeError, ReferenceStoreError
from infopo.reference_store import (
    ReferenceIdentity,
    ReferenceStore,
    check_folder,
    default_folder,
    folder_of,
    live_claims,
    response_key,
    summed,
)
from infopo.workflows.store import list_store, prune, shelves

IDENTITY = ReferenceIdentity(
    weights="w", adapter=None, config="c", dtype="float32", autocast="off", matmul="ieee", head="h", path="forest",
    attention="sdpa",
)  # fmt: skip
KEYS = [response_key([1, 2], [3, n]) for n in range(6)]
VALUES = {key: np.linspace(-n - 1, 0, n + 1, dtype=np.float32) for n, key in enumerate(KEYS)}


def store_in(folder: Path, identity: ReferenceIdentity = IDENTITY, **about: str) -> ReferenceStore:
    return ReferenceStore(folder, identity, **about)


def filled(folder: Path, identity: ReferenceIdentity = IDENTITY) -> ReferenceStore:
    store = store_in(folder, identity, model_name="org/sft", device="cpu")
    store.add({key: VALUES[key] for key in KEYS[:3]})
    store.add({key: VALUES[key] for key in KEYS[3:]})
    store.note_use()
    return store


def found_by_another(folder: Path, identity: ReferenceIdentity = IDENTITY) -> dict[bytes, float]:
    other = store_in(folder, identity)
    other.want(KEYS)
    return {key: each.logp for key, each in other.found.items()}


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_a_key_is_the_tokens_and_where_the_prompt_ends() -> None:
    assert len({*KEYS, response_key([1], [2, 3, 0]), response_key([1, 2, 3], [0])}) == 8
    assert response_key([1, 2], [3]) == response_key((1, 2), (3,))
    # Golden: SHA-256 of 2 as 8 bytes and of 1, 2, 3 as 4 bytes each, little-endian; first 16 bytes.
    assert response_key([1, 2], [3]).hex() == "053bae2c4c65332eba09291d8e41710c"


@pytest.mark.parametrize("name", [f.name for f in fields(ReferenceIdentity)])
def test_whatever_changes_the_function_changes_its_identity(name: str, tmp_path: Path) -> None:
    changed = replace(IDENTITY, **{name: 2 if name == "schema" else "another"})
    assert changed.digest != IDENTITY.digest
    filled(tmp_path)
    assert found_by_another(tmp_path, changed) == {}


def test_an_identity_is_the_same_on_every_machine() -> None:
    assert IDENTITY.digest == "0cc94ac754dc892a866d9aaa298e0ec4"


@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ({}, True),
        ({"dtype": "float64"}, True),
        ({"dtype": "bfloat16"}, False),
        ({"autocast": "bfloat16"}, False),
        ({"matmul": "tf32"}, False),
    ],
)
def test_values_are_exact_in_float32_throughout(changes: dict[str, str], exact: bool) -> None:
    assert replace(IDENTITY, **changes).is_exact is exact


# ---- values --------------------------------------------------------------------------------------------------------


def test_what_is_written_is_found_by_another_process_token_by_token(tmp_path: Path) -> None:
    filled(tmp_path)
    script = (
        "import sys; from pathlib import Path; from infopo.reference_store import *\n"
        "store = ReferenceStore(Path(sys.argv[1]), ReferenceIdentity(*eval(sys.argv[2])))\n"
        "keys = [response_key([1, 2], [3, n]) for n in range(7)]\n"
        "store.want(keys)\n"
        "print([None if (t := store.tokens(k)) is None else (t.dtype.name, t.tolist()) for k in keys])\n"
        "assert 'torch' not in sys.modules\n"
    )
    identity = repr(tuple(getattr(IDENTITY, f.name) for f in fields(IDENTITY)))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), identity], capture_output=True, text=True, check=True
    )
    assert eval(done.stdout) == [("float32", VALUES[key].tolist()) for key in KEYS] + [None]


def test_sums_run_in_float64(tmp_path: Path) -> None:
    tokens = np.full(10_001, -0.1, dtype=np.float32)
    expected = 10_001 * float(np.float32(-0.1))
    assert summed(tokens) == pytest.approx(expected, rel=1e-13)
    assert abs(float(tokens.cumsum()[-1]) - expected) > 1e-3  # what float32 would give
    store = store_in(tmp_path)
    store.add({KEYS[0]: tokens})
    assert found_by_another(tmp_path)[KEYS[0]] == summed(tokens)


def test_only_wanted_responses_are_found(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.want([KEYS[1], response_key([9], [9])])
    assert list(store.found) == [KEYS[1]]
    assert store.tokens(KEYS[0]) is None
    assert store.reused == 1
    assert len(store.computed) == 6


def test_nothing_is_made_before_a_value_is_written(tmp_path: Path) -> None:
    store = store_in(tmp_path / "store")
    store.want(KEYS)
    store.note_use()
    assert not (tmp_path / "store").exists()


def test_provenance_names_versions_and_counts_but_no_place(tmp_path: Path) -> None:
    store = store_in(tmp_path, model_name="/home/somebody/models/sft", device="cpu")
    store.add({KEYS[0]: VALUES[KEYS[0]]})
    store.note_use()
    text = (store.folder / "provenance.json").read_text(encoding="utf-8")
    about = json.loads(text)
    assert about["model"] == "sft"
    assert about["counts"] == {"shards": 1, "responses": 1, "tokens": 1}
    assert about["identity"]["weights"] == "w"
    assert about["device"] == "cpu"
    assert about["packages"]["torch"]
    assert not {"somebody", str(Path.cwd()), os.uname().nodename} & set(
        json.dumps(about).replace('"', " ").split()
    )
    later = store_in(tmp_path, model_name="a copy", device="cuda")  # whose values join the first ones
    later.add({key: VALUES[key] for key in KEYS[1:]})
    later.note_use()
    again = json.loads((store.folder / "provenance.json").read_text(encoding="utf-8"))
    assert again["counts"] == {"shards": 2, "responses": 6, "tokens": 21}
    assert [again[k] for k in ("created", "model", "device")] == [about["created"], "sft", "cpu"]


# ---- damage --------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path) -> None:
    """Another shard's bytes: readable, but not those of this name."""
    path.write_bytes(next(p for p in path.parent.glob("*.safetensors") if p != path).read_bytes())


@pytest.mark.parametrize("damage", [cut, flip, empty, swap])
def test_a_damaged_shard_is_named_set_aside_and_not_used(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = filled(tmp_path)
    store.want(KEYS)
    shard = store.folder / store.found[KEYS[0]].shard
    damage(shard)
    with caplog.at_level(logging.WARNING):
        found = found_by_another(tmp_path)
    assert found == {key: summed(VALUES[key]) for key in KEYS[3:]}
    assert f"{shard}: is damaged" in caplog.text
    assert not shard.exists()
    assert (store.folder / "damaged" / shard.name).exists()
    store.add({key: VALUES[key] for key in KEYS[:3]})
    assert found_by_another(tmp_path) == {key: summed(VALUES[key]) for key in KEYS}


def test_a_file_that_is_no_shard_under_its_right_hash_is_set_aside(tmp_path: Path) -> None:
    store = filled(tmp_path)
    content = safetensors.numpy.save({"other": np.zeros(3)})
    name = f"{reference_store.hashlib.sha256(content).hexdigest()}.safetensors"
    (store.folder / name).write_bytes(content)
    assert len(found_by_another(tmp_path)) == 6
    assert (store.folder / "damaged" / name).exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"identity": {}}'])
def test_damaged_provenance_is_written_anew(tmp_path: Path, content: str) -> None:
    store = filled(tmp_path)
    (store.folder / "provenance.json").write_text(content)
    assert [shelf.responses for shelf in shelves(str(tmp_path))] == [6]
    store.note_use()
    assert json.loads((store.folder / "provenance.json").read_text())["model"] == "org/sft"


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    store = filled(tmp_path)
    half = store.folder / ".0123.tmp"
    half.write_bytes(b"half")
    with store.claim(deque([[b"k" * 16]]), 1):
        assert not half.exists()
        half.write_bytes(b"somebody is writing")
        with store_in(tmp_path).claim(deque([[b"l" * 16]]), 1):
            assert half.exists()


# ---- claims --------------------------------------------------------------------------------------------------------


def test_of_two_claims_each_response_is_in_one(tmp_path: Path) -> None:
    queue, others = deque([KEYS[:2], KEYS[2:4], KEYS[4:]]), deque([KEYS[3:], KEYS[:3]])
    with store_in(tmp_path).claim(queue, 2) as mine:
        assert mine == [KEYS[:2], KEYS[2:4]]
        assert queue == deque([KEYS[4:]])
        with store_in(tmp_path).claim(others, 9) as theirs:
            assert theirs == [KEYS[4:]]
            assert others == deque([[KEYS[3]], KEYS[:3]])  # to look for later
            with store_in(tmp_path).claim(deque([KEYS]), 9) as nothing:
                assert nothing == []
    with store_in(tmp_path).claim(others, 9) as rest:
        assert rest == [[KEYS[3]], KEYS[:3]]


def test_what_is_stored_is_not_claimed(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.want(KEYS)
    store_in(tmp_path).add({key: VALUES[key] for key in KEYS[1:]})
    queue = deque([KEYS[:3], KEYS[3:]])
    with store.claim(queue, 9) as mine:
        assert mine == [KEYS[:1]]
    assert not queue
    assert store.found.keys() == set(KEYS[1:])


def test_a_claim_ends_with_its_block_even_if_that_fails(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"), store.claim(deque([KEYS]), 1):
        raise RuntimeError("out of memory")
    assert list((store.folder / "claims").iterdir()) == []
    with store_in(tmp_path).claim(deque([KEYS]), 1) as mine:
        assert mine == [KEYS]


def test_a_claim_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(KEYS[0]), before[1]))
    try:
        with pytest.raises(ReferenceStoreError) as held, store.claim(deque([KEYS]), 1):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with store_in(tmp_path).claim(deque([KEYS]), 1) as mine:
        assert mine == [KEYS]
    assert held.tb is not None


def test_a_claim_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    script = (
        "import sys, time; from collections import deque; from pathlib import Path\n"
        "from infopo.reference_store import *\n"
        "store = ReferenceStore(Path(sys.argv[1]), ReferenceIdentity(*eval(sys.argv[2])))\n"
        "keys = [response_key([1, 2], [3, n]) for n in range(6)]\n"
        "with store.claim(deque([keys[:4]]), 1):\n"
        "    print('claimed', flush=True); time.sleep(600)\n"
    )
    identity = repr(tuple(getattr(IDENTITY, f.name) for f in fields(IDENTITY)))
    command = [sys.executable, "-c", script, str(tmp_path), identity]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "claimed\n"
            store = store_in(tmp_path)
            with store.claim(deque([KEYS]), 1) as mine:
                assert mine == [KEYS[4:]]
            with pytest.raises(
                ReferenceStoreError, match="is being computed by another process at the moment"
            ):
                prune(str(tmp_path), ["all"])
        finally:
            process.kill()
            process.wait()
    with store.claim(deque([KEYS]), 1) as mine:
        assert mine == [KEYS]
    assert list((store.folder / "claims").iterdir()) == []
    assert prune(str(tmp_path), ["all"]) == [store.folder]


def test_many_threads_compute_each_response_once(tmp_path: Path) -> None:
    keys = [response_key([n], [n]) for n in range(60)]
    computed: list[bytes] = []

    def work(turn: int) -> None:
        store = store_in(tmp_path)
        store.want(keys)
        shifted = keys[turn * 15 :] + keys[: turn * 15]
        queue = deque(shifted[i : i + 4] for i in range(0, 60, 4))
        while queue:
            with store.claim(queue, 2) as mine:
                chosen = [key for batch in mine for key in batch]
                computed.extend(chosen)
                time.sleep(0.002)
                if chosen:
                    store.add({key: np.array([-1.0], dtype=np.float32) for key in chosen})
        assert store.found.keys() == set(keys)

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(computed) == sorted(keys)


def test_a_lock_that_is_kept_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_store, "LOCK_SECONDS", 0.05)
    store = filled(tmp_path)
    with (
        reference_store.exclusive(store.folder),
        pytest.raises(ReferenceStoreError, match=r"lock: another process has held this lock for 0.05 s"),
        store_in(tmp_path).claim(deque([[b"k" * 16]]), 1),
    ):
        pass


# ---- places --------------------------------------------------------------------------------------------------------


def test_where_the_store_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFOPO_CACHE", str(tmp_path / "a"))
    assert default_folder() == folder_of("auto") == tmp_path / "a" / "reference"
    monkeypatch.delenv("INFOPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert default_folder() == tmp_path / "b" / "infopo" / "reference"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert default_folder() == tmp_path / "c" / ".cache" / "infopo" / "reference"
    assert folder_of("~/store") == tmp_path / "c" / "store"
    assert folder_of("off") is folder_of(None) is None


def test_a_place_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert check_folder(tmp_path / "new" / "deep") is None
    assert check_folder(tmp_path) is None
    assert str(check_folder(tmp_path / "file" / "store")).endswith(
        f"cannot be made: {tmp_path / 'file'} is a file"
    )
    store = store_in(tmp_path / "file")
    with pytest.raises(ReferenceStoreError, match=r"set reference.store to one, or to off"):
        store.add({KEYS[0]: VALUES[KEYS[0]]})
    with pytest.raises(ReferenceStoreError), store.claim(deque([KEYS]), 1):
        pass


# ---- list and prune ------------------------------------------------------------------------------------------------

OTHER = replace(IDENTITY, weights="v", autocast="bfloat16", path="naive")


def test_list_shows_each_reference_with_its_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    list_store(str(tmp_path / "none"))
    assert capsys.readouterr().out == f"{tmp_path / 'none'}: references: 0, 0 B\n"
    first, second = filled(tmp_path), filled(tmp_path, OTHER)
    os.utime(first.folder / "provenance.json", (0, 0))
    second.want(KEYS)
    flip(second.folder / second.found[KEYS[0]].shard)
    second.want(KEYS)
    list_store(str(tmp_path))
    total, *lines = capsys.readouterr().out.splitlines()
    sizes = [sum(p.stat().st_size for p in s.folder.rglob("*") if p.is_file()) for s in (second, first)]
    assert total == f"{tmp_path}: references: 2, {sum(sizes) / 1000:.1f} kB"
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert lines == [
        f"{second.folder.name[:8]}  3 responses, {sizes[0] / 1000:.1f} kB, 1 damaged shard, last used {today}: "
        "org/sft (float32, bfloat16 autocast, naive, sdpa)",
        f"{first.folder.name[:8]}  6 responses, {sizes[1] / 1000:.1f} kB, last used 1970-01-01: "
        "org/sft (float32, forest, sdpa)",
    ]


def test_prune_removes_what_is_named_and_nothing_else(tmp_path: Path) -> None:
    first, second = filled(tmp_path), filled(tmp_path, OTHER)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RecipeError, match=r"0 references begin with 'zz', expected one; there are"):
        prune(str(tmp_path), [first.folder.name, "zz"])
    with pytest.raises(RecipeError, match="2 references begin with ''"):
        prune(str(tmp_path), [""])
    with pytest.raises(RecipeError, match="--prune: name references"):
        prune(str(tmp_path), [])
    assert len(shelves(str(tmp_path))) == 2
    assert prune(str(tmp_path), [first.folder.name[:8]]) == [first.folder]
    assert [shelf.folder for shelf in shelves(str(tmp_path))] == [second.folder]
    assert prune(str(tmp_path), ["all"]) == [second.folder]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "notes.txt"]


def test_prune_by_age_looks_at_the_last_use(tmp_path: Path) -> None:
    old, new = filled(tmp_path), filled(tmp_path, OTHER)
    days_ago = time.time() - 10 * 86400
    os.utime(old.folder / "provenance.json", (days_ago, days_ago))
    assert prune(str(tmp_path), [], older_than=11) == []
    assert prune(str(tmp_path), [new.folder.name], older_than=9) == []
    assert prune(str(tmp_path), [], older_than=9) == [old.folder]


def test_a_shard_that_is_pruned_while_it_is_read_is_simply_not_there(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.want(KEYS)
    prune(str(tmp_path), ["all"])
    assert store.tokens(KEYS[0]) is None
    store.add({KEYS[0]: VALUES[KEYS[0]]})
    assert found_by_another(tmp_path) == {KEYS[0]: summed(VALUES[KEYS[0]])}
    with reference_store.exclusive(store.folder):
        assert live_claims(store.folder) == set()
