"""Which rows an optimizer step holds when ranks share them."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class PaddedSampler(Sampler[int]):
    """A sampler followed by as many absent rows as fill the last batch of every rank.

    Absent rows are indices beyond the dataset, which gives an empty example for them: no row is repeated to even
    out ranks, as accelerate would do, so every row weighs the same.

    Args:
        sampler: The order of the rows.
        multiple: Rows of all ranks in one forward pass.
        epoch: Asked for the epoch whenever an order is drawn; None: wait for `set_epoch`. Beneath both a rank's
            share and the skipped batches of a resumed run, accelerate's `set_epoch` does not get here.
    """

    def __init__(self, sampler: Sampler[int], multiple: int, epoch: Callable[[], int] | None = None) -> None:
        self.sampler = sampler
        self.epoch = epoch
        self.num_rows = len(sampler)  # type: ignore[arg-type]
        self.multiple = multiple

    def __len__(self) -> int:
        return -(-self.num_rows // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        if self.epoch is not None:
            self.set_epoch(self.epoch())
        yield from self.sampler
        yield from range(self.num_rows, len(self))

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on, from which a random order is drawn."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


class LengthGroupedEpochs(Sampler[int]):
    """Rows of similar length near each other, in an order drawn from seed and epoch: a resumed run goes on with it.

    Args:
        lengths: Tokens of each row.
        group: Rows of similar length: those of an optimizer step.
        seed: Of the order.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        self.lengths = lengths
        self.group = group
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(LengthGroupedSampler(self.group, lengths=self.lengths, generator=generator))

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next."""
        self.epoch = epoch
