"""HumanEval and MBPP as tasks: problems whose answers are programs, which tests judge. Imports no torch."""

import ast
import builtins
import re
from collections.abc import Mapping, Sequence
from typing import Any

from infopo.errors import DataError
from infopo.evaluation.code_answers import Asked, program_in
from infopo.evaluation.code_grading import Program, grade
from infopo.evaluation.items import Answered, Item, Mark, Task
from infopo.evaluation.task_rows import task_rows

RULE = "by_value"
"""Name of the rule. Tests and response run in sandboxes of their own, and plain values go between them."""

NO_CODE = "no code found"

_HUMANEVAL = ("openai/openai_humaneval", None, "test")
_MBPP = ("google-research-datasets/mbpp", "full", "test")

_HUMANEVAL_CHAT = (
    "Complete the following Python function. Answer with the whole function in one block of code, with the imports "
    "that it needs.\n\n```python\n{prompt}\n```"
)
_MBPP_ASKED = (
    "You are an expert Python programmer, and here is your task: {task} "
    "Your code should pass these tests:\n\n{tests}"
)
_WORKED = (
    (
        "Write a function to find the shared elements from the given two lists.",
        "assert set(similar_elements((3, 4, 5, 6),(5, 7, 4, 10))) == set((4, 5))\n"
        "assert set(similar_elements((1, 2, 3, 4),(5, 4, 3, 7))) == set((3, 4))\n"
        "assert set(similar_elements((11, 12, 14, 13),(17, 15, 14, 13))) == set((13, 14))",
        "def similar_elements(test_tup1, test_tup2):\n"
        "  res = tuple(set(test_tup1) & set(test_tup2))\n"
        "  return (res) ",
    ),
    (
        "Write a python function to identify non-prime numbers.",
        "assert is_not_prime(2) == False\nassert is_not_prime(10) == True\nassert is_not_prime(35) == True",
        "import math\n"
        "def is_not_prime(n):\n"
        "    result = False\n"
        "    for i in range(2,int(math.sqrt(n)) + 1):\n"
        "        if n % i == 0:\n"
        "            result = True\n"
        "    return result",
    ),
    (
        "Write a function to find the n largest integers from a given list of numbers, returned in descending order.",
        "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],3)==[85, 75, 65]\n"
        "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],2)==[85, 75]\n"
        "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],5)==[85, 75, 65, 58, 35]",
        "import heapq as hq\n"
        "def heap_queue_largest(nums,n):\n"
        "  largest_nums = hq.nlargest(n, nums)\n"
        "  return largest_nums",
    ),
)
"""Problems 2, 3 and 4 of MBPP (Austin et al., 2021, arXiv 2108.07732; CC BY 4.0), which the authors' prompts show."""

WORKED_IDS = frozenset({2, 3, 4})
"""Numbers of those problems, which are therefore no items."""


def humaneval_task() -> Task:
    """Returns the task `humaneval`: 164 functions to complete (Chen et al., 2021, arXiv 2107.03374).

    Example:
        >>> humaneval_task().headline, humaneval_task().executes_code
        ('by_value', True)
    """
    return Task(
        "humaneval",
        lambda data: [
            humaneval_item(row, row_id) for row_id, row in task_rows("humaneval", data, _HUMANEVAL)
        ],
        {RULE: by_value},
        max_new_tokens=1024,
        # Those of the paper. A function ends where the next thing begins in column 0.
        stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        plain="{prompt}",
        chat=_HUMANEVAL_CHAT,
        executes_code=True,
    )


def mbpp_task() -> Task:
    """Returns the task `mbpp`: functions by a description and three tests (Austin et al., 2021, arXiv 2108.07732).

    Without `data`, these are the 500 problems of the test split. Of a file, they are all but the three that the
    worked examples show.
    """
    return Task(
        "mbpp",
        lambda data: [
            mbpp_item(row, row_id)
            for row_id, row in task_rows("mbpp", data, _MBPP)
            if _number(row.get("task_id")) not in WORKED_IDS
        ],
        {RULE: by_value},
        max_new_tokens=1024,
        examples=[(_MBPP_ASKED.format(task=task, tests=tests), f"{code}\n[DONE]") for task, tests, code in _WORKED],
        stop=("[DONE]",),
        plain="{prompt}\n[BEGIN]\n",
        executes_code=True,
    )  # fmt: skip


def humaneval_item(row: Mapping[str, Any], row_id: str) -> Item:
    """Returns a row of HumanEval, or of a file in its form, as an item.

    Raises:
        DataError: A column is missing, or the prompt defines no such function.
    """
    prompt, function, test = (_text(row, name, row_id) for name in ("prompt", "entry_point", "test"))
    preamble = _preamble(prompt, function)
    if preamble is None:
        raise DataError(f"prompt: expected Python that defines {function!r}", row_id, "no such function")
    # Tests may call others that the response has to define, beside the one that they are about.
    others = [
        name for name in _called(f"{preamble}\n{test}", row.get("canonical_solution")) if name != function
    ]
    functions = [function, *others]
    gold = {"functions": functions, "prompt": prompt, "preamble": preamble, "setup": preamble, "test": test}
    return Item(_id("humaneval", row, row_id), prompt, gold)


