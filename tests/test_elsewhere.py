"""Files of LLaMA-Factory, Axolotl and TRL become recipes, and no setting of them disappears."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from infopo.cli import main
from infopo.config import Recipe, parse_recipe
from infopo.data.counts import DataCounts
from infopo.data.sources import read_rows
from infopo.elsewhere import TOOLS, convert, tool_of
from infopo.errors import ConfigError
from infopo.train_table import quick_train_fields

EXAMPLES = sorted((Path(__file__).parent / "fixtures" / "elsewhere").glob("*.yaml"))
each_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def written(folder: Path, given: dict[str, Any]) -> Path:
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return path


def converted(folder: Path, given: dict[str, Any], tool: str | None = None) -> tuple[Recipe, str]:
    _, text = convert(written(folder, given), tool)
    return parse_recipe(text, source="converted", train_fields=quick_train_fields()), text


def keys_of(tree: Any) -> list[str]:
    """All keys of a file; of what is within a mapping or a list, the last part of the name."""
    if isinstance(tree, dict):
        return [key for name, value in tree.items() for key in (str(name), *keys_of(value))]
    return [key for each in tree for key in keys_of(each)] if isinstance(tree, list) else []


def unnamed(given: Any, text: str) -> list[str]:
    """Keys of a file that the recipe does not name, neither as a comment nor as a key."""
    return [key for key in keys_of(given) if not re.search(rf"(?<![\w-]){re.escape(key)}(?![\w-])", text)]


@each_example
def test_every_converted_file_is_a_sound_recipe(path: Path):
    conversion, text = convert(path)
    recipe = parse_recipe(text, source=path.name, train_fields=quick_train_fields())
    assert recipe.model.name_or_path
    assert recipe.data.path
    assert conversion.tool in text


@each_example
def test_every_setting_of_a_file_is_named_in_the_recipe(path: Path):
    _, text = convert(path)
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert len(keys_of(given)) > 8
    assert unnamed(given, text) == []


@each_example
def test_the_tool_is_recognised(path: Path):
    tool = tool_of(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert tool is not None
    assert path.stem.startswith(tool)


def test_there_is_an_example_of_each_method_of_each_tool():
    names = {path.stem for path in EXAMPLES}
    assert {f"axolotl-{method}" for method in ("dpo", "ipo", "kto", "orpo", "simpo")} <= names
    assert {f"llama-factory-{loss}" for loss in ("dpo", "kto", "orpo", "simpo")} <= names
    assert {"trl-dpo", "trl-kto"} <= names


def test_a_setting_that_nobody_knows_is_named():
    for tool, base in BASES.items():
        for key, value in {"frobnicate": 3, "nested": {"frobnicate": [1]}, "1": "x: #y"}.items():
            conversion, text = TOOLS[tool]({**base, key: value}, Path("x.yaml")), ""
            conversion.rest()
            text = conversion.recipe("x.yaml")
            assert [each.key for each in conversion.lost if each.key == key] == [key]
            assert unnamed([key], text) == []


BASES: dict[str, dict[str, Any]] = {
    "llama-factory": {"model_name_or_path": "m", "stage": "dpo", "dataset": "d", "output_dir": "out"},
    "axolotl": {"base_model": "m", "rl": "dpo", "datasets": [{"path": "d"}], "output_dir": "out"},
    "trl": {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "out"},
}


ODD = [True, False, 0, -1, 0.25, "text", [], [1, "a"], {}, {"a": {"b": [2]}}, "a\nb: #c", "\x1b[31m", 10**30]


@pytest.mark.long
@each_example
def test_an_odd_value_is_converted_named_or_refused_by_name(path: Path):
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    tool = tool_of(given)
    for index, key in enumerate(given):
        for value in ODD[index % 3 :: 3]:
            try:
                conversion = TOOLS[tool]({**given, key: value}, path)
                conversion.rest()
                text = conversion.recipe(path.name)
            except ConfigError:
                continue
            parse_recipe(text, source=f"{key}: {value!r}", train_fields=quick_train_fields())
            assert unnamed([key], text) == []


@pytest.mark.long
def test_every_setting_of_trls_configurations_is_converted_or_named(tmp_path: Path):
    """Each alone, at its default and at another value: nothing crashes, and the recipe names it."""
    from trl import DPOConfig, KTOConfig, ModelConfig, ScriptArguments

    checked, refused = 0, []
    for config in (DPOConfig, KTOConfig, ModelConfig, ScriptArguments):
        for field in dataclasses.fields(config):
            if field.name in BASES["trl"] or not field.init:
                continue
            default = None if field.default is dataclasses.MISSING else field.default
            default = default.value if hasattr(default, "value") else default
            others = {bool: not default, int: 3, float: 0.25, str: "text", type(None): 1}
            for value in (default, others.get(type(default), "text"), "odd text", [1, "a"], {"a": 1}):
                if value is None:
                    continue
                try:
                    conversion = TOOLS["trl"]({**BASES["trl"], field.name: value}, Path("x.yaml"))
                    conversion.rest()
                    text = conversion.recipe("x.yaml")
                except ConfigError as error:  # a loss that does not exist is no loss to convert
                    refused.append((field.name, value, str(error)))
                    continue
                assert unnamed([field.name], text) == [], (field.name, value)
                parse_recipe(text, source=field.name, train_fields=quick_train_fields())
                checked += 1
    assert checked > 600
    assert [each for each in refused if not re.search(rf"{each[0]}|beta|loss", each[2])] == []


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "given", "expected"),
    [
        ("llama-factory", {"pref_loss": "sigmoid"}, {"name": "dpo", "beta": 0.1}),
        (
            "llama-factory",
            {"pref_beta": 0.3, "dpo_label_smoothing": 0.1},
            {"name": "dpo", "beta": 0.3, "label_smoothing": 0.1},
        ),
        ("llama-factory", {"pref_ftx": 0.5}, {"name": "dpo", "nll_weight": 0.5}),
        (
            "llama-factory",
            {"pref_loss": "simpo", "simpo_gamma": 1.2, "pref_beta": 2.5},
            {"name": "simpo", "gamma": 1.2, "beta": 2.5},
        ),
        ("llama-factory", {"pref_loss": "kto_pair"}, {"name": "kto"}),
        (
            "llama-factory",
            {"stage": "kto", "kto_rejected_weight": 1.5},
            {"name": "kto", "undesirable_weight": 1.5},
        ),
        ("axolotl", {}, {"name": "dpo", "beta": 0.1}),
        ("axolotl", {"rl": "ipo", "rl_beta": 0.2}, {"name": "ipo", "beta": 0.2}),
        ("axolotl", {"dpo_loss_type": ["ipo"]}, {"name": "ipo"}),
        (
            "axolotl",
            {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1.0, 0.2]},
            {"name": "dpo", "nll_weight": 0.2},
        ),
        ("axolotl", {"dpo_use_weighting": True}, {"name": "wpo"}),
        ("axolotl", {"rl": "orpo", "orpo_alpha": 0.2}, {"name": "orpo", "beta": 0.2}),
        (
            "axolotl",
            {"rl": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0},
            {"name": "simpo", "gamma": 0.7, "beta": 0.1},
        ),
        (
            "axolotl",
            {"rl": "kto", "kto_desirable_weight": 0.2, "rl_beta": 0.5},
            {"name": "kto", "desirable_weight": 0.2, "beta": 0.5},
        ),
        ("trl", {"loss_type": "sigmoid", "beta": 0.2}, {"name": "dpo", "beta": 0.2}),
        (
            "trl",
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
            {"name": "dpo", "nll_weight": 0.5},
        ),
        ("trl", {"desirable_weight": 1.5}, {"name": "kto", "desirable_weight": 1.5}),
        (
            "trl",
            {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
            {"name": "fdpo", "divergence": "js"},
        ),
        ("llama-factory", {"pref_loss": "ipo", "pref_ftx": 0.0}, {"name": "ipo", "beta": 0.1}),
    ],
)
def test_the_loss_is_that_of_the_tool(
    tool: str, given: dict[str, Any], expected: dict[str, Any], tmp_path: Path
):
    recipe, text = converted(tmp_path, BASES[tool] | given, tool)
    (term,) = recipe.objective
    found = {"name": term.name, **term.parameters}
    assert {key: found[key] for key in expected} == expected
    assert unnamed(given, text) == []


SFT = ("sft", {"token_mean": True})


@pytest.mark.parametrize(
    ("tool", "given", "expected"),
    [
        (
            "trl",
            {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [0.5, 0.3, 0.2], "beta": 0.3},
            [("dpo", {"beta": 0.3}, 0.5), ("ipo", {"beta": 0.3}, 0.3), (*SFT, 0.2)],
        ),
        ("trl", {"loss_type": "hinge", "loss_weights": [2.0]}, [("hinge", {"beta": 0.1}, 2.0)]),
        (
            "trl",
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [2.0, 0.5]},
            [("dpo", {"beta": 0.1, "nll_weight": 0.0}, 2.0), (*SFT, 0.5)],
        ),
        (
            "axolotl",
            {"rl": "simpo", "simpo_gamma": 0.7},
            [("simpo", {"beta": 0.1, "gamma": 0.7}, 1.0), (*SFT, 1.0)],
        ),
        (
            "llama-factory",
            {"pref_loss": "orpo", "pref_ftx": 0.5, "pref_beta": 0.2},
            [("orpo", {"beta": 0.2}, 1.0), (*SFT, 0.5)],
        ),
        (
            "llama-factory",
            {"stage": "kto", "kto_chosen_weight": 2.0, "pref_ftx": 0.1},
            [("kto", {"beta": 0.1, "desirable_weight": 2.0}, 1.0), (*SFT, 0.1)],
        ),
    ],
)
def test_several_losses_of_the_tool_are_a_sum(
    tool: str, given: dict[str, Any], expected: list[tuple[str, dict[str, Any], float]], tmp_path: Path
):
    recipe, text = converted(tmp_path, BASES[tool] | given, tool)
    found = [(term.name, dict(term.parameters), term.weight) for term in recipe.objective]
    for (name, parameters, weight), (title, known, share) in zip(found, expected, strict=True):
        assert (name, weight) == (title, share)
        assert {key: parameters[key] for key in known} == known
    assert unnamed(given, text) == []


@pytest.mark.parametrize(
    ("tool", "given", "told"),
    [
        ("llama-factory", {"stage": "sft"}, "the stages dpo and kto are converted"),
        ("llama-factory", {"pref_loss": "bco"}, "pref_loss"),
        ("llama-factory", {"pref_loss": ["sigmoid"]}, "pref_loss"),
        ("axolotl", {"rl": "grpo"}, "rl: grpo"),
        ("axolotl", {"rl": None}, "rl"),
        ("axolotl", {"rl_beta": -1}, "beta: expected a value > 0, got -1"),
        ("trl", {"loss_type": "sigmiod"}, "did you mean 'sigmoid'"),
        ("trl", {"dataset_name": None}, "data.path: is required"),
    ],
)
def test_what_cannot_be_a_recipe_is_refused(tool: str, given: dict[str, Any], told: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=re.escape(told)):
        converted(tmp_path, BASES[tool] | given, tool)


# ---- values ----------------------------------------------------------------------------------------------------------


def test_defaults_of_the_tool_are_written_out(tmp_path: Path):
    """What the file leaves out is what that tool does, and not what infopo does by default."""
    of_llama_factory, _ = converted(tmp_path, BASES["llama-factory"])
    assert of_llama_factory.train["learning_rate"] == 5e-5
    assert of_llama_factory.data.max_length == 2048
    assert of_llama_factory.model.adapter is not None
    assert (of_llama_factory.model.adapter.r, of_llama_factory.model.adapter.lora_alpha) == (8, 16)
    of_axolotl, _ = converted(tmp_path, BASES["axolotl"])
    assert of_axolotl.train["num_train_epochs"] == 1.0
    assert of_axolotl.model.adapter is None
    assert of_axolotl.data.on_too_long == "drop"


def test_yaml_is_read_as_the_tools_read_it(tmp_path: Path):
    path = tmp_path / "given.yaml"
    path.write_text(
        "base_model: m\nrl: dpo\nadapter: lora\nlora_target_linear: yes\nload_in_8bit: off\nlearning_rate: 2e-4\n"
        "datasets: [{path: d}]\nweight_decay: '0.01'\n",
        encoding="utf-8",
    )
    recipe = parse_recipe(convert(path)[1], source="x", train_fields=quick_train_fields())
    assert recipe.model.adapter is not None
    assert recipe.model.adapter.target_modules == "all-linear"
    assert recipe.model.quantization is None
    assert (recipe.train["learning_rate"], recipe.train["weight_decay"]) == (2e-4, 0.01)


@pytest.mark.parametrize(
    ("per_epoch", "epochs", "strategy", "steps"),
    [
        (1, 1, "epoch", None),
        (1, 4, "epoch", None),
        (4, 1, "steps", 0.25),
        (2, 5, "steps", 0.1),
        (2, 0.5, "epoch", None),
    ],
)
def test_saves_per_epoch_are_a_share_of_all_steps(
    per_epoch: int, epochs: float, strategy: str, steps: float | None, tmp_path: Path
):
    recipe, _ = converted(tmp_path, BASES["axolotl"] | {"saves_per_epoch": per_epoch, "num_epochs": epochs})
    assert (recipe.train["save_strategy"], recipe.train.get("save_steps")) == (strategy, steps)


def test_values_that_a_recipe_cannot_have_are_named_with_the_reason(tmp_path: Path):
    given = BASES["trl"] | {
        "optim": "adamw_nope",
        "neftune_noise_alpha": 5,
        "max_prompt_length": 4096,
        "hub_token": "hf_secret",
    }
    conversion, text = convert(written(tmp_path, given))
    assert "optim: adamw_nope (expected one of" in text
    assert "neftune_noise_alpha: 5 (noise on the policy alone" in text
    assert re.search(r"max_prompt_length: 4096 \(data.max_prompt_length: 4096 leaves no room", text)
    assert "hf_secret" not in text
    assert len(conversion.lost) == 4


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "\x00", "just text", "a: &a [*a]"])
def test_a_file_that_is_no_configuration_is_told_so(text: str, tmp_path: Path):
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        convert(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match=r"nope\.yaml: cannot be read"):
        convert(tmp_path / "nope.yaml")


# ---- data ------------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "1+1=?"}
GOOD, BAD = {"role": "assistant", "content": "2"}, {"role": "assistant", "content": "3"}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "1+1=?"}],
    "chosen": {"from": "gpt", "value": "2"}, "rejected": {"from": "gpt", "value": "3"},
}  # fmt: skip


def rows_of(recipe: Recipe, row: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What infopo reads of a row under the recipe's settings, as texts of the last turns."""
    (read,) = read_rows([row], DataCounts(), shape=recipe.data.shape, columns=recipe.data.columns)  # type: ignore[arg-type]

    def text(part: Any) -> Any:
        return part if isinstance(part, str) else part[-1]["content"]

    return text(read.prompt), [text(each) for each in read.chosen], [text(each) for each in read.rejected]


