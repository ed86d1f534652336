"""A trainer that loads, moves and counts packed batches. It contains no mathematics.

Methods override those of transformers' `Trainer`, which expects dicts of padded rows.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from infopo.arguments import InfoPOConfig
from infopo.data import sampling
from infopo.data.examples import ExampleDataset
from infopo.data.streaming import ExampleStream
from infopo.records import PER, PackedBatch, to_device
from infopo.sharding import ShardedTrainer


class LoadingTrainer(ShardedTrainer):
    """transformers' `Trainer` for packed batches.

    Attributes:
        next_step: The device batches of the optimizer step that comes next, each a list of pieces.
    """

    args: InfoPOConfig
    train_dataset: ExampleDataset | ExampleStream
    next_step: list[list[PackedBatch]] = []  # noqa: RUF012 - never changed here
    _num_parameters = 0

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Overrides `Trainer`'s for streams, of which it returns batches of this process's share.

        A stream's loader is not prepared by accelerate, which would divide the stream among processes once more, and
        split batches as if they were tensors.
        """
        if not isinstance(self.train_dataset, ExampleStream):
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _get_train_sampler(self, train_dataset: ExampleDataset | None = None) -> Sampler[int] | None:
        """Overrides `Trainer`'s to group by length without a generator, and to fill up ranks with empty examples.

        `Trainer`'s length grouping draws from the global random state, which differs in a resumed run. With several
        ranks, accelerate would repeat rows, which would weigh twice.
        """
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        # The loader of a stream asks for no sampler.
        assert isinstance(dataset, ExampleDataset)
        usual = partial(super()._get_train_sampler, dataset)
        return sampling.for_training(
            dataset, usual, self.args, self._train_batch_size, lambda: int(self.state.epoch or 0)
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Overrides `Trainer`'s so that evaluation is over the whole set, whatever `dataloader_drop_last` is."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            # transformers keeps the loader of persistent workers under the same name for every dataset that is passed.
            vars(self).get("_eval_dataloaders", {}).pop("eval", None)
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _get_eval_sampler(self, eval_dataset: ExampleDataset) -> Sampler[int] | None:
        """Overrides `Trainer`'s to fill up ranks with empty examples, where accelerate would repeat rows.

        It leaves out grouping by length.
        """
        return sampling.for_evaluation(eval_dataset, self.args)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Overrides `Trainer`'s, which moves tensors in dicts and lists, to move packed batches to the device.

        It leaves out DeepSpeed's cast of inputs, because token ids are integers.
        """
        return (
            [b.to(self.args.device) for b in inputs]
            if isinstance(inputs, list)
            else inputs.to(self.args.device)
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[list[PackedBatch]], Tensor]:
        """Overrides `Trainer`'s to return the items (`PER`) of the step over all ranks in place of its token count.

        Returns:
            The device batches of one optimizer step, and the counts that its loss terms are divided by.
        """
        if self.state.global_step >= self.state.max_steps:
            # If a run is resumed after its last step, inside an epoch, transformers would take one step more.
            self.control.should_training_stop = True
            num_batches = 0
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        each = [b.counts for batch in batches for b in batch]
        counts = torch.stack(each).sum(0) if each else torch.zeros(len(PER), dtype=torch.int64)
        [counts] = to_device([counts], device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        self.next_step = batches
        return batches, counts

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `Trainer`'s to count the weights, of which DeepSpeed's ZeRO-3 leaves none in its place."""
        self._num_parameters = self._num_parameters or self.model.num_parameters(exclude_embeddings=True)
        return super()._prepare_for_training(*args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> float:
        """Overrides `Trainer`'s, which expects a dict, to return 6 x parameters x tokens of the batch.

        That is the work of forward and backward pass. It leaves out attention.
        """
        return 6.0 * self._num_parameters * sum(batch.row_tokens() for batch in inputs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Overrides `Trainer`'s, which counts tokens in a dict.

        It leaves out the difference between `all` and `non_padding`, because there is no padding.
        """
        if self.args.include_num_input_tokens_seen != "no":
            tokens = torch.tensor([sum(batch.row_tokens() for batch in inputs)], device=self.args.device)
            self.state.num_input_tokens_seen += int(self._gather(tokens).sum())

    def _gather(self, values: Tensor) -> Tensor:
        return self.accelerator.gather(values) if self.args.world_size > 1 else values