def mbpp_item(row: Mapping[str, Any], row_id: str) -> Item:
    """Returns a row of MBPP, full or sanitized, as an item.

    Raises:
        DataError: A column is missing, or the tests call nothing.
    """
    task = _text(row, "prompt" if "prompt" in row else "text", row_id)
    code = row.get("code")
    tests = row.get("test_list")
    if (
        not isinstance(tests, Sequence)
        or isinstance(tests, str)
        or not all(isinstance(t, str) for t in tests)
    ):
        raise DataError(f"test_list: expected a list of texts, got {tests!r:.60}", row_id, "no tests")
    given = row.get("test_imports") or row.get("test_setup_code") or ""
    before = given if isinstance(given, str) else "\n".join(given)
    test = "\n".join(tests)
    functions = _called(f"{before}\n{test}", code)
    if not functions:
        raise DataError("test_list: expected calls of a function, got none", row_id, "no tests")
    # The authors run tests after the code that they grade, whose imports some tests use.
    setup = "\n".join([before, *_imports(code)])
    gold = {"functions": functions, "prompt": "", "preamble": before, "setup": setup, "test": test}
    asked = _MBPP_ASKED.format(task=task.strip(), tests=test)
    return Item(_id("mbpp", row, row_id), asked, gold)


def by_value(answers: Sequence[Answered]) -> list[Mark]:
    """Marks responses by running them: the tests in one sandbox, the response in another.

    The answer of a mark is the program that was found. Notes are `no code found`, `does not compile`,
    `fails when loaded`, `no such function`, `time-out`, `ended itself` (an exit, a crash, too much memory),
    `no plain value` (an object that the tests cannot be given) and `tests ended early`. A wrong value and an exception
    have none: they are what tests are for.

    Raises:
        ConfigError: Nobody has allowed to run what models write (`infopo.evaluation.sandbox.allow`).
    """
    found = [program_in(answered.response, asked_of(answered.item)) for answered in answers]
    programs = [
        program_of(code, answered.item) for code, answered in zip(found, answers, strict=True) if code is not None
    ]  # fmt: skip
    graded = iter(grade(programs))
    marks = []
    for code in found:
        if code is None:
            marks.append(Mark(False, None, NO_CODE))
        else:
            one = next(graded)
            marks.append(Mark(one.passed, code, one.note))
    return marks


def asked_of(item: Item) -> Asked:
    """Returns what a response to an item has to define."""
    return Asked(item.gold["functions"], item.gold["prompt"], item.gold["preamble"])


def program_of(code: str, item: Item) -> Program:
    """Returns the program of a response with the tests of its item."""
    return Program(code, tuple(item.gold["functions"]), item.gold["test"], item.gold["setup"])


def _text(row: Mapping[str, Any], name: str, row_id: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        columns = ", ".join(map(str, row))
        raise DataError(
            f"{name}: expected text, got {value!r:.60}; columns are {columns:.200}", row_id, "no text"
        )
    return value


def _number(task_id: Any) -> int | None:
    digits = str(task_id).rpartition("/")[2]
    return int(digits) if digits.isdecimal() else None


def _id(task: str, row: Mapping[str, Any], row_id: str) -> str:
    """Returns the id of a problem, which `HumanEval/3` and `3` have in common."""
    if (task_id := row.get("task_id")) is None or not str(task_id).strip():
        raise DataError("task_id: expected the problem's number or name, got none", row_id, "no task_id")
    prefix, _, number = str(task_id).rpartition("/")
    return f"{task}/{number}" if prefix.casefold() in ("", task) else f"{task}/{task_id}"


def _preamble(prompt: str, function: str) -> str | None:
    """Returns what a prompt has before its function, or None if it does not define it."""
    match = list(re.finditer(rf"^(?:async +)?def +{re.escape(function)}\b", prompt, re.M))
    return prompt[: match[-1].start()].strip("\n") if match else None


def _called(test: str, code: Any) -> list[str]:
    """Returns the names of the functions that tests call and do not define themselves.

    Args:
        test: The tests, with what runs before them.
        code: A solution, or whatever the row has in its place. What it defines is called even if Python has the name:
            problem 126 of MBPP asks for a function `sum`.
    """
    tree = _tree(test)
    there = {"candidate"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            there.add(node.name)
        elif isinstance(node, ast.arg):
            there.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            there.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            there |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    solved = {node.name for node in _tree(code).body if isinstance(node, ast.FunctionDef)}
    called = [
        node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]  # fmt: skip
    return [
        name
        for name in dict.fromkeys(called)
        if name not in there and (name in solved or not hasattr(builtins, name))
    ]


def _imports(code: Any) -> list[str]:
    return [ast.unparse(node) for node in _tree(code).body if isinstance(node, ast.Import | ast.ImportFrom)]


def _tree(code: Any) -> ast.Module:
    try:
        return ast.parse(code if isinstance(code, str) else "")
    except (SyntaxError, ValueError):
        return ast.parse("")
