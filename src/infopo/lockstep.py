"""Forward passes of a sharded model outside of training, which all ranks take together.

Each forward pass of a sharded model needs all ranks, because each holds a part of the weights. Ranks that looked for
work on their own, as they do if each holds the whole model, would wait for each other for ever. So the first rank
decides what is computed, and the others compute what it asks for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from accelerate.utils import broadcast_object_list, gather_object

from infopo.errors import InfoPOError

Work = TypeVar("Work")
Result = TypeVar("Result")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class _End:
    """Tells the ranks that wait for work that there is none left, and how it ended."""

    outcome: Any


@dataclass(frozen=True)
class Lockstep(Generic[Work, Result]):
    """Runs pieces of work on all ranks, as many at once as there are ranks.

    Attributes:
        run: Runs one piece of work, with the same number of forward passes whatever it is.
        rank: Index of this process.
        world_size: Number of processes.
    """

    run: Callable[[Work], Result]
    rank: int
    world_size: int

    def lead(self, decide: Callable[[Callable[[Sequence[Work]], list[Result]]], Outcome]) -> Outcome:
        """Returns, on all ranks, what `decide` returns on the first, or raises its `InfoPOError`.

        All ranks must call this. `decide` is called on the first rank only.

        Args:
            decide: Is given a function that runs any number of pieces of work and returns their results in order.

        Example:
            >>> Lockstep(run=abs, rank=0, world_size=1).lead(lambda run_all: run_all([-1, 2]))
            [1, 2]
        """
        if self.world_size == 1:
            return decide(self.alone)
        if self.rank > 0:
            return self._follow()
        try:
            outcome: Outcome | InfoPOError = decide(self._run_all)
        except InfoPOError as error:
            outcome = error
        broadcast_object_list([_End(outcome)])
        return self._result(outcome)

    def alone(self, work: Sequence[Work]) -> list[Result]:
        """Returns the results of pieces of work that this process runs on its own, one after the other."""
        return [self.run(piece) for piece in work]

    def _run_all(self, work: Sequence[Work]) -> list[Result]:
        results: list[Result] = []
        for begin in range(0, len(work), self.world_size):
            pieces = list(work[begin : begin + self.world_size])
            broadcast_object_list([pieces])
            results += gather_object([self.run(pieces[0])])[: len(pieces)]
        return results

    def _follow(self) -> Any:
        while True:
            message: list[Any] = [None]
            broadcast_object_list(message)
            if isinstance(message[0], _End):
                return self._result(message[0].outcome)
            # A rank without a piece of its own runs the last one too: what matters is that it takes part.
            pieces = cast(list[Work], message[0])
            gather_object([self.run(pieces[min(self.rank, len(pieces) - 1)])])

    @staticmethod
    def _result(outcome: Any) -> Any:
        if isinstance(outcome, InfoPOError):
            raise outcome
        return outcome
