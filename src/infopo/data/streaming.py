"""Examples that are read and encoded when a step asks for them: what is trained on need not fit into memory."""

import copy
from collections.abc import Callable, Iterator
from itertools import islice

from torch.utils.data import IterableDataset

from infopo.data.counts import DataCounts
from infopo.data.encode import Encoder, encoded
from infopo.errors import DataError
from infopo.records import PreferenceExample, PreferenceRow

Judge = Callable[[PreferenceExample], None]


class ExampleStream(IterableDataset[PreferenceExample]):
    """Preference examples without an end: when the rows are used up, they are read again from the start.

    So each rank has a batch at every step, however the rows that are skipped fall on their shares; how long to train
    is for `max_steps` to say. The order is that of the source, the same in every pass.

    Args:
        open_rows: Gives the rows of one pass, and notes in the ledger what it reads.
        encoder: Turns rows into tokens.
        counts: Ledger over all passes. It is kept in this process, so a loader must not have workers.
        judge: Raises `DataError` at an example that this training cannot use.
        rank: Number of this process.
        world_size: Number of processes; each takes every `world_size`-th usable row.

    Attributes:
        counts: The ledger.
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

    def of(self, judge: Judge, rank: int = 0, world_size: int = 1) -> "ExampleStream":
        """The same stream, with the same ledger, for one of several processes."""
        other = copy.copy(self)
        other._judge, other._rank, other._world_size = judge, rank, world_size
        return other

    def __iter__(self) -> Iterator[PreferenceExample]:
        """Examples, pass after pass.

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
        """The first usable example of all processes; reads again from the start, and leaves the ledger alone.

        Raises:
            DataError: As for the iteration.
        """
        aside = DataCounts(on_bad_row=self.counts.on_bad_row, source=self.counts.source)
        for example in encoded(self._open_rows(aside), self._encoder, aside):
            return example
        raise DataError("no row can be used", self.counts.source or "data", "no usable row")
