"""InfoPOTrainer: transformers' Trainer with preference objectives. It contains no mathematics.

A step is the same for all objectives. It computes log-probs of the batch's responses under the policy (`logps`) and the
reference (`reference`), and loss terms (`losses`). Each term is divided by its count in the whole optimizer step.
"""

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from infopo import (
    checkpoints,
    durable,
    late_failures,
    learning,
    models,
    noise,
    ranks,
    run_state,
    sharding,
    startup,
)
from infopo.arguments import InfoPOConfig, refuse_arguments
from infopo.data import sampling
from infopo.data.counts import DataCounts
from infopo.data.examples import ExampleDataset
from infopo.data.packing import PreferenceCollator, select
from infopo.data.streaming import ExampleStream
from infopo.errors import (
    NonFiniteLossError,
    UnsupportedArgumentError,
)
from infopo.finite import FiniteWatch
from infopo.intake import Intake, RawDataset
from infopo.logps import attention, router
from infopo.logps.forward import response_logps
from infopo.losses.catalog import mixture_in_words
from infopo.losses.coupling import StepCoupling
from infopo.losses.registry import loss_function, step_statistic
from infopo.metrics import (
    MetricRule,
    MetricSums,
    absent_in_training,
    non_finite_rows,
    preference_metrics,
)
from infopo.model_card import Card, render, tags_of
from infopo.output import get_logger, shown
from infopo.policy_setup import name_of, set_up_policy
from infopo.records import PER, LossTerms, PackedBatch, ResponseLogps, Role, to_device
from infopo.reference import (
    StoredReference,
    is_exact,
    reference_sides,
    tolerance,
)
from infopo.reference_setup import ReferenceBuilder
from infopo.reference_store import ReferenceStore
from infopo.saving import SavingTrainer
from infopo.secrets import masked

logger = get_logger(__name__)


