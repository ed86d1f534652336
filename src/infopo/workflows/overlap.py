"""What a run was trained on beside what it is evaluated on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from infopo.build import training_rows
from infopo.config import load_recipe
from infopo.data.counts import DataCounts
from infopo.errors import InfoPOError
from infopo.evaluation.items import Item
from infopo.evaluation.overlap import overlaps
from infopo.output import say
from infopo.runs import RECIPE, Record
from infopo.settings import DataSettings

_ITEMS_NAMED = 5


def overlap_of_run(model: str, tasks: Mapping[str, Sequence[Item]]) -> dict[str, Record]:
    """Finds the items of tasks in the training data of a run directory, and says what was found.

    Args:
        model: What is evaluated.
        tasks: Items by task.

    Returns:
        For each task what `eval.json` has under `overlap`; `{"unknown": why}` if the training data cannot be read.
        Nothing if the model is no run directory with a recipe.
    """
    recipe_file = Path(model) / RECIPE
    if not recipe_file.is_file():
        return {}
    try:
        data = load_recipe(recipe_file).data
        if data.streaming:
            return _unknown(tasks, "the training data are a stream")
        found = overlaps(tasks, training_rows(data, DataCounts(on_bad_row="skip")))
    except InfoPOError as error:
        return _unknown(tasks, str(error))
    for name, overlap in found.items():
        say(overlap.line(name))
    return {name: overlap.record for name, overlap in found.items()}


def say_overlap(data: DataSettings, tasks: Mapping[str, Sequence[Item]]) -> None:
    """Finds the items of tasks in the data of a recipe, and says what was found.

    Raises:
        DataError: The data cannot be read.
    """
    if not tasks:
        return
    found = overlaps(tasks, training_rows(data, DataCounts(on_bad_row="skip")))
    for name, overlap in found.items():
        say(overlap.line(name))
        if named := [*dict.fromkeys([*overlap.exact, *overlap.shared])][:_ITEMS_NAMED]:
            say(f"  e.g. {', '.join(named)}")


def _unknown(tasks: Mapping[str, Sequence[Item]], why: str) -> dict[str, Record]:
    say(f"overlap of the training data with {', '.join(tasks)} is not known: {why}")
    return {name: {"unknown": why} for name in tasks}
