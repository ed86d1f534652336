"""The tables agree with the functions, and name every problem of what a user wrote, with a way out."""

import inspect
import math
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopo.catalog import suggestion
from infopo.errors import RecipeError
from infopo.losses.catalog import OBJECTIVES, Parameter, check_objective, complete_parameters, with_defaults
from infopo.losses.declaration import declared
from infopo.losses.registry import FUNCTIONS

every_objective = pytest.mark.parametrize("name", OBJECTIVES)
every_parameter = pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, objective in OBJECTIVES.items() for key in objective.parameters]
)


def edge_values(parameter: Parameter) -> tuple[list[Any], list[Any]]:
    """Values just inside and just outside the domain that the parameter prints."""
    tiny = sys.float_info.min
    words = parameter.domain
    if words.startswith("among "):
        choices = words.removeprefix("among ").split(", ")
        return choices, ["", "reverse_kl_", choices[0].upper()]
    if words.startswith("in "):
        interval = words.removeprefix("in ")
        low, high = (float(end) for end in interval[1:-1].split(","))
        below, above = math.nextafter(low, -math.inf) if low else -tiny, math.nextafter(high, math.inf)
        ends = [(low, below, interval[0] == "["), (high, above, interval[-1] == "]")]
        within = [
            end if closed else math.nextafter(end, math.inf if end == low else -math.inf)
            for end, _, closed in ends
        ]
        return [*within, (low + high) / 2], [outside if closed else end for end, outside, closed in ends]
    return {
        "> 0": ([tiny, 1, 1e300], [0, 0.0, -tiny, -1]),
        ">= 0": ([0, 0.0, -0.0, 1e300], [-tiny, -1]),
        "(true or false)": ([True, False], []),
        "(any finite number)": ([0, -1e300, 1e300], []),
    }[words]


# --- tables and functions -----------------------------------------------------------------------------------


def test_tables_and_functions_name_the_same_objectives_in_the_same_order() -> None:
    assert list(OBJECTIVES) == list(FUNCTIONS)


@every_objective
def test_the_table_is_read_from_the_source_as_the_function_declares_it(name: str) -> None:
    assert repr(OBJECTIVES[name]) == repr(declared(FUNCTIONS[name]))


@every_objective
def test_parameters_and_defaults_are_those_of_the_function(name: str) -> None:
    signature = list(inspect.signature(FUNCTIONS[name]).parameters.values())[1:]
    assert {p.name: p.default for p in signature} == {
        k: p.default for k, p in OBJECTIVES[name].parameters.items()
    }
    assert {p.name: p.annotation for p in signature} == {
        k: p.kind for k, p in OBJECTIVES[name].parameters.items()
    }
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in signature)


@every_objective
def test_rows_are_consistent_in_themselves(name: str) -> None:
    objective = OBJECTIVES[name]
    assert objective.reference <= objective.sides <= {"chosen", "rejected"}
    assert objective.sides
    assert not objective.pairs or objective.sides == {"chosen", "rejected"}
    assert objective.title
    assert objective.formula
    assert objective.source
    assert all(parameter.help.endswith(".") for parameter in objective.parameters.values())


@every_objective
def test_every_source_is_named_in_the_functions_docstring(name: str) -> None:
    documented = inspect.getdoc(FUNCTIONS[name]) or ""
    for paper in re.findall(r"arXiv (\d{4}\.\d{5})", OBJECTIVES[name].source):
        assert paper in documented


def test_infopo_needs_one_side_of_the_reference() -> None:
    """Half of DPO's reference pass: what the method claims (ARCHITECTURE §1)."""
    assert OBJECTIVES["infopo"].reference == {"rejected"}
    assert not OBJECTIVES["infopo"].pairs


@every_objective
def test_a_loss_without_a_reference_has_rewards_without_one(name: str) -> None:
    """α-DPO has SimPO's rewards: its reference is in the target margin alone."""
    has_none = not OBJECTIVES[name].reference or name == "alpha_dpo"
    assert has_none == (OBJECTIVES[name].reward != "log_ratio")


def test_the_catalog_imports_no_torch() -> None:
    code = "import sys, infopo.catalog, infopo.losses.catalog; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


# --- parameters ---------------------------------------------------------------------------------------------


@every_parameter
def test_the_default_lies_in_the_domain(name: str, key: str) -> None:
    parameter = OBJECTIVES[name].parameters[key]
    assert parameter.problem(parameter.default) is None


@every_parameter
def test_the_domain_in_words_is_the_domain_in_code(name: str, key: str) -> None:
    parameter = OBJECTIVES[name].parameters[key]
    inside, outside = edge_values(parameter)
    assert [parameter.problem(value) for value in inside] == [None] * len(inside)
    for value in outside:
        problem = parameter.problem(value)
        assert problem
        assert parameter.domain in problem
        assert repr(value) in problem


