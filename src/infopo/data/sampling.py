"""Samplers that decide which rows an optimizer step contains when ranks share them."""

from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from infopo.data.examples import ExampleDataset


class PaddedSampler(Sampler[int]):
    """Appends to a sampler as many absent rows as fill the last batch of every rank.

    Absent rows are indices beyond the dataset, for which an `ExampleDataset` returns an empty example. Accelerate would
    repeat rows instead, which would then weigh twice.

    Args:
        sampler: Sampler of the rows.
        multiple: Number of rows of all ranks in one forward pass.
        epoch: Returns the epoch, and is called whenever an order is drawn. If None, `set_epoch` has to be called.
            accelerate's `set_epoch` does not reach a sampler that is nested inside both `BatchSamplerShard` and
            `SkipBatchSampler`, as in a resumed run on several ranks.

    Example:
        >>> list(PaddedSampler(torch.utils.data.SequentialSampler(range(5)), multiple=4))
        [0, 1, 2, 3, 4, 5, 6, 7]
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
        """Passes the epoch, which a random order depends on, to the sampler."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def for_training(
    dataset: ExampleDataset,
    usual: Callable[[], Sampler[int] | None],
    args: TrainingArguments,
    batch_size: int,
    epoch: Callable[[], int],
) -> Sampler[int] | None:
    """Returns the order of training rows, in which each row of an epoch occurs once, whatever the number of ranks.

    Args:
        dataset: The training data.
        usual: Makes transformers' sampler, in whose place comes one of ours if rows are grouped by length.
        args: Settings of the run.
        batch_size: Number of rows of one rank in one forward pass, which `auto_find_batch_size` may have lowered.
        epoch: Returns the epoch.
    """
    if args.train_sampling_strategy == "group_by_length":
        # Rows are sorted among 50 groups at most. With a group of one rank's rows, many ranks would take theirs from
        # different ends of such a piece, and wait for the one with the longest.
        group = batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler: Sampler[int] | None = LengthGroupedEpochs(dataset.lengths.tolist(), group, seed)
    else:
        sampler = usual()
    if args.world_size == 1 or args.dataloader_drop_last or sampler is None:
        return sampler
    if isinstance(sampler, RandomSampler):
        # accelerate would replace the sampler, so that all ranks have the same order, if it were not nested.
        sampler = SeedableRandomSampler(dataset, data_seed=args.data_seed)
    return PaddedSampler(sampler, batch_size * args.world_size, epoch)


def for_evaluation(dataset: ExampleDataset, args: TrainingArguments) -> Sampler[int]:
    """Returns the rows of evaluation data in their order, filled up so that each rank has as many."""
    rows: Sampler[int] = SequentialSampler(dataset)
    return rows if args.world_size == 1 else PaddedSampler(rows, args.eval_batch_size * args.world_size)


class LengthGroupedEpochs(Sampler[int]):
    """Puts rows of similar length next to each other, in a random order that depends on seed and epoch alone.

    Without a generator, transformers' `LengthGroupedSampler` draws from the global random state, which differs in a
    resumed run. This sampler therefore makes a generator for each epoch.

    Args:
        lengths: Number of tokens of each row.
        group: Number of rows that have similar lengths, which is that of an optimizer step of all ranks.
        seed: Seed of the order.

    Example:
        >>> sampler = LengthGroupedEpochs([9, 1, 8, 2], group=2, seed=0)
        >>> sorted(sampler) == [0, 1, 2, 3], list(sampler) == list(sampler)
        (True, True)
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
        """Sets the epoch whose order is drawn next."""
        self.epoch = epoch
