"""Tasks at each evaluation during training, so that the best checkpoint can be chosen by what the model can do."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from infopo import ranks
from infopo.errors import ConfigError, InfoPOError
from infopo.evaluation.asking import in_memory, wanted
from infopo.evaluation.marking import Loaded, loaded_tasks, marked, task_record
from infopo.evaluation.prompting import Prompts
from infopo.evaluation.results import DURING, Response, write_evaluation
from infopo.evaluation.settings import EvaluationSettings
from infopo.evaluation.subjects import LoadedModel
from infopo.output import get_logger
from infopo.provenance import environment
from infopo.runs import Record

logger = get_logger(__name__)

PREFIX = "eval_tasks/"


class TaskEvaluation(TrainerCallback):
    """Asks the policy the items of tasks at each evaluation, and adds `eval_tasks/NAME` to its metrics.

    The items and the seeds are the same each time. Ranks share the items. Marks and responses of step N are in
    `tasks/step-N` of the run directory, those of an evaluation after training in `tasks/final`.

    Args:
        settings: What is asked, and how.

    Raises:
        ConfigError: A task does not exist, or runs code that may not run.
        DataError: Data of a task cannot be used.

    Attributes:
        log: Takes the metrics of a step for the log. The trainer's, once it is there.

    Example:
        >>> callback = TaskEvaluation(EvaluationSettings(tasks=["lab"], limit=20))
        >>> callback.metric_names
        ('eval_tasks/lab', 'eval_tasks/lab/low', 'eval_tasks/lab/high')
    """

    def __init__(self, settings: EvaluationSettings) -> None:
        self.settings = settings
        self.log: Callable[[dict[str, float]], None] | None = None
        self._loaded = loaded_tasks(settings)
        self._found: tuple[int, dict[str, float]] | None = None
        self._is_over = False

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics that are added: the share that is right, and the ends of its 95 % interval."""
        return tuple(f"{PREFIX}{name}{end}" for name in self.settings.tasks for end in ("", "/low", "/high"))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Adds the figures to the metrics, from which transformers chooses the best checkpoint."""
        step = state.global_step
        if self._found is None or self._found[0] != step:  # several evaluation sets have one evaluation each
            self._found = (step, self._evaluated(model, processing_class, args, step))
            if self.log is not None:
                self.log(self._found[1])
        if metrics is not None:
            metrics.update(self._found[1])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets the last step's figures, because the best checkpoint may have been loaded since."""
        self._found, self._is_over = None, True

    def _evaluated(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments, step: int
    ) -> dict[str, float]:
        begin = time.perf_counter()
        subject = LoadedModel("policy", model, tokenizer, self.settings.batch_size, weights=f"step {step}")
        found: dict[str, Record] = {}
        responses: list[Response] = []
        for each in self._loaded:
            mine, about = self._of_task(subject, each, args)
            found[each.task.name] = task_record(each, self.settings, mine) | about
            responses += mine
        if args.process_index == 0:
            folder = "final" if self._is_over else f"step-{step}"
            self._write(Path(args.output_dir) / DURING / folder, found, responses, args)
        metrics: dict[str, float] = {}
        for name, record in found.items():
            rule = record["rules"][record["headline"]]
            low, high = rule["ci95"]
            metrics |= {
                f"{PREFIX}{name}": rule["accuracy"],
                f"{PREFIX}{name}/low": low,
                f"{PREFIX}{name}/high": high,
            }
        logger.info("step %d: tasks took %.0f s", step, time.perf_counter() - begin)
        return metrics

    def _of_task(
        self, subject: LoadedModel, each: Loaded, args: TrainingArguments
    ) -> tuple[list[Response], Record]:
        """Returns all ranks' responses to a task, and how it was asked."""
        settings = self.settings
        prompts = Prompts(subject.tokenizer, each.task, settings.prompting, settings.num_fewshot)
        law = settings.law(each.task, prompts.stop)
        needed = list(
            wanted(subject, prompts, each.items, law, num_samples=settings.num_samples, seed=settings.seed)
        )
        mine: list[tuple[int, Response]] | InfoPOError
        try:
            places = range(args.process_index, len(needed), max(1, args.world_size))
            share = [needed[place] for place in places]
            mine = list(
                zip(places, marked(each.task, in_memory(subject, prompts, each.task.name, share, law)))
            )
        except (
            InfoPOError
        ) as error:  # which is raised on all ranks, because the others would wait for this one
            mine = error
        parts = ranks.gathered(mine, args)
        for part in parts:
            if isinstance(part, InfoPOError):
                raise part
        whole = sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])  # type: ignore[union-attr]
        about = {"prompting": prompts.style, "num_fewshot": settings.num_fewshot, "law": law.record}
        return [response for _, response in whole], about

    def _write(
        self, folder: Path, found: Mapping[str, Record], responses: list[Response], args: TrainingArguments
    ) -> None:
        record = {
            "model": {"name": f"{args.output_dir} {folder.name}", "weights": None},
            "settings": asdict(self.settings),
            "environment": environment(seed=self.settings.seed),
            "tasks": found,
        }
        try:
            write_evaluation(folder, record, responses)
        except InfoPOError as error:  # training goes on without it
            logger.warning("the marks of this step are not written: %s", error)


def refuse_sharded(callbacks: Any, accelerator: Any) -> None:
    """Refuses tasks during the training of a model that no rank holds as a whole.

    Raises:
        ConfigError: There is such a callback, and the model is sharded.
    """
    if not ranks.has_all_weights(accelerator) and any(isinstance(each, TaskEvaluation) for each in callbacks):
        raise ConfigError(
            "evaluate.tasks: a model that is sharded over ranks cannot be asked while it trains; leave them out, and "
            "evaluate the checkpoints with `infopo evaluate`"
        )
