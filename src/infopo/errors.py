"""All errors that infopo raises on purpose. Every message says what was expected, what came, where, and what to do.

    InfoPOError
    ├── ConfigError                a recipe, an argument or a combination of them is wrong (lists every problem)
    │   ├── UnsupportedArgumentError   an argument is understood but cannot be honoured here
    │   └── ObjectiveError             a loss from outside the package is not what it declares
    ├── DataError                  a data file or one of its rows cannot be used (names the file and the row)
    │   └── RunDirectoryError          a file of a run directory cannot be read or written (in runs.py)
    ├── ModelError                 a model, tokenizer or adapter cannot be loaded or is not what it must be
    │   └── LogpsError             log-probs of this model cannot be trusted (start-up self-test)
    ├── ReferenceStoreError        the store of reference log-probs cannot be read or written (names the file)
    ├── ServerError                a server of models cannot be reached, or does not answer (names the URL)
    └── TrainingError              the run itself went wrong
        ├── NonFiniteLossError     loss is NaN or infinite (names the rows)
        ├── NonFiniteWeightsError  a weight is NaN or infinite, and is not saved
        ├── SaveError              a checkpoint or the model cannot be written (says what is kept)
        ├── ReferenceMismatchError policy and reference differ where they must not
        └── CheckpointError        a checkpoint cannot be resumed from

All of them mean that the input or the set-up is at fault. The command line prints them without a traceback and exits
with status 2. Any other exception is a bug of ours.
"""

import re
from collections.abc import Sequence

from infopo.secrets import masked

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and line feed, marks that turn the direction of writing, and halves of pairs."""


def printable(text: str) -> str:
    r"""Returns the text with control characters written as escapes, so that a terminal can show it.

    Rows, templates, file names and model configurations come from strangers. An escape sequence in them could change
    what a terminal shows, or what its user pastes next.

    Example:
        >>> print(printable("\x1b[31mred"))
        \x1b[31mred
    """
    return _UNPRINTABLE.sub(lambda match: _escape(ord(match[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class InfoPOError(Exception):
    """Base of all errors that infopo raises on purpose. Secrets in its text are masked, control characters escaped."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(masked(arg) if isinstance(arg, str) else arg for arg in args))

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(InfoPOError, ValueError):
    """A setting is wrong, whether a recipe or an argument gives it.

    Args:
        problems: One sentence per problem, which begins with the place (`data.path: ...`).
        source: Origin of the settings, e.g. the recipe's file name.

    Example:
        >>> print(ConfigError(["data.path: is required", "objective.beta: expected a value > 0, got 0"], "a.yaml"))
        2 problems in a.yaml:
          - data.path: is required
          - objective.beta: expected a value > 0, got 0
    """

    def __init__(self, problems: str | Sequence[str], source: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.source = source
        where = f" in {source}" if source else ""
        if len(self.problems) == 1:
            message = f"{self.problems[0]}{where}" if source else self.problems[0]
        else:
            message = "\n".join(
                [f"{len(self.problems)} problems{where}:", *(f"  - {p}" for p in self.problems)]
            )
        super().__init__(message)


RecipeError = ConfigError
"""The name that `ConfigError` had when recipes were the only place of settings."""


class UnsupportedArgumentError(ConfigError, NotImplementedError):
    """An argument is understood but cannot be honoured. The message says why, and what to use instead."""


class ObjectiveError(ConfigError):
    """A loss from outside the package is not what it declares, or not what every loss must be."""


class DataError(InfoPOError, ValueError):
    """A data file, or one row of it, cannot be used.

    Args:
        problem: What is wrong and what was expected.
        row_id: File and row, e.g. `pairs.jsonl:17`, or just the file if the whole file is at fault.
        reason: Short name under which skipped rows are counted, e.g. `empty chosen`.

    Example:
        >>> print(DataError("column 'chosen': expected text, got null", "pairs.jsonl:17", "null value"))
        pairs.jsonl:17: column 'chosen': expected text, got null
    """

    def __init__(self, problem: str, row_id: str, reason: str = "unusable") -> None:
        self.problem = problem
        self.row_id = row_id
        self.reason = reason
        # A file's name may contain a line feed, behind which it could pass for another message.
        where = row_id.replace("\n", "\\n")
        super().__init__(f"{where}: {problem}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # The default would rebuild from `args`, which has the joined message only, and fail in a process pool.
        return type(self), (self.problem, self.row_id, self.reason)


class ModelError(InfoPOError, ValueError):
    """A model, tokenizer or adapter cannot be loaded, or is not what it must be."""


class LogpsError(ModelError):
    """The start-up self-test found that log-probs of this model cannot be trusted."""


class ReferenceStoreError(InfoPOError, RuntimeError):
    """The store of reference log-probs cannot be read or written."""


class ServerError(InfoPOError, RuntimeError):
    """A server of models cannot be reached, refuses access, or does not answer."""


class TrainingError(InfoPOError, RuntimeError):
    """The run itself went wrong."""


class NonFiniteLossError(TrainingError):
    """The loss of an optimizer step is NaN or infinite. The message names the rows that made it so."""


class NonFiniteWeightsError(TrainingError):
    """A weight or a value of the optimizer is NaN or infinite, and is not saved. Names the last whole checkpoint."""


class SaveError(TrainingError):
    """A checkpoint, the model or the metrics cannot be written, e.g. to a full disk. The message says what is kept."""


class ReferenceMismatchError(TrainingError):
    """Policy and reference give different log-probs although they must be the same model."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be resumed from: another reference, other data, or a damaged file."""
