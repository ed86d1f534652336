"""Takes in the data of a run: rows become examples, which are judged for the objective. It needs no trainer."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import datasets
from torch import nn
from transformers import PreTrainedTokenizerBase

from infopo import startup
from infopo.arguments import InfoPOConfig
from infopo.data.counts import DataCounts
from infopo.data.encode import Encoder, encode_rows
from infopo.data.examples import ExampleDataset
from infopo.data.responses import ScoreRule
from infopo.data.sources import located, read_rows
from infopo.data.streaming import ExampleStream
from infopo.encoding import encode_once
from infopo.errors import ConfigError, DataError
from infopo.losses.catalog import UNPAIRED, Objective, row_of
from infopo.losses.mixture import mixture_in_words
from infopo.output import get_logger
from infopo.records import PreferenceExample, PreferenceRow, Role
from infopo.settings import RowSettings

logger = get_logger(__name__)

RawDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset | list[dict[str, Any]] | ExampleDataset


def encoder_of(settings: RowSettings, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Returns what turns rows into tokens under these limits."""
    return Encoder(
        tokenizer,
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
        on_too_long=settings.on_too_long,
        chat_template_kwargs=settings.chat_template_kwargs,
        as_chat=settings.as_chat,
    )


def rule_of(settings: RowSettings) -> ScoreRule:
    """Returns how responses with scores are split into chosen and rejected ones."""
    return ScoreRule(settings.score_rule, settings.score_threshold)


_IN_A_SCRIPT = {
    "data.columns": "InfoPOConfig(columns={...}), with None for null",
    "on_bad_row: skip": "InfoPOConfig(on_bad_row='skip')",
}
"""Settings as errors of data name them, which are keys of a recipe -> how a script writes them."""


@contextlib.contextmanager
def _told_to_a_script() -> Iterator[None]:
    """Within it, errors that name a key of a recipe say how a script writes it."""
    try:
        yield
    except DataError as error:
        # Nothing within the text is changed, because it may quote the user's rows.
        if ways := [way for key, way in _IN_A_SCRIPT.items() if key in error.problem]:
            problem = f"{error.problem} (in a script: {'; '.join(ways)})"
            raise DataError(problem, error.row_id, error.reason) from error
        raise


