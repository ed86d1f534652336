"""`infopo train` trains as a recipe says, and leaves a run directory with an aligned model."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer_utils import TrainOutput

from infopo import ranks, run_state
from infopo.build import build_trainer, train_fields
from infopo.config import Recipe, load_recipe, to_yaml
from infopo.ending import ClosingSummary
from infopo.errors import ConfigError
from infopo.model_card import refresh
from infopo.output import say
from infopo.preflight import preflight
from infopo.report.closing import ending
from infopo.run_files import RunFiles
from infopo.runs import RunWriter
from infopo.trainer import InfoPOTrainer
from infopo.workflows.terminal import attach, logging_above, quiet_bars


def train(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Trains as the recipe says, and returns the run directory.

    The directory contains model and tokenizer (for `from_pretrained`), `metrics.jsonl`, `recipe.yaml` (resolved),
    `environment.json`, `verdicts.json`, `data.json`, `eval.json` if there is evaluation data, and checkpoints. It is
    locked against other runs while this one lasts.

    Raises:
        InfoPOError: Recipe, data, model or checkpoint are at fault.
        KeyboardInterrupt: The user pressed Ctrl-C. The message says how to continue.
    """
    preflight(recipe_path, overrides)
    return train_recipe(load_recipe(recipe_path, overrides, train_fields()))


@quiet_bars()
def train_recipe(recipe: Recipe) -> Path:
    """Trains as a recipe says that was read and judged (see `train`)."""
    run_dir = Path(recipe.output_dir)
    is_main = ranks.is_first()
    was_there = run_dir.exists()
    try:
        with run_state.in_use(run_dir) if is_main else contextlib.nullcontext():
            _train(recipe)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(run_dir)) from None
    finally:
        # A recipe that is refused leaves no folder behind.
        if not was_there and is_main:
            with contextlib.suppress(OSError):
                run_dir.rmdir()
    return run_dir


def _train(recipe: Recipe) -> None:
    run_dir, resume = Path(recipe.output_dir), recipe.train.get("resume_from_checkpoint", False)
    trainer = build_trainer(recipe)
    is_main = trainer.is_world_process_zero()
    if is_main:
        say(*trainer.description())
    writer = RunWriter(run_dir)
    if resume is True and run_state.last(run_dir) is None:
        if is_main:
            say(f"{run_dir}: no checkpoint yet, starting afresh")
        resume = False
    if resume:
        # This comes before anything is written, so that a refused checkpoint leaves the run's records unchanged.
        resume = trainer.find_checkpoint(resume)
    if is_main:
        if not resume and (earlier := run_state.set_aside_metrics(run_dir)):
            say(
                f"{run_dir}: an earlier run saved no checkpoint and no model; its metrics are kept as {earlier.name}"
            )
        for account in trainer.data_counts.values():
            # A stream has read no row yet.
            if account.rows:
                say(*account.lines())
    write_recipe(trainer, recipe)
    with logging_above(attach(trainer)):
        run(trainer, resume)
    if is_main and recipe.data.streaming:
        say(*trainer.data_counts["train"].lines())
    trainer.save_final_model()
    if trainer.eval_dataset is not None:
        metrics = final_evaluation(trainer)
        if is_main:
            writer.write_evaluation(metrics)
    if is_main:
        refresh(run_dir)
        say(*ending(run_dir, recipe.model.name_or_path))
    # With threads of the process group left, a rank may abort at its exit.
    trainer.accelerator.end_training()


def _how_to_go_on(run_dir: Path) -> str:
    """Returns what to do after Ctrl-C."""
    if (checkpoint := run_state.last(run_dir)) is None:
        return f"no checkpoint had been saved to {run_dir}; the same command starts afresh"
    return f"go on from {checkpoint} with train.resume_from_checkpoint=true"


def write_recipe(trainer: InfoPOTrainer, recipe: Recipe) -> None:
    """Has a trainer write the recipe when training begins. That of a resumed run is written beside that of its start.

    Without its files, a run of a recipe ends.
    """
    files = next(each for each in trainer.callback_handler.callbacks if isinstance(each, RunFiles))
    files.recipe = to_yaml(recipe.without_resume())


def final_evaluation(trainer: InfoPOTrainer) -> dict[str, float]:
    """Returns the metrics of the trained model, from an evaluation after the last step if there was one."""
    state = trainer.state
    record = next((r for r in reversed(state.log_history) if "eval_loss" in r), None)
    if record is None or record["step"] != state.global_step or trainer.args.load_best_model_at_end:
        return trainer.evaluate()
    # Tasks have a record of their own.
    records = [r for r in state.log_history if r["step"] == state.global_step and "loss" not in r]
    return {
        key: value for r in records for key, value in r.items() if key == "epoch" or key.startswith("eval_")
    }


def run(trainer: InfoPOTrainer, resume: str | bool = False) -> TrainOutput:
    """Prints what starts, calls `trainer.train`, and turns errors that mean a wrong recipe into `ConfigError`.

    Raises:
        ConfigError: Evaluation has no metric of the name that chooses the best model, or a library that a setting needs
            is not installed.
    """
    # What the trainer would log is printed: the start here, and the end once the model is saved.
    trainer.remove_callback(ClosingSummary)
    trainer.remove_callback(ranks.StartLine)
    trainer.add_callback(ranks.StartLine(say))
    try:
        return trainer.train(resume_from_checkpoint=resume or None)
    except ImportError as error:
        raise ConfigError(f"train: {error}") from error
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        raise ConfigError(f"train.metric_for_best_model: {error.args[0]}") from error
