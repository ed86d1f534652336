"""`infopo train`: recipe -> run directory with an aligned model."""

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from infopo import checkpoints
from infopo.build import build_trainer, train_fields
from infopo.config import Recipe, load_recipe, to_yaml
from infopo.data.counts import DataCounts
from infopo.errors import RecipeError
from infopo.reference_store import check_folder, folder_of
from infopo.runs import METRICS, RunWriter, environment
from infopo.trainer import InfoPOTrainer


def train(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Trains as the recipe says and returns the run directory.

    The directory holds the model and tokenizer (`from_pretrained` loads them), `metrics.jsonl`, `recipe.yaml`
    (resolved), `environment.json`, `eval.json` where there is evaluation data, and checkpoints.

    Raises:
        InfoPOError: Recipe, data, model or checkpoint are at fault.
    """
    recipe = load_recipe(recipe_path, overrides, train_fields())
    run_dir = Path(recipe.output_dir)
    resume = recipe.train.get("resume_from_checkpoint", False)
    check_run_directory(recipe)
    check_store(recipe)
    if holds_run(run_dir) and not resume:
        raise RecipeError(
            f"output_dir: {run_dir} already holds a run. Continue it with train.resume_from_checkpoint=true, "
            "name another output_dir, or remove the folder"
        )
    was_there = run_dir.exists()
    try:
        trainer, accounts = build_trainer(recipe)
    except BaseException:
        if not was_there:  # transformers makes the folder early; a recipe that is refused leaves none behind
            with contextlib.suppress(OSError):
                run_dir.rmdir()
        raise
    writer = RunWriter(run_dir)
    trainer.add_callback(MetricsFile(writer))
    is_main = trainer.is_world_process_zero()
    if resume is True and checkpoints.last(str(run_dir)) is None:
        if is_main:
            print(f"{run_dir}: no checkpoint yet, starting afresh")
        resume = False
    if resume:
        trainer.find_checkpoint(
            resume
        )  # a refused one leaves the account of the run in the directory as it is
    if is_main:
        for account in accounts:
            if account.rows:  # a stream has given none yet
                print(*account.lines(), sep="\n")
        writer.write_recipe(to_yaml(recipe))
        writer.write_environment(_environment(recipe, trainer, accounts))
    run(trainer, resume)
    if is_main and recipe.data.streaming:
        print(*accounts[0].lines(), sep="\n")
        writer.write_environment(_environment(recipe, trainer, accounts))
    trainer.save_final_model()
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        if is_main:
            writer.write_evaluation(metrics)
    if is_main:
        print(f"{run_dir}: model, metrics.jsonl, recipe.yaml and environment.json written")
    trainer.accelerator.end_training()  # with threads of the process group left, a rank may abort at its exit
    return run_dir


def run(trainer: InfoPOTrainer, resume: str | bool = False) -> TrainOutput:
    """`trainer.train`.

    Raises:
        RecipeError: The metric that is to choose the best model is none of those that evaluation gives, or a library
            that a setting asks for is not installed.
    """
    try:
        return trainer.train(resume_from_checkpoint=resume or None)
    except ImportError as error:
        raise RecipeError(f"train: {error}") from error
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        raise RecipeError(f"train.metric_for_best_model: {error.args[0]}") from error


def check_run_directory(recipe: Recipe) -> None:
    """Judges the run directory and the checkpoint to resume from; makes and changes nothing.

    Raises:
        RecipeError: The directory cannot be made or written to.
        CheckpointError: There is no such checkpoint.
    """
    run_dir = Path(recipe.output_dir)
    resume = recipe.train.get("resume_from_checkpoint", False)
    try:
        there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    except OSError as error:
        raise RecipeError(f"output_dir: {run_dir} cannot be made: {error.strerror}") from error
    if not there.is_dir():
        raise RecipeError(f"output_dir: {run_dir} cannot be made: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError(f"output_dir: {run_dir} cannot be written to: no permission to write in {there}")
    if isinstance(resume, str):
        checkpoints.find(resume, recipe.output_dir)


def check_store(recipe: Recipe) -> None:
    """Judges the folder of the reference store, where the recipe names one; makes nothing.

    Raises:
        RecipeError: It cannot be made or written to.
    """
    folder = folder_of(recipe.reference.store)
    if folder and recipe.reference.store != "auto" and (problem := check_folder(folder)):
        raise RecipeError(f"reference.store: {problem}")


def holds_run(run_dir: Path) -> bool:
    """Whether there is a run, with which a second one would mix its metrics and checkpoints."""
    return (run_dir / METRICS).exists() or checkpoints.last(str(run_dir)) is not None


class MetricsFile(TrainerCallback):
    """Appends every log record to the run's `metrics.jsonl`; on resume, drops what was logged after the checkpoint."""

    def __init__(self, writer: RunWriter) -> None:
        self.writer = writer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.writer.truncate_metrics_after(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            self.writer.append_metrics({"step": state.global_step, "time": round(time.time(), 3), **logs})


def _environment(recipe: Recipe, trainer: InfoPOTrainer, accounts: list[DataCounts]) -> dict[str, Any]:
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return environment(
        seed=trainer.args.seed,
        accelerators=accelerators,
        extra={
            "model": {"name_or_path": recipe.model.name_or_path, "hash": trainer.policy_hash},
            "reference": {"source": recipe.reference.source, "hash": trainer.reference_hash},
            "data": {"path": recipe.data.path, "hash": trainer.data_hash()},
            "rows": [
                {
                    "source": a.source,
                    "rows": a.rows,
                    "used": a.used,
                    "skipped": dict(a.skipped),
                    "notes": dict(a.notes),
                }
                for a in accounts
            ],
            "processes": trainer.args.world_size,
        },
    )