PAIR = ("1+1=?", ["2"], ["3"])


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("chatml.intel", {"system": "", "question": "1+1=?", "chosen": "2", "rejected": "3"}),
        ("chatml.icr", {"system": "Sum.", "input": "1+1=?", "chosen": "2", "rejected": "3"}),
        ("llama3.prompt_pairs", {"system": "Sum.", "prompt": "1+1=?", "chosen": "2", "rejected": "3"}),
        ("chatml.argilla", {"instruction": "1+1=?", "chosen_response": "2", "rejected_response": "3"}),
        ("llama3.argilla_chat", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}),
        ("chatml.ultra", {"prompt": "1+1=?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}),
        (
            "zephyr.nectar",
            {"prompt": "1+1=?", "answers": [{"answer": "2", "rank": 1}, {"answer": "3", "rank": 2}]},
        ),
        ("chat_template.argilla_chat", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}),
        ("chat_template.default", {"messages": [USER], "chosen": GOOD, "rejected": BAD}),
        ("chat_template.default", {"messages": [USER], "chosen": "2", "rejected": "3"}),
        (None, {"prompt": "1+1=?", "chosen": "2", "rejected": "3"}),
        (
            {"field_prompt": "q", "field_chosen": "good", "field_rejected": "bad"},
            {"q": "1+1=?", "good": "2", "bad": "3"},
        ),
    ],
)
def test_rows_of_axolotls_types_are_read(kind: Any, row: dict[str, Any], tmp_path: Path):
    recipe, _ = converted(tmp_path, BASES["axolotl"] | {"datasets": [{"path": "d", "type": kind}]})
    assert rows_of(recipe, row) == PAIR


