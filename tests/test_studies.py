"""The studies' scripts run, and the numbers in their READMEs are those of their results."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from worlds import quick

STUDIES = Path(__file__).resolve().parents[1] / "studies"
NAMES = sorted(p.parent.name for p in STUDIES.glob("*/run.py"))
every_study = pytest.mark.parametrize("name", NAMES)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"study_{name}", STUDIES / name / "run.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def text(name: str) -> str:
    return (STUDIES / name / "README.md").read_text(encoding="utf-8")


def test_there_are_studies() -> None:
    assert len(list(STUDIES.glob("*/run.py"))) >= 5


@every_study
def test_tables_are_those_of_the_results(name: str) -> None:
    study = script(name)
    results = json.loads((STUDIES / name / "results.json").read_text(encoding="utf-8"))
    readme = sys.modules["readme"]
    assert readme.fill(text(name), study.tables(results)) == text(name)


@every_study
def test_numbers_in_the_prose_stand_in_a_table(name: str) -> None:
    """All with a decimal point, except those that are defined and not measured."""
    # The theorem, 10 log(9/8), a setting, log 2; a quantile's level, and β and the drift to compare at.
    defined = {"4.1", "1.18", "0.5", "0.693", "97.5", "0.1"}
    whole = text(name)
    tables = "".join(re.findall(r"<!-- table: .*?<!-- end of table -->", whole, flags=re.DOTALL))
    prose = re.sub(r"<!-- table: .*?<!-- end of table -->", "", whole, flags=re.DOTALL)
    number = r"(?<![\w.])\d+\.\d+(?:e[+-]\d+)?"
    assert set(re.findall(number, prose)) - set(re.findall(number, tables)) <= defined


@pytest.mark.parametrize("name", quick(NAMES, *NAMES[:2]))
def test_script_runs_with_small_settings(name: str, tmp_path: Path) -> None:
    study = script(name)
    (tmp_path / "README.md").write_text(text(name), encoding="utf-8")
    study.main(["--tiny", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {"created", "packages", "seed", "hardware"} <= results["environment"].keys()
    assert (tmp_path / "plot.png").stat().st_size > 1000
    filled = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert all(f"\n{table}\n" in filled for table in study.tables(results).values())


def test_a_table_without_a_place_is_refused() -> None:
    script("01_estimators")
    with pytest.raises(ValueError, match="no place for table 'missing'"):
        sys.modules["readme"].fill("text", {"missing": "| a |"})


def test_law_of_the_estimators_study_is_that_of_its_samples() -> None:
    """Var of NWJ at n = 64 from 4,000 repetitions at I = 0.5, where 20 dimensions have a fourth moment: within 10 %."""
    import torch

    study = script("01_estimators")
    values = study.estimates(0.5, 64, 4000, torch.Generator().manual_seed(1))
    assert values["NWJ"].var().item() == pytest.approx(study.nwj_variance(0.5, 64), rel=0.1)
    assert values["NWJ"].mean().item() == pytest.approx(0.5, abs=0.015)
    assert values["InfoNCE"].max() <= torch.log(torch.tensor(64.0))


@pytest.mark.parametrize("labels", ["reference", "complement", "graded"])
def test_laws_of_the_mode_seeking_study_are_laws_and_graded_pairs_add_up(labels: str) -> None:
    study = script("02_mode_seeking")
    for reference in study.REFERENCES:
        w = study.world(reference, labels, 2.0, 801)
        for law in (w.reference, w.chosen, w.rejected):
            assert law.sum() == pytest.approx(1, abs=1e-9)
            assert law.min() >= 0
        if labels == "graded":
            assert abs(w.chosen + w.rejected - 2 * w.reference).max() < 1e-15


def test_summaries_of_the_study_of_many_responses_are_those_of_its_runs() -> None:
    study = script("03_many_responses")
    results = json.loads((STUDIES / "03_many_responses" / "results.json").read_text(encoding="utf-8"))
    lab, seeds = results["lab"], results["seeds"]
    assert len(seeds) >= 5
    measures = [name for name, value in lab["arms"][0].items() if isinstance(value, dict)]
    assert study.summarise(study.ARMS, lab["runs"], results["size"]["rates"], measures) == lab["arms"]
    parts = [{"start": lab["start"], "runs": [r for r in lab["runs"] if r["seed"] == seed]} for seed in seeds]
    assert study.differences(parts, lab["arms"]) == lab["differences"]


def test_equal_tokens_are_equal_within_a_few_percent() -> None:
    study = script("03_many_responses")
    results = json.loads((STUDIES / "03_many_responses" / "results.json").read_text(encoding="utf-8"))
    tokens = {(a["data"], a["method"]): a["tokens"]["mean"] for a in results["lab"]["arms"]}
    for data in (study.PROMPTS, study.EPOCHS):
        assert tokens[data, "infopo"] == pytest.approx(tokens[study.LISTS, "infopo"], rel=0.05)
    assert tokens[study.PAIRS, "dpo"] == pytest.approx(tokens[study.LISTS, "dpo"] / 4, rel=0.05)


def test_accuracy_at_a_drift_lies_on_the_line_between_two_learning_rates() -> None:
    study = script("03_many_responses")
    runs = [{"kl": 0.05, "accuracy": 0.8}, {"kl": 0.25, "accuracy": 0.6}]
    assert study.at_drift(runs, {"accuracy": 0.7}, 0.1) == pytest.approx(0.75)
    assert study.at_drift(runs, {"accuracy": 0.7}, 0.025) == pytest.approx(0.75)
    assert study.at_drift(runs, {"accuracy": 0.7}, 0.3) != study.at_drift(runs, {"accuracy": 0.7}, 0.3)  # NaN


def test_real_data_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = script("03_many_responses")
    monkeypatch.setattr(study, "SHARED", tmp_path)
    for load, _ in study.REAL.values():
        with pytest.raises(FileNotFoundError, match="beside the repository"):
            load()


def test_one_seed_gives_the_same_lists_twice_and_they_hold_right_and_wrong_responses() -> None:
    from infopo.lab import solve, verify
    from infopo.models import LAB_POLICY, load_policy, load_tokenizer

    study = script("03_many_responses")
    policy, tokenizer = load_policy(LAB_POLICY), load_tokenizer(LAB_POLICY)
    rows, facts = study.make_lists(policy, tokenizer, 3, 5, "preference")
    assert (rows, facts) == study.make_lists(policy, tokenizer, 3, 5, "preference")
    for row in rows:
        problem = solve(row["prompt"][0]["content"])
        assert [verify(problem, text[0]["content"]) for text in row["chosen"]] == [True]
        assert [verify(problem, text[0]["content"]) for text in row["rejected"]] == [False] * study.REJECTED


@pytest.mark.parametrize(("name", "seeds"), [(f"{name}", 5) for name in NAMES[3:]])
def test_a_study_that_can_be_continued_says_how_much_is_finished(name: str, seeds: int) -> None:
    study = script(name)
    results = json.loads((STUDIES / name / "results.json").read_text(encoding="utf-8"))
    planned = results["planned"]
    assert planned["seeds"] >= seeds
    counts = [int(n) for n in re.findall(r"\| (\d+) of \d+ \|", study.tables(results)["facts"])]
    assert sum(counts) == len(results["runs"]) <= planned["runs"]


def test_responses_of_the_long_lab_are_four_times_as_long_as_those_of_the_short_one() -> None:
    results = json.loads((STUDIES / "04_sum_or_mean" / "results.json").read_text(encoding="utf-8"))
    length = {
        each["lab"]: each["chosen_tokens"] for each in results["lengths"] if each["labels"] == "verified"
    }
    assert length["long"] >= 4 * length["short"]


def test_a_mean_with_beta_times_the_length_pulls_like_the_sum() -> None:
    """Gradient of the two losses by log π at responses of exactly L tokens: the same but for the factor of β."""
    import torch

    from infopo.losses.registry import loss_function
    from infopo.records import ResponseLogps

    study = script("04_sum_or_mean")
    length = study.LENGTH["short"]
    known = study.methods("short")
    pull = {}
    for name in ("InfoPO sum, β 0.5", "InfoPO mean, β 0.5 L"):
        objective, parameters = known[name]
        logps = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(length, length))
        logps.policy.requires_grad_()
        loss = sum(term.values.sum() for term in loss_function(objective, dict(parameters))(logps))
        (pull[name],) = torch.autograd.grad(loss, logps.policy)
    assert pull["InfoPO mean, β 0.5 L"].tolist() == pytest.approx(pull["InfoPO sum, β 0.5"].tolist())


def test_the_policy_of_the_study_of_diversity_learns_right_answers_and_several_to_a_question() -> None:
    from infopo.lab.expressions import is_right, parse

    script("08_diversity")
    rows = sys.modules["expression_runs"].answered(300)
    assert all(is_right(parse(row.question), row.solution) for row in rows)
    assert len({row.question for row in rows}) < len(set(rows))


def test_the_probability_that_two_right_answers_differ_is_that_of_drawing_two() -> None:
    from collections import Counter
    from itertools import combinations

    script("08_diversity")
    differing = sys.modules["expression_runs"].differing
    for drawn in ("aabbc", "aaaa", "abcd", "ab"):
        couples = [a != b for a, b in combinations(drawn, 2)]
        assert differing(Counter(drawn)) == pytest.approx(sum(couples) / len(couples))
    assert differing(Counter("a")) is None


def test_a_method_is_compared_with_sft_on_the_line_between_two_rates_question_by_question() -> None:
    study = script("08_diversity")
    shape = study.Shape(1, 2, 1, 1, 2, 2, (1e-4, 1e-3), 2)

    def run(method: str | None, rate: float, kl: float, *scores: float | None) -> dict[str, object]:
        questions = {name: list(scores) for name in study.COMPARED}
        return {"seed": 1, "method": method, "rate": rate, "points": [{"kl": kl}], "questions": questions}

    runs = [
        run(None, 0.0, 0.0, 0.5, 0.5),
        run("DPO, β 1", 1e-3, 0.3, 1.0, None),
        run("DPO, β 1", 1e-4, 0.05, 0.6, 0.5),
    ]
    assert study.by_question(runs, shape, 1, "DPO, β 1", "share", 0.1) == {(1, 0): pytest.approx(0.68)}
