"""How an evaluation is made. Imports no torch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from infopo.errors import ConfigError
from infopo.evaluation.items import Task
from infopo.evaluation.law import Law
from infopo.evaluation.server import ServerSettings


@dataclass(frozen=True)
class EvaluationSettings:
    """How an evaluation is made.

    Attributes:
        tasks: Names of tasks.
        data: A file or hub name by task. Tasks without one use their own source.
        limit: Largest number of items of a task, the first of its data. None means all.
        num_samples: Responses per item.
        temperature: Divisor of the logits. None means greedy decoding for one sample, and 1 for several.
        top_p: Mass of the nucleus that tokens are drawn from.
        max_new_tokens: Largest number of tokens of a response. None means that of the task.
        prompting: "chat" or "plain". None means chat if the tokenizer has a chat template.
        num_fewshot: Number of worked examples before each problem.
        batch_size: Number of sequences that are drawn together.
        seed: Seed of the samples.
        dtype: Type of the weights.
        shard: (number from 1, count) of a process that draws its share of the samples and marks nothing.
        allow_code_execution: Whether code that the model wrote may run.
        isolation: The weakest level of isolation that code may run at (see `infopo.evaluation.sandbox`).
        include_path: Folder of task files of lm-evaluation-harness, or None.
        server: Where the model is served, or None for a model that is loaded.
    """

    tasks: Sequence[str]
    data: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    num_samples: int = 1
    temperature: float | None = None
    top_p: float = 1.0
    max_new_tokens: int | None = None
    prompting: str | None = None
    num_fewshot: int = 0
    batch_size: int = 32
    seed: int = 0
    dtype: str = "auto"
    shard: tuple[int, int] | None = None
    allow_code_execution: bool = False
    isolation: str = "uid"
    include_path: str | None = None
    server: ServerSettings | None = None

    def __post_init__(self) -> None:
        problems = []
        if not self.tasks:
            problems.append("--tasks: expected at least one")
        if len(set(self.tasks)) != len(self.tasks):
            problems.append("--tasks: a task is named twice")
        for name in sorted(set(self.data) - set(self.tasks)):
            problems.append(f"--data: {name!r} is none of the tasks {', '.join(self.tasks)}")
        counts = {"--limit": self.limit, "--num-samples": self.num_samples, "--batch-size": self.batch_size,
                  "--max-new-tokens": self.max_new_tokens}  # fmt: skip
        problems += [
            f"{name}: expected at least 1, got {n}" for name, n in counts.items() if n is not None and n < 1
        ]
        if self.temperature == 0 and self.num_samples > 1:
            problems.append("--num-samples: greedy decoding has one response; set --temperature above 0")
        if not 0 <= self.seed < 2**32:
            problems.append(f"--seed: expected a number in [0, 2**32), got {self.seed}")
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            problems.append(f"--shard: expected I/N with 1 <= I <= N, got {self.shard[0]}/{self.shard[1]}")
        try:
            Law(1, self._temperature, self.top_p)
        except ConfigError as error:
            problems += [f"--{each.replace('_', '-', 1)}" for each in error.problems]
        if problems:
            raise ConfigError(problems)

    @property
    def _temperature(self) -> float:
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.num_samples == 1 else 1.0

    def law(self, task: Task, stop: tuple[str, ...]) -> Law:
        """Returns the distribution that answers to a task are drawn from."""
        return Law(self.max_new_tokens or task.max_new_tokens, self._temperature, self.top_p, stop)


DRAWING = (
    "num_samples", "temperature", "top_p", "max_new_tokens", "prompting", "num_fewshot", "batch_size", "dtype", "shard",
)  # fmt: skip
"""Settings of how responses are drawn, which nothing reads of responses that are there."""

LOADING = ("batch_size", "dtype")
"""Settings of a model that is loaded, which nothing reads of one behind a server."""


def unread(
    settings: Any, names: Collection[str], where: str, usual: Mapping[str, Collection[Any]] | None = None
) -> list[str]:
    """Returns a problem for each setting that differs from its default though nothing would read it.

    A setting that is accepted and ignored is recorded with a result that it did not make.

    Args:
        settings: A dataclass of settings, whose fields are named as the options of commands.
        names: Names of the fields that are not read.
        where: To what they do not apply.
        usual: Further values of fields that say nothing, as the default of a command.

    Example:
        >>> unread(EvaluationSettings(["lab"], top_p=0.5, temperature=1.0), DRAWING, "answers.jsonl")
        ['--temperature: does not apply to answers.jsonl', '--top-p: does not apply to answers.jsonl']
    """
    found = []
    for each in fields(settings):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        said = getattr(settings, each.name) not in (default, *(usual or {}).get(each.name, ()))
        if each.name in names and said:
            found.append(f"--{each.name.replace('_', '-')}: does not apply to {where}")
    return found


def refuse_unread(
    settings: Any, names: Collection[str], where: str, usual: Mapping[str, Collection[Any]] | None = None
) -> None:
    """Refuses settings that nothing would read (see `unread`).

    Raises:
        ConfigError: There are some. Names all of them.
    """
    if problems := unread(settings, names, where, usual):
        raise ConfigError(problems)
