r"""Tasks of mathematical reasoning: GSM8K, SVAMP and MATH. Imports no torch.

Each reads the layouts in which its data is published: `question` and `answer` (the number behind `####`); `Body`,
`Question` and `Answer`; `problem` with `answer`, or with `solution`, whose last `\boxed{...}` is the answer.
"""

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from infopo.errors import DataError
from infopo.evaluation.answers import NUMBER_RULES, last_box
from infopo.evaluation.items import Item, Rule, Task
from infopo.evaluation.math_answers import (
    boxed_marks,
    has_math_verify,
    lm_eval_hendrycks_marks,
    math_verify_marks,
)
from infopo.evaluation.numbers import numbers, plain
from infopo.evaluation.task_rows import Row, task_rows
from infopo.evaluation.worked import MATHEMATICS, WORD_PROBLEMS
from infopo.output import get_logger

logger = get_logger(__name__)

_NEXT_PROBLEM = ("Question:", "\nQ:")


def gsm8k_task() -> Task:
    """Returns the task `gsm8k`: grade-school word problems, of which 1319 are for tests.

    References:
        Cobbe et al., 2021, "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168.
    """
    load = _loader("gsm8k", ("openai/gsm8k", "main", "test"), _number_in)
    return Task("gsm8k", load, _number_rules("gsm8k"), 512, WORD_PROBLEMS, _NEXT_PROBLEM)


def svamp_task() -> Task:
    """Returns the task `svamp`: easier word problems, varied so that shallow cues mislead. The original file has 1000.

    References:
        Patel et al., 2021, "Are NLP Models really able to Solve Simple Math Word Problems?", arXiv 2103.07191.
    """
    load = _loader("svamp", ("ChilleD/SVAMP", None, "test"), _number_in)
    return Task("svamp", load, _number_rules("svamp"), 512, WORD_PROBLEMS, _NEXT_PROBLEM)


def math_task() -> Task:
    """Returns the task `math`: competition problems whose answers are expressions. By default, the 500 of MATH-500.

    References:
        Hendrycks et al., 2021, "Measuring Mathematical Problem Solving With the MATH Dataset", arXiv 2103.03874.
    """
    load = _loader("math", ("HuggingFaceH4/MATH-500", None, "test"), _expression_in)
    rules: dict[str, Rule] = {
        "math_verify": math_verify_marks,
        "boxed": boxed_marks,
        "lm_eval_hendrycks": lm_eval_hendrycks_marks,
    }
    return Task("math", load, rules, 1024, MATHEMATICS, ("Problem:",), "Problem: {prompt}\nSolution:")


def _number_rules(task: str) -> Mapping[str, Rule]:
    if has_math_verify():
        return {**NUMBER_RULES, "math_verify": math_verify_marks}
    logger.warning(
        "task %s: the rule math_verify is left out, since math-verify is not installed; pip install 'infopo[eval]'",
        task,
    )
    return NUMBER_RULES


def _loader(
    task: str, hub: tuple[str, str | None, str], gold: Callable[[Row, str], str]
) -> Callable[[str | None], list[Item]]:
    def load(data: str | None) -> list[Item]:
        return [
            Item(f"{task}/{number}", _problem(row, row_id), gold(row, row_id))
            for number, (row_id, row) in enumerate(task_rows(task, data, hub))
        ]

    return load


def _problem(row: Row, row_id: str) -> str:
    if "Body" in row and "Question" in row:
        body, question = _text(row, "Body", row_id), _text(row, "Question", row_id)
        # Bodies of SVAMP end with or without a full stop.
        return f"{body}{'' if body.endswith(('.', '!', '?', ',')) else '.'} {question}"
    return _text(row, _one_of(row, ("question", "problem"), row_id), row_id)


def _number_in(row: Row, row_id: str) -> str:
    """Returns the number of the solution as text: the one behind the last `####`, or the whole answer."""
    column = _one_of(row, ("answer", "Answer"), row_id)
    answer = row[column]
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        # 51.0 is how SVAMP writes 51, and rules that compare texts need the latter.
        number = Decimal(str(answer))
        return str(int(number)) if number == number.to_integral_value() else str(number)
    text = _text(row, column, row_id).rpartition("####")[2].strip()
    found = list(numbers(plain(text)))
    if len(found) != 1:
        raise DataError(
            f"column {column!r}: expected a number, or a solution that ends in `#### NUMBER`, got {text!r:.80}",
            row_id,
            "no number",
        )
    return text.removesuffix(".0")


def _expression_in(row: Row, row_id: str) -> str:
    """Returns the answer: its own column, or the last box of the solution."""
    column = _one_of(row, ("answer", "solution"), row_id)
    answer = row[column]
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    text = _text(row, column, row_id)
    if (box := last_box(text)) is not None:
        return box
    if column == "solution":
        raise DataError(
            rf"column 'solution': expected an answer in \boxed{{...}}, got {text[-60:]!r}", row_id, "no box"
        )
    return text


def _one_of(row: Row, columns: tuple[str, ...], row_id: str) -> str:
    column = next((column for column in columns if row.get(column) is not None), None)
    if column is None:
        names = " or ".join(map(repr, columns))
        got = ", ".join(map(str, row)) or "none"
        raise DataError(f"expected a column {names}, got {got:.200}", row_id, "missing column")
    return column


def _text(row: Row, column: str, row_id: str) -> str:
    value: Any = row[column]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"column {column!r}: expected text, got {value!r:.60}", row_id, "no text")
    return value.strip()
