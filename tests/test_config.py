"""Recipes: what is refused and how, and the laws of reading, overriding and writing them."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infopo import catalog, config
from infopo.config import Recipe, TrainField, load_recipe, parse_recipe, to_yaml
from infopo.errors import ConfigError, RecipeError
from infopo.losses.catalog import OBJECTIVES
from infopo.settings import (
    DTYPES,
    AdapterSettings,
    DataSettings,
    ModelSettings,
    ObjectiveSettings,
    ReferenceSettings,
)
from infopo.validation import PYTHON

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}

MINIMAL = """\
model: {name_or_path: sft}
data:
  path: pairs.jsonl
output_dir: run
"""

TRAIN_FIELDS = {
    field.name: field
    for field in (
        TrainField("learning_rate", (float,)),
        TrainField("max_steps", (int,)),
        TrainField("bf16", (bool,)),
        TrainField("fp16", (bool,)),
        TrainField("eval_on_start", (bool,)),
        TrainField("load_best_model_at_end", (bool,)),
        TrainField("eval_strategy", (str,), ("no", "steps", "epoch")),
        TrainField("report_to", (type(None), str, list)),
        TrainField("lr_scheduler_kwargs", (dict, type(None))),
    )
}


def parse(text: str = MINIMAL, *overrides: str) -> Recipe:
    return parse_recipe(text, source="recipe.yaml", overrides=overrides, train_fields=TRAIN_FIELDS)


def problems_of(text: str = MINIMAL, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(text, *overrides)
    assert caught.value.source == "recipe.yaml"
    return caught.value.problems


def only_problem_of(text: str = MINIMAL, *overrides: str) -> str:
    problems = problems_of(text, *overrides)
    assert len(problems) == 1, problems
    return problems[0]


# --- what a sound recipe means ---


def test_minimal_recipe_takes_every_default():
    assert parse() == Recipe(ModelSettings("sft"), DataSettings("pairs.jsonl"), "run")


def test_objective_defaults_to_infopo_with_the_catalogs_parameters():
    (term,) = parse().objective
    assert term == ObjectiveSettings("infopo", {"beta": 1.0, "length_normalized": False, "cap": 5.0})


def test_bare_strings_stand_for_objective_and_reference():
    short = parse(MINIMAL + "objective: dpo\nreference: live\n")
    long = parse(MINIMAL + "objective: {name: dpo}\nreference: {source: live}\n")
    assert short == long


def test_parameters_stand_beside_the_objectives_name():
    assert parse(MINIMAL + "objective: {name: dpo, beta: 0.25}\n").objective[0].parameters["beta"] == 0.25


@pytest.mark.parametrize("number", ["1e-6", "1E-6", "1.0e-6", ".000001", "1e-06"])
def test_floats_are_numbers_however_they_are_written(number: str):
    in_file = parse(f"{MINIMAL}train: {{learning_rate: {number}}}\n")
    in_override = parse(MINIMAL, f"train.learning_rate={number}")
    assert in_file.train["learning_rate"] == in_override.train["learning_rate"] == 1e-6


def test_no_is_text_not_false():
    assert parse(MINIMAL + "train: {eval_strategy: no}\n").train == {"eval_strategy": "no"}


def test_dates_are_text():
    assert parse(MINIMAL, "model.revision=2025-02-30").model.revision == "2025-02-30"


def test_null_adapter_is_none_and_an_empty_one_takes_defaults():
    assert parse(MINIMAL, "model.adapter=null").model.adapter is None
    assert parse(MINIMAL, "model.adapter={}").model.adapter == AdapterSettings()


def test_adapter_off_is_accepted_with_an_adapter():
    recipe = parse(MINIMAL, "reference=adapter-off", "model.adapter.r=4")
    assert recipe.model.adapter == AdapterSettings(r=4)
    assert not recipe.reference.is_path


def test_reference_may_be_a_model():
    assert parse(MINIMAL, "reference=models/sft").reference.is_path


def test_evaluation_is_accepted_with_data_for_it():
    assert parse(MINIMAL, "train.eval_strategy=steps", "data.eval_split=test").data.has_eval


def test_sections_that_are_empty_take_defaults():
    assert parse(MINIMAL + "train:\nobjective:\nreference:\n") == parse()


def test_anchors_share_values_and_an_override_changes_one_use_only():
    text = """\
