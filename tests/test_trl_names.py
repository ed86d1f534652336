"""What settings of TRL's trainers mean here: the loss that they name, or a message with the line that works."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from accelerate import ParallelismConfig
from transformers import HfArgumentParser, TrainingArguments

from infopo import trl_names
from infopo.arguments import InfoPOConfig
from infopo.build import build_arguments
from infopo.config import parse_recipe
from infopo.errors import RecipeError, UnsupportedArgumentError
from infopo.lab import policy_path
from infopo.losses.catalog import OBJECTIVES
from infopo.losses.declaration import Parameter


def mixture(**settings: Any) -> list[tuple[str, dict[str, Any], float]]:
    if isinstance(name := settings.get("loss_type"), str):  # text is taken too, as in TRL, but not annotated
        settings["loss_type"] = [name]
    return InfoPOConfig(output_dir="unused", use_cpu=True, **settings).mixture()


def parameters(name: str, **changed: Any) -> dict[str, Any]:
    return {key: p.default for key, p in OBJECTIVES[name].parameters.items()} | changed


def message(**settings: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        mixture(**settings)
    text = str(caught.value)
    assert len(text) < 500, text
    return text


@pytest.mark.parametrize(
    ("settings", "name", "changed"),
    [
        ({"loss_type": "kto"}, "kto", {}),
        (
            {"loss_type": "kto", "desirable_weight": 1.33, "undesirable_weight": 0.5, "beta": 0.2},
            "kto",
            {"desirable_weight": 1.33, "undesirable_weight": 0.5, "beta": 0.2},
        ),
        ({"objective": "kto", "undesirable_weight": 2.0}, "kto", {"undesirable_weight": 2.0}),
        (
            {"loss_type": "simpo", "simpo_gamma": 1.4, "cpo_alpha": 0.0, "beta": 2.5},
            "simpo",
            {"gamma": 1.4, "beta": 2.5},
        ),
        ({"loss_type": "simpo"}, "simpo", {"beta": 0.1}),  # TRL's default, not the paper's
        ({"loss_type": "cpo", "cpo_alpha": 0.4}, "cpo", {"nll_weight": 0.4}),
        ({"objective": "slic", "cpo_alpha": 0.5}, "slic", {"nll_weight": 0.5}),
        ({"loss_type": "orpo", "beta": 0.3}, "orpo", {"beta": 0.3}),
        ({"loss_type": "infopo"}, "infopo", {}),
        ({"loss_type": "sigmoid_norm"}, "dpo", {"length_normalized": True}),
        ({"loss_type": "alphapo", "alpha": 0.25}, "simpo", {"alpha": 0.25, "beta": 0.1}),
        ({"loss_type": "discopop", "discopop_tau": 0.2}, "discopop", {"tau": 0.2}),
        ({"loss_type": "sppo_hard"}, "sppo_hard", {}),
        ({"loss_type": "sigmoid", "use_weighting": True, "beta": 0.2}, "wpo", {"beta": 0.2}),
        ({"objective": "wpo", "use_weighting": True}, "wpo", {}),
        (
            {"loss_type": "sigmoid", "f_divergence_type": "js_divergence", "beta": 0.2},
            "fdpo",
            {"divergence": "js", "beta": 0.2},
        ),
        ({"objective": "dpo", "f_divergence_type": "forward_kl"}, "fdpo", {"divergence": "forward_kl"}),
        ({"objective": "fdpo", "f_divergence_type": "js_divergence"}, "fdpo", {"divergence": "js"}),
        (
            {"loss_type": "sigmoid", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
            "fdpo",
            {"divergence": "alpha", "alpha": pytest.approx(0.3)},
        ),
    ],
    ids=repr,
)
def test_settings_of_other_trainers_of_trl_name_the_same_loss(
    settings: dict[str, Any], name: str, changed: dict[str, Any]
) -> None:
    """That the losses themselves agree is `parity/test_trl_losses.py`."""
    assert mixture(**settings) == [(name, parameters(name, **changed), 1.0)]


def other_values(parameter: Parameter) -> list[Any]:
    """Two values that are not the default, or the one that there is."""
    tried: list[Any] = [0, 0.3, 0.7, 2, 3.5, True, False, *re.findall(r"\w+", parameter.domain)]
    return [v for v in tried if v != parameter.default and parameter.problem(v) is None][:2]


OTHER_VALUES = [
    (name, key, value)
    for name, row in OBJECTIVES.items()
    for key, parameter in row.parameters.items()
    for value in other_values(parameter)
]


@pytest.mark.parametrize(("name", "key", "value"), OTHER_VALUES, ids=lambda value: str(value))
def test_every_parameter_of_every_objective_reaches_it(name: str, key: str, value: Any) -> None:
    """From Python and from a recipe: no default of a setting under TRL's names stands in its way."""
    wanted = [(name, parameters(name, **{key: value}), 1.0)]
    assert mixture(objective=name, objective_parameters={key: value}) == wanted
    recipe = parse_recipe(
        f"model: {{name_or_path: lab:policy}}\ndata: {{path: lab}}\noutput_dir: out\n"
        f"objective: {{name: {name}, {key}: {json.dumps(value)}}}\ntrain: {{use_cpu: true, max_steps: 1}}\n",
        source="recipe.yaml",
    )
    assert build_arguments(recipe).mixture() == wanted


