"""Weighted sums of objectives: what recipes and scripts may write, and that what is minimised is the sum."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from infopo import InfoPOConfig, LossTerm, ResponseLogps
from infopo.checkpoints import check_identity
from infopo.config import parse_recipe, to_yaml
from infopo.data.examples import ExampleDataset
from infopo.elsewhere.conversion import Conversion
from infopo.elsewhere.losses import put_loss
from infopo.errors import CheckpointError, ConfigError
from infopo.losses import foreign
from infopo.report.comparing import compare, method_of, settings_of
from infopo.report.reading import read_runs
from infopo.secrets import masked
from infopo.sweep_grid import cells
from trainers import step_records, trainer_of
from worlds import random_examples, tiny_llama

MINIMAL = "{model: sft, data: pairs.jsonl, output_dir: run}"


def own_loss(logps: Any, *, weight: float = 1.0) -> Any:
    """A loss whose parameter has the name that a sum has taken."""
    raise AssertionError("it is refused before it is called")


def objective_of(text: str, *overrides: str) -> list[tuple[str, dict[str, Any], float]]:
    recipe = parse_recipe(MINIMAL, source="recipe", overrides=[f"objective={text}", *overrides])
    assert parse_recipe(to_yaml(recipe), source="written") == recipe
    return [(term.name, dict(term.parameters), term.weight) for term in recipe.objective]


def config(**settings: Any) -> InfoPOConfig:
    return InfoPOConfig("unused", use_cpu=True, **settings)


# ---- what is written -------------------------------------------------------------------------------------------------


def test_a_term_is_a_name_or_a_mapping_and_its_weight_is_one_unless_given() -> None:
    assert objective_of("[InfoPO, {name: sft, weight: 0.2}]") == [
        ("infopo", {"beta": 1.0, "length_normalized": False, "cap": 5.0}, 1.0),
        ("sft", {"token_mean": False}, 0.2),
    ]


def test_a_list_of_one_is_scaled_and_a_mapping_alone_cannot_be() -> None:
    assert objective_of("[{name: ipo, weight: 3}]")[0][2] == 3
    with pytest.raises(ConfigError, match=r"objective\.weight \(override\): belongs to a list"):
        objective_of("{name: ipo, weight: 3}")


@pytest.mark.parametrize("key", ["objective[1].weight", "objective.1.weight"])
def test_an_override_reaches_into_a_term(key: str) -> None:
    assert [weight for *_, weight in objective_of("[infopo, sft]", f"{key}=0.5")] == [1.0, 0.5]


@pytest.mark.parametrize(
    "key",
    [
        "objective[2].weight",
        "objective.beta",
        "objective.-1.weight",
        f"objective.{'9' * 5000}",
        "objective.\u0660",
    ],
)
def test_an_override_of_a_term_that_is_not_there_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="is a list of 2, which has no item"):
        objective_of("[infopo, sft]", f"{key}=0.5")


def test_an_anchor_shared_by_two_lists_changes_in_one_of_them_only() -> None:
    text = "{model: sft, data: &files [a.jsonl, b.jsonl], output_dir: run}"
    recipe = parse_recipe(text, source="recipe", overrides=["data.path[0]=c.jsonl"])
    assert recipe.data.path == ["c.jsonl", "b.jsonl"]


REFUSED = [
    ([], "objective: is an empty list"),
    ([3], r"objective\[0\]: expected a name, or a mapping"),
    ([["infopo"]], r"objective\[0\]: expected a name, or a mapping"),
    ([{"beta": 1.0}], r"objective\[0\]\.name: is required"),
    ([{"name": 3}], r"objective\[0\]\.name: expected text, got 3"),
    (["infopo", "sfft"], r"objective\[1\]\.name: no objective 'sfft' \(did you mean 'sft'"),
    (["infopo", {"name": "dpo", "beta": -1.0}], r"objective\[1\]\.beta: expected a value > 0"),
    (["infopo", {"name": "dpo", "betta": 1.0}], r"objective\[1\]\.betta: dpo has no such parameter"),
    (
        ["infopo", {"name": "sft", "weight": -1}],
        r"objective\[1\]\.weight: expected a finite number >= 0, got -1",
    ),
    (["infopo", {"name": "sft", "weight": math.inf}], r"objective\[1\]\.weight: expected a finite number"),
    (["infopo", {"name": "sft", "weight": True}], r"objective\[1\]\.weight: expected a finite number"),
    ([{"name": "infopo", "weight": 0}, {"name": "sft", "weight": 0.0}], "objective: all weights are 0"),
    ([["x"] * 1000], r"got \['x', 'x', 'x', 'x', 'x', 'x', \.\.\.\]"),
    (["infopo", {"name": "sft", "weight": 10**400}], r"objective\[1\]\.weight: expected a finite number"),
    ([f"{__name__}:own_loss"], r"objective\[0\]\.weight: is the weight in the sum, but .*own_loss has"),
]


@pytest.mark.parametrize(("terms", "told"), REFUSED)
def test_what_is_wrong_with_a_term_is_named_with_its_place(terms: list[Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config(objective=terms)
    text = json.dumps(terms).replace("Infinity", ".inf")
    with pytest.raises(ConfigError, match=told.replace(": ", r" \(override\): ", 1).replace(r"\]", r"\]")):
        objective_of(text)


def test_the_line_of_a_wrong_term_is_told() -> None:
    text = "model: sft\ndata: pairs.jsonl\noutput_dir: run\nobjective:\n- infopo\n- name: dpo\n  beta: 0\n"
    with pytest.raises(ConfigError, match=r"objective\[1\]\.beta \(line 7\)"):
        parse_recipe(text, source="recipe")


@pytest.mark.parametrize(
    "beside",
    [
        {"beta": 0.3}, {"objective_parameters": {"cap": 1.0}}, {"label_smoothing": 0.1}, {"loss_type": ["ipo"]},
        {"loss_weights": [1.0, 2.0]}, {"use_weighting": True}, {"f_divergence_type": "js_divergence"},
        {"simpo_gamma": 1.0}, {"beta": 0.0}, {"desirable_weight": 0.0},
    ],
)  # fmt: skip
def test_settings_of_a_single_loss_beside_a_list_are_refused(beside: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(beside))}=.*(beside a list|one of the two)"):
        config(objective=["infopo", "sft"], **beside)


def test_scripts_may_write_a_mapping_functions_and_json() -> None:
    from infopo.losses.pairwise import dpo

    assert config(objective={"name": "ipo", "beta": 0.3}).mixture()[0][1]["beta"] == 0.3
    by_function = config(objective=[dpo, {"name": dpo, "beta": 0.3, "weight": 2.0}]).mixture()
    assert by_function == config(objective='["dpo", {"name": "dpo", "beta": 0.3, "weight": 2}]').mixture()
    with pytest.raises(ConfigError, match="JSON"):
        config(objective="[dpo, sft]")
    with pytest.raises(ConfigError, match="expected a name, a function, or a list"):
        config(objective=5)


def test_what_cannot_be_a_term_of_a_script_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective\[0\]: keys are names of parameters, got 3"):
        config(objective=[{"name": "dpo", 3: 4}])
    with pytest.raises(ConfigError, match="terms of a loss are JSON here"):
        config(objective="[" * 100_000)
    with pytest.raises(ConfigError, match="loss_weights: expected finite numbers"):
        config(loss_type=["sigmoid", "sft"], loss_weights=[1, 10**400])


def test_names_in_a_list_are_spelt_as_in_the_catalog_and_stay_so() -> None:
    once = config(objective=["KTO", {"name": "SFT on chosen"}])
    assert once.objective == ["kto", {"name": "sft"}]
    assert config(objective=once.objective).objective == once.objective


def test_losses_of_weight_zero_alone_are_refused_under_trls_name_too() -> None:
    with pytest.raises(ConfigError, match="loss_weights: all are 0"):
        config(loss_type=["sigmoid", "sft"], loss_weights=[0.0, 0.0])


def test_runs_of_a_sweep_over_sums_are_named_by_them() -> None:
    grid = {
        "objective": ["infopo", ["infopo", {"name": "sft", "weight": 0.2}]],
        "objective[1].weight": [0.1],
    }
    names = [cell.name for cell in cells(grid)]
    assert names == ["infopo-weight-0.1", "infopo-+-sft-weight-0.2-weight-0.1"]


@pytest.mark.parametrize("weight", ["objective[1].weight", "objective.1.weight"])
def test_a_sweep_sets_a_weight_in_the_list_that_it_sets_wherever_the_key_stands(weight: str) -> None:
    grid = {weight: [0.1, 0.2], "objective": [["infopo", "sft"]]}
    found = [
        parse_recipe(MINIMAL, source="recipe", overrides=cell.overrides).objective[1].weight
        for cell in cells(grid)
    ]
    assert found == [0.1, 0.2]


def test_keys_of_a_sweep_that_end_alike_are_told_apart() -> None:
    grid = {
        "objective.0.weight": [1],
        "objective[1].weight": [0.1],
        "train.seed": [0],
        "train.data_seed": [0],
    }
    [cell] = cells(grid)
    assert cell.name == "0.weight-1-1.weight-0.1-seed-0-data_seed-0"
    assert cell.group == "0.weight 1, 1.weight 0.1"


def test_a_sweep_with_two_keys_of_one_setting_is_refused() -> None:
    grid = "{'objective[1].weight': [0.1], 'objective.1.weight': [0.2]}"
    with pytest.raises(ConfigError, match=r"is the same setting as objective\[1\]\.weight"):
        parse_recipe(MINIMAL, source="recipe", overrides=["objective=[infopo, sft]", f"sweep={grid}"])


# ---- what is told of it ----------------------------------------------------------------------------------------------


def scaled(factor: float) -> Any:
    def inner(logps: ResponseLogps) -> list[LossTerm]:
        return [LossTerm(-factor * logps.margins(logps.policy), per="pair")]

    return inner


def test_each_of_several_callables_of_one_name_is_known_by_its_source() -> None:
    def told(*factors: float) -> tuple[dict[str, str], list[str]]:
        mixture = config(objective=[scaled(factor) for factor in factors]).mixture()
        return foreign.sources(mixture), [record["sha256"] for record in foreign.records(mixture)]

    assert len({str(told(*factors)[0]) for factors in [(1, 2), (7, 2), (2, 1), (1, 1, 2), (1, 2, 2)]}) == 5
    (source,), hashes = told(1, 2)[0].values(), told(1, 2)[1]
    assert source == " + ".join(hashes)
    assert len(set(hashes)) == 2
    assert told(1, 1)[0] == told(1)[0]


def test_a_checkpoint_of_another_sum_names_the_terms_that_differ() -> None:
    terms = [
        [name, {"beta": 0.1, "label_smoothing": 0.0, "length_normalized": False}, 1.0] for name in "abcd"
    ]
    now = [*terms[:3], [*terms[3][:2], 0.5]]
    with pytest.raises(
        CheckpointError, match=r"objective from item 4 on \(then \[\['d', .* 1\.0\]\], now \[\['d'"
    ) as told:
        check_identity(Path("checkpoint-2"), {"objective": terms}, {"objective": now})
    assert len(str(told.value)) < 500


def test_a_report_shows_weights_and_a_row_per_setting_of_a_term(tmp_path: Path) -> None:
    def run(text: str) -> Any:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n', encoding="utf-8")
        recipe = parse_recipe(MINIMAL, source="recipe", overrides=[f"objective={text}"])
        (folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        return read_runs([folder])[0]

    runs = [
        run("[infopo, {name: sft, weight: 0.2}]"),
        run("[infopo, {name: sft, weight: 0.4}]"),
        run("infopo"),
    ]
    methods = [method_of(each) for each in runs]
    assert methods == [
        "InfoPO (β 1) + 0.2 x SFT on chosen",
        "InfoPO (β 1) + 0.4 x SFT on chosen",
        "InfoPO (β 1)",
    ]
    table = compare([settings_of(each) for each in runs[:2]])
    assert [key for key, differs in zip(table.keys, table.differs, strict=True) if differs] == [
        "objective[1].weight"
    ]


@pytest.mark.parametrize(
    ("given", "expected"), [({}, 1.5), ({"cpo_alpha": 0.7}, 1.2), ({"cpo_alpha": 0.0}, 0.5)]
)
def test_a_converted_sum_keeps_the_likelihood_that_its_loss_has(
    given: dict[str, Any], expected: float
) -> None:
    settings = {"loss_type": ["cpo", "sft"], "loss_weights": [1.0, 0.5], **given}
    made = Conversion("TRL", settings)
    put_loss(made, settings, dict.fromkeys(["name", "nll_weight"], "loss_type"))
    assert made["objective.nll_weight"] == pytest.approx(expected)


def keyed(logps: ResponseLogps, *, api_key: str = "") -> list[LossTerm]:
    return [LossTerm(-logps.margins(logps.policy), per="pair")]


def test_a_secret_of_a_term_is_neither_told_nor_written(tmp_path: Path) -> None:
    name, key = f"{keyed.__module__}:keyed", "opens-doors-1"
    objective = f"[sft, {{name: '{name}', api_key: {key}}}]"
    recipe = parse_recipe(MINIMAL, source="recipe", overrides=[f"objective={objective}"])
    assert key not in to_yaml(recipe)
    assert masked(f"with {key}") == "with ***"
    terms = [{"name": term.name, **term.parameters} for term in recipe.objective]
    trained(tmp_path, objective=terms, save_strategy="steps", save_steps=3)
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and key.encode() in f.read_bytes()]
    trained(tmp_path, objective=terms, save_strategy="steps", save_steps=3, max_steps=4, resume=True)


# ---- what is minimised -----------------------------------------------------------------------------------------------


def trained(
    folder: Path, resume: bool = False, **settings: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Returns the losses of three steps, and the weights after them."""
    trainer = trainer_of(
        folder,
        ExampleDataset.from_examples(random_examples(6)),
        tiny_llama(),
        ref_model=tiny_llama(seed=1),
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        **{"max_steps": 3, **settings},
    )
    trainer.train(resume_from_checkpoint=resume)
    return [record["loss"] for record in step_records(trainer)], dict(trainer.model.state_dict())