@every_parameter
@pytest.mark.parametrize("value", [None, "0.1", "true", [0.1], {}, 1j], ids=repr)
def test_values_of_another_type_are_refused(name: str, key: str, value: Any) -> None:
    parameter = OBJECTIVES[name].parameters[key]
    problem = parameter.problem(value)
    assert problem
    if not isinstance(value, parameter.kind):
        assert problem.startswith(f"expected {parameter.kind.__name__} ")
    assert repr(value) in problem


@every_parameter
def test_a_bool_is_not_a_number_and_a_number_is_not_a_bool(name: str, key: str) -> None:
    parameter = OBJECTIVES[name].parameters[key]
    for value in (True, False) if parameter.kind is float else (0, 1, 0.0, 1.0):
        assert (parameter.problem(value) or "").startswith(f"expected {parameter.kind.__name__}")


def test_a_bool_is_not_an_integer() -> None:
    steps = Parameter(default=1, kind=int, domain="> 0", admits=lambda v: bool(v > 0), help="")
    assert steps.problem(3) is None
    assert (steps.problem(True) or "").startswith("expected int")


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 10**400], ids=["nan", "inf", "-inf", "10**400"]
)
def test_numbers_that_are_not_finite_floats_are_refused(value: float) -> None:
    for objective in OBJECTIVES.values():
        for parameter in objective.parameters.values():
            if parameter.kind is float:
                assert "finite" in (parameter.problem(value) or "")


# --- check_objective and complete_parameters ----------------------------------------------------------------


def test_check_objective_collects_all_problems_each_with_its_place() -> None:
    problems = check_objective("dpo", {"beta": 0, "label_smoothing": 0.5, "nll_wieght": 1.0, "cap": 3.0})
    assert [p.split(":")[0] for p in problems] == [
        "objective.beta",
        "objective.label_smoothing",
        "objective.nll_wieght",
        "objective.cap",
    ]
    assert "> 0" in problems[0]
    assert "0" in problems[0]
    assert "did you mean 'nll_weight'?" in problems[2]
    assert "did you mean" not in problems[3]
    assert all(key in problems[3] for key in OBJECTIVES["dpo"].parameters)


def test_an_unknown_objective_is_named_with_a_suggestion_and_the_choices() -> None:
    (problem,) = check_objective("infop", {"beta": -1})
    assert problem.startswith("objective.name: ")
    assert "'infop'" in problem
    assert "did you mean 'infopo'?" in problem
    assert all(name in problem for name in OBJECTIVES)


@every_objective
def test_nothing_is_wrong_with_the_defaults(name: str) -> None:
    assert check_objective(name, {}) == []
    assert complete_parameters(name, {}) == {k: p.default for k, p in OBJECTIVES[name].parameters.items()}


def test_complete_parameters_keeps_what_is_given_and_adds_the_rest() -> None:
    given_ = {"cap": 3}
    assert complete_parameters("infopo", given_) == {"beta": 1.0, "length_normalized": False, "cap": 3}
    assert given_ == {"cap": 3}


def test_a_checkpoint_made_before_a_parameter_existed_has_its_default() -> None:
    before = [["dpo", {"beta": 0.2, "label_smoothing": 0.0, "nll_weight": 0.0}, 1.0]]
    assert with_defaults(before) == [["dpo", complete_parameters("dpo", {"beta": 0.2}), 1.0]]
    for foreign in (None, [["my_module:my_loss", {}, 1.0]], [["dpo"]]):
        assert with_defaults(foreign) == foreign


def test_complete_parameters_raises_all_problems_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        complete_parameters("simpo", {"beta": -1, "gama": 1})
    assert len(error.value.problems) == 2
    assert all(problem in str(error.value) for problem in error.value.problems)


@pytest.mark.parametrize(
    ("word", "expected"),
    [("bta", " (did you mean 'beta'?)"), ("beta", " (did you mean 'beta'?)"), ("xyz", "")],
)
def test_suggestion_names_a_near_miss_only(word: str, expected: str) -> None:
    assert suggestion(word, {"beta": 1, "cap": 2}) == expected
    assert suggestion(word, ("beta", "cap")) == expected


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@given(
    name=st.sampled_from(list(OBJECTIVES)),
    parameters=st.dictionaries(
        st.sampled_from(sorted({k for o in OBJECTIVES.values() for k in o.parameters})) | st.text(),
        values,
        max_size=4,
    ),
)
def test_every_bad_parameter_gets_its_own_sentence_and_no_good_one_does(
    name: str, parameters: dict[str, Any]
) -> None:
    known = OBJECTIVES[name].parameters
    bad = [k for k, v in parameters.items() if k not in known or known[k].problem(v)]
    problems = check_objective(name, parameters)
    assert len(problems) == len(bad)
    assert all(problem.startswith(f"objective.{key}: ") for key, problem in zip(bad, problems, strict=True))
