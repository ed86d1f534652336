"""Examples that are read and encoded when a step asks for them, so that the data need not fit into memory."""

import copy
from collections.abc import Callable, Iterator
from itertools import islice

from torch.utils.data import IterableDataset

from infopo.data.counts import DataCounts
from infopo.data.encode import Encoder, encoded
from infopo.errors import DataError
from infopo.records import PreferenceExample, PreferenceRow

Judge = Callable[[PreferenceExample], None]
"""Raises `DataError` if an example cannot be used."""


class ExampleStream(IterableDataset[PreferenceExample]):
    """An endless stream of preference examples: at the end of the rows, they are read again from the start.

    Each rank therefore has a batch at every step, whichever rows are skipped. `max_steps` says how long to train. The
    order is that of the source, and the same in every pass.

    Args:
        open_rows: Opens the rows of one pass. It counts what it reads in the `DataCounts` that it is given.
        encoder: Turns rows into tokens.
        counts: Counts over all passes. They are kept in this process, so a loader must not have workers.
        judge: Raises `DataError` at an example that this training cannot use.
        rank: Index of this process.
        world_size: Number of processes, each of which takes every `world_size`-th usable row.

    Attributes:
        counts: See above.
    """

    def __init__(
        self,
        open_rows: Callable[[DataCounts], Iterator[PreferenceRow]],
        encoder: Encoder,
        counts: DataCounts,
        judge: Judge = lambda example: None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._open_rows = open_rows
        self._encoder = encoder
        self.counts = counts
        self._judge = judge
        self._rank = rank
        self._world_size = world_size

    def for_rank(self, judge: Judge, rank: int = 0, world_size: int = 1) -> "ExampleStream":
        """Returns the same stream, with the same counts, for one of several processes."""
        other = copy.copy(self)
        other._judge, other._rank, other._world_size = judge, rank, world_size
        return other

    def __iter__(self) -> Iterator[PreferenceExample]:
        """Yields examples, pass after pass.

        Raises:
            DataError: A source cannot be read, a row cannot be used (and is not skipped), or a pass gave none.
        """
        while True:
            example = None
            for example in self._one_pass(self.counts):
                self._judge(example)
                yield example
            if example is None:
                reasons = ", ".join(f"{n} x {reason}" for reason, n in self.counts.skipped.most_common())
                problem = f"no row can be used by process {self._rank} of {self._world_size}: {reasons or 'too few'}"
                raise DataError(problem, self.counts.source or "data", "no usable row")

    def _one_pass(self, counts: DataCounts) -> Iterator[PreferenceExample]:
        examples = encoded(self._open_rows(counts), self._encoder, counts)
        return islice(examples, self._rank, None, self._world_size)

    def first(self) -> PreferenceExample:
        """Returns the first usable example of all processes. It reads from the start, and counts nothing.

        Raises:
            DataError: As for the iteration.
        """
        return self.head(1)[0]

    def head(self, size: int) -> list[PreferenceExample]:
        """Returns the first `size` usable examples of all processes. It reads from the start, and counts nothing.

        Raises:
            DataError: As for the iteration.
        """
        # Counts of their own are thrown away, because the stream itself reads the same rows again.
        own_counts = DataCounts(on_bad_row=self.counts.on_bad_row, source=self.counts.source)
        found = list(islice(encoded(self._open_rows(own_counts), self._encoder, own_counts), size))
        if not found:
            raise DataError("no row can be used", self.counts.source or "data", "no usable row")
        return found