model: {name_or_path: sft}
data: {path: p}
output_dir: run
train:
  lr_scheduler_kwargs: &shared {a: 1}
  report_to: [*shared]
"""
    recipe = parse(text, "train.lr_scheduler_kwargs.a=2")
    assert recipe.train == {"lr_scheduler_kwargs": {"a": 2}, "report_to": [{"a": 1}]}


def test_without_train_fields_any_training_argument_passes():
    recipe = parse_recipe(MINIMAL + "train: {anything: 1}\n", source="r", train_fields=None)
    assert recipe.train == {"anything": 1}


@pytest.mark.parametrize("value", [True, "run/checkpoint-5", None])
def test_resume_from_checkpoint_is_a_training_argument(value: object):
    written = {True: "true", None: "null"}.get(value, value)
    assert parse(MINIMAL, f"train.resume_from_checkpoint={written}").train["resume_from_checkpoint"] == value


@pytest.mark.parametrize(
    "override",
    ["model.adapter.r=1", "model.adapter.lora_dropout=0", "data.max_length=2", "data.max_prompt_length=1023"],
)
def test_limits_themselves_are_admitted(override: str):
    assert parse(MINIMAL, override)


# --- what is refused ---


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.name_or_path=3"], "model.name_or_path (override): expected text, got 3"),
        (["model.name_or_path=''"], "model.name_or_path (override): is empty"),
        (
            ["model.dtype=bf16"],
            "model.dtype (override): expected one of auto, float32, bfloat16, float16, got 'bf16'",
        ),
        (
            ["model.trust_remote_code=yes"],
            "model.trust_remote_code (override): expected true or false, got 'yes'",
        ),
        (["model.adapter=lora"], "model.adapter (override): expected a section"),
        (["model.adapter.r=0"], "model.adapter.r (override): expected a value >= 1, got 0"),
        (["model.adapter.r=true"], "model.adapter.r (override): expected an integer, got true"),
        (
            ["model.adapter.lora_dropout=1"],
            "model.adapter.lora_dropout (override): expected a value in [0, 1), got 1",
        ),
        (["model.adapter.target_modules=[1]"], "expected text or a list of texts or null, got [1]"),
        (
            ["model.adapter.lora_r=3"],
            "model.adapter.lora_r (override): no such setting (did you mean model.adapter.r?)",
        ),
        (["data.max_length=1"], "data.max_length (override): expected a value >= 2, got 1"),
        (["data.max_length=512.0"], "data.max_length (override): expected an integer or null, got 512.0"),
        (["data.on_bad_row=ignore"], "data.on_bad_row (override): expected one of raise, skip, got 'ignore'"),
        (["data.num_proc=0"], "data.num_proc (override): expected a value >= 1, got 0"),
        (["data.limit=-5"], "data.limit (override): expected a value >= 1, got -5"),
        (
            ["data=3"],
            "data (override): expected a section with settings beneath it, got 3",
        ),
        (["objective=dppo"], "objective.name (override): no objective 'dppo' (did you mean 'dpo'?)"),
        (["objective=3"], "objective (override): expected a name, a section"),
        (["objective.name=3"], "objective.name (override): expected text, got 3"),
        (
            ["objective.bta=1"],
            "objective.bta (override): infopo has no such parameter (did you mean 'beta'?)",
        ),
        (["objective.beta=0"], "objective.beta (override): expected a value > 0, got 0"),
        (["objective.beta=.inf"], "objective.beta (override): expected a finite number"),
        (
            ["reference.sides=all"],
            "reference.sides (override): expected one of auto, needed, both, got 'all'",
        ),
        (
            ["reference=precomputed"],
            "reference.source (override): 'precomputed' is none of auto, live, precompute",
        ),
        (["train=3"], "train (override): expected a section with settings beneath it, got 3"),
        (
            ["train.learning_rat=1"],
            "train.learning_rat (override): no such training argument (did you mean 'learning",
        ),
        (["train.learning_rate=fast"], "train.learning_rate (override): expected a number, got 'fast'"),
        (["train.learning_rate=.nan"], "train.learning_rate (override): NaN is no setting"),
        (["train.learning_rate=!!float nan"], "train.learning_rate (override): NaN is no setting"),
        (["train.max_steps=1.5"], "train.max_steps (override): expected an integer, got 1.5"),
        (
            ["train.eval_strategy=step", "data.eval_split=test"],
            "expected one of no, steps, epoch, got 'step' (did you",
        ),
        (["train.resume_from_checkpoint=7"], "expected true or false or text or null, got 7"),
        (["outputdir=x"], "outputdir (override): no such setting (did you mean 'output_dir'?)"),
        (["output_dir="], "output_dir (override): is required"),
        (["output_dir=[a]"], "output_dir (override): expected text, got ['a']"),
    ],
)
def test_wrong_setting_is_named_with_what_was_expected(overrides: list[str], expected: str):
    assert expected in only_problem_of(MINIMAL, *overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["reference=adapter-off"],
            "reference.source (override): adapter-off takes the model without its adapter",
        ),
        (
            ["data.max_prompt_length=1024"],
            "data.max_prompt_length (override): 1024 leaves no room for a response",
        ),
        (["train.eval_strategy=steps"], "train.eval_strategy (override): there is no data to evaluate on"),
        (["train.eval_on_start=true"], "train.eval_on_start (override): there is no data to evaluate on"),
        (["train.load_best_model_at_end=true"], "train.load_best_model_at_end (override): there is no data"),
        (["train.bf16=true", "train.fp16=true"], "train.fp16 (override): bf16 is on too"),
        (
            ["model.dtype=float16", "train.fp16=true"],
            "train.fp16 (override): mixed precision scales gradients",
        ),
    ],
)
def test_impossible_combination_is_refused(overrides: list[str], expected: str):
    assert expected in only_problem_of(MINIMAL, *overrides)


def test_output_dir_stands_at_the_top_level_only():
    problem = only_problem_of(MINIMAL + "train: {output_dir: elsewhere}\n")
    assert problem.startswith(
        "train.output_dir (line 5): the run directory is set by output_dir at the top level"
    )


@pytest.mark.parametrize("section", ["model", "data"])
def test_missing_section_names_its_required_setting(section: str):
    required = {"model": "model.name_or_path: is required", "data": "data.path: is required"}
    others = {"model": "data: {path: p}\n", "data": "model: {name_or_path: sft}\n"}
    assert only_problem_of(others[section] + "output_dir: run\n") == required[section]


def test_unknown_key_names_its_line_and_the_nearest_key():
    problem = only_problem_of(MINIMAL.replace("data:", "data:\n  max_lenght: 5"))
    assert problem.startswith("data.max_lenght (line 3): no such setting (did you mean 'max_length'?)")


def test_problem_in_an_overridden_section_does_not_name_a_line_of_the_file():
    problem = only_problem_of(
        MINIMAL + "objective: {name: dpo, beta: 0.1}\n", "objective={name: dpo, beta: -1}"
    )
    assert problem.startswith("objective.beta (override): expected a value > 0")


def test_duplicate_key_is_refused_with_both_lines():
    text = MINIMAL.replace("  path: pairs.jsonl", "  path: pairs.jsonl\n  split: a\n  split: b")
    assert only_problem_of(text) == "data.split (line 4): given twice, on lines 4 and 5; keep one"


def test_key_that_is_not_text_is_refused():
    assert only_problem_of(MINIMAL + "train: {3: 4}\n") == (
        "train (line 5): '3' on line 5 is no text, but keys are; put it in quotes"
    )


def test_foreign_tag_is_refused():
    assert (
        "tag tag:yaml.org,2002:binary has no meaning"
        in problems_of(MINIMAL, "model.revision=!!binary aGk=")[0]
    )


def test_python_object_is_refused_and_not_made():
    marker = "!!python/object/apply:sys.exit [3]"
    assert any(
        "no meaning in a recipe" in p or "not valid YAML" in p
        for p in problems_of(MINIMAL, f"train={marker}")
    )


def test_value_that_does_not_fit_its_tag_is_refused():
    for value in ("!!float x", "!!float ''", '!!int ""', "!!bool maybe", "!!int x"):
        assert "not valid YAML" in only_problem_of(MINIMAL, f"train.learning_rate={value}")


def test_self_reference_is_refused():
    assert "refers to itself" in only_problem_of(MINIMAL + "train: &loop {a: *loop}\n")


def test_syntax_error_names_its_line():
    assert only_problem_of("model:\n  path: x\n    y: 3\n").startswith("line 3: not valid YAML")


def test_second_document_is_refused():
    assert "not valid YAML" in only_problem_of(MINIMAL + "---\n" + MINIMAL)


def test_endless_nesting_is_refused():
    assert "nested too deeply" in only_problem_of("a: " + "[" * 5000)


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_empty_recipe_is_refused(text: str):
    assert problems_of(text)


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "sequence"), ("just words\n", "scalar")])
def test_top_level_is_a_mapping(text: str, kind: str):
    assert only_problem_of(text) == (
        f"recipe: expected `key: value` lines at the top level, got a {kind} on line 1"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate", "override 'train.learning_rate': expected key=value"),
        ("=3", "override '=3': expected a key before `=`"),
        (" =3", "expected a key before `=`"),
        (
            "train..lr=3",
            "override 'train..lr=3': expected a key before `=`, its parts separated by single dots",
        ),
        ("output_dir.name=x", "override 'output_dir.name=x': output_dir is 'run', which has no key 'name'"),
        ("data.path.x.y=1", "override 'data.path.x.y=1': data.path is 'pairs.jsonl', which has no key 'x'"),
        ("train.max_steps=[", "override 'train.max_steps=[': the value is not valid YAML"),
    ],
)
def test_wrong_override_is_named(override: str, expected: str):
    assert expected in only_problem_of(MINIMAL, override)


def test_all_problems_come_at_once():
    text = """\
