"""`infopo train`: recipe -> run directory with an aligned model."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from infopo import ranks, resuming, run_state
from infopo.build import build_trainer, train_fields
from infopo.config import Recipe, load_recipe, to_yaml
from infopo.data.counts import DataCounts
from infopo.data.examples import ExampleDataset
from infopo.errors import RecipeError, SaveError
from infopo.preflight import preflight
from infopo.runs import RunDirectoryError, RunWriter, environment
from infopo.trainer import InfoPOTrainer


def train(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Trains as the recipe says and returns the run directory.

    The directory holds the model and tokenizer (`from_pretrained` loads them), `metrics.jsonl`, `recipe.yaml`
    (resolved), `environment.json`, `eval.json` where there is evaluation data, and checkpoints. While the run goes on
    it is locked against another.

    Raises:
        InfoPOError: Recipe, data, model or checkpoint are at fault.
        KeyboardInterrupt: On Ctrl-C; its message says how to go on.
    """
    preflight(recipe_path, overrides)
    recipe = load_recipe(recipe_path, overrides, train_fields())
    run_dir = Path(recipe.output_dir)
    is_main = ranks.is_first()
    was_there = run_dir.exists()
    try:
        with run_state.in_use(run_dir) if is_main else contextlib.nullcontext():
            _train(recipe)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(run_dir)) from None
    finally:
        if not was_there and is_main:  # a recipe that is refused leaves no folder behind
            with contextlib.suppress(OSError):
                run_dir.rmdir()
    return run_dir


def _train(recipe: Recipe) -> None:
    run_dir, resume = Path(recipe.output_dir), recipe.train.get("resume_from_checkpoint", False)
    trainer, accounts = build_trainer(recipe)
    is_main = trainer.is_world_process_zero()
    writer = RunWriter(run_dir)
    path = recipe.data.path
    trainer.dataset_names = [path] if isinstance(path, str) else list(path)
    trainer.base_name = recipe.model.name_or_path
    trainer.add_callback(MetricsFile(writer))
    if resume is True and run_state.last(run_dir) is None:
        if is_main:
            print(f"{run_dir}: no checkpoint yet, starting afresh")
        resume = False
    if resume:
        resume = trainer.find_checkpoint(resume)  # a refused one leaves the account of the run as it is
    if is_main:
        if not resume and (earlier := run_state.set_aside_metrics(run_dir)):
            print(
                f"{run_dir}: an earlier run saved no checkpoint and no model; its metrics are kept as {earlier.name}"
            )
        for account in accounts:
            if account.rows:  # a stream has given none yet
                print(*account.lines(), sep="\n")
        _write_account(writer, recipe, trainer, accounts, resume)
    run(trainer, resume)
    if is_main and recipe.data.streaming:
        print(*accounts[0].lines(), sep="\n")
        _write_account(writer, recipe, trainer, accounts, resume)
    trainer.save_final_model()
    if trainer.eval_dataset is not None:
        metrics = final_evaluation(trainer)
        if is_main:
            writer.write_evaluation(metrics)
    if is_main:
        print(f"{run_dir}: model, metrics.jsonl, recipe.yaml and environment.json written")
    trainer.accelerator.end_training()  # with threads of the process group left, a rank may abort at its exit


def _how_to_go_on(run_dir: Path) -> str:
    """What to do after Ctrl-C."""
    if (checkpoint := run_state.last(run_dir)) is None:
        return f"no checkpoint had been saved to {run_dir}; the same command starts afresh"
    return f"go on from {checkpoint} with train.resume_from_checkpoint=true"


def _write_account(
    writer: RunWriter, recipe: Recipe, trainer: InfoPOTrainer, accounts: list[DataCounts], resume: str | bool
) -> None:
    """What is run, and with what: of a resumed run beside that of its beginning."""
    done = run_state.step_of(Path(resume)) if isinstance(resume, str) else 0
    rows = len(trainer.train_dataset) if isinstance(trainer.train_dataset, ExampleDataset) else None
    train = {key: value for key, value in recipe.train.items() if key != "resume_from_checkpoint"}
    asked = resuming.steps_of(trainer.args, rows)
    if not done or asked is None or asked > done:  # else nothing is run any more
        writer.write_recipe(to_yaml(replace(recipe, train=train)), done)
        writer.write_environment(_environment(recipe, trainer, accounts), done)


def final_evaluation(trainer: InfoPOTrainer) -> dict[str, float]:
    """Metrics of the model as training left it; those of an evaluation after the last step, if there was one."""
    state = trainer.state
    record = next((r for r in reversed(state.log_history) if "eval_loss" in r), None)
    if record is None or record["step"] != state.global_step or trainer.args.load_best_model_at_end:
        return trainer.evaluate()
    return {key: value for key, value in record.items() if key != "step"}


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
            try:
                self.writer.append_metrics({"step": state.global_step, "time": round(time.time(), 3), **logs})
            except RunDirectoryError as error:
                raise SaveError(f"{error}. {run_state.kept(self.writer.directory)}") from error


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
