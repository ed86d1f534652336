"""A setting that stands in the wrong place of a recipe is answered with the right one."""

import re

import pytest

from infopo import catalog, config, settings
from infopo.build import train_fields
from infopo.errors import RecipeError
from infopo.places import SYNONYMS

MINIMAL = "model: {name_or_path: sft}\ndata:\n  path: pairs.jsonl\noutput_dir: run\n"
OWN = {"path", "name_or_path", "store", "source", "sides", "r", "adapter"}


def answer(override: str) -> str:
    with pytest.raises(RecipeError) as caught:
        config.parse_recipe(MINIMAL, source="r.yaml", overrides=[override], train_fields=train_fields())
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("beta", "objective.beta"),
        ("loss_type", "objective.name"),
        ("max_prompt_length", "data.max_prompt_length"),
        ("group_by_length", "train_sampling_strategy"),
        ("lora_dropout", "model.adapter.lora_dropout"),
        ("per_device_batch_size", "per_device_train_batch_size"),
        ("desirable_weight", "objective.desirable_weight"),
        ("reference_sides", "reference.sides"),
        ("dtype", "model.dtype"),
        ("output_dir", "output_dir at the top level"),
    ],
)
def test_beneath_train(key: str, place: str) -> None:
    assert place in answer(f"train.{key}=1")


@pytest.mark.parametrize("section", ["", "data.", "reference.", "model."])
def test_a_trainers_argument_elsewhere_is_sent_to_train(section: str) -> None:
    assert "train.learning_rate" in answer(f"{section}learning_rate=1e-5")


def test_every_synonym_leads_to_a_place_that_there_is() -> None:
    names = {f"train.{name}" for name in train_fields()} | {
        "reference",
        "objective",
        "model",
        "model.adapter",
    }
    sections = {
        "model": settings.ModelSettings, "model.adapter": settings.AdapterSettings, "data": settings.DataSettings,
        "reference": settings.ReferenceSettings, "objective": settings.ObjectiveSettings,
    }  # fmt: skip
    names |= {
        f"{name}.{field}" for name, section in sections.items() for field in section.__dataclass_fields__
    }
    names |= {f"objective.{key}" for row in config.OBJECTIVES.values() for key in row.parameters}
    for key, place in SYNONYMS.items():
        assert re.split(r"[:, ]", place)[0] in names, (key, place)
    assert catalog.REFERENCE_SIDES