def test_names_of_axolotls_message_fields_are_mapped(tmp_path: Path):
    entry = {
        "path": "d",
        "type": "chat_template.default",
        "field_messages": "talk",
        "field_chosen": "yes",
        "field_rejected": "no",
    }
    recipe, _ = converted(tmp_path, BASES["axolotl"] | {"datasets": [entry]})
    assert rows_of(recipe, {"talk": [USER], "yes": GOOD, "no": [BAD]}) == PAIR


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("chatml.intel", {"question": "1+1=?", "completion": "2"}),
        ("chatml.argilla", {"system": "Sum.", "instruction": "1+1=?", "completion": "2"}),
        ("llama3.ultra", {"prompt": "1+1=?", "completion": "2"}),
        ("llama3.prompt_pairs", {"prompt": "1+1=?", "completion": "2"}),
        ("llama3.argilla_chat", {"completion": [USER, GOOD]}),
        ({"field_prompt": "q", "field_completion": "a", "field_label": "ok"}, {"q": "1+1=?", "a": "2"}),
    ],
)
def test_rows_of_axolotls_types_of_kto_are_read(kind: Any, row: dict[str, Any], tmp_path: Path):
    recipe, _ = converted(
        tmp_path, BASES["axolotl"] | {"rl": "kto", "datasets": [{"path": "d", "type": kind}]}
    )
    label = "ok" if isinstance(kind, dict) else "label"
    assert rows_of(recipe, {**row, label: True}) == ("1+1=?", ["2"], [])