def test_every_parameter_has_another_value() -> None:
    tried = {(name, key) for name, key, _ in OTHER_VALUES}
    assert tried == {(name, key) for name, row in OBJECTIVES.items() for key in row.parameters}


def test_defaults_of_trls_settings_are_those_of_the_parameters_that_they_are() -> None:
    defaults = {field.name: field.default for field in fields(trl_names.LossSettings)}
    for setting, (parameter, owners, _) in trl_names.PARAMETERS.items():
        if defaults[setting] is not None:
            assert {OBJECTIVES[owner].parameters[parameter].default for owner in owners} == {
                defaults[setting]
            }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"beta": 0.2, "objective_parameters": {"beta": 0.1}},
            "beta=0.2 and objective_parameters={'beta': 0.1}",
        ),
        (
            {"objective": "simpo", "alpha": 0.3, "objective_parameters": {"alpha": 0.2}},
            "alpha=0.3 and objective_parameters={'alpha': 0.2}",
        ),
        (
            {"loss_type": "simpo", "simpo_gamma": 0.3, "objective_parameters": {"gamma": 0.2}},
            "simpo_gamma=0.3 and objective_parameters={'gamma': 0.2}",
        ),
        (
            {"objective": "dpo", "label_smoothing": 0.1, "objective_parameters": {"label_smoothing": 0.2}},
            "label_smoothing=0.1 and objective_parameters={'label_smoothing': 0.2}",
        ),
        (
            {
                "objective": "fdpo",
                "f_divergence_type": "forward_kl",
                "objective_parameters": {"divergence": "js"},
            },
            "f_divergence_type='forward_kl' and objective_parameters={'divergence': 'js'}",
        ),
        (
            {
                "objective": "fdpo",
                "f_divergence_type": "alpha_divergence",
                "f_alpha_divergence_coef": 0.7,
                "objective_parameters": {"alpha": 0.7},
            },
            "f_alpha_divergence_coef=0.7 and objective_parameters={'alpha': 0.7}",
        ),
    ],
    ids=repr,
)
def test_a_parameter_that_is_set_twice_is_refused_if_the_values_differ(
    settings: dict[str, Any], said: str
) -> None:
    assert f"{said}: give one of the two" in message(**settings)


def test_a_parameter_that_is_set_twice_to_one_value_is_taken() -> None:
    both = mixture(objective="simpo", beta=2.5, alpha=0.3, objective_parameters={"alpha": 0.3, "beta": 2.5})
    assert both == [("simpo", parameters("simpo", alpha=0.3, beta=2.5), 1.0)]


