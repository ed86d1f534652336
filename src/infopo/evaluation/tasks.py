"""The tasks that `infopo evaluate` knows by name. Imports no torch."""

from collections.abc import Callable, Mapping

from infopo.errors import ConfigError
from infopo.evaluation.code_tasks import humaneval_task, mbpp_task
from infopo.evaluation.expressions_task import expressions_task
from infopo.evaluation.items import Task
from infopo.evaluation.lab_task import lab_task
from infopo.evaluation.reasoning import gsm8k_task, math_task, svamp_task

TASKS: Mapping[str, Callable[[], Task]] = {
    "lab": lab_task,
    "expressions": expressions_task,
    "gsm8k": gsm8k_task,
    "svamp": svamp_task,
    "math": math_task,
    "humaneval": humaneval_task,
    "mbpp": mbpp_task,
}
"""Name -> a function that makes the task. It loads no data."""


def task(name: str) -> Task:
    """Returns the task of that name.

    Raises:
        ConfigError: There is none.

    Example:
        >>> task("lab").headline
        'lab'
    """
    if name not in TASKS:
        raise ConfigError(f"tasks: no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]()