@pytest.mark.parametrize(
    ("about", "row", "expected"),
    [
        (
            {"ranking": True},
            {"instruction": "1+1", "input": "=?", "chosen": "2", "rejected": "3"},
            ("1+1\n=?", ["2"], ["3"]),
        ),
        (
            {"ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
            {"q": "1+1=?", "good": "2", "bad": "3"},
            PAIR,
        ),
        ({"ranking": True, "formatting": "sharegpt"}, SHAREGPT, PAIR),
        (
            {
                "formatting": "sharegpt",
                "columns": {"messages": "talk", "kto_tag": "ok"},
                "tags": {
                    "role_tag": "role",
                    "content_tag": "content",
                    "user_tag": "user",
                    "assistant_tag": "assistant",
                },
            },
            {"talk": [USER, GOOD], "ok": True},
            ("1+1=?", ["2"], []),
        ),
        (
            {"columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"}},
            {"prompt": "1+1=?", "completion": "3", "label": False},
            ("1+1=?", [], ["3"]),
        ),
    ],
)
def test_rows_of_dataset_info_are_read(
    about: dict[str, Any], row: dict[str, Any], expected: Any, tmp_path: Path
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(
        json.dumps({"d": {"file_name": "d.json", **about}}), encoding="utf-8"
    )
    recipe, _ = converted(tmp_path, BASES["llama-factory"])
    assert recipe.data.path == str(tmp_path / "data" / "d.json")
    assert rows_of(recipe, row) == expected


def test_what_dataset_info_says_beyond_files_and_columns_is_named(tmp_path: Path):
    (tmp_path / "data").mkdir()
    about = {
        "hf_hub_url": "org/pairs",
        "subset": "en",
        "split": "train_prefs",
        "tags": {"user_tag": "person"},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"d": about}), encoding="utf-8")
    recipe, text = converted(tmp_path, BASES["llama-factory"])
    assert (recipe.data.path, recipe.data.split) == ("org/pairs", "train_prefs")
    assert "d.subset: en" in text
    assert "d.tags.user_tag: person" in text