def test_a_divergence_and_its_parameter_may_stand_in_both_places_if_they_agree() -> None:
    given: dict[str, Any] = {"objective": "fdpo", "f_divergence_type": "alpha_divergence"}
    for more, alpha in (
        (
            {"objective_parameters": {"alpha": 0.3}},
            0.3,
        ),  # TRL's coefficient is at its default, which nobody gave
        (
            {"objective_parameters": {"divergence": "alpha", "alpha": 0.1}, "f_alpha_divergence_coef": 0.9},
            0.1,
        ),
        ({"f_alpha_divergence_coef": 0.9}, pytest.approx(0.1)),
    ):
        wanted = parameters("fdpo", divergence="alpha", alpha=alpha)
        assert mixture(**given, **more) == [("fdpo", wanted, 1.0)]


def test_a_setting_goes_to_the_objective_that_it_is_of_and_not_to_a_namesake() -> None:
    both = mixture(loss_type=["simpo", "interpolated"], alpha=0.3)
    assert both[0][1]["alpha"] == 0.3
    assert both[1][1]["alpha"] == OBJECTIVES["interpolated"].parameters["alpha"].default


def test_dpo_under_a_divergence_stands_beside_sft_as_in_trl() -> None:
    both = mixture(loss_type=["sigmoid", "sft"], f_divergence_type="js_divergence", loss_weights=[1.0, 0.5])
    assert [(name, weight) for name, _, weight in both] == [("fdpo", 1.0), ("sft", 0.5)]
    assert both[0][1]["divergence"] == "js"
    assert both[1] == ("sft", parameters("sft", token_mean=True), 0.5)


def test_the_sum_that_trl_makes_of_simpo_and_cpo_alpha_is_a_list_of_losses() -> None:
    both = mixture(loss_type=["simpo", "sft"], loss_weights=[1.0, 0.5], simpo_gamma=0.3)
    assert both == [
        ("simpo", parameters("simpo", gamma=0.3, beta=0.1), 1.0),
        ("sft", parameters("sft", token_mean=True), 0.5),
    ]


@pytest.mark.parametrize("loss_type", trl_names.LOSS_TYPES)
def test_every_loss_type_that_is_listed_is_taken_in_any_case(loss_type: str) -> None:
    assert mixture(loss_type=loss_type.upper())[0][0] == trl_names.LOSS_TYPES[loss_type]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_found_by_name_and_title_in_any_case(name: str) -> None:
    for spelling in (name.upper(), OBJECTIVES[name].title, name.replace("_", "-")):
        assert mixture(objective=spelling)[0][0] == name


