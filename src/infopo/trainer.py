"""InfoPOTrainer: transformers' Trainer with preference objectives. It contains no mathematics.

A step is the same for all objectives. It computes log-probs of the batch's responses under the policy (`logps`) and the
reference (`reference`), and loss terms (`losses`). Each term is divided by its count in the whole optimizer step.

Methods that override `Trainer`'s say what they replace. Those that do not call `Trainer`'s own say what they leave out.
"""

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, set_seed
from transformers.trainer_utils import EvalLoopOutput

from infopo import (
    checkpoints,
    late_failures,
    learning,
    noise,
    observing,
    printing,
    ranks,
    rehearsal,
    sharding,
    startup,
)
from infopo.arguments import InfoPOConfig
from infopo.constructor import refuse_arguments
from infopo.data.examples import ExampleDataset
from infopo.data.packing import PreferenceCollator
from infopo.data.streaming import ExampleStream
from infopo.describing import DescribedTrainer
from infopo.ending import ClosingSummary
from infopo.errors import UnsupportedArgumentError
from infopo.intake import Intake, RawDataset
from infopo.judging import Judge
from infopo.logps import attention
from infopo.losses import foreign
from infopo.losses.coupling import Averages
from infopo.measuring import Instruments
from infopo.model_card import tags_of
from infopo.observing import Observer, Subject
from infopo.output import get_logger
from infopo.policy_setup import name_of, set_up_policy, short_name
from infopo.records import PackedBatch
from infopo.reference import StoredReference, is_exact, tolerance
from infopo.reference_setup import ReferenceBuilder, ReferenceSetup
from infopo.refusals import RefusingTrainer, refuse_uses
from infopo.run_files import RunFiles
from infopo.step_loss import EvaluationLoss, RunLoss, StepLoss

logger = get_logger(__name__)