def test_several_data_sets_are_a_list_or_a_mixture(tmp_path: Path):
    several = BASES["llama-factory"] | {"dataset": "ultrafeedback, orca_pairs"}
    recipe, _ = converted(tmp_path, several)
    assert recipe.data.path == ["llamafactory/ultrafeedback_binarized", "Intel/orca_dpo_pairs"]
    shares = several | {"mix_strategy": "interleave_under", "interleave_probs": "0.7, 0.3"}
    recipe, text = converted(tmp_path, shares)
    assert recipe.data.path == {"llamafactory/ultrafeedback_binarized": 0.7, "Intel/orca_dpo_pairs": 0.3}
    assert unnamed(shares, text) == []


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_new_file_and_names_what_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, target = written(tmp_path, BASES["axolotl"] | {"val_set_size": 0.1}), tmp_path / "mine.yaml"
    assert main(["convert-recipe", str(source), "--output", str(target)]) == 0
    err = capsys.readouterr().err
    assert "1 without a counterpart" in err
    assert "without a counterpart: val_set_size: 0.1 (no share of the training rows is held out" in err
    assert main(["convert-recipe", str(source)]) == 0
    assert capsys.readouterr().out == target.read_text(encoding="utf-8")
    assert main(["convert-recipe", str(source), "--output", str(target)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_tools_of_the_command_line_are_the_converters(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["convert-recipe", "x.yaml", "--from", "nobody"])
    told = capsys.readouterr().err
    assert [tool for tool in TOOLS if tool not in told] == []


def test_a_refusal_speaks_of_the_file_and_not_of_the_recipe_that_nobody_sees(tmp_path: Path):
    given = {"base_model": 3, "rl": "dpo", "datasets": [{"path": "a.jsonl", "type": "chat_template.default"}]}
    with pytest.raises(ConfigError) as refused:
        converted(tmp_path, given, "axolotl")
    assert "(line" not in str(refused.value)
    assert "base_model (model.name_or_path): expected text, got 3" in str(refused.value)