@pytest.mark.parametrize(
    ("settings", "works"),
    [
        ({"desirable_weight": 1.0}, "objective='kto'"),
        ({"undesirable_weight": 1.0, "loss_type": "sigmoid"}, "objective='kto'"),
        ({"simpo_gamma": 0.5}, "loss_type='simpo'"),
        ({"cpo_alpha": 1.0}, "objective='cpo'"),
        ({"cpo_alpha": 1.0, "loss_type": "sigmoid"}, "objective='cpo'"),  # CPOConfig's default loss
        ({"cpo_alpha": 0.5, "loss_type": "simpo"}, "loss_type=['simpo', 'sft']"),
        ({"loss_type": "apo_zero_unpaired"}, "objective='apo_zero'"),
        ({"alpha": 0.25}, "loss_type='simpo'"),
        ({"discopop_tau": 0.1, "loss_type": "sigmoid"}, "loss_type='discopop'"),
        ({"loss_type": "kto_pair"}, "objective='kto'"),
        ({"use_weighting": True}, "the loss is InfoPO"),
        ({"use_weighting": True, "loss_type": "hinge"}, "loss_type='sigmoid'"),
        (
            {"use_weighting": True, "loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
            "under reverse KL",
        ),
        ({"f_divergence_type": "js_divergence"}, "loss_type='sigmoid'"),
        ({"f_divergence_type": "js_divergence", "loss_type": "hinge"}, "loss_type='sigmoid'"),
        ({"f_divergence_type": "js", "loss_type": "sigmoid"}, "js_divergence"),
        ({"f_divergence_type": "js_divergence", "loss_type": "sigmoid_norm"}, "'sigmoid_norm') has no divergence"),
        ({"f_divergence_type": "js_divergence", "loss_type": ["sigmoid", "ipo"]}, "not to sigmoid + ipo"),
        ({"f_divergence_type": "js_divergence", "loss_type": "sft"}, "belongs to DPO's loss, not to sft"),
        (
            {
                "f_divergence_type": "alpha_divergence",
                "f_alpha_divergence_coef": 2.0,
                "loss_type": "sigmoid",
            },
            "f_alpha_divergence_coef: expected a value in (0, 1), got 2.0",
        ),
        ({"loss_type": "sigmod"}, "did you mean 'sigmoid'?"),
        ({"objective": "KT0"}, "did you mean 'kto'?"),
        ({"objective": "infop"}, "objective: no objective 'infop' (did you mean 'infopo'?)"),
        ({"beta": -1.0}, "beta: expected a value > 0"),
        ({"max_length": 512, "max_prompt_length": 512}, "max_prompt_length: 512 leaves no room for a response"),
        ({"max_length": 1}, "max_length: expected a value >= 2, got 1"),
        ({"score_rule": "threshold"}, "score_threshold: goes with score_rule: threshold"),
        ({"score_rule": "best-worse"}, "did you mean 'best-worst'?"),
        ({"on_too_long": "keep"}, "on_too_long: expected one of cut, drop, got 'keep'"),
        ({"reference": "precomputed"}, "write ./precomputed for a folder of that name"),
        ({"dataset_num_proc": 0}, "dataset_num_proc: expected a value >= 1, got 0"),
        ({"pad_token": ""}, "pad_token: is empty; expected text"),
        ({"objective_parameters": {"gamma": 1.0}}, "objective_parameters.gamma: infopo has no such parameter"),
    ],
    ids=repr,
)  # fmt: skip
def test_what_names_no_loss_is_answered_with_the_line_that_works(
    settings: dict[str, Any], works: str
) -> None:
    assert works in message(**settings)


def test_the_loss_types_of_trls_trainers_are_all_mapped_or_told() -> None:
    """Read from the texts of TRL's own errors, so that a new version with a new loss fails here."""
    pytest.importorskip("trl")
    import trl
    from trl.experimental import cpo

    sources = [
        Path(trl.__file__).parent / "trainer" / "dpo_trainer.py",
        Path(cpo.__file__).parent / "cpo_trainer.py",
    ]
    named = {
        name
        for source in sources
        for names in re.findall(r"Unknown loss type: .*?\[(.*?)\]", source.read_text(), flags=re.DOTALL)
        for name in re.findall(r"'(\w+)'", names)
    }
    assert len(named) > 14
    assert named <= trl_names.LOSS_TYPES.keys() | trl_names.TOLD.keys()


@pytest.mark.parametrize("trainer", ["DPO", "KTO", "CPO", "ORPO"])
def test_every_setting_of_trls_trainers_is_known_and_their_defaults_are_taken(trainer: str) -> None:
    pytest.importorskip("trl")
    from dataclasses import MISSING, fields

    from trl import DPOConfig, KTOConfig
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    theirs = {"DPO": DPOConfig, "KTO": KTOConfig, "CPO": CPOConfig, "ORPO": ORPOConfig}[trainer]
    ours = {f.name for f in fields(InfoPOConfig)}
    assert {f.name for f in fields(theirs)} <= ours
    own = {f.name for f in fields(theirs)} - {f.name for f in fields(TrainingArguments)}
    spelled_out = {
        f.name: f.default for f in fields(theirs) if f.name in own and f.default is not MISSING
    } | {"loss_type": {"DPO": "sigmoid", "KTO": "kto", "CPO": "cpo", "ORPO": "orpo"}[trainer]}
    (loss,) = mixture(**spelled_out)
    assert loss[0] == {"DPO": "dpo"}.get(trainer, trainer.lower())


@pytest.mark.long
def test_trls_own_script_trains_with_its_documented_command_line(tmp_path: Path) -> None:
    """`trl/scripts/dpo.py` with two names changed, and the flags that its docstring shows."""
    trl = pytest.importorskip("trl")
    source = (Path(trl.__file__).parent / "scripts" / "dpo.py").read_text(encoding="utf-8")
    source = source.replace("DPOTrainer", "InfoPOTrainer").replace("DPOConfig", "InfoPOConfig")
    source = source.replace(
        "from trl import ", "from infopo import InfoPOConfig, InfoPOTrainer\nX from trl import "
    )
    source = re.sub(
        r"( *)from infopo import (.*)\nX from trl import (.*)",
        lambda m: (
            f"{m[1]}from infopo import {m[2]}\n{m[1]}from trl import "
            + ", ".join(n for n in m[3].split(", ") if not n.startswith("InfoPO"))
        ),
        source,
    )
    (tmp_path / "dpo.py").write_text(source, encoding="utf-8")
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": " 0"} for i in range(8)]
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    line = (
        f"--dataset_name data --model_name_or_path {policy_path()} --learning_rate 5.0e-6 --num_train_epochs 1 "
        "--per_device_train_batch_size 2 --max_steps 2 --gradient_accumulation_steps 2 --eval_strategy steps "
        "--eval_steps 1 --output_dir out --no_remove_unused_columns --use_peft --lora_r 4 --lora_alpha 16 --use_cpu"
    )
    done = subprocess.run(
        [sys.executable, "dpo.py", *line.split()],
        cwd=tmp_path,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "eval_rewards/accuracies" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_flag_that_trl_documents_is_parsed() -> None:
    parser = HfArgumentParser(InfoPOConfig)
    assert not parser.parse_args(["--no_remove_unused_columns"]).remove_unused_columns
    assert parser.parse_args(["--loss_type", "sigmoid", "sft"]).loss_type == ["sigmoid", "sft"]


def test_a_configuration_can_be_changed_extended_and_documented() -> None:
    @dataclass
    class Mine(InfoPOConfig):
        patience: int = 3

    config = Mine("unused", use_cpu=True, patience=4, reference=Path("models") / "sft")  # type: ignore[arg-type]
    config.max_length = 77  # recipes' settings are frozen, and these are not
    assert (config.patience, config.max_length, config.reference) == (4, 77, "models/sft")
    for name in ("max_length", "reference_store", "logps_path", "beta"):
        assert f"        {name}: " in (InfoPOConfig.__doc__ or "")


def test_everything_that_is_not_honoured_is_refused_at_once_and_by_name() -> None:
    other: dict[str, Any] = {
        "truncation_mode": "keep_end", "pad_to_multiple_of": 8, "train_sampling_strategy": "batch_rebalance",
        "average_tokens_across_devices": False, "include_for_metrics": ["inputs"], "label_names": ["labels"],
        "liger_kernel_config": {"rope": True}, "eval_accumulation_steps": 2, "padding_value": 0,
        "max_completion_length": 9, "ld_alpha": 0.5, "debug": "underflow_overflow",
        "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0, "parallelism_config": ParallelismConfig(),
    }  # fmt: skip
    settings = {name: other.get(name, True) for name in trl_names.NOT_HONOURED} | {"fp16_full_eval": False}
    with pytest.raises(UnsupportedArgumentError) as caught:
        InfoPOConfig(output_dir="unused", use_cpu=True, **settings)
    named = [p.split("=")[0] for p in caught.value.problems]
    assert named == [name for name in trl_names.NOT_HONOURED if name != "fp16_full_eval"]  # not with bf16's
    assert max(map(len, caught.value.problems)) < 400


def test_a_setting_left_alone_is_never_refused() -> None:
    assert trl_names.refused(InfoPOConfig(output_dir="unused", use_cpu=True)) == []


def test_the_page_lists_what_is_refused_and_every_other_trainer() -> None:
    page = (Path(__file__).parents[1] / "docs" / "from-trl.md").read_text(encoding="utf-8")
    assert re.findall(r"^- `(\w+)`$", page.split("## What is refused")[1], flags=re.MULTILINE) == list(
        trl_names.NOT_HONOURED
    )
    for name in (*trl_names.TOLD, *trl_names.PARAMETERS, "KTOTrainer", "CPOTrainer", "ORPOTrainer"):
        assert name in page, name