@dataclass(frozen=True)
class Intake:
    """Takes in training and evaluation data as the settings and the objective say.

    Attributes:
        args: Settings.
        objectives: What the loss is made of, which decides what an example has to contain.
        encoder: Turns rows into tokens.
        counts: The account of each dataset: `train`, and `eval` or the name of the evaluation set. Examples that come
            encoded have been counted by whoever encoded them.
    """

    args: InfoPOConfig
    objectives: Sequence[Objective]
    encoder: Encoder
    counts: dict[str, DataCounts]

    @classmethod
    def of(cls, args: InfoPOConfig, tokenizer: PreTrainedTokenizerBase) -> "Intake":
        """Returns the intake of a run with these settings."""
        return cls(args, [row_of(name) for name, _, _ in args.mixture()], encoder_of(args, tokenizer), {})

    @property
    def needs_mismatches(self) -> bool:
        """Whether the objective compares with responses to other prompts."""
        return any(objective.statistic == "kl" for objective in self.objectives)

    def both(
        self, train_data: RawDataset | ExampleStream, eval_data: Any, fit: Sequence[nn.Module]
    ) -> tuple[ExampleDataset | ExampleStream, Any]:
        """Returns training and evaluation data, of which the models `fit` can read every example.

        Raises:
            DataError, ConfigError, ModelError: See `training` and `evaluation`.
        """
        train_examples, eval_examples = self.training(train_data, fit), self.evaluation(eval_data)
        for model in fit:
            startup.check_fit(model, train_examples, eval_examples)
        return train_examples, eval_examples

    def training(
        self, dataset: RawDataset | ExampleStream, fit: Sequence[nn.Module]
    ) -> ExampleDataset | ExampleStream:
        """Returns the training data, of which every example has what the objective compares.

        Args:
            dataset: Rows, examples, or a stream of either.
            fit: Models that have to be able to read each example. A stream is judged when an example is read.

        Raises:
            DataError: A row or example cannot be used.
            ConfigError: The objective needs data that a stream cannot give.
            ModelError: The first example of a stream does not fit a model.
        """
        if not isinstance(dataset, datasets.IterableDataset | ExampleStream):
            with _told_to_a_script():
                return self._encoded(dataset, "train_dataset", "train")
        if self.needs_mismatches:
            raise ConfigError(
                f"{mixture_in_words(self.args.mixture())}: responses to other prompts cannot be drawn from a stream; "
                "load the rows into memory (data.streaming: false), or take another objective for unpaired data"
            )
        return self._streamed(dataset, fit)

    def evaluation(self, dataset: Any) -> Any:
        """Returns evaluation data, or a dict of them by name, judged as training data are.

        Raises:
            DataError: A row or example cannot be used.
        """
        if dataset is None:
            return dataset
        with _told_to_a_script():
            if isinstance(dataset, Mapping):
                return {
                    name: self._encoded(rows, f"eval_dataset[{name}]", name) for name, rows in dataset.items()
                }
            return self._encoded(dataset, "eval_dataset", "eval")

    def _encoded(self, dataset: RawDataset, source: str, name: str) -> ExampleDataset:
        if isinstance(dataset, ExampleDataset):
            return self._judged(dataset, source)
        counts = self.counts[name] = DataCounts(on_bad_row=self.args.on_bad_row, source=source)
        args = self.args
        examples = encode_once(
            [located(dataset, str(dataset) if isinstance(dataset, str) else source)],
            self.encoder,
            counts,
            lambda counts: encode_rows(
                self._opened(dataset)(counts), self.encoder, counts, num_proc=args.dataset_num_proc
            ),
            reading={"rule": [args.score_rule, args.score_threshold], "columns": args.column_names()},
            cache=args.dataset_cache,
        )
        if self.args.process_index == 0:
            level = logging.WARNING if counts.has_findings else logging.INFO
            logger.log(level, "\n".join(counts.lines()))
        return self._judged(examples, source)

    def _opened(self, dataset: Any) -> Callable[[DataCounts], Iterator[PreferenceRow]]:
        return partial(read_rows, dataset, rule=rule_of(self.args), columns=self.args.column_names())

    def _opened_in_steps(self, dataset: Any, counts: DataCounts) -> Iterator[PreferenceRow]:
        with _told_to_a_script():
            yield from self._opened(dataset)(counts)

    def _streamed(
        self, dataset: datasets.IterableDataset | ExampleStream, fit: Sequence[nn.Module]
    ) -> ExampleStream:
        """Returns the stream, which judges each example when it is read, as a dataset is judged as a whole."""
        if not isinstance(dataset, ExampleStream):
            counts = DataCounts(on_bad_row=self.args.on_bad_row, source="train_dataset")
            dataset = ExampleStream(partial(self._opened_in_steps, dataset), self.encoder, counts)
        self.counts["train"] = dataset.counts

        def judge(example: PreferenceExample) -> None:
            alone = ExampleDataset.from_examples([example])
            self._check_pairs(alone)
            for model in fit:
                startup.check_fit(model, alone)

        judge(dataset.first())
        return dataset.for_rank(judge, self.args.process_index, self.args.world_size)

    def _judged(self, dataset: ExampleDataset, source: str) -> ExampleDataset:
        """Returns the dataset if every example has what the objective compares.

        The loss of other examples would silently be zero.
        """
        if not len(dataset):
            raise DataError("holds no example", source)
        sides = {"chosen": dataset.has(Role.CHOSEN), "rejected": dataset.has(Role.REJECTED)}
        for objective in self.objectives:
            if not any(sides[side].any() for side in objective.sides):
                raise DataError(
                    f"holds no {' or '.join(sorted(objective.sides))} response, which {objective.title} needs",
                    source,
                )
        self._check_pairs(dataset)
        return dataset.mismatched(self.encoder.max_length) if self.needs_mismatches else dataset

    def _check_pairs(self, dataset: ExampleDataset) -> None:
        sides = {"chosen": dataset.has(Role.CHOSEN), "rejected": dataset.has(Role.REJECTED)}
        for objective in self.objectives:
            for side, present in sides.items():
                if objective.pairs and not present.all():
                    raise DataError(
                        f"has no {side} response; {objective.title} compares pairs; data with one side "
                        f"train {', '.join(UNPAIRED)}",
                        dataset.row_ids[int(present.argmin())],
                    )
