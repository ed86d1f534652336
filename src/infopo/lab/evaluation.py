"""Measures the greedy accuracy of a policy on lab problems."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infopo.errors import ConfigError
from infopo.generate import sample
from infopo.intervals import wilson
from infopo.lab.problems import OPERATIONS, Problem, verify
from infopo.records import Message


def longest_response(operations: int) -> int:
    """Returns the number of tokens at which a response to a problem with this many operations is cut off.

    A line of a worked solution has at most 11 tokens, and the answer with its end of turn at most 5. Slips to longer
    numbers add a few.

    Example:
        >>> longest_response(3)
        44
    """
    return 11 * operations + 11


MAX_NEW_TOKENS = longest_response(OPERATIONS[1])
"""Token limit for the problems that the shipped policy was trained on."""

# Two-sided 95 % quantile of the standard normal law.


@dataclass(frozen=True)
class AccuracyResult:
    """A proportion with its uncertainty."""

    correct: int
    n: int
    accuracy: float
    """`correct / n`."""
    ci95: tuple[float, float]
    """The 95 % Wilson interval (`wilson_interval`)."""

    def __str__(self) -> str:
        low, high = self.ci95
        return f"{self.accuracy:.3f} ({self.correct} of {self.n}, 95 % interval {low:.3f} to {high:.3f})"


def as_prompt(problem: Problem) -> list[Message]:
    """Returns the conversation that asks the problem's question.

    Example:
        >>> from infopo.lab.problems import solve
        >>> as_prompt(solve("1+2-3=?"))
        [{'role': 'user', 'content': '1+2-3=?'}]
    """
    return [{"role": "user", "content": problem.question}]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread within the block.

    When a small model is decoded, several threads wait for each other longer than they compute.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    batch_size: int = 256,
) -> AccuracyResult:
    """Returns the share of `problems` whose greedy response `verify` accepts.

    A response that was cut off at `MAX_NEW_TOKENS` counts as wrong, whatever it says.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        problems: The problems to solve.
        batch_size: Number of problems that are decoded together.

    Raises:
        ConfigError: there are no problems.
    """
    if not problems:
        raise ConfigError("problems: expected at least one, got none")
    responses = sample(
        model,
        tokenizer,
        [as_prompt(problem) for problem in problems],
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=0.0,
        batch_size=batch_size,
        seed=0,
    )
    correct = sum(
        response.finished and verify(problem, response.text)
        for problem, (response,) in zip(problems, responses, strict=True)
    )
    return AccuracyResult(
        correct, len(problems), correct / len(problems), wilson_interval(correct, len(problems))
    )


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Returns the 95 % interval of a proportion (see `infopo.intervals.wilson`), within [0, 1] and never empty.

    Raises:
        ConfigError: not 0 <= correct <= n with n >= 1.

    Example:
        >>> [round(end, 3) for end in wilson_interval(9, 10)]
        [0.596, 0.982]
    """
    if n < 1 or not 0 <= correct <= n:
        raise ConfigError(f"correct: expected 0 <= correct <= n and n >= 1, got {correct} of {n}")
    return wilson(correct / n, n)
