"""What can go wrong, by name. Every error says what was expected, what came, where, and what to do.

    InfoPOError
    ├── RecipeError                a recipe, an argument or a combination of them is wrong; lists every problem found
    │   └── UnsupportedArgumentError   an argument is understood but cannot be honoured here
    ├── DataError                  a data file or one of its rows cannot be used; names the file and the row
    │   └── RunDirectoryError          a file of a run directory cannot be read or written (in runs.py)
    ├── ModelError                 a model, tokenizer or adapter cannot be loaded or is not what it must be
    │   └── LogpsError             log-probs of this model cannot be trusted (start-up self-test)
    ├── ReferenceStoreError        the store of reference log-probs cannot be read or written; names the file
    └── TrainingError              the run itself went wrong
        ├── NonFiniteLossError     loss is NaN or infinite; names the rows
        ├── NonFiniteWeightsError  a weight is NaN or infinite, and is not saved
        ├── SaveError              a checkpoint or the model cannot be written; says what is kept
        ├── ReferenceMismatchError policy and reference differ where they must not
        └── CheckpointError        a checkpoint cannot be resumed from

All of them mean that the input or the set-up is at fault: the command line prints them without a traceback
and exits with status 2. Any other exception is a bug of ours.
"""

import re
from collections.abc import Sequence

from infopo.secrets import masked

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and line feed, marks that turn the direction of writing, and halves of pairs."""


def printable(text: str) -> str:
    r"""The text with control characters written as escapes, so that it may go to a terminal.

    Rows, templates, file names and model configurations come from strangers: raw, an escape sequence among them could
    rewrite what a terminal shows, or what its user pastes next.

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


class RecipeError(InfoPOError, ValueError):
    """A recipe or an argument is wrong.

    Args:
        problems: One sentence a problem, each beginning with the place (`data.path: ...`).
        source: Where the settings came from, e.g. the recipe's file name.
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


class UnsupportedArgumentError(RecipeError, NotImplementedError):
    """An argument is understood but cannot be honoured; the message says why and what to use instead."""


class DataError(InfoPOError, ValueError):
    """A data file, or one row of it, cannot be used.

    Args:
        problem: What is wrong and what was expected.
        row_id: File and row, e.g. `pairs.jsonl:17`; just the file when the whole file is at fault.
        reason: Short name under which skipped rows are counted, e.g. `empty chosen`.
    """

    def __init__(self, problem: str, row_id: str, reason: str = "unusable") -> None:
        self.problem = problem
        self.row_id = row_id
        self.reason = reason
        where = row_id.replace(
            "\n", "\\n"
        )  # of a file's name: a line of its own could pass for another message
        super().__init__(f"{where}: {problem}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # The default rebuilds from `args`, which holds the joined message only: it would not survive a process pool.
        return type(self), (self.problem, self.row_id, self.reason)


class ModelError(InfoPOError, ValueError):
    """A model, tokenizer or adapter cannot be loaded, or is not what it must be."""


class LogpsError(ModelError):
    """The start-up self-test found that log-probs of this model cannot be trusted."""


class ReferenceStoreError(InfoPOError, RuntimeError):
    """The store of reference log-probs cannot be read or written."""


class TrainingError(InfoPOError, RuntimeError):
    """The run itself went wrong."""


class NonFiniteLossError(TrainingError):
    """The loss of an optimizer step is NaN or infinite; names the rows that made it so."""


class NonFiniteWeightsError(TrainingError):
    """A weight or a value of the optimizer is NaN or infinite; it is not saved. Names the last whole checkpoint."""


class SaveError(TrainingError):
    """A checkpoint, the model or the metrics cannot be written, e.g. to a full disk; says what is kept."""


class ReferenceMismatchError(TrainingError):
    """Policy and reference give different log-probs where they must be the same model."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be resumed from: another reference, other data, or a damaged file."""