class InfoPOTrainer(RefusingTrainer, DescribedTrainer):
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
        others: Must be empty. Arguments of other trainers are refused by name.

    Raises:
        ConfigError: Settings contradict each other.
        UnsupportedArgumentError: An argument cannot be honoured.
        DataError: A row cannot be used (unless `on_bad_row="skip"`). The message names file and row.
        ModelError: Model, tokenizer or adapter cannot be used.

    Example:
        >>> import tempfile
        >>> from infopo.lab import policy_path
        >>> rows = [{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 11"}]
        >>> args = InfoPOConfig(tempfile.mkdtemp(), use_cpu=True, reference_store="off", dataset_cache="off")
        >>> trainer = InfoPOTrainer(str(policy_path()), args=args, train_dataset=rows)
        >>> trainer.data_counts["train"].used
        1
        >>> trainer.objective_in_words()
        'InfoPO (beta=1.0, length_normalized=False, cap=5.0)'
    """

    loss_is_scaled_for_ga = True
    _observer: Observer | None = None
    dataset_names: Sequence[str] = ()
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
        callbacks: list[TrainerCallback | type[TrainerCallback]] | None = None,
        optimizers: learning.Optimizers = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        refuse_uses(type(self), callbacks or [])
        refuse_arguments(
            model, ref_model, args, data_collator, train_dataset, compute_metrics, quantization_config,
            optimizers, processing_class, callbacks, others,
        )  # fmt: skip
        self.base_name = name_of(model)
        args = args or InfoPOConfig(output_dir=f"{short_name(self.base_name)}-InfoPO")
        args.check()
        rehearsal.refuse(args, type(self), given=(optimizers[0] is not None, optimizers[1] is not None))
        # The seed is set before an adapter is initialised at random.
        set_seed(args.seed)
        policy = set_up_policy(
            model, ref_model, args, processing_class, optimizers[0], quantization_config, peft_config
        )
        self._changed_config, self._quiet = policy.changed_config, policy.quiet
        self._router_coef, self.logps_in_words = policy.router_coef, policy.path
        self.mixture = args.mixture()
        self._intake = Intake.of(args, policy.tokenizer)
        train_examples, eval_examples = self._intake.both(
            train_dataset, eval_dataset, fit=[each for each in (policy.model, ref_model) if each is not None]
        )
        learning.refuse_schedule(args, optimizers, _length(train_examples))
        late_failures.check_best_metric(args, eval_examples, callbacks or [], trainer=type(self))
        super().__init__(
            model=policy.model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_examples,
            eval_dataset=eval_examples,
            processing_class=policy.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        startup.refuse_processes(self.args, policy.model, train_examples, self.accelerator)
        self._has_own_collator = data_collator is None
        self._references = ReferenceBuilder(
            self.model,
            args,
            self.accelerator,
            self.mixture,
            policy_name=model if isinstance(model, str) else "",
            adapter_is_fresh=peft_config is not None,
            quantization_config=quantization_config,
            on_path=self._take_path,
        )
        self._set_up_run(policy.model, ref_model)

    def _set_up_run(self, policy: nn.Module, ref_model: nn.Module | None) -> None:
        """Sets what the steps of a run need, when transformers' part of the constructor has set up the processes."""
        ranks.leave_at_exit()
        printing.shorten(self)
        self.add_callback(ranks.StartLine(logger.info))
        self.add_callback(RunFiles(self))
        self.add_callback(Judge())
        self.add_callback(ClosingSummary())
        if hasattr(policy, "add_model_tags"):
            policy.add_model_tags([*tags_of(self.mixture), *self._tag_names])  # type: ignore[operator]
        self._take_path(self.logps_in_words)
        self._setup = self._set_up_reference(ref_model)
        both = (policy, ref_model, self.ref_model)
        self._sharing = [weakref.ref(m) for m in both if m is not None and attention.is_enabled(m)]
        self._loss = RunLoss(
            self.mixture, self.args.device, self._gather, self.args.world_size, self._router_coef
        )
        self._steps = StepLoss(self._loss, self._setup.train)
        self._is_tried = self._is_checked = self._has_trained = self._is_running = False
        self._log_description()

    def _set_up_reference(self, ref_model: nn.Module | None) -> ReferenceSetup:
        """Returns the reference, and sets the data with its precomputed values. A sharded policy is cut up before."""
        sharding.take_precision(self.model, self.accelerator)
        if not ranks.is_sharded(self.accelerator):
            self._check_gradients(self.train_dataset)
        with self._compiling():
            choice = self._references.choose(ref_model, self.train_dataset, self.eval_dataset)
            if sharding.is_fsdp(self.accelerator):
                self.shard()
                self._check_gradients(self.train_dataset)
                self._references = replace(self._references, policy=self.model)
            setup, self.train_dataset, self.eval_dataset = self._references.build(
                choice, self.train_dataset, self.eval_dataset
            )
        return setup

    def _check_gradients(self, dataset: ExampleDataset | ExampleStream) -> None:
        """Refuses a policy whose parameters get no gradient."""
        over_ranks = self._summed if ranks.is_sharded(self.accelerator) else None
        learning.check_gradients(
            self.model, startup.first(dataset), self.args, self.accelerator.autocast, self._quiet, over_ranks
        )

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Lets the models share prefixes within the block, after which they are as they came: attention, and layers."""
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
        return startup.compiling(self.accelerator, self.args, self.model)

    def _take_path(self, description: str) -> None:
        """Collates batches for the path on which the policy's log-probs are now computed, which counts tokens."""
        self.logps_in_words = description
        if not self._has_own_collator:
            return
        is_sharded = ranks.is_sharded(self.accelerator)
        self.data_collator = (
            PreferenceCollator() if is_sharded else startup.collator(self.model, self.args, self._router_coef)
        )

    # ---- training ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Overrides `Trainer`'s to refuse a checkpoint that was made with another reference, objective or data.

        Raises:
            CheckpointError: The checkpoint does not belong to this run.
        """
        late_failures.check_best_metric(
            self.args, self.eval_dataset, self.callback_handler.callbacks, trainer=type(self)
        )
        averages = None
        if resume_from_checkpoint:
            resume_from_checkpoint = self.find_checkpoint(resume_from_checkpoint)
            self._has_trained = True
            if self._loss.coupling.keeps_averages:
                averages = checkpoints.read_averages(Path(resume_from_checkpoint))
        self._steps.start(averages)
        checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._observer = Observer(self.args, self.subject, super().log, checkpoint)
        self.add_callback(self._observer)
        try:
            with self._running():
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.remove_callback(self._observer)
            self._observer = None

    def subject(self) -> Subject:
        """Returns what is measured during training: the policy as it is now, and the instruments for it."""
        held_out = self.eval_dataset
        if isinstance(held_out, dict):
            held_out = next(iter(held_out.values()), None)
        is_sharded = ranks.is_sharded(self.accelerator)
        scaler = getattr(self.accelerator, "scaler", None)
        instruments = Instruments(
            model=self.model,
            tokenizer=self.processing_class,
            collate=self.data_collator,
            context=self.compute_loss_context_manager,
            device=self.args.device,
            batch_size=self.args.per_device_train_batch_size,
            quiet=self._quiet,
            reference=self._setup.train,
            responses=lambda model, batch, reference: self._loss.piece(model, batch, reference, 1.0).logps,
            slopes=self._loss.slopes,
            summed=self._summed if is_sharded else lambda value: value,
            # Ranks that hold all of the gradient have the same one. Those of FSDP have their parts only by exchanging.
            unsynchronised=contextlib.nullcontext
            if is_sharded
            else partial(self.accelerator.no_sync, self.model_wrapped),
            loss_scale=scaler.get_scale if scaler is not None else lambda: 1.0,
        )
        return Subject(
            instruments,
            held_out if held_out is not None else self.train_dataset,
            "held-out examples" if held_out is not None else "training examples",
            starts_as_reference=self._setup.policy_is_reference or not self.reference_sides,
            without_samples=None if ranks.has_all_weights(self.accelerator) else observing.SHARDED,
            without_gradients=observing.gradient_obstacle(
                self.model, has_deepspeed=self.is_deepspeed_enabled
            ),
        )

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
        ahead, self.next_step = self.next_step, []
        self._steps.look_ahead(model, ahead, self.compute_loss_context_manager)
        loss = torch.zeros((), device=self.args.device)
        for batch, is_last in self._steps.pieces(inputs):
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model), self._weighing():
                loss = loss + super().training_step(model, batch, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._steps.refuse_non_finite(self.state.global_step + 1, self.args.output_dir)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PackedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Overrides `Trainer`'s, which reads the loss from the model's output, to return a piece's share of the step's.

        It leaves out label smoothing, because there are no logits. If it is overridden, it returns the loss that the
        step would have if all of it were like this piece, as TRL's does of a batch, so that what is added to it or
        multiplied by has the same weight however the step is cut. `_weighing` then takes the piece's share.

        Raises:
            UnsupportedArgumentError: Outputs are asked for.
        """
        if return_outputs:
            raise UnsupportedArgumentError(
                "compute_loss: no logits are kept to return; leave return_outputs out"
            )
        noise.silence(self._quiet)
        is_alone = self._has_own_loss and num_items_in_batch is None
        router_weight = self.args.world_size if is_alone else self._weight
        loss = self._steps.of_piece(model, inputs, num_items_in_batch, router_weight)
        if not self._has_own_loss:
            return loss
        return loss / (self.args.world_size if is_alone else self._weight or 1.0)

    @property
    def _has_own_loss(self) -> bool:
        """Whether `compute_loss` is that of a subclass, or one that a script has set."""
        return "compute_loss" in vars(self) or type(self).compute_loss is not InfoPOTrainer.compute_loss

    @property
    def _weight(self) -> float:
        """The part of the optimizer step's tokens that the current piece has."""
        return self._steps.share / getattr(self, "current_gradient_accumulation_steps", 1)

    @contextlib.contextmanager
    def _weighing(self) -> Iterator[None]:
        """Multiplies what an overridden `compute_loss` returns by the weight of its piece, within the block."""
        if not self._has_own_loss:
            yield
            return
        given, own = vars(self).get("compute_loss"), self.compute_loss

        def weighed(*args: Any, **kwargs: Any) -> Tensor:
            return own(*args, **kwargs) * self._weight

        self.compute_loss = weighed  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.compute_loss
            if given is not None:
                self.compute_loss = given  # type: ignore[method-assign]

    def _check_model(self, model: nn.Module, batch: PackedBatch) -> None:
        """Runs the checks of the first step (see `startup`) on the model as it is distributed."""
        self._is_checked = True
        exact = is_exact(self.model, self.args.device, self.accelerator.autocast)
        rounding = self._try_log_probs(model, exact)
        if self._setup.policy_is_reference and self.reference_sides and self.state.global_step == 0:
            startup.check_step_0(
                model,
                batch,
                self._setup.train,
                self._quiet if self.args.disable_dropout else None,
                partial(tolerance, is_exact=exact, noise=rounding),
                partial(ranks.largest, args=self.args) if ranks.is_sharded(self.accelerator) else int,
            )

    def _try_log_probs(self, model: nn.Module, exact: bool) -> float:
        """Runs the start-up self-test, and returns the rounding noise that it measures."""
        self._is_tried = True
        return startup.check_log_probs(model, self.train_dataset, self.args, exact=exact, quiet=self._quiet)

    # ---- metrics, evaluation, checkpoints ------------------------------------------------------------------------

    def _summed(self, values: Tensor) -> Tensor:
        values = values.to(self.args.device)
        return self.accelerator.reduce(values, reduction="sum") if self.args.world_size > 1 else values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Overrides `Trainer`'s to add the metrics since the last record, by one reduction over ranks."""
        if "loss" in logs:
            logs |= self._steps.metrics()
            logs |= self._observer.take() if self._observer is not None else {}
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Overrides `Trainer`'s to tokenize a dataset that is given here, and to compute its reference.

        Raises:
            ConfigError: The reference was computed before training, and its model cannot be had any more.
        """
        late_failures.check_evaluation(eval_dataset, self.eval_dataset)
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

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Overrides `Trainer`'s, which gathers logits and labels, to compute loss and metrics over the whole set.

        It leaves out predictions and `compute_metrics`, because there are no logits.
        """
        model = self._wrap_model(self.model, training=False)
        is_prepared = sharding.is_fsdp(self.accelerator) or len(self.accelerator._models) > 0
        if model is self.model and not is_prepared:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        self._set_optimizer("eval")
        self.callback_handler.eval_dataloader = dataloader
        if self._has_own_loss:
            logger.warning(
                "compute_loss is overridden: it trains, and evaluation gives the loss of the objective"
            )
        loss = EvaluationLoss(self._loss, self._setup.evaluation)
        with torch.no_grad(), self.accelerator.autocast():
            if not self._is_tried:  # nothing was trained yet, and numbers should not be wrong before
                self._try_log_probs(model, is_exact(self.model, self.args.device, self.accelerator.autocast))
            for inputs in dataloader:
                loss.add(model, self._prepare_inputs(inputs))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in loss.metrics().items()}
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset)
        )

    def _identity(self) -> dict[str, Any]:
        return {
            "reference": self.reference_hash,
            "reference_sides": sorted(self.reference_sides),
            "objective": [[foreign.plain_name(name), *rest] for name, *rest in self.mixture],
            "data": self.data_hash(),
            **({"source of the loss": source} if (source := foreign.sources(self.mixture)) else {}),
        }

    def data_hash(self) -> str | None:
        """SHA-256 of the tokens that are trained on; None of a stream, whose end is not known."""
        return self.train_dataset.content_hash() if isinstance(self.train_dataset, ExampleDataset) else None

    @property
    def kept_averages(self) -> list[Averages]:
        return self._loss.coupling.kept


def _length(dataset: ExampleDataset | ExampleStream) -> int | None:
    return len(dataset) if isinstance(dataset, ExampleDataset) else None
