"""Files of responses, graded by a task."""

from collections.abc import Mapping
from pathlib import Path

from infopo.errors import ConfigError
from infopo.evaluation.contenders import Scored
from infopo.evaluation.given import given_responses
from infopo.evaluation.items import Answered, shown_text
from infopo.evaluation.results import gold_text
from infopo.evaluation.tasks import task as task_named


def graded(path: Path, name: str, rule: str | None, data: Mapping[str, str]) -> Scored:
    """Returns the scores of the responses in a file.

    Args:
        path: The file, as `given_responses` reads it.
        name: Name of the task.
        rule: Name of its rule, or None for the headline.
        data: Data of tasks by name, for those that are not to read their own.

    Raises:
        ConfigError: There is no such task or rule, or it would run code that a model wrote.
        DataError: A row has no response, or answers no item.
    """
    task = task_named(name)
    if task.executes_code:
        raise ConfigError(
            f"--tasks {name}: marking runs code that a model wrote; mark {path} by `infopo evaluate --responses` first"
        )
    chosen = rule or task.headline
    if chosen not in task.rules:
        raise ConfigError(f"--rule: {name} has no rule {chosen!r}; it has {', '.join(task.rules)}")
    given, _ = given_responses(path, name, task.load(data.get(name)))
    answered = [
        Answered(each.item, *response)
        for each in given
        for response in zip(each.responses, each.finished, strict=True)
    ]
    scores: dict[str, list[float]] = {}
    for one, mark in zip(answered, task.rules[chosen](answered), strict=True):
        scores.setdefault(one.item.id, []).append(float(mark.correct))
    prompts = {each.item.id: shown_text(each.item.prompt) for each in given}
    golds = {each.item.id: gold_text(each.item.gold) for each in given}
    return Scored(chosen, scores, prompts, {}, list(task.rules), golds)
