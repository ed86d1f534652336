"""Loads the items of tasks, and marks answers to them."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from infopo.errors import ConfigError, DataError
from infopo.evaluation import sandbox
from infopo.evaluation.diversity import diversity
from infopo.evaluation.items import Answered, Item, Mark, Task, shown_text
from infopo.evaluation.results import Response, gold_text, summary
from infopo.evaluation.samples import Sample
from infopo.evaluation.settings import EvaluationSettings
from infopo.evaluation.tasks import task as task_named
from infopo.output import say
from infopo.runs import Record, to_json


@dataclass(frozen=True)
class Loaded:
    """A task with the items that are evaluated.

    Attributes:
        task: The task.
        items: Its items, up to the limit.
        source: The file or name that they come from.
        sha256: Hash of the items with what they are graded against, whatever file they came from.
    """

    task: Task
    items: Sequence[Item]
    source: str
    sha256: str


def loaded_tasks(settings: EvaluationSettings, names: Sequence[str] | None = None) -> list[Loaded]:
    """Returns tasks with their items.

    Args:
        settings: What is evaluated, and how.
        names: Names of the tasks, by default all of the settings.

    Raises:
        ConfigError: A task does not exist, or runs code that may not run, or not at the isolation that there is.
        DataError: Its data cannot be used.
    """
    tasks = [task_named(name) for name in (settings.tasks if names is None else names)]
    for task in tasks:
        if task.executes_code and not settings.allow_code_execution:
            raise ConfigError(
                f"--tasks {task.name}: marking runs code that a model wrote; add --allow-code-execution if it may run "
                "on this machine"
            )
    if any(task.executes_code for task in tasks):
        # Before anything is drawn, since a machine without walls cannot mark it.
        say(f"code runs in: {sandbox.allow(settings.isolation)}")
    return [_load(task, settings) for task in tasks]


def _load(task: Task, settings: EvaluationSettings) -> Loaded:
    source = settings.data.get(task.name)
    items = task.load(source)
    if not items:
        raise DataError(f"task {task.name} has no items", source or task.name, "no items")
    return loaded(task, items[: settings.limit], source or "default")


def loaded(task: Task, items: Sequence[Item], source: str) -> Loaded:
    """Returns a task with these items, which come from `source`."""
    digest = hashlib.sha256(to_json([vars(item) for item in items]).encode()).hexdigest()
    return Loaded(task, items, source, digest)


def marked(task: Task, answers: Sequence[tuple[Item, Sample]]) -> list[Response]:
    """Returns stored or given samples with the marks of every rule of a task, in their order."""
    given = [Answered(item, sample.text, sample.finished) for item, sample in answers]
    marks: dict[str, Sequence[Mark]] = {name: rule(given) for name, rule in task.rules.items()}
    return [
        Response(
            task.name,
            item.id,
            sample.sample,
            shown_text(sample.prompt),
            sample.text,
            sample.tokens,
            sample.finished,
            {name: found[place] for name, found in marks.items()},
            gold_text(item.gold),
        )
        for place, (item, sample) in enumerate(answers)
    ]


def task_record(
    each: Loaded,
    settings: EvaluationSettings,
    responses: Sequence[Response],
    logps: Sequence[float | None] | None = None,
) -> Record:
    """Returns what `eval.json` says of a task.

    Args:
        each: The task.
        settings: How it was evaluated.
        responses: All responses to it.
        logps: Σ log π of each response (nats), for the entropy.
    """
    by_item = Counter(response.item for response in responses)
    lengths = [response.tokens for response in responses if response.tokens is not None]
    return {
        "headline": each.task.headline,
        "items": len(by_item),
        # Files may have more responses to some items than to others.
        "samples": min(by_item.values(), default=0),
        "data": {"source": each.source, "sha256": each.sha256},
        "rules": {rule: summary(responses, rule) for rule in each.task.rules},
        "tokens_mean": sum(lengths) / len(lengths) if lengths else None,
        "finished_share": sum(response.finished for response in responses) / max(1, len(responses)),
        "diversity": diversity(responses, each.task.headline, logps=logps, seed=settings.seed) or None,
        **({"isolation": sandbox.allowed().as_record()} if each.task.executes_code else {}),
    }
