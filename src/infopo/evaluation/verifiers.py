"""What marks the samples that pairs are made of: a task's rule, a function of the user's, or a reward model.

Imports no torch but for reward models.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from infopo.errors import ConfigError
from infopo.evaluation import sandbox
from infopo.evaluation.items import Answered, Item, Task
from infopo.evaluation.lab_task import lab_item
from infopo.evaluation.questions import prompt_of
from infopo.evaluation.spooled import SpooledItems
from infopo.evaluation.task_rows import task_rows
from infopo.evaluation.tasks import TASKS
from infopo.evaluation.tasks import task as task_named
from infopo.lab.problems import make_problems
from infopo.losses.foreign import load_module
from infopo.output import say

Score: TypeAlias = bool | float | None
"""Right or wrong, or any number, or none."""

_LAB_PROBLEMS = 1000

_LAB = re.compile(r"lab(?::(\d+))?")
"""Prompts of the lab, with the seed of its problems."""

_MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class Verifier:
    """Marks samples.

    Attributes:
        name: As the user gave it.
        task: How prompts are asked: worked examples, plain form, largest number of new tokens.
        load: Returns the prompts of a file, as items that samples are marked against.
        score: Returns for each response whether it is right, or its score, or None where there is none.
    """

    name: str
    task: Task
    load: Callable[[str | None], Sequence[Item]]
    score: Callable[[Sequence[Answered]], Sequence[Score]]


def verifier_named(
    name: str, *, limit: int | None = None, allow_code_execution: bool = False, isolation: str = "uid"
) -> Verifier:
    """Returns the verifier of that name.

    Args:
        name: A task (`gsm8k`, `lab`, ...), `module:function`, or `reward:MODEL`. `judge:URL` is none of them, since
            a judge has settings (`infopo.workflows.pairs.marker_of`).
        limit: Number of prompts of the lab, which makes as many as are wanted.
        allow_code_execution: Whether code that the model wrote may run.
        isolation: The weakest level of isolation that it may run at (see `infopo.evaluation.sandbox`).

    Raises:
        ConfigError: There is none, or it runs code and that is not allowed, or not at the isolation that there is.

    Example:
        >>> verifier = verifier_named("lab")
        >>> verifier.score([Answered(item, "Answer: 1") for item in verifier.load("lab")[:2]])
        [False, False]
    """
    if name in TASKS:
        return _of_task(name, limit, isolation if allow_code_execution else None)
    kind, colon, rest = name.partition(":")
    if kind == "judge" and rest:
        raise ConfigError(
            f"--verifier {name}: says who judges and not how; expected a JudgeSettings beside it: "
            f"infopo.workflows.pairs.pairs(..., judge=JudgeSettings({rest!r}))"
        )
    if kind == "reward" and rest:
        return _of_reward(name, rest)
    if colon and rest.isidentifier():
        return _of_function(name)
    raise ConfigError(
        f"--verifier: expected a task ({', '.join(TASKS)}), my_module:my_function, reward:MODEL or "
        f"judge:URL, got {name!r}"
    )


def of_rows(name: str, score: Callable[[Sequence[Answered]], Sequence[Score]]) -> Verifier:
    """Returns a verifier whose prompts are rows of any file, which has them in a column of a usual name."""
    return Verifier(name, Task("pairs", _load_rows, {}, _MAX_NEW_TOKENS), _load_rows, score)


def _of_task(name: str, limit: int | None, isolation: str | None) -> Verifier:
    task = task_named(name)
    if task.executes_code:
        if isolation is None:
            raise ConfigError(
                f"--verifier {name}: marking runs code that a model wrote; add --allow-code-execution if it may run on "
                "this machine"
            )
        say(f"code runs in: {sandbox.allow(isolation)}")
    rule = task.rules[task.headline]

    def load(prompts: str | None) -> Sequence[Item]:
        # The task's own problems are held out for evaluation.
        if name == "lab" and (found := _LAB.fullmatch(prompts or "lab")):
            problems = make_problems(limit or _LAB_PROBLEMS, int(found[1] or 0), "preference")
            return [lab_item(problem, number) for number, problem in enumerate(problems)]
        if prompts is None:
            raise ConfigError(f"--prompts: expected a file with problems to train on for the verifier {name}")
        return task.load(prompts)

    def score(answers: Sequence[Answered]) -> list[Score]:
        return [mark.correct for mark in rule(answers)]

    return Verifier(name, task, load, score)


def _of_function(name: str) -> Verifier:
    module, _, function_name = name.partition(":")
    function = getattr(load_module(module, name), function_name, None)
    if not callable(function):
        raise ConfigError(f"--verifier {name}: there is no such function; expected MODULE:FUNCTION")

    def score(answers: Sequence[Answered]) -> list[Score]:
        return _called(function, name, answers)

    return of_rows(name, score)


def _called(function: Callable[..., Any], name: str, answers: Sequence[Answered]) -> list[Score]:
    """Calls a reward function as TRL does: with lists of prompts, completions and the other columns of the rows."""
    completions: list[Any] = [
        [{"role": "assistant", "content": each.response}]
        if isinstance(each.item.prompt, list)
        else each.response
        for each in answers
    ]
    columns = {key for each in answers for key in each.item.gold} - {"prompts", "completions"}
    others = {key: [each.item.gold.get(key) for each in answers] for key in sorted(columns)}
    try:
        scores = function(prompts=[each.item.prompt for each in answers], completions=completions, **others)
    except Exception as error:  # it is the user's
        raise ConfigError(f"--verifier {name}: raised {type(error).__name__}: {error}") from error
    expected = f"--verifier {name}: expected a list of {len(answers)} numbers, one for each completion"
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise ConfigError(f"{expected}, got {type(scores).__name__}")
    if len(scores) != len(answers):
        raise ConfigError(f"{expected}, got {len(scores)}")
    return [
        _number(score, f"{expected}; of {each.item.id} got")
        for score, each in zip(scores, answers, strict=True)
    ]


def _number(score: Any, problem: str) -> Score:
    if score is None or isinstance(score, bool):
        return score
    try:
        value = float(score) if not isinstance(score, str) else math.nan
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{problem} {score!r:.80}")
    return value


def _load_rows(prompts: str | None) -> SpooledItems:
    """Returns the rows of a file as items, whose gold is the whole row. They are not in memory."""
    if prompts is None:
        raise ConfigError("--prompts: expected a file")
    rows = task_rows("pairs", prompts, ("", None, "train"))
    return SpooledItems(
        Item(f"row/{number}", prompt_of(row, row_id), dict(row)) for number, (row_id, row) in enumerate(rows)
    )


def _of_reward(name: str, model: str) -> Verifier:
    from infopo.evaluation.reward import RewardModel

    return of_rows(name, RewardModel(model).scores)
