"""The sample store: what a sample is found by, and what a kill, a second process and damage do to it."""

import dataclasses
import json
from pathlib import Path

import pytest

from infopo.errors import ConfigError, DataError
from infopo.evaluation.items import Item
from infopo.evaluation.samples import Sample, SampleStore, key_of, read_samples, seed_of
from infopo.evaluation.spooled import Places, SpooledItems

LAW = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "stop": [], "ends": [2]}


def sample(number: int, text: str = "Answer: 7") -> Sample:
    return Sample(
        key=key_of("weights", "prompt", LAW, 0, number), task="lab", item="lab/0", sample=number, seed=number,
        weights="weights", law=LAW, prompt=[{"role": "user", "content": "3+4=?"}], text=text, token_ids=(5, 2),
        tokens=2, finished=True, logp=-0.25,
    )  # fmt: skip


def test_samples_come_back_as_they_were_added(tmp_path: Path) -> None:
    kept = [
        sample(number, text) for number, text in enumerate(["plain", 'quote " and \n line', "ü𝄞\u2028", ""])
    ]
    with SampleStore(tmp_path) as store:
        store.add(kept[:2])
        store.add(kept[2:])
        assert [store[each.key] for each in kept] == kept
    with SampleStore(tmp_path) as store:
        assert [store[each.key] for each in kept] == kept
        assert len(store) == 4
    assert list(read_samples(tmp_path / "samples.jsonl")) == kept


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": "other"},
        {"prompt": "other"},
        {"seed": 1},
        {"sample": 1},
        *({"law": {**LAW, name: value}} for name, value in
          {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.5, "stop": ["\n"], "ends": [2, 3]}.items()),
    ],
)  # fmt: skip
def test_a_sample_is_another_one_if_anything_that_it_depends_on_changes(changed: dict[str, object]) -> None:
    given = {"weights": "weights", "prompt": "prompt", "law": LAW, "seed": 0, "sample": 0}
    assert key_of(**given) != key_of(**given | changed)  # type: ignore[arg-type]


def test_a_greedy_sample_depends_on_no_seed() -> None:
    greedy = {**LAW, "temperature": 0.0}
    assert key_of("w", "p", greedy, 0, 0) == key_of("w", "p", greedy, 5, 3)


def test_seeds_differ_between_samples_prompts_and_evaluations() -> None:
    seeds = {seed_of(seed, prompt, number) for seed in range(5) for prompt in "abcde" for number in range(40)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_half_a_line_that_a_kill_left_is_drawn_anew(tmp_path: Path) -> None:
    with SampleStore(tmp_path) as store:
        store.add([sample(0), sample(1)])
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    for cut in (1, 20, len(whole) // 2 - 2):
        path.write_bytes(whole[:-cut])
        with SampleStore(tmp_path) as store:
            assert sample(0).key in store
            assert sample(1).key not in store
            store.add([sample(1)])
            assert store[sample(1).key] == sample(1)
        assert path.read_bytes() == whole


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with SampleStore(tmp_path) as store:
        store.add([sample(0), sample(1), sample(2)])
    path = tmp_path / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for damaged in ("{}\n", "no JSON\n", json.dumps({**json.loads(lines[1]), "text": 5}) + "\n"):
        path.write_text("".join([lines[0], damaged, lines[2]]))
        with pytest.raises(DataError, match=r"samples\.jsonl:2"):
            SampleStore(tmp_path)


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with SampleStore(tmp_path), pytest.raises(ConfigError, match="--shard"):
        SampleStore(tmp_path)
    with SampleStore(tmp_path, (1, 2)) as one, SampleStore(tmp_path, (2, 2)) as two:
        one.add([sample(0)])
        two.add([sample(1)])
    with SampleStore(tmp_path) as store:
        assert [store[sample(number).key] for number in (0, 1)] == [sample(0), sample(1)]


def test_a_store_that_cannot_be_read_lets_go_of_its_file(tmp_path: Path) -> None:
    """A notebook keeps the last exception, with all that it came through."""
    path = tmp_path / "samples.jsonl"
    path.write_text("no JSON\n")
    with pytest.raises(DataError) as held:
        SampleStore(tmp_path)
    path.write_text("")
    with SampleStore(tmp_path) as store:
        assert len(store) == 0
    assert held.tb is not None


def test_lines_of_later_versions_with_further_fields_are_read(tmp_path: Path) -> None:
    with SampleStore(tmp_path) as store:
        store.add([sample(0)])
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}) + "\n")
    (found,) = read_samples(path)
    assert dataclasses.asdict(found) == dataclasses.asdict(sample(0))


def test_places_are_found_by_any_key_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    places = Places()
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    places.add([("\ud800", 2, a, 5), ("\ud800", 0, b, 9), ("'; --", 0, a, 0), ("\ud800", 2, a, 1)])
    assert places.of("\ud800") == [(b, 9), (a, 1), (a, 5)]
    assert places.of("'; --") == [(a, 0)]
    assert ("none" in places, "\ud800" in places, len(places)) == (False, True, 4)


def test_items_on_disk_are_those_that_were_given() -> None:
    given = [Item(f"row/{n}", [{"role": "user", "content": "\ud800" * n}], {"n": n}) for n in range(20)]
    items = SpooledItems(iter(given))
    assert list(items) == given
    assert list(items[5:][:3]) == given[5:8]
    assert [len(items), len(items[18:]), items[-1]] == [20, 2, given[-1]]
    both = zip(items[:10], items[10:], strict=True)  # two readers of one file
    assert [(a.gold["n"], b.gold["n"]) for a, b in both] == [(n, n + 10) for n in range(10)]
