"""Verdicts: each needs its effect and its interval, causes come before symptoms, and what was not measured is said."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from infopo.evidence import Evidence, History
from infopo.intervals import wilson
from infopo.runs import to_json
from infopo.verdicts import CHECKS, Verdict, judge, line_of, record_of, verdicts_in

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8")

START = {
    "step": 0,
    "probe/n": 64,
    "probe/n_pairs": 64,
    "probe/n_chosen": 64,
    "probe/logps/chosen_per_token": -0.1,
    "probe/logps/rejected_per_token": -0.2,
    "probe/ranking_accuracy": 0.8,
    "probe/p_max": -0.3,
    "anchor/entropy": 0.5,
    "generations/distinct_2": 0.5,
}
HEALTHY = {
    "step": 100,
    "loss": 1.5,
    "probe/change/chosen_per_token": 0.01,
    "probe/change/chosen_per_token_ci95": 0.005,
    "probe/margin": 1.2,
    "probe/margin_ci95": 0.3,
    "probe/p_max": -0.3,
    "probe/chosen_fell": 0.3,
    "anchor/entropy": 0.4,
    "kl/forward": 0.3,
    "kl/forward_se": 0.1,
    "reference/moved": 0.0,
    "length/sampled": 30,
    "length/anchor": 29,
    "generations/distinct_2": 0.5,
}


def share(count: int, n: int) -> dict[str, Any]:
    return {
        "count": count,
        "n": n,
        "share": count / n,
        "rows": [f"a.jsonl:{i}" for i in range(min(count, 10))],
    }


def data(
    near: int = 0, conflicts: int = 0, d: float = 0.1, chosen_mean: float = 30, prefers: float | None = 0.3
) -> dict[str, Any]:
    known = None if prefers is None else {"share": prefers, "share_per_token": prefers, "n": 600}
    lengths = {"chosen_mean": chosen_mean, "rejected_mean": 29}
    return {
        "pairs": 600,
        "length": lengths | {"cohens_d": d, "cohens_d_ci95": [d - 0.1, d + 0.1]},
        "near_duplicates": share(near, 600),
        "conflicts": share(conflicts, 600),
        "reference_prefers_rejected": known,
    }


def verdicts(
    end: Mapping[str, float] = {}, facts: Mapping[str, Any] | None = None, **start: float
) -> dict[str, Verdict]:
    history = History([START | start, HEALTHY | end])
    found = judge(Evidence(history, data() if facts is None else facts, finished=True))
    return {verdict.name: verdict for verdict in found}


def fired(found: Mapping[str, Verdict]) -> list[str]:
    return [name for name, verdict in found.items() if verdict.fired]


def test_an_interval_is_that_of_the_effect_beside_it():
    """In a healthy run, and beyond and within the threshold of each check."""
    seen = set()
    for values in ({}, *(each for pair in BEYOND.values() for each in pair)):
        metrics = {name: value for name, value in values.items() if name not in ("facts", "start")}
        for verdict in verdicts(metrics, values.get("facts"), **values.get("start", {})).values():
            if verdict.interval is not None:
                low, high = verdict.interval
                assert low - 1e-12 <= verdict.effect <= high + 1e-12, verdict
                seen.add(verdict.name)
    assert len(seen) >= 7


def test_the_interval_of_suspect_labels_is_the_one_that_it_is_called():
    found = verdicts(facts=data(prefers=0.8))["suspect labels"]
    n = data(prefers=0.8)["reference_prefers_rejected"]["n"]
    assert found.interval == pytest.approx(wilson(0.8, n))


def test_a_healthy_run_has_no_verdict_and_all_was_checked():
    found = verdicts()
    assert fired(found) == []
    assert [verdict.not_checked for verdict in found.values()] == [None] * len(CHECKS)
    assert all(verdict.effect is not None for verdict in found.values())


FALLEN = {"probe/change/chosen_per_token": -0.1, "probe/change/chosen_per_token_ci95": 0.02}

BEYOND: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reference not frozen": ({"reference/moved": 0.5}, {"reference/moved": 0.005}),
    "conflicting rows": ({"facts": data(conflicts=30)}, {"facts": data(conflicts=3)}),
    "suspect labels": ({"facts": data(prefers=0.8)}, {"facts": data(prefers=0.55)}),
    "near-duplicate sides": ({"facts": data(near=90)}, {"facts": data(near=30)}),
    "instability": ({"loss": math.nan}, {"loss": 3.0}),
    "length bias": ({"facts": data(d=1.2, chosen_mean=60)}, {"facts": data(d=0.6, chosen_mean=60)}),
    "poor chosen responses": (
        {"start": {"probe/logps/chosen_per_token": -2.5}},
        {"start": {"probe/logps/chosen_per_token": -1.5}},
    ),
    "longer samples": ({"length/sampled": 80}, {"length/sampled": 40}),
    "entropy collapse": (
        {"anchor/entropy": 0.1, "generations/distinct_2": 0.2},
        {"anchor/entropy": 0.1, "generations/distinct_2": 0.6},
    ),
    "squeezing": (FALLEN | {"probe/p_max": -0.1}, {"probe/p_max": -0.1}),
    "chosen falling": (FALLEN, FALLEN | {"probe/change/chosen_per_token_ci95": 0.2}),
    "drift beyond budget": ({"kl/forward": 40.0}, {"kl/forward": 40.0, "kl/forward_se": 20.0}),
    "nothing learned": (
        {"probe/margin": 0.01, "probe/margin_ci95": 0.02},
        {"probe/margin": 0.01, "probe/margin_ci95": 0.5},
    ),
}


@pytest.mark.parametrize("check", [check.name for check in CHECKS])
def test_a_check_fires_beyond_its_threshold_alone_and_is_named_first(check: str):
    beyond, within = BEYOND[check]
    for values, expected in ((beyond, True), (within, False)):
        metrics = {name: value for name, value in values.items() if name not in ("facts", "start")}
        found = verdicts(metrics, values.get("facts"), **values.get("start", {}))
        assert found[check].fired == expected, found[check]
        if expected:
            assert fired(found)[0] == check


@pytest.mark.parametrize("check", [check.name for check in CHECKS])
def test_the_page_of_the_documentation_has_threshold_and_advice_of_each_check(check: str):
    (row,) = (each for each in CHECKS if each.name == check)
    assert f"| `{check}` | {row.threshold} | {row.advice} |" in PAGE.splitlines()


def test_what_was_not_measured_is_said_for_each_check_and_none_fires():
    found = judge(Evidence(History()))
    assert not any(verdict.fired for verdict in found)
    assert all(verdict.not_checked and verdict.not_checked in verdict.text for verdict in found)


@pytest.mark.parametrize("name", [*HEALTHY, *START])
def test_any_metric_may_be_missing(name: str):
    records = [{k: v for k, v in record.items() if k != name} for record in (START, HEALTHY)]
    assert not any(verdict.fired for verdict in judge(Evidence(History(records), data(), finished=True)))


def test_labels_are_judged_on_the_probe_set_if_the_reference_of_a_side_is_not_known():
    unknown = data(prefers=None)
    assert fired(verdicts({}, unknown)) == []
    swapped = {"probe/ranking_accuracy": 0.2, "probe/logps/chosen_per_token": -0.3}
    assert fired(verdicts({}, unknown, **swapped)) == ["suspect labels"]
    # Longer responses are less likely by their length alone.
    assert fired(verdicts({}, unknown, **{"probe/ranking_accuracy": 0.2})) == []


def test_chosen_falling_is_a_symptom_of_an_unfrozen_reference():
    found = verdicts(FALLEN | {"reference/moved": 0.3, "probe/p_max": -0.1})
    assert fired(found) == ["reference not frozen", "squeezing", "chosen falling"]


def losses(values: list[float]) -> Verdict:
    found = judge(Evidence(History({"step": i + 1, "loss": loss} for i, loss in enumerate(values))))
    return next(verdict for verdict in found if verdict.name == "instability")


def test_spikes_are_unstable_and_a_noisy_or_falling_loss_is_not():
    noisy = [1 + 0.3 * math.sin(7 * i) for i in range(100)]
    assert not losses(noisy).fired
    assert not losses([5 - i / 20 for i in range(100)]).fired
    assert not losses([*noisy, 30.0, *noisy]).fired  # one bad batch
    assert losses([*noisy, 30.0, *noisy, 30.0, *noisy, 30.0]).effect == 3
    assert losses([*noisy, 30.0, *noisy, 30.0, *noisy, 30.0]).fired


def test_a_verdict_stays_with_the_step_at_which_it_was_first_reached():
    history = History([START, HEALTHY | FALLEN | {"step": 10}])
    first = judge(Evidence(history))
    history.add(HEALTHY | {"step": 20})
    (later,) = (verdict for verdict in judge(Evidence(history), first) if verdict.fired)
    assert (later.name, later.step, later.effect) == ("chosen falling", 10, -0.1)


def test_the_record_is_strict_json_and_is_read_back():
    found = list(verdicts(FALLEN).values())
    record = json.loads(to_json(record_of(found, 100, finished=True)))
    assert [entry["name"] for entry in record["verdicts"]] == ["chosen falling"]
    assert (record["schema_version"], record["step"], record["finished"]) == (1, 100, True)
    assert verdicts_in(record) == found
    assert verdicts_in({"checked": [{"name": "from another version"}]}) == []


def test_a_line_says_where_what_and_what_to_do():
    line = line_of(verdicts(FALLEN)["chosen falling"])
    assert line.startswith(
        "verdict: chosen falling (step 100). Chosen responses changed by -0.100 ± 0.020 nats"
    )
    assert "Lower the learning rate" in line
    assert len(line) < 500


def test_the_kept_evidence_has_planted_faults_named_first_and_sound_runs_without_a_verdict():
    record = json.loads((ROOT / "benchmarks" / "results" / "verdicts.json").read_text(encoding="utf-8"))
    planted = {run["run"]: run["fired"][0] for run in record["runs"] if run["expected_first"]}
    assert planted == {
        "unfrozen reference": "reference not frozen",
        "swapped labels": "suspect labels",
        "far too high learning rate": "instability",
        "long-chosen data": "length bias",
        "near-duplicate pairs": "near-duplicate sides",
    }
    sound = [run["fired"] for run in record["runs"] if not run["expected_first"]]
    # Twenty of 24 steps, and four of 120.
    assert sound == [[]] * 24


@pytest.mark.parametrize("check", ["poor chosen responses", "longer samples", "entropy collapse"])
def test_means_of_few_examples_without_an_interval_are_not_judged(check: str):
    beyond, _ = BEYOND[check]
    metrics = {name: value for name, value in beyond.items() if name != "start"}
    for number, expected in ((8, True), (7, False)):
        found = verdicts({**metrics, "probe/n": number}, **beyond.get("start", {}))[check]
        assert found.fired == expected
        assert (found.not_checked is None) == expected
