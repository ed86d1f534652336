"""Converts published data that are no preference rows yet into rows of a shape that the readers know (`docs/data.md`).

Both functions account for their items: each is either used, or left out and counted by reason.
"""

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infopo.data.columns import label_of, list_of, text_of, value_of
from infopo.data.door import check_object
from infopo.data.files import file_rows
from infopo.errors import ConfigError, DataError

MBPP_TEST_TASKS = range(11, 511)
"""Task ids of MBPP's test split. A model that is trained on some of them is evaluated on others only."""


@dataclass
class Converted:
    """Rows of one shape, and an account of the items that they were made from.

    Attributes:
        shape: Name of the rows' shape.
        rows: The rows.
        items: Number of items in the source.
        used: Number of items that the rows contain.
        left_out: Number of items that they do not contain, by reason.
    """

    shape: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    items: int = 0
    used: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """Returns the account as lines of text."""
        lines = [f"{self.items} items, {self.used} used in {len(self.rows)} rows of shape {self.shape}"]
        return [*lines, *(f"  left out {n}: {why}" for why, n in self.left_out.most_common() if n)]


def mbpp_rows(
    files: Iterable[str | Path], form: str = "lists", tasks: Container[int] = MBPP_TEST_TASKS
) -> Converted:
    """Collects right and wrong solutions of each task, from rows of {task_id: "MBPP/11", prompt, solution, is_solved}.

    A solution that several models gave is used once. One that is labelled both right and wrong is left out.

    Args:
        files: Files of solutions.
        form: `lists` gives one row per task, in which one side may be empty. `pairs` gives one row for each right
            solution with each wrong one of the same task, and leaves out tasks without both.
        tasks: Task ids to use (see `MBPP_TEST_TASKS`).

    Raises:
        ConfigError: `form` is neither.
        DataError: A file or an item cannot be used.
    """
    if form not in ("lists", "pairs"):
        raise ConfigError(f"form: expected lists or pairs, got {form!r}")
    result = Converted("lists" if form == "lists" else "conversational")
    prompts, labels = dict[int, str](), dict[int, dict[str, set[bool]]]()
    times = Counter[tuple[int, str]]()
    for file in files:
        for number, raw in file_rows(Path(file), str(file)):
            task, prompt, solution, is_solved = _solution(raw, f"{file}:{number}")
            result.items += 1
            if task not in tasks:
                result.left_out["another task"] += 1
                continue
            prompts[task] = prompt
            labels.setdefault(task, {}).setdefault(solution, set()).add(is_solved)
            times[task, solution] += 1
    for task in sorted(labels):
        _add_task(result, form, prompts[task], labels[task], {s: times[task, s] for s in labels[task]})
    return result


def _solution(raw: object, row_id: str) -> tuple[int, str, str, bool]:
    if isinstance(raw, DataError):
        raise raw
    row = check_object(raw, row_id)
    task = text_of(row, "task_id", row_id).removeprefix("MBPP/")
    if not task.isdecimal():
        raise DataError(f"column 'task_id': expected MBPP/<number>, got {task!r}", row_id, "wrong type")
    solution = text_of(row, "solution", row_id).strip("\n")
    return int(task), text_of(row, "prompt", row_id), solution, label_of(row, "is_solved", row_id)


def _add_task(
    result: Converted, form: str, prompt: str, labels: Mapping[str, set[bool]], times: Mapping[str, int]
) -> None:
    clear = {solution: seen for solution, seen in labels.items() if len(seen) == 1 and solution.strip()}
    result.left_out["labelled both ways, or empty"] += sum(times[s] for s in labels if s not in clear)
    result.left_out["repeated"] += sum(times[s] - 1 for s in clear)
    right = [_code(solution) for solution, seen in clear.items() if seen == {True}]
    wrong = [_code(solution) for solution, seen in clear.items() if seen == {False}]
    question = [
        {"role": "user", "content": f"Complete this Python function.\n\n```python\n{prompt.rstrip()}\n```"}
    ]
    if form == "lists" and (right or wrong):
        result.rows.append({"prompt": question, "chosen": right, "rejected": wrong})
    elif right and wrong:
        result.rows += [
            {"prompt": question, "chosen": good, "rejected": bad} for good in right for bad in wrong
        ]
    else:
        result.left_out["none of the other side in its task"] += len(clear)
        return
    result.used += len(clear)


def _code(solution: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": f"```python\n{solution}\n```"}]


def squality_rows(
    file: str | Path,
    prompts: Mapping[tuple[str, str], str] | None = None,
    rating: str = "overall-rating",
) -> Converted:
    """Collects summaries with the mean of their reviewers' ratings, as one `scored` row per question of a story.

    The published ratings contain neither story nor question. Without `prompts`, a row's prompt is only a name for them,
    which shows how the data are used but teaches no summarising.

    Args:
        file: SQuALITY's human evaluation, with one story per line.
        prompts: Story and question of each prompt, by (passage id, question number).
        rating: `overall-rating`, `correctness-rating` or `selection-rating`.

    Raises:
        DataError: The file or one of its stories cannot be used.
    """
    result = Converted("scored")
    for number, raw in file_rows(Path(file), str(file)):
        row_id = f"{file}:{number}"
        if isinstance(raw, DataError):
            raise raw
        story = check_object(raw, row_id)
        passage = text_of(story, "passage-id", row_id)
        questions = check_object(value_of(story, "questions", row_id), row_id)
        for question, systems in questions.items():
            question_id = f"{row_id}, question {question}"
            prompt = f"Summarize story {passage} for question {question}.\n\n"
            if prompts is not None:
                prompt = text_of({"prompt": prompts.get((passage, question))}, "prompt", question_id)
            by_system = check_object(systems, question_id)
            summaries = [check_object(summary, question_id) for summary in by_system.values()]
            result.items += len(summaries)
            result.used += len(summaries)
            result.rows.append(
                {
                    "prompt": prompt,
                    "responses": [text_of(summary, "response", question_id) for summary in summaries],
                    "scores": [_mean_rating(summary, rating, question_id) for summary in summaries],
                }
            )
    return result


def _mean_rating(summary: Mapping[str, Any], rating: str, row_id: str) -> float:
    reviews = list_of(summary, "reviews", row_id, "reviews")
    ratings = [value_of(check_object(review, row_id), rating, row_id) for review in reviews]
    if not ratings or not all(isinstance(r, int | float) for r in ratings):
        raise DataError(f"{rating}: expected a number of each reviewer, got {ratings}", row_id, "wrong type")
    return float(sum(ratings) / len(ratings))