class InfoPOTrainer(SavingTrainer):
    """Aligns a causal language model with preference data.

    The interface is that of TRL's `DPOTrainer`. The loss is InfoPO with β = 1, unless `args` name another.

    Args:
        model: The SFT policy: a `PreTrainedModel` or `PeftModel`, or the name or folder of one.
        ref_model: The frozen reference, or None for the policy as it is now (see `InfoPOConfig.reference`).
        args: Settings. By default those of InfoPO, with the output folder `<model>-InfoPO`.
        data_collator: None, or a `PreferenceCollator`.
        train_dataset: Preference rows (`datasets.Dataset` in a shape of `data/shapes.py`) or an `ExampleDataset`. With
            `max_steps` it can be a stream, i.e. a `datasets.IterableDataset` or an `ExampleStream`.
        eval_dataset: Rows of the same kinds, of which a stream is read to its end, or a dict of them, each of which is
            evaluated under its name.
        processing_class: The tokenizer, or None for the one that belongs to the model.
        compute_metrics: Must be None, because there are no logits or labels to pass (use callbacks).
        callbacks: As in `Trainer`.
        optimizers: As in `Trainer`.
        quantization_config: Argument of `from_pretrained`, if `model` is a name.
        peft_config: Adapter that is added to the model and trained alone.

    Raises:
        ConfigError: Settings contradict each other.
        UnsupportedArgumentError: An argument cannot be honoured.
        DataError: A row cannot be used (unless `on_bad_row="skip"`). The message names file and row.
        ModelError: Model, tokenizer or adapter cannot be used.
    """

    loss_is_scaled_for_ga = True
    args: InfoPOConfig
    control: TrainerControl
    train_dataset: ExampleDataset | ExampleStream
    eval_dataset: ExampleDataset | dict[str, ExampleDataset] | None

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: nn.Module | None = None,
        args: InfoPOConfig | None = None,
        data_collator: PreferenceCollator | None = None,
        train_dataset: RawDataset | ExampleStream | None = None,
        eval_dataset: RawDataset | Mapping[str, RawDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: learning.Optimizers = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        refuse_arguments(
            model, ref_model, args, data_collator, train_dataset, compute_metrics, quantization_config
        )
        self.base_name = name_of(model)
        args = args or InfoPOConfig(
            output_dir=f"{(self.base_name or 'model').rstrip('/').split('/')[-1]}-InfoPO"
        )
        # The seed is set before an adapter is initialised at random.
        set_seed(args.seed)
        policy = set_up_policy(
            model, ref_model, args, processing_class, optimizers[0], quantization_config, peft_config
        )
        self._changed_config, self._quiet = policy.changed_config, policy.quiet
        self._router_coef, self.logps_in_words = policy.router_coef, policy.path
        self.mixture = args.mixture()
        self._loss_functions = [(loss_function(n, p), weight) for n, p, weight in self.mixture]
        self._intake = Intake.of(args, policy.tokenizer)
        fit = [each for each in (policy.model, ref_model) if each is not None]
        train_examples = self._intake.training(train_dataset, fit)
        eval_examples = self._intake.evaluation(eval_dataset)
        for each in fit:
            startup.check_fit(each, train_examples, eval_examples)
        learning.refuse_schedule(args, optimizers, _length(train_examples))
        late_failures.check_best_metric(args, eval_examples, callbacks or [], trainer=type(self))
        self._has_own_collator = data_collator is None
        super().__init__(
            model=policy.model,
            args=args,
            data_collator=data_collator or startup.collator(policy.model, args, self._router_coef),
            train_dataset=train_examples,
            eval_dataset=eval_examples,
            processing_class=policy.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        ranks.leave_at_exit()
        self.add_callback(ranks.StartLine(logger.info))
        startup.refuse_processes(self.args, policy.model, train_examples, self.accelerator)
        if ranks.is_sharded(self.accelerator):
            self.data_collator = data_collator or PreferenceCollator()
        self._start_records()
        self.dataset_names: Sequence[str] = ()
        if hasattr(policy.model, "add_model_tags"):
            policy.model.add_model_tags(tags_of(self.mixture))  # type: ignore[operator]
        if not ranks.is_sharded(self.accelerator):
            self._check_gradients(train_examples)
        name = model if isinstance(model, str) else ""
        references = ReferenceBuilder(
            self.model,
            args,
            self.accelerator,
            self.mixture,
            policy_name=name,
            adapter_is_fresh=peft_config is not None,
            quantization_config=quantization_config,
            on_path=self._take_path,
        )
        with self._compiling():
            choice = references.choose(ref_model, train_examples, eval_examples)
            if sharding.is_fsdp(self.accelerator):
                self.shard()
                self._check_gradients(train_examples)
            self._references = replace(references, policy=self.model)
            self._setup, self.train_dataset, self.eval_dataset = self._references.build(
                choice, train_examples, eval_examples
            )
        self._sharing = [
            weakref.ref(each)
            for each in (policy.model, ref_model, self.ref_model)
            if each is not None and attention.is_enabled(each)
        ]
        self._log_description()

    def _start_records(self) -> None:
        """Sets what is kept between the calls of a step: metrics, step statistics, and the rows of a step."""
        self._metric_rule = MetricRule.of(self.mixture)
        self._metric_sums = {"train": MetricSums(), "eval": MetricSums()}
        self._step_record: list[tuple[PackedBatch, ResponseLogps, LossTerms]] = []
        self._unseen_step: list[list[PackedBatch]] = []
        statistics = [step_statistic(n, p) for n, p, _ in self.mixture]
        self._coupling = StepCoupling(statistics, self.args.device, self._gather)
        self._aux_loss: Tensor | None = None
        self._aux_share = 1.0
        self._finite = FiniteWatch()
        self._is_checked = False
        self._has_trained = False
        self._is_running = False

    def _check_gradients(self, dataset: ExampleDataset | ExampleStream) -> None:
        """Refuses a policy whose parameters get no gradient."""
        over_ranks = self._summed if ranks.is_sharded(self.accelerator) else None
        learning.check_gradients(
            self.model, startup.first(dataset), self.args, self.accelerator.autocast, self._quiet, over_ranks
        )

    def description(self) -> list[str]:
        """Returns what was set up, in lines: objective, reference, store, path of log-probs, dropout, absent metrics.

        The constructor logs them, and the command line prints them.
        """
        sides = " and ".join(sorted(self.reference_sides)) or "no"
        lines = [
            f"objective: {self.objective_in_words()}",
            f"reference: {self.reference_in_words}, for {sides} responses",
        ]
        if self.reference_store is not None:
            lines.append(f"reference store: {self.reference_store.in_words()}")
        lines.append(f"log-probs: {self.logps_in_words}")
        lines.append(self._dropout_in_words())
        lines.append(absent_in_training(self._metric_rule, self.reference_sides) or "")
        return [shown(line) for line in lines if line]

    def _dropout_in_words(self) -> str:
        if not self.args.disable_dropout:
            return ""
        return late_failures.dropout_in_words(self.model, is_fresh=self._references.adapter_is_fresh)

    def _log_description(self) -> None:
        if self.is_world_process_zero():
            is_changed = not self._references.adapter_is_fresh
            for line in self.description():
                is_warning = is_changed and line.startswith("dropout: ")
                logger.log(logging.WARNING if is_warning else logging.INFO, line)

    @property
    def data_counts(self) -> dict[str, DataCounts]:
        """What happened to the rows of each dataset: `train`, and `eval` or the name of the evaluation set."""
        return self._intake.counts

    # ---- objective and reference -------------------------------------------------------------------------------

    def objective_in_words(self) -> str:
        """Returns name and parameters of the loss, e.g. `InfoPO (beta=1.0, length_normalized=False, cap=5.0)`."""
        return mixture_in_words(self.mixture)

    @property
    def reference_sides(self) -> frozenset[str]:
        """Sides whose reference log-probs are computed for training."""
        return reference_sides(self.mixture, self.args.reference_sides, "train")

    @property
    def eval_reference_sides(self) -> frozenset[str]:
        """Sides whose reference log-probs are computed for evaluation."""
        return reference_sides(self.mixture, self.args.reference_sides, "eval")

    @property
    def policy_hash(self) -> str:
        """Hash of the policy's weights before training."""
        return self._setup.policy_hash

    @property
    def reference_hash(self) -> str | None:
        """Hash of the reference's weights, or None if nothing needs a reference."""
        return self._setup.hash

    @property
    def reference_in_words(self) -> str:
        """Description of the reference."""
        return self._setup.description

    @property
    def reference_store(self) -> ReferenceStore | None:
        """The store of precomputed reference log-probs, or None if there is none."""
        return self._setup.store

    @property
    def ref_model(self) -> nn.Module | None:
        """The model that runs beside the policy as its reference, or None."""
        return self._setup.model

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Lets the models share prefixes within the block, after which they have the attention they came with."""
        if self._is_running:  # an evaluation during training
            yield
            return
        self._is_running = True
        sharing = [model for each in self._sharing if (model := each()) is not None]
        try:
            with attention.lent(sharing), self._compiling():
                yield
        finally:
            self._is_running = False

    def _compiling(self) -> contextlib.AbstractContextManager[None]:
        in_parts = attention.is_enabled(self.model)
        return startup.compiling(self.accelerator, self.args, in_parts=in_parts)

    def _take_path(self, description: str) -> None:
        """Collates batches for the path on which the policy's log-probs are now computed, which counts tokens."""
        self.logps_in_words = description
        if self._has_own_collator and not ranks.is_sharded(self.accelerator):
            self.data_collator = startup.collator(self.model, self.args, self._router_coef)

    # ---- data ----------------------------------------------------------------------------------------------------

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
        """Overrides `Trainer`'s to fill up ranks with empty examples, where accelerate would repeat rows."""
        return sampling.for_evaluation(eval_dataset, self.args)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Overrides `Trainer`'s, which moves tensors in dicts and lists, to move packed batches to the device."""
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
        self._unseen_step = batches
        return batches, counts

    # ---- training ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains as `Trainer` does, but refuses a checkpoint that was made with another reference, objective or data.

        Raises:
            CheckpointError: The checkpoint does not belong to this run.
        """
        late_failures.check_best_metric(
            self.args, self.eval_dataset, self.callback_handler.callbacks, trainer=type(self)
        )
        self._coupling.reset()
        if resume_from_checkpoint:
            resume_from_checkpoint = self.find_checkpoint(resume_from_checkpoint)
            self._has_trained = True
            if self._coupling.keeps_averages:
                self._coupling.reset(checkpoints.read_averages(Path(resume_from_checkpoint)))
        self._metric_sums["train"], self._step_record, self._finite = MetricSums(), [], FiniteWatch()
        with self._running():
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: list[PackedBatch], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Overrides `Trainer`'s to run a device batch in pieces, after checks and a pass for step statistics.

        A device batch is a list of pieces of at most `max_tokens_per_forward` tokens. `Trainer`'s own training step
        runs once per piece, and gradients are synchronised over ranks after the last.
        """
        self._has_trained = True
        # transformers sets the optimizer's mode in its part of the step, but our own passes come before.
        self._set_optimizer("train")
        if not self._is_checked:
            self._check_model(model, inputs[0].to(self.args.device))
        self._look_ahead(model)
        loss = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(inputs):
            is_last = number == len(inputs) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                if self._intake.needs_mismatches:  # their part is done: z has no gradient
                    batch = _only(batch, {Role.CHOSEN, Role.REJECTED})
                self._aux_share = _row_tokens(batch) / max(1, sum(map(_row_tokens, inputs)))
                loss = loss + super().training_step(model, batch, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._check_finite()
        return loss

    def _look_ahead(self, model: nn.Module) -> None:
        """Computes the step statistics of the objectives before a step's first gradient, by a pass without gradient.

        Only responses that enter the statistics are run. Dropout is off, because a statistic is one of the policy
        itself.
        """
        batches, self._unseen_step = self._unseen_step, []
        roles = self._coupling.roles
        if not batches or not roles:
            return
        was_training = model.training
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            seen = [
                self._logps(model, _only(b, roles))
                for inputs in batches
                for b in self._prepare_inputs(inputs)
            ]
        model.train(was_training)
        self._metric_sums["train"].add(self._coupling.advance(seen))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PackedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Overrides `Trainer`'s to return this piece's share of the optimizer step's loss.

        The share is Σ_terms Σ values / count, with the counts of the whole step. It is multiplied by the number of
        ranks, because their gradients are averaged.
        """
        noise.silence(self._quiet)
        logps = self._logps(model, inputs)
        terms = self._terms(logps, self._coupling.values)
        self._record_metrics("train", logps)
        self._record_aux("train")
        detached = [replace(term, values=term.values.detach()) for term in terms]
        self._step_record.append((inputs, replace(logps, policy=logps.policy.detach()), detached))
        counts = num_items_in_batch if num_items_in_batch is not None else inputs.counts
        counts = counts.to(logps.policy.dtype).clamp(min=1)
        loss = sum(
            (term.values.sum() / counts[PER.index(term.per)] for term in terms), logps.policy.sum() * 0
        )
        loss = loss * self.args.world_size
        if self._aux_loss is not None:  # a mean over device batches and ranks, as in TRL
            steps = getattr(self, "current_gradient_accumulation_steps", 1)
            loss = loss + self._router_coef * self._aux_share / steps * self._aux_loss
        self._finite.note([loss, *(term.values.sum() for term in detached)])
        return loss

    def _logps(self, model: nn.Module, batch: PackedBatch, mode: str = "train") -> ResponseLogps:
        with router.aux_losses(self._router_coef != 0) as found:
            policy = response_logps(model, batch)
        self._aux_loss = router.mean(found)
        reference = self._setup.train if mode == "train" else self._setup.evaluation
        return batch.with_logps(policy, reference(batch) if reference.sides else None)

    def _record_aux(self, mode: str) -> None:
        if self._aux_loss is not None:
            share = self._aux_share
            self._metric_sums[mode].add({"aux_loss": (self._aux_loss.detach() * share, share)})

    def _terms(self, logps: ResponseLogps, step_values: list[Tensor | None]) -> LossTerms:
        return [
            replace(term, values=weight * term.values)
            for (function, weight), value in zip(self._loss_functions, step_values, strict=True)
            for term in function(replace(logps, statistic=value))
        ]

    def _check_finite(self) -> None:
        """Refuses an optimizer step whose loss is not finite, before it is taken."""
        record, self._step_record = self._step_record, []
        if self._finite.answer():
            return
        rows = [row for batch, logps, terms in record for row in non_finite_rows(batch, logps, terms)]
        raise NonFiniteLossError(
            f"step {self.state.global_step + 1}: the loss is not finite; rows: {', '.join(rows) or 'unknown'}. "
            f"No update was made. {run_state.kept(self.args.output_dir)}. A lower learning_rate, which takes effect "
            "from there on, or bf16 in place of fp16, is the usual remedy."
        )

    def _check_model(self, model: nn.Module, batch: PackedBatch) -> None:
        """Runs the checks of the first step (see `startup`) on the model as it is distributed."""
        self._is_checked = True
        exact = is_exact(self.model, self.args.device, self.accelerator.autocast)
        rounding = startup.check_log_probs(
            model, self.train_dataset, self.args, exact=exact, quiet=self._quiet
        )
        if self._setup.policy_is_reference and self.reference_sides and self.state.global_step == 0:
            startup.check_step_0(
                model,
                batch,
                self._setup.train,
                self._quiet if self.args.disable_dropout else None,
                partial(tolerance, is_exact=exact, noise=rounding),
                partial(ranks.largest, args=self.args) if ranks.is_sharded(self.accelerator) else int,
            )

    # ---- metrics, evaluation, checkpoints ------------------------------------------------------------------------

    def _record_metrics(self, mode: str, logps: ResponseLogps) -> None:
        sides = self.reference_sides if mode == "train" else self.eval_reference_sides
        self._metric_sums[mode].add(*preference_metrics(logps, self._metric_rule, sides))

    def _gather(self, values: Tensor) -> Tensor:
        return self.accelerator.gather(values) if self.args.world_size > 1 else values

    def _summed(self, values: Tensor) -> Tensor:
        values = values.to(self.args.device)
        return self.accelerator.reduce(values, reduction="sum") if self.args.world_size > 1 else values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Overrides `Trainer`'s to add the metrics since the last record, by one reduction over ranks."""
        if "loss" in logs:
            logs |= self._metric_sums["train"].reduce(self._gather)
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluates as `Trainer` does. A dataset given here is tokenized, and its reference computed, as by the
        constructor.

        Raises:
            ConfigError: The reference was computed before training, and its model cannot be had any more.
        """
        with self._running():
            if eval_dataset is not None and not isinstance(eval_dataset, str):
                eval_dataset = self._intake.evaluation(eval_dataset)
                startup.check_fit(self.model, eval_dataset)
                if isinstance(self._setup.evaluation, StoredReference) and self.eval_reference_sides:
                    eval_dataset = self._references.with_late_values(
                        self._setup,
                        eval_dataset,
                        self.model,
                        self.train_dataset,
                        has_trained=self._has_trained,
                    )
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `Trainer`'s, which returns logits and labels, to refuse. It leaves out everything.

        Raises:
            UnsupportedArgumentError: Always.
        """
        raise UnsupportedArgumentError(
            "predict: no logits are kept to return; evaluate(dataset, metric_key_prefix='test') gives the metrics"
        )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Overrides `Trainer`'s to compute loss and metrics over the whole set, with each example once.

        They are sums divided by counts, whatever the batches and ranks. Step statistics are computed over the whole
        set, so that MINE equals DV here. `Trainer`'s loop gathers logits and labels, which do not exist here. This one
        leaves out predictions and `compute_metrics`.
        """
        model = self._wrap_model(self.model, training=False)
        is_prepared = sharding.is_fsdp(self.accelerator) or len(self.accelerator._models) > 0
        if model is self.model and not is_prepared:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        self._set_optimizer("eval")
        self.callback_handler.eval_dataloader = dataloader
        losses = MetricSums()
        seen: list[tuple[Tensor, ResponseLogps]] = []
        # An evaluation that was interrupted has left a part of its sums.
        self._metric_sums["eval"] = MetricSums()
        with torch.no_grad(), self.accelerator.autocast():
            for inputs in dataloader:
                pieces = self._prepare_inputs(inputs)
                for batch in pieces:
                    self._aux_share = _row_tokens(batch) / max(1, sum(map(_row_tokens, pieces)))
                    logps = self._logps(model, batch, "eval")
                    self._record_aux("eval")
                    seen.append((batch.counts, logps))
                    self._record_metrics("eval", logps)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        statistics, of_set = self._coupling.over([logps for _, logps in seen])
        self._metric_sums["eval"].add(of_set)
        for numbers, logps in seen:
            counts = numbers.tolist()
            for index, term in enumerate(self._terms(logps, statistics)):
                losses.add({f"{index}": (term.values.sum(), int(counts[PER.index(term.per)]))})
        metrics = {"loss": sum(losses.reduce(self._gather).values())}
        metrics |= self._metric_sums["eval"].reduce(self._gather)
        metrics["loss"] += self._router_coef * metrics.get("aux_loss", 0.0)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset)
        )

    def floating_point_ops(self, inputs: Any) -> float:
        """Returns 6 x parameters x tokens of the batch, for forward and backward pass without attention.

        This overrides `Trainer`'s, which expects a dict.
        """
        parameters = self.model.num_parameters(exclude_embeddings=True)
        return 6.0 * parameters * sum(_row_tokens(batch) for batch in inputs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Overrides `Trainer`'s, which counts tokens in a dict."""
        if self.args.include_num_input_tokens_seen != "no":
            tokens = torch.tensor([sum(_row_tokens(batch) for batch in inputs)], device=self.args.device)
            self.state.num_input_tokens_seen += int(self._gather(tokens).sum())

    def _identity(self) -> dict[str, Any]:
        return {
            "reference": self.reference_hash,
            "reference_sides": sorted(self.reference_sides),
            "objective": [[name, parameters, weight] for name, parameters, weight in self.mixture],
            "data": self.data_hash(),
        }

    def card(
        self, model_name: str | None = None, datasets: Sequence[str] = (), tags: Sequence[str] = ()
    ) -> Card:
        """What the model card says of this run."""
        args = self.args
        hub = (args.hub_model_id or "").split("/")[-1]
        return Card(
            name=model_name or hub or Path(args.output_dir).resolve().name,
            base=self.base_name,
            mixture=self.mixture,
            reference=self.reference_in_words,
            datasets=datasets or self.dataset_names,
            rows=_length(self.train_dataset),
            settings={
                "learning rate": args.learning_rate,
                "steps": self.state.global_step,
                "rows per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
                "longest row": f"{args.max_length} tokens",
                "seed": args.seed,
            },
            is_adapter=models.is_peft_model(self.model),
            tags=tags,
        )

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Overrides `Trainer`'s to write the card of this library to `output_dir`, as TRL's trainers do theirs.

        It leaves out transformers' other arguments (language, license, ...), which have no effect.
        """
        if self.is_world_process_zero():
            data = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name or ())
            text = render(self.card(model_name, data, [tags] if isinstance(tags, str) else list(tags or ())))
            durable.write(Path(self.args.output_dir) / "README.md", [masked(text).encode()])

    def _card_text(self) -> str:
        return masked(render(self.card()))

    def data_hash(self) -> str | None:
        """SHA-256 of the tokens that are trained on; None of a stream, whose end is not known."""
        return self.train_dataset.content_hash() if isinstance(self.train_dataset, ExampleDataset) else None

    @property
    def kept_averages(self) -> list[float]:
        """Logarithm of each objective's moving average (nats), NaN if it keeps none."""
        return [float(average) for average in self._coupling.averages]


def _length(dataset: ExampleDataset | ExampleStream) -> int | None:
    return len(dataset) if isinstance(dataset, ExampleDataset) else None


def _only(batch: PackedBatch, roles: set[Role]) -> PackedBatch:
    """The batch with its responses of these roles. Waits for the device."""
    return select(batch, [i for i, role in enumerate(batch.roles) if role in roles])


def _row_tokens(batch: PackedBatch) -> int:
    """Tokens of all responses with their prompts, as rows."""
    start = batch.segment_start
    return sum(start[s + 1] - start[s] for r in range(batch.num_responses) for s in batch.path(r))