model: {name_or_path: sft, dtype: half}
data:
  path: pairs.jsonl
  max_length: 100
  max_prompt_length: 200
  limit: 0
objective: {name: dpo, bta: 0.1}
train: {bf16: true, fp16: true}
output_dir: run
"""
    places = [problem.partition(":")[0] for problem in problems_of(text)]
    assert places == [
        "model.dtype (line 1)",
        "data.limit (line 6)",
        "objective.bta (line 7)",
        "data.max_prompt_length (line 5)",
        "train.fp16 (line 8)",
    ]


def test_a_wrong_section_does_not_hide_a_wrong_combination():
    problems = problems_of(MINIMAL, "model.dtype=half", "reference=adapter-off")
    assert len(problems) == 2


def test_settings_judge_themselves_wherever_they_are_made():
    with pytest.raises(ConfigError) as caught:
        DataSettings("p", max_length=5, max_prompt_length=9, on_bad_row="drop")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "on_bad_row", "max_prompt_length",
    ]  # fmt: skip
    assert DataSettings.wrong_values({"path": "p", "as_chat": 1, "limit": None}, PYTHON) == [
        ("as_chat", "expected True or False, got 1")
    ]
    assert RecipeError is ConfigError


def test_settings_are_frozen():
    for settings_of_a_subject in (
        DataSettings("p"),
        ModelSettings("m"),
        ReferenceSettings(),
        AdapterSettings(),
    ):
        name = dataclasses.fields(settings_of_a_subject)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings_of_a_subject, name, "other")
    assert dataclasses.replace(DataSettings("p"), limit=3) == DataSettings("p", limit=3)


# --- files ---


def test_recipe_file_is_read(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe(path) == parse()


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"none\.yaml: no such file"):
        load_recipe(tmp_path / "none.yaml")


def test_directory_is_no_recipe(tmp_path: Path):
    with pytest.raises(RecipeError, match="is a directory"):
        load_recipe(tmp_path)


def test_invalid_utf8_names_its_line(tmp_path: Path):
    path = tmp_path / "latin1.yaml"
    path.write_bytes(MINIMAL.encode() + b"# caf\xe9\n")
    with pytest.raises(RecipeError, match=r"line 5: not UTF-8 \(byte 0xe9\) in .*latin1\.yaml"):
        load_recipe(path)


def test_path_that_no_system_accepts_is_named():
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe("a\0b")


# --- laws ---

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
counts = st.integers(1, 10**9)
floats = st.floats(0, 1, exclude_max=True, allow_nan=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def terms(draw: st.DrawFn, weights: st.SearchStrategy[float]) -> ObjectiveSettings:
    name = draw(st.sampled_from(sorted(OBJECTIVES)))
    drawn = {bool: st.booleans(), float: st.floats(0.01, 0.49)}
    known = {key: spec for key, spec in OBJECTIVES[name].parameters.items() if spec.kind in drawn}
    chosen = draw(st.sets(st.sampled_from(sorted(known)))) if known else set()
    return ObjectiveSettings(name, {key: draw(drawn[known[key].kind]) for key in chosen}, draw(weights))


objectives = st.tuples(terms(st.just(1.0))) | st.lists(
    terms(st.floats(0.01, 100)), min_size=1, max_size=3
).map(tuple)


adapters = st.builds(
    AdapterSettings,
    r=counts,
    lora_alpha=counts,
    lora_dropout=floats,
    target_modules=st.none() | texts | st.lists(texts, max_size=3),
)
recipes = st.builds(
    Recipe,
    model=st.builds(
        ModelSettings,
        name_or_path=texts,
        dtype=st.sampled_from(DTYPES),
        attn_implementation=st.none() | texts,
        trust_remote_code=st.booleans(),
        revision=st.none() | texts,
        adapter=st.none() | adapters,
    ),
    data=st.builds(
        DataSettings,
        path=texts,
        eval_path=st.none() | texts,
        max_length=st.none() | st.integers(2, 10**6),
        limit=st.none() | counts,
        on_bad_row=st.sampled_from(catalog.ON_BAD_ROW),
    ),
    output_dir=texts,
    objective=objectives,
    reference=st.builds(
        ReferenceSettings,
        source=st.sampled_from(["auto", "live", "precompute", "./folder", "no", "1e-3"]),
        sides=st.sampled_from(catalog.REFERENCE_SIDES),
    ),
    train=st.dictionaries(texts.map(lambda key: f"x{key}"), plain, max_size=4),
)


def reread(recipe: Recipe, *overrides: str) -> Recipe:
    return parse_recipe(to_yaml(recipe), source="round trip", overrides=overrides, train_fields=None)


def assert_survives_writing(recipe: Recipe) -> None:
    text = to_yaml(recipe)
    again = parse_recipe(text, source="round trip", train_fields=None)
    assert again == recipe
    assert to_yaml(again) == text


@given(recipes)
@settings(max_examples=40)
def test_a_written_recipe_reads_back_equal_and_is_written_alike(recipe: Recipe):
    assert_survives_writing(recipe)


@pytest.mark.long
@settings(max_examples=1000)
@given(recipes)
def test_many_written_recipes_read_back_equal_and_are_written_alike(recipe: Recipe):
    assert_survives_writing(recipe)


@given(st.data())
def test_overriding_with_the_same_value_changes_nothing(data: st.DataObject):
    recipe = parse(MINIMAL, "objective=dpo", "model.adapter={}", "train.learning_rate=1e-6")
    tree = dataclasses.asdict(recipe)
    section = data.draw(st.sampled_from(["model", "data", "reference", "train"]))
    key = data.draw(st.sampled_from(sorted(tree[section])))
    value = config.dump_tree({"value": tree[section][key]}).partition(":")[2].strip()
    if isinstance(tree[section][key], dict):
        value = "{r: 16, lora_alpha: 32, lora_dropout: 0.0, target_modules: null}"
    assert reread(recipe, f"{section}.{key}={value}") == recipe


@given(st.text(max_size=60) | st.text("abk:{}[]&*!<>|-?'\"#% \n\t0.e", max_size=60))
def test_whatever_the_text_only_recipe_errors_come_out(text: str):
    with pytest.raises(RecipeError):
        parse_recipe(text, source="fuzz", train_fields=None)


@given(st.text(max_size=40) | st.text("datrin.=:{}[]&*!-'\"# \n0e", max_size=40))
def test_whatever_the_override_only_recipe_errors_come_out(override: str):
    with contextlib.suppress(RecipeError):
        parse(MINIMAL, override)


def test_config_runs_and_catalog_need_no_torch():
    code = (
        "import infopo.config, infopo.runs, infopo.losses.catalog, sys;"
        "heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
