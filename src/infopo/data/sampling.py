"""Which rows an optimizer step holds when ranks share them."""

from collections.abc import Iterator

from torch.utils.data import Sampler


class PaddedSampler(Sampler[int]):
    """A sampler followed by as many absent rows as fill the last batch of every rank.

    Absent rows are indices beyond the dataset, which gives an empty example for them: no row is repeated to even
    out ranks, as accelerate would do, so every row weighs the same.

    Args:
        sampler: The order of the rows.
        multiple: Rows of all ranks in one forward pass.
    """

    def __init__(self, sampler: Sampler[int], multiple: int) -> None:
        self.sampler = sampler
        self.num_rows = len(sampler)  # type: ignore[arg-type]
        self.multiple = multiple

    def __len__(self) -> int:
        return -(-self.num_rows // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from range(self.num_rows, len(self))

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on, from which a random order is drawn."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
