"""Which metrics there are, what they are, and that each of them stands in the documentation."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from infopo.arguments import InfoPOConfig
from infopo.data.examples import ExampleDataset
from infopo.lab.tokenizer import build_tokenizer
from infopo.losses.catalog import OBJECTIVES
from infopo.metrics import METRICS, MetricRule, MetricSums, metric_names, preference_metrics
from infopo.records import ResponseLogps, Role
from infopo.reference import reference_sides
from infopo.trainer import InfoPOTrainer
from worlds import PLAIN_SGD, random_dataset, tiny_llama

ROOT = Path(__file__).parents[1]
TOKENIZER = build_tokenizer()
F64 = torch.float64
PAIRS = random_dataset(8)
UNPAIRED = random_dataset(8, chosen=(1, 0), rejected=(0, 1))
ONE_SIDE = random_dataset(8, chosen=(0,))
OF_TRANSFORMERS = {
    "grad_norm",
    "learning_rate",
    "epoch",
    "step",
    "runtime",
    "samples_per_second",
    "steps_per_second",
}


def run(folder: Path, data: ExampleDataset, **settings: Any) -> tuple[set[str], set[str], dict[str, float]]:
    """Metrics of this package that two steps and an evaluation log, and the values of the first step.

    The tail of ratios is one of diagnostics, whose page names it.
    """
    trainer = InfoPOTrainer(
        model=tiny_llama(),
        args=InfoPOConfig(
            output_dir=str(folder),
            **PLAIN_SGD | {"reference_sides": "auto", "max_steps": 2, "report_to": "none"} | settings,
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=TOKENIZER,
    )
    trainer.train()
    records = [r for r in trainer.state.log_history if "loss" in r]
    evaluated = {name.removeprefix("eval_") for name in trainer.evaluate()}
    logged = {name for name in records[0] if not name.startswith("ratio_tail/")}
    return logged - OF_TRANSFORMERS, evaluated - OF_TRANSFORMERS, records[0]


def expected(data: ExampleDataset, objective: str, setting: str, split: Any) -> set[str]:
    mixture = [(objective, {k: p.default for k, p in OBJECTIVES[objective].parameters.items()}, 1.0)]
    examples = list(data)
    return set(
        metric_names(
            MetricRule.of(mixture),
            reference_sides(mixture, setting, split),
            chosen=any(e.chosen_ids for e in examples),
            rejected=any(e.rejected_ids for e in examples),
            pairs=any(e.chosen_ids and e.rejected_ids for e in examples),
        )
    )


def one_of_each_kind() -> list[str]:
    """Objectives that differ in what metrics depend on."""
    kinds = {
        (o.reference, o.ratio, o.reward, o.statistic, "beta" in o.parameters): n
        for n, o in OBJECTIVES.items()
    }
    return sorted(kinds.values())


@pytest.mark.parametrize("objective", one_of_each_kind())
@pytest.mark.parametrize("setting", ["auto", "both"])
def test_what_a_run_logs_is_what_was_foretold_and_documented(
    tmp_path: Path, objective: str, setting: str
) -> None:
    """On pairs: nothing else, and nothing that the page on metrics does not name."""
    in_training, in_evaluation, values = run(tmp_path, PAIRS, objective=objective, reference_sides=setting)
    assert in_training == expected(PAIRS, objective, setting, "train")
    assert in_evaluation == expected(PAIRS, objective, setting, "eval")
    assert in_training | in_evaluation <= METRICS.keys()
    assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize(
    ("data", "objective"), [(UNPAIRED, "kto"), (UNPAIRED, "infopo"), (ONE_SIDE, "infopo")]
)
def test_the_same_without_pairs(tmp_path: Path, data: ExampleDataset, objective: str) -> None:
    in_training, in_evaluation, _ = run(tmp_path, data, objective=objective)
    assert in_training == expected(data, objective, "auto", "train")
    assert in_evaluation == expected(data, objective, "auto", "eval")


def test_by_default_evaluation_has_what_users_of_trl_watch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "infopo")
    watched = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    in_training, in_evaluation, _ = run(tmp_path, PAIRS)
    assert in_evaluation >= watched | {"logps/accuracies", "logps/margins", "logratios/chosen"}
    assert in_training & watched == {"rewards/rejected"}
    told = caplog.messages.copy()
    (line,) = [line for line in told if line.startswith("metrics not computed in training: ")]
    assert all(name in line for name in watched - in_training)
    assert "reference_sides='both'" in line
    caplog.clear()
    run(tmp_path, PAIRS, reference_sides="both")
    assert "not computed" not in caplog.text
    assert in_training >= {"logps/accuracies", "logps/margins"}


def logps_of(policy: list[float], reference: list[float], length: list[int], chosen: int) -> ResponseLogps:
    """Responses of one example, the chosen ones first."""
    number = len(policy)
    return ResponseLogps.of(
        torch.tensor(policy, dtype=F64),
        torch.tensor(reference, dtype=F64),
        torch.tensor(length),
        torch.tensor([int(Role.CHOSEN)] * chosen + [int(Role.REJECTED)] * (number - chosen)),
        torch.zeros(number, dtype=torch.int64),
    )


def values_of(logps: ResponseLogps, rule: MetricRule, sides: set[str]) -> dict[str, float]:
    sums = MetricSums()
    sums.add(*preference_metrics(logps, rule, frozenset(sides)))
    return sums.reduce(lambda values: values)


def test_a_tie_is_half_a_success() -> None:
    """One pair won, one tied, one lost: 1/2. At step 0, where policy and reference are equal, all are ties."""
    logps = logps_of([-1.0, -1.0, -2.0, 0.0], [-1.0, -1.0, -2.0, 0.0], [1] * 4, chosen=1)
    values = values_of(logps, MetricRule(beta=0.1), {"chosen", "rejected"})
    assert values["logps/accuracies"] == pytest.approx(0.5)
    assert values["rewards/accuracies"] == 0.5
    assert values["rewards/margins"] == 0.0


@pytest.mark.parametrize(
    ("objective", "chosen", "rejected"),
    [
        ("simpo", 2.0 * -3.0 / 2, 2.0 * -8.0 / 4),
        ("orpo", 0.1 * -3.0 / 2, 0.1 * -8.0 / 4),
        ("cpo", 0.1 * -3.0, 0.1 * -8.0),
        ("slic", -3.0, -8.0),
        ("sft", -3.0, -8.0),
    ],
)
def test_rewards_of_losses_without_a_reference_are_those_of_trls_trainers_for_them(
    objective: str, chosen: float, rejected: float
) -> None:
    """β log π_θ, a token where TRL takes the mean over tokens (SimPO, ORPO)."""
    parameters = {k: p.default for k, p in OBJECTIVES[objective].parameters.items()}
    logps = logps_of([-3.0, -8.0], [math.nan, math.nan], [2, 4], chosen=1)
    values = values_of(logps, MetricRule.of([(objective, parameters, 1.0)]), set())
    assert (values["rewards/chosen"], values["rewards/rejected"]) == pytest.approx((chosen, rejected))
    assert values["rewards/margins"] == pytest.approx(chosen - rejected)
    assert values["rewards/accuracies"] == 1.0
    assert not any(name.startswith(("ratio/", "logratios/")) for name in values)


def test_log_ratios_are_in_nats_whatever_beta_is() -> None:
    logps = logps_of([-3.0, -8.0], [-2.5, -7.0], [2, 4], chosen=1)
    for beta in (0.1, 1.0):
        values = values_of(logps, MetricRule(beta=beta, has_ratio=False), {"chosen", "rejected"})
        assert (values["logratios/chosen"], values["logratios/rejected"]) == (-0.5, -1.0)
        assert values["rewards/chosen"] == pytest.approx(-0.5 * beta)


def test_without_pairs_the_margin_is_the_difference_of_the_means_as_in_trls_kto(tmp_path: Path) -> None:
    _, _, values = run(tmp_path, UNPAIRED, objective="kto", per_device_train_batch_size=8)
    assert values["rewards/margins"] == values["rewards/chosen"] - values["rewards/rejected"]
    assert "rewards/accuracies" not in values


def test_ktos_reference_point_is_logged_before_it_is_held_at_0_too(tmp_path: Path) -> None:
    trained = run(tmp_path, PAIRS, objective="kto", learning_rate=0.1, max_steps=6, logging_steps=6)[2]
    assert trained["kl"] >= max(0.0, trained["kl_unclamped"])
    assert trained["kl_unclamped"] != 0.0


def test_ratios_are_shown_exactly_where_the_formula_has_one() -> None:
    assert {n for n, o in OBJECTIVES.items() if o.ratio} == {
        n for n, o in OBJECTIVES.items() if "r(l)^" in o.formula
    }
    # The margin of α-DPO is one of log-probs, which it compares with one of the reference's.
    assert {n for n, o in OBJECTIVES.items() if o.reward != "log_ratio"} - {"alpha_dpo"} == {
        n for n, o in OBJECTIVES.items() if not o.reference
    }


def test_the_page_on_metrics_is_the_table_in_the_code() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [
        tuple(c.strip() for c in line.strip("|\n ").split("|"))
        for line in page.splitlines()
        if line.startswith("| `")
    ]
    of_table = {name.strip("`"): rest for name, *rest in rows if len(rest) >= 4}
    better = {True: "higher", False: "lower", None: "-"}
    for name, metric in METRICS.items():
        formula, unit, over, direction = of_table[name][:4]
        assert (formula.strip("`"), unit, over, direction) == (
            metric.formula, metric.unit, metric.over, better[metric.better],
        )  # fmt: skip
    assert re.findall(r"`(eval_[\w/]+)`", page)


@pytest.mark.parametrize("objective", [name for name, row in OBJECTIVES.items() if row.ratio])
def test_a_ratio_is_that_of_the_loss_with_a_cap_only_where_the_loss_has_one_on_it(objective: str) -> None:
    """A rejected response with a critic of 10 nats, twice the usual cap, and one with 1 nat."""
    parameters = {k: p.default for k, p in OBJECTIVES[objective].parameters.items()} | {"beta": 1.0}
    logps = logps_of([-3.0, -8.0, -8.0], [-3.0, -18.0, -9.0], [2, 4, 4], chosen=1)
    values = values_of(logps, MetricRule.of([(objective, parameters, 1.0)]), {"chosen", "rejected"})
    if objective in ("infopo", "interpolated", "chi2", "hellinger"):
        assert values["ratio/max"] == pytest.approx(math.exp(5))
        assert values["ratio/capped"] == 0.5
    else:
        assert values["ratio/max"] == pytest.approx(math.exp(10))
        assert values["ratio/mean"] == pytest.approx((math.exp(10) + math.e) / 2)
        assert "ratio/capped" not in values
