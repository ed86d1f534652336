"""`infopo check` does everything that `infopo train` does, up to and including one step, and writes nothing."""

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from transformers import PreTrainedTokenizerBase

from infopo.build import (
    build_arguments,
    build_examples,
    build_tokenizer,
    build_trainer_on,
    settings_named,
    train_fields,
)
from infopo.config import Recipe, load_recipe
from infopo.data.display import display
from infopo.data.examples import ExampleDataset
from infopo.data.facts import facts_of
from infopo.data.survey import report_lines
from infopo.evaluation.tasks import task
from infopo.evidence import Evidence, History
from infopo.judging import Judge
from infopo.models import check_fit
from infopo.output import say
from infopo.preflight import check_run_directory, preflight
from infopo.run_state import holds_run
from infopo.verdicts import judge, line_of
from infopo.workflows.forecast import band, forecast
from infopo.workflows.forecast import lines as forecast_lines
from infopo.workflows.overlap import say_overlap
from infopo.workflows.terminal import Terminal, has_color, hush, quiet_bars
from infopo.workflows.train import run

RENDERED_EXAMPLES = 3

ROWS_OF_A_STREAM = 1000
"""Number of rows that are checked if the recipe streams its data."""


@quiet_bars()
def check(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    tasks: Sequence[str] = (),
    task_data: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Validates a recipe, loads its model, tokenizes its data, does one step, and prints what it finds.

    Args:
        recipe_path: The recipe.
        overrides: See `parse_recipe`.
        tasks: Tasks of `infopo evaluate` whose problems are looked for in the training data.
        task_data: Their data by task, where they are not the task's own.

    Raises:
        InfoPOError: Anything that would stop `infopo train`.
    """
    preflight(recipe_path, overrides, makes_a_run=False)
    items = {name: task(name).load(task_data.get(name)) for name in tasks}
    recipe = load_recipe(recipe_path, overrides, train_fields())
    build_arguments(recipe)
    check_run_directory(recipe)
    say(f"recipe: {recipe_path} is valid")
    tokenizer = build_tokenizer(recipe)
    if recipe.data.streaming:
        limit = min(recipe.data.limit or ROWS_OF_A_STREAM, ROWS_OF_A_STREAM)
        recipe = replace(recipe, data=replace(recipe.data, limit=limit))
        say(f"the data are streamed: the first {limit} usable rows are looked at")
    train, evaluation = _look_at_data(recipe, tokenizer)
    _say_verdicts(train)
    say_overlap(recipe.data, items)
    few, few_to_evaluate = _first_step(recipe, train), evaluation and _first_step(recipe, evaluation)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer_on(_one_step(recipe, folder), tokenizer, few, few_to_evaluate)
        say(*trainer.description())
        hush(trainer)
        # A few rows say nothing of the data, and one step nothing of training.
        trainer.remove_callback(Judge)
        for dataset in (train, evaluation):
            if dataset is not None:
                # The trainer has checked its first rows only.
                check_fit(trainer.model, dataset.longest_row, dataset.largest_token_id)
        if trainer.args.probe_size:
            say(*forecast_lines(forecast(trainer, train)))
            if sentence := band(trainer, train):
                say(sentence)
        start = time.perf_counter()
        result = run(trainer)
        seconds = time.perf_counter() - start
    say(f"one step: loss {result.training_loss:.4f}, {seconds:.1f} s")
    if holds_run(Path(recipe.output_dir)) and not recipe.train.get("resume_from_checkpoint"):
        say(f"note: {recipe.output_dir} already holds a run; `infopo train` will ask for another output_dir")
    say("check passed")


def _look_at_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[ExampleDataset, ExampleDataset | None]:
    """Prints what the rows are and what became of them, and returns those to train and to evaluate on."""
    with settings_named(recipe):
        train, counts = build_examples(recipe.data, tokenizer)
    say(*counts.lines())
    say(*report_lines(train, tokenizer, recipe.train.get("per_device_train_batch_size", 8)))
    evaluation = None
    if recipe.data.has_eval:
        with settings_named(recipe):
            evaluation, eval_counts = build_examples(recipe.data, tokenizer, evaluation=True)
        say(*eval_counts.lines())
    color = has_color(sys.stdout)
    masked = "dim" if color else "in ⟪brackets⟫ within a response"
    say(f"the first examples; the prompt and what is masked ({masked}) are read and not scored")
    for index in range(min(RENDERED_EXAMPLES, len(train))):
        print(display(train[index], tokenizer, color=color))
    return train, evaluation


def _say_verdicts(dataset: ExampleDataset) -> None:
    """Prints what is wrong with the training data."""
    verdicts = judge(Evidence(History(), facts_of(dataset)))
    terminal = Terminal(bar=False)
    for verdict in verdicts:
        if verdict.fired:
            terminal.verdict(line_of(verdict))
    if not any(verdict.fired for verdict in verdicts):
        say("data: no verdict (lengths of the sides, near-duplicate sides, conflicting rows)")


def _one_step(recipe: Recipe, folder: str) -> Recipe:
    train = {
        k: v
        for k, v in recipe.without_resume().train.items()
        if not k.startswith(("eval_", "save_", "load_best", "push_to"))
    }
    if recipe.train.get("max_steps", -1) != 1:
        train["warmup_steps"] = 0  # of the recipe's many steps, this is one whose rate is not 0
    train |= {"max_steps": 1, "save_strategy": "no", "report_to": "none", "logging_steps": 1}
    if recipe.data.has_eval:
        train |= {"eval_strategy": "steps", "eval_steps": 1}
    reference = replace(recipe.reference, store="off")
    return replace(recipe, train=train, reference=reference, output_dir=folder)


def _first_step(recipe: Recipe, dataset: ExampleDataset) -> ExampleDataset:
    """Returns the examples of one optimizer step of one process, which is all that the reference pass needs here."""
    size = recipe.train.get("per_device_train_batch_size", 8) * recipe.train.get(
        "gradient_accumulation_steps", 1
    )
    return ExampleDataset.from_examples(dataset[i] for i in range(min(size, len(dataset))))
