"""`infopo reference RECIPE.yaml` computes the reference log-probs that a recipe's runs will need, and stores them."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from infopo.build import build_trainer, train_fields
from infopo.config import Recipe, load_recipe
from infopo.errors import ConfigError
from infopo.output import say
from infopo.preflight import preflight
from infopo.reference_store import ReferenceStore
from infopo.workflows.terminal import quiet_bars


@quiet_bars()
def reference(recipe_path: str | Path, overrides: Sequence[str] = ()) -> ReferenceStore:
    """Stores log π_ref of the recipe's training and evaluation data, where a run of the recipe then finds it.

    It builds the trainer that `infopo train` builds, so that model, precision and code path are the same. Nothing is
    trained, and no run directory is made. Under `torchrun` the ranks share the work.

    Raises:
        InfoPOError: Something would stop `infopo train`, or the recipe's reference is not one that is stored.
    """
    preflight(recipe_path, overrides, makes_a_run=False)
    recipe = load_recipe(recipe_path, overrides, train_fields())
    _refuse_what_is_not_stored(recipe)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(_without_run(recipe, folder))
    if trainer.is_world_process_zero():
        say(*trainer.description())
        for account in trainer.data_counts.values():
            say(*account.lines())
    store = trainer.reference_store
    # With threads of the process group left, a rank may abort at its exit.
    trainer.accelerator.end_training()
    if store is None:
        names = " + ".join(term.name for term in recipe.objective)
        raise ConfigError(
            f"objective: {names} needs no reference, so there is nothing to store; "
            "reference.sides=both computes it for metrics"
            if not trainer.reference_sides
            else "reference.store: the user's cache cannot be written to; name a folder"
        )
    return store


def _refuse_what_is_not_stored(recipe: Recipe) -> None:
    problems = []
    if recipe.reference.source in ("live", "adapter-off"):
        problems.append(
            f"reference.source: {recipe.reference.source} computes the reference in every step, so there is nothing to "
            "store; use auto, precompute or the path of a model"
        )
    if recipe.reference.store in (None, "off"):
        problems.append("reference.store: is off; name a folder, or leave it out for the user's cache")
    if problems:
        raise ConfigError(problems)


def _without_run(recipe: Recipe, folder: str) -> Recipe:
    train = {k: v for k, v in recipe.train.items() if not k.startswith(("push_to", "resume_"))}
    return replace(recipe, train=train | {"report_to": "none"}, output_dir=folder)