def same(one: tuple[list[float], dict[str, torch.Tensor]], other: Any, **tolerance: float) -> None:
    torch.testing.assert_close(one[0], other[0], **tolerance)
    torch.testing.assert_close(one[1], other[1], **tolerance)


def test_a_list_is_the_sum_that_loss_types_and_weights_name(tmp_path: Path) -> None:
    terms = [{"name": "dpo", "weight": 2.0}, {"name": "sft", "token_mean": True, "weight": 0.25}]
    theirs = trained(tmp_path / "theirs", loss_type=["sigmoid", "sft"], loss_weights=[2.0, 0.25])
    same(trained(tmp_path / "ours", objective=terms), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["infopo", "dv", "kto"])
def test_shares_of_one_loss_are_that_loss(name: str, tmp_path: Path) -> None:
    """Losses with a statistic of the step too: each term has its own."""
    shares = [{"name": name, "weight": 0.25}, {"name": name, "weight": 0.75}]
    tolerance = {"rtol": 1e-4, "atol": 1e-6}
    same(trained(tmp_path / "sum", objective=shares), trained(tmp_path / "one", objective=name), **tolerance)


def test_a_term_of_weight_zero_changes_nothing(tmp_path: Path) -> None:
    terms = ["infopo", {"name": "hinge", "weight": 0.0}]
    same(
        trained(tmp_path / "sum", objective=terms),
        trained(tmp_path / "one", objective="infopo"),
        rtol=1e-6,
        atol=1e-9,
    )


def test_terms_of_one_name_keep_their_own_parameters(tmp_path: Path) -> None:
    """At π = π_ref, the gradient of DPO is β/2 (∇log π(y_l) - ∇log π(y_w)), so that the sum has β = 0.1 + 2 x 0.3."""
    start = {"ref_model": tiny_llama(), "optim": "sgd", "learning_rate": 1e-3, "max_steps": 1}

    def step(folder: str, objective: Any) -> dict[str, torch.Tensor]:
        trainer = trainer_of(
            tmp_path / folder, ExampleDataset.from_examples(random_examples(4)), tiny_llama(), objective=objective,
            max_grad_norm=0.0, **start,
        )  # fmt: skip
        trainer.train()
        return dict(trainer.model.state_dict())

    terms = [{"name": "dpo", "beta": 0.1}, {"name": "dpo", "beta": 0.3, "weight": 2.0}]
    both, one = step("sum", terms), step("one", [{"name": "dpo", "beta": 0.7}])
    torch.testing.assert_close(both, one, rtol=1e-4, atol=1e-7)
