"""Losses from outside the package: found by name, judged before training, recorded, and noticed when they change."""

import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from infopo import InfoPOConfig, LossTerm, ResponseLogps, check_loss, objective
from infopo.cli import main
from infopo.config import load_recipe
from infopo.errors import ConfigError, ObjectiveError
from infopo.losses import foreign
from infopo.losses.catalog import OBJECTIVES, check_objective, complete_parameters, row_of
from infopo.losses.declaration import at_least_zero, flag
from infopo.losses.fingerprint import digest
from infopo.losses.judgement import MANY, judge, random_logps
from infopo.losses.registry import FUNCTIONS, loss_function

RECIPES = Path(__file__).parents[1] / "recipes"

MODULE = """
from infopo import LossTerm, objective
from infopo.losses.declaration import at_least_zero

SCALE = 1.0

@objective(formula="max(0, m - log r(w) + log r(l))", pairs=True, parameters={"margin": at_least_zero("Nats.")})
def my_loss(logps, *, margin: float = 1.0):
    return [LossTerm(SCALE * (margin - logps.margins(logps.policy - logps.reference)).clamp(min=0), per="pair")]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder with a module of a loss in it, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(foreign, "_found", {})
    monkeypatch.setattr(foreign, "_folders", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_module.py").write_text(MODULE, encoding="utf-8")
    yield tmp_path
    sys.modules.pop("my_module", None)


@objective(
    title="Shifted", formula="-log r(w) + m", pairs=True, parameters={"margin": at_least_zero("Nats.")}
)
def good(logps: ResponseLogps, *, margin: float = 0.5) -> list[LossTerm]:
    return [LossTerm(torch.relu(margin - logps.margins(logps.policy)), per="pair")]


# --- each kind of wrong loss has its error ---------------------------------------------------------------------


def of_pairs(values: Callable[[ResponseLogps], torch.Tensor], per: str = "pair", **declared: Any) -> Any:
    @objective(**{"pairs": True} | declared)
    def loss(logps: ResponseLogps) -> list[LossTerm]:
        return [unchecked(values(logps), per)]

    return loss


def unchecked(values: torch.Tensor, per: str) -> LossTerm:
    """A term as a run makes it: in tests, types are checked when a term is made, before the loss can be judged."""
    term = object.__new__(LossTerm)
    for name, value in (("values", values), ("per", per), ("name", "loss")):
        object.__setattr__(term, name, value)
    return term


def in_place(logps: ResponseLogps) -> torch.Tensor:
    logps.reference.clamp_(max=-3.0)
    return logps.margins(logps.policy - logps.reference)


def margins(logps: ResponseLogps) -> torch.Tensor:
    return logps.margins(logps.policy - logps.reference)


WRONG = {
    "expected 4 values|expected 3 values, one per chosen": of_pairs(margins, per="chosen"),
    "one per pair, for .* got one number": of_pairs(lambda logps: margins(logps).mean()),
    "per='pairs': expected one of pair, chosen": of_pairs(margins, per="pairs"),
    "is NaN on a batch of 3 chosen": of_pairs(lambda logps: margins(logps).log()),
    "has no gradient": of_pairs(lambda logps: margins(logps).detach()),
    "a gradient of 0 for every response": of_pairs(lambda logps: margins(logps) * 0),
    "reads the reference of chosen responses, which it does not declare": of_pairs(
        margins, reference=["rejected"]
    ),
    "reads the reference of rejected responses": of_pairs(margins, reference=["chosen"]),
    "depends on the other examples": of_pairs(
        lambda logps: margins(logps) * margins(logps).detach().abs().sum()
    ),
    "has one value per pair; declare": of_pairs(margins, pairs=False),
    "changes the log-probs": of_pairs(in_place),
    "fails on .* ZeroDivisionError": of_pairs(lambda logps: margins(logps) / 0 if 1 / 0 else margins(logps)),
    "expected a list of LossTerm.*, got Tensor": objective(pairs=True)(lambda logps: margins(logps).sum()),
    "expected a list of LossTerm.*, got list of Tensor": objective(pairs=True)(
        lambda logps: [margins(logps)]
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_loss_is_named_before_training(message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        InfoPOConfig("unused", objective=WRONG[message], use_cpu=True)
    assert len(str(error.value)) < 700
    with pytest.raises(ObjectiveError, match=message):
        check_loss(WRONG[message])


def test_a_loss_may_draw_random_numbers() -> None:
    """It is compared with itself on several batches, and those of a run are drawn as if it had not been."""

    def half(logps: ResponseLogps) -> torch.Tensor:
        values = margins(logps)
        return values * (torch.rand_like(values) < 0.5)

    state = torch.get_rng_state()
    InfoPOConfig("unused", objective=of_pairs(half, reference=["chosen", "rejected"]), use_cpu=True)
    check_loss(of_pairs(half, reference=["chosen", "rejected"]))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        (
            {"parameters": {"marign": flag("")}},
            "'marign', which is no parameter of the function; it has margin",
        ),
        ({"reference": "both"}, "reference: expected a subset"),
        ({"pairs": True, "sides": ["chosen"]}, "needs both sides"),
        ({"statistic": "mean"}, "statistic: expected one of log_mean"),
        ({"reward": "ratio"}, "reward: expected log_ratio"),
        ({"sides": []}, "at least one"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused_where_it_stands(declaration: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(**declaration)(lambda logps, *, margin=1.0: [])


def test_parameters_are_judged_by_their_domains_and_required_ones_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"objective_parameters\.margin: expected a value >= 0, got -1"):
        InfoPOConfig("unused", objective=good, objective_parameters={"margin": -1.0}, use_cpu=True)
    with pytest.raises(ConfigError, match=r"no such parameter \(did you mean 'margin'\?\)"):
        InfoPOConfig("unused", objective=good, objective_parameters={"margn": 1.0}, use_cpu=True)

    def needs_one(logps: ResponseLogps, *, margin: float) -> list[LossTerm]:
        return good(logps, margin=margin)

    with pytest.raises(ConfigError, match=r"margin: is required"):
        InfoPOConfig("unused", objective=needs_one, use_cpu=True)
    config = InfoPOConfig("unused", objective=needs_one, objective_parameters={"margin": 2}, use_cpu=True)
    [(name, parameters, weight)] = config.mixture()
    assert name.startswith(f"{__name__}:test_parameters")
    assert (parameters, weight) == ({"margin": 2.0}, 1.0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_packages_own_losses_stand_the_same_judgement(name: str) -> None:
    assert judge(name, complete_parameters(name, {})) == []
    # These hold a part of each pair's value constant on purpose.
    check_loss(name, finite_differences=name not in ("beta_dpo", "alpha_dpo"))


def test_the_helper_finds_a_gradient_that_is_not_the_derivative() -> None:
    wrong = of_pairs(lambda logps: margins(logps) * margins(logps).detach())
    with pytest.raises(ObjectiveError, match="not the derivative of the value"):
        check_loss(wrong)
    check_loss(wrong, finite_differences=False)


# --- callables --------------------------------------------------------------------------------------------------


def test_a_loss_without_a_declaration_gets_defaults() -> None:
    """Both sides of the reference, and pairs if it reads them. Numbers of its signature are parameters."""

    def alone(logps: ResponseLogps, scale=1) -> list[LossTerm]:
        return [LossTerm(-scale * logps.policy[logps.chosen], per="chosen")]

    def paired(logps: ResponseLogps) -> list[LossTerm]:
        return [LossTerm(-margins(logps) + 0 * logps.margins(logps.policy), per="pair")]

    names = [foreign.register(loss) for loss in (alone, paired)]
    assert [judge(name, complete_parameters(name, {})) for name in names] == [[], []]
    rows = [row_of(name) for name in names]
    assert [row.pairs for row in rows] == [False, True]
    assert all(row.reference == {"chosen", "rejected"} for row in rows)
    assert rows[0].parameters["scale"].problem(0.5) is None
    assert rows[0].parameters["scale"].problem("much")


def test_closures_of_one_name_are_told_apart_and_keep_their_values() -> None:
    def made(scale: float) -> Any:
        return of_pairs(lambda logps: -scale * margins(logps))

    configs = [InfoPOConfig("unused", objective=made(scale), use_cpu=True) for scale in (1.0, 3.0)]
    logps = random_logps(MANY)
    values = [loss_function(config.objective)(logps)[0].values for config in configs]
    assert configs[0].objective != configs[1].objective
    torch.testing.assert_close(values[1], 3 * values[0])


class Scale:
    """An object whose values no hash of a function covers."""

    def __init__(self, scale: float) -> None:
        self.scale = scale


def test_closures_whose_hashes_are_equal_are_told_apart_too() -> None:
    def made(scale: Scale) -> Any:
        @objective(pairs=True)
        def loss(logps: ResponseLogps) -> list[LossTerm]:
            return [LossTerm(-scale.scale * margins(logps), per="pair")]

        return loss

    one, three = made(Scale(1.0)), made(Scale(3.0))
    assert digest(one) == digest(three)
    config = InfoPOConfig("unused", objective=[one, three, one], use_cpu=True)
    logps = random_logps(MANY)
    values = [loss_function(name)(logps)[0].values.detach() for name, _, _ in config.mixture()]
    assert [float((value / values[0]).mean()) for value in values] == pytest.approx([1, 3, 1])
    assert len({name for name, _, _ in config.mixture()}) == 2
    assert {foreign.plain_name(name) for name, _, _ in config.mixture()} == {
        foreign.plain_name(config.mixture()[0][0])
    }


def test_partials_objects_and_own_losses_are_taken_too() -> None:
    class Loss:
        def __call__(self, logps: ResponseLogps, *, margin: float = 1.0) -> list[LossTerm]:
            return good(logps, margin=margin)

    assert foreign.register(FUNCTIONS["dpo"]) == "dpo"
    for loss in (Loss(), partial(good, margin=2.0)):
        check_loss(loss)


def test_a_config_is_text_after_it_is_made() -> None:
    """transformers writes settings as JSON, and scripts parse them from the command line."""
    config = InfoPOConfig("unused", objective=good, use_cpu=True)
    assert json.loads(config.to_json_string())["objective"] == f"{__name__}:good"
    mixed = InfoPOConfig(
        "unused", loss_type=[f"{__name__}:good", "sft"], loss_weights=[1.0, 0.5], use_cpu=True
    )
    assert [name for name, _, _ in mixed.mixture()] == [f"{__name__}:good", "sft"]


# --- names ------------------------------------------------------------------------------------------------------


def test_a_recipe_finds_a_loss_in_its_own_folder_before_the_current_one(here: Path) -> None:
    folder = here / "elsewhere"
    folder.mkdir()
    (folder / "my_module.py").write_text(MODULE.replace("SCALE = 1.0", "SCALE = 2.0"), encoding="utf-8")
    text = (RECIPES / "lab.yaml").read_text(encoding="utf-8")
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    recipe = load_recipe(folder / "recipe.yaml", ["objective={name: 'my_module:my_loss', margin: 3}"])
    assert recipe.objective[0].parameters == {"margin": 3.0}
    assert row_of("my_module:my_loss").location == str(folder / "my_module.py")
    with pytest.raises(ConfigError, match=r"objective\.margin .*: expected a value >= 0, got -1"):
        load_recipe(folder / "recipe.yaml", ["objective={name: 'my_module:my_loss', margin: -1}"])


def test_each_recipe_finds_the_loss_of_its_own_folder(here: Path) -> None:
    """Whichever was found before, as in a script that trains one after the other."""
    text = (RECIPES / "lab.yaml").read_text(encoding="utf-8")
    folders = [here / name for name in ("one", "two")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "my_module.py").write_text(
            MODULE.replace("SCALE = 1.0", f"SCALE = {number}"), encoding="utf-8"
        )
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    found = []
    for folder in (*folders, folders[0]):
        load_recipe(folder / "recipe.yaml", ["objective=my_module:my_loss"])
        found.append((row_of("my_module:my_loss").location, row_of("my_module:my_loss").digest))
    assert [location for location, _ in found] == [str(f / "my_module.py") for f in (*folders, folders[0])]
    assert found[0] == found[2]
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:loss", r"no module 'nowhere'; looked in .* and where Python looks"),
        ("my_module:my_los", r"has no 'my_los' \(did you mean 'my_loss'\?\)"),
        ("my_module:SCALE", "expected a function of ResponseLogps, got float"),
        (
            "my_module.py:my_loss",
            "MODULE:FUNCTION, with the module's name as Python imports it, e.g. my_module:my",
        ),
        ("broken:loss", r"cannot be imported: SyntaxError: .*line 1"),
        ("missing:loss", "cannot be imported: ModuleNotFoundError: No module named 'not_there'"),
    ],
)
def test_a_name_that_leads_nowhere_says_why(here: Path, name: str, message: str) -> None:
    (here / "broken.py").write_text("def loss(:\n", encoding="utf-8")
    (here / "missing.py").write_text("import not_there\n", encoding="utf-8")
    (problem,) = check_objective(name, {})
    assert problem.startswith("objective.name: ")
    with pytest.raises(ConfigError, match=message):
        row_of(name)


def test_losses_that_packages_register_are_found_listed_and_shown(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A distribution on the path, as pip leaves one."""
    (here / "their_losses.py").write_text(MODULE, encoding="utf-8")
    about = here / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: theirs\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text(
        f"[{foreign.GROUP}]\ntheirs = their_losses:my_loss\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(here))
    assert "theirs" in {point.name for point in entry_points(group=foreign.GROUP)}
    assert main(["objectives"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed for name in [*OBJECTIVES, "theirs"])
    assert main(["objectives", "theirs"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "max(0, m - log r(w) + log r(l))",
        "pairs; reference of both",
        "margin: 1.0, >= 0. Nats.",
        str(here),
    ):
        assert part in shown
    assert check_objective("theirs", {"margin": 2.0}) == []
    assert "theirs" in check_objective("their", {})[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_command_line_shows_every_objective(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives", name]) == 0
    shown = capsys.readouterr().out
    assert OBJECTIVES[name].formula in shown
    assert all(f"  {key}: " in shown for key in OBJECTIVES[name].parameters)


# --- the hash of what is computed -------------------------------------------------------------------------------


def loaded(folder: Path, text: str) -> str:
    (folder / "my_module.py").write_text(text, encoding="utf-8")
    sys.modules.pop("my_module", None)
    foreign._found.clear()
    import linecache

    linecache.clearcache()
    for cached in folder.glob("__pycache__/*"):
        cached.unlink()
    return digest(foreign.find("my_module:my_loss").function)


def test_the_hash_sees_what_is_computed_and_not_how_it_is_written(here: Path) -> None:
    first = loaded(here, MODULE)
    same = MODULE.replace("    return [", "    # A remark.\n\n    return [ ").replace(
        "= 1.0):", '= 1.0):\n    """Doc."""'
    )
    assert loaded(here, same) == first
    for changed in (MODULE.replace("SCALE = 1.0", "SCALE = 2.0"), MODULE.replace("min=0", "min=-1")):
        assert loaded(here, changed) != first


def test_the_hash_sees_functions_of_the_same_module(here: Path) -> None:
    text = MODULE.replace("SCALE *", "scaled() *") + "\ndef scaled():\n    return SCALE\n"
    assert loaded(here, text) != loaded(here, text.replace("return SCALE", "return 2 * SCALE"))


def over(value: Any) -> Any:
    """A closure over a value, which it takes from its cell."""
    return lambda logps: value


@dataclass(frozen=True)
class Setting:
    values: tuple[int, ...]


class Loss:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, logps: ResponseLogps) -> float:
        return self.scale

    def bound(self, logps: ResponseLogps) -> float:
        return self.scale


DIFFERENT = {
    "small numbers, which are one object each": ((1, 2, 1), (1, 2, 2)),
    "flags": ((True, False, True), (True, False, False)),
    "lengths": ([1, 1], [1, 1, 1]),
    "how values are nested": ([[1], [2, 3]], [[1, 2], [3]]),
    "kinds of numbers": (1, 1.0),
    "tensors": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
    "tensors of another shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "bfloat16": (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0], dtype=torch.bfloat16)),
    "arrays": (np.array([1, 2]), np.array([2, 1])),
    "dataclasses": (Setting((1, 2)), Setting((2, 2))),
    "namespaces": (SimpleNamespace(beta=1), SimpleNamespace(beta=2)),
    "sets": ({"a", "b"}, {"a", "c"}),
    "types of torch": (torch.float16, torch.float32),
    "paths": (Path("a"), Path("b")),
    "objects that can be called": (Loss(1.0), Loss(2.0)),
    "methods": (Loss(1.0).bound, Loss(2.0).bound),
    "partials": (partial(max, 1), partial(max, 2)),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_the_hash_sees_the_values_that_a_closure_holds(what: str) -> None:
    one, other = DIFFERENT[what]
    assert digest(over(one)) != digest(over(other))
    assert digest(over(one)) == digest(over(copy.deepcopy(one)))


class Failing:
    """An object that fails whenever it is looked at, as one that is loaded late."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("not initialised")

    def __repr__(self) -> str:
        raise RuntimeError("not initialised")


LATE = Failing()
NUMBERS = (float, torch.Tensor, {"half": np.float16})
WEIGHTS = {margins: 1.0, max: 2.0}


def test_no_value_that_a_loss_holds_stops_a_run() -> None:
    """Of what cannot be described there is the type. An array of objects has no values that last."""

    def reads_globals(logps: Any) -> Any:
        return LATE, NUMBERS, WEIGHTS

    loop: list[Any] = []
    loop.append(loop)
    unset = object.__new__(Setting)
    held = [
        LATE,
        NUMBERS,
        WEIGHTS,
        loop,
        unset,
        SimpleNamespace(dtype="bf16", shape=None),
        logging.getLogger("a"),
    ]
    held += [np.array([{"a": 1}], dtype=object), torch.zeros(2, device="meta"), {1: frozenset({"a", "b"})}]
    for value in (*held, lambda: held):
        assert digest(over(value)) == digest(over(value))
    assert digest(reads_globals) == digest(reads_globals)
    assert digest(over(np.array([1, "a"], dtype=object))) != digest(over(np.array([2, "a"], dtype=object)))


def test_a_method_that_is_registered_again_has_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "_found", {})
    loss = Loss(1.0)
    assert len({foreign.register(loss.bound) for _ in range(3)}) == 1
    assert len(foreign._found) == 1


def test_the_hash_of_methods_sees_whose_they_are() -> None:
    assert digest(Loss(1.0).bound) != digest(Loss(2.0).bound)
    assert digest(Loss(1.0).bound) == digest(Loss(1.0).bound)


def test_the_hash_is_the_same_in_every_process_without_source_too() -> None:
    """As of `python -c` and of a console. Inner functions have an address in their `repr`, and sets an order."""
    code = """
from infopo.losses.fingerprint import digest
import logging, torch
logger = logging.getLogger("mine")
TABLE = {"a": {"x", "y", "z"}, "b": torch.arange(3)}
def loss(logps, *, flag=True):
    inner = lambda value: value in {"red", "green", "blue"}
    logger.info("called")
    return [inner(each) for each in TABLE]
print(digest(loss))
"""
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, text=True,
            capture_output=True, check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(seen) == 1
    changed = code.replace('"blue"', '"brown"')
    other = subprocess.run(
        [sys.executable, "-c", changed], env=dict(os.environ), text=True, capture_output=True, check=True
    ).stdout
    assert other not in seen


# --- training ---------------------------------------------------------------------------------------------------

SMALL = ["objective=my_module:my_loss", "data.limit=32", "train.max_steps=2", "train.save_steps=1",
         "train.eval_strategy=no", "data.eval_split=null", "train.per_device_train_batch_size=16",
         "reference.store=off", "data.cache=off"]  # fmt: skip


@pytest.mark.long
def test_a_run_with_a_loss_of_the_users_is_recorded_resumed_and_refused_once_the_loss_has_changed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(RECIPES / "lab.yaml")
    assert main(["train", recipe, *SMALL]) == 0, capsys.readouterr().err
    run = here / "runs" / "lab"
    assert "name: my_module:my_loss\n  margin: 1.0\n" in (run / "recipe.yaml").read_text(encoding="utf-8")
    [record] = json.loads((run / "environment.json").read_text(encoding="utf-8"))["losses_from_outside"]
    assert record["file"] == str(here / "my_module.py")
    assert record["sha256"] in (run / "README.md").read_text(encoding="utf-8")
    again = [*SMALL, "train.max_steps=3", "train.resume_from_checkpoint=true"]
    loaded(here, MODULE.replace("SCALE = 1.0", "SCALE = 2.0"))
    assert main(["train", recipe, *again]) == 2
    message = capsys.readouterr().err
    assert "another source of the loss" in message
    loaded(here, MODULE + "\n# Written on.\n")
    assert main(["train", recipe, *again]) == 0, capsys.readouterr().err
