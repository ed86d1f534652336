"""InfoPOTrainer: transformers' Trainer with preference objectives. It contains no mathematics.

A step is the same for all objectives. It computes log-probs of the batch's responses under the policy (`logps`) and the
reference (`reference`), and loss terms (`losses`). Each term is divided by its count in the whole optimizer step.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from infopo import (
    checkpoints,
    hashing,
    late_failures,
    learning,
    models,
    noise,
    ranks,
    run_state,
    startup,
)
from infopo.arguments import InfoPOConfig, init_kwargs, refuse_arguments
from infopo.catalog import REFERENCE_MODES
from infopo.data.counts import DataCounts
from infopo.data.encode import Encoder, encode_rows
from infopo.data.examples import ExampleDataset
from infopo.data.packing import PreferenceCollator, select
from infopo.data.responses import ScoreRule
from infopo.data.sampling import LengthGroupedEpochs, PaddedSampler
from infopo.data.sources import read_rows
from infopo.data.streaming import ExampleStream
from infopo.errors import (
    DataError,
    NonFiniteLossError,
    RecipeError,
    ReferenceStoreError,
    UnsupportedArgumentError,
    printable,
)
from infopo.late_reference import Context, LateReference, lend
from infopo.logps import attention, router
from infopo.logps.forward import response_logps, with_layout
from infopo.losses.catalog import OBJECTIVES, UNPAIRED
from infopo.losses.coupling import step_parts
from infopo.losses.registry import loss_function, step_statistic
from infopo.metrics import (
    MetricRule,
    MetricSums,
    absent_in_training,
    non_finite_rows,
    preference_metrics,
)
from infopo.model_card import Card, render, tags_of
from infopo.records import PER, LossTerms, PackedBatch, PreferenceExample, ResponseLogps, Role, sum_dtype
from infopo.reference import (
    LiveReference,
    Reference,
    StoredReference,
    identity_of,
    is_exact,
    precompute,
    reference_sides,
    resolve,
    tolerance,
)
from infopo.reference_store import ReferenceStore, check_folder, folder_of
from infopo.saving import SavingTrainer
from infopo.secrets import masked

logger = logging.getLogger(__name__)

RawDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset | list[dict[str, Any]] | ExampleDataset


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
        RecipeError: Settings contradict each other.
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
        config = getattr(model, "config", None)
        name = model if isinstance(model, str) else getattr(config, "_name_or_path", "") or "model"
        args = args or InfoPOConfig(output_dir=f"{name.rstrip('/').split('/')[-1]}-InfoPO")
        # The seed is set before an adapter is initialised at random.
        set_seed(args.seed)
        policy = model
        if isinstance(policy, str):
            policy = models.load_policy(policy, **init_kwargs(args, quantization_config))
        if processing_class is None:
            processing_class = models.load_tokenizer(name, trust_remote_code=args.trust_remote_code)
        for each in (policy, ref_model):
            if each is not None:
                models.refuse_other_classes(each)
        models.set_pad_token(processing_class, policy, args.pad_token)
        # This comes before an adapter is added, whose dropout was asked for, and has no effect while it adds 0.
        self._changed_config = models.disable_dropout(policy) if args.disable_dropout else []
        if peft_config is not None:
            policy = models.add_adapter(policy, peft_config)
        late_failures.check_saving(policy, processing_class, args)
        learning.refuse_frozen(policy, optimizers[0], keeps_float32=bool(args.deepspeed))
        if models.is_peft_model(policy) and args.activation_checkpointing:
            models.let_gradients_reach_adapters(policy)
        if args.disable_dropout and ref_model is not None:
            models.disable_dropout(ref_model)
        self._quiet = noise.random_modules(policy) if args.disable_dropout else []
        self._router_coef = router.coefficient(policy, args.router_aux_loss_coef)
        self.logps_in_words = startup.choose_path(policy, ref_model, args)

        self.mixture = args.mixture()
        self._loss_functions = [(loss_function(n, p), weight) for n, p, weight in self.mixture]
        self._statistics = [step_statistic(n, p) for n, p, _ in self.mixture]
        self._mismatches = any(OBJECTIVES[name].statistic == "kl" for name, _, _ in self.mixture)
        self._encoder = Encoder(
            processing_class,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            on_too_long=args.on_too_long,
            chat_template_kwargs=args.chat_template_kwargs,  # type: ignore[arg-type]  # a dict: __post_init__
            as_chat=args.as_chat,
        )
        self._rule = ScoreRule(args.score_rule, args.score_threshold)
        models_to_fit = [model for model in (policy, ref_model) if model is not None]
        train_examples: ExampleDataset | ExampleStream
        if isinstance(train_dataset, datasets.IterableDataset | ExampleStream):
            if self._mismatches:
                raise RecipeError(
                    f"{self.objective_in_words()}: responses to other prompts cannot be drawn from a stream; load the "
                    "rows into memory (data.streaming: false), or take another objective for unpaired data"
                )
            train_examples = self._streamed(train_dataset, args, models_to_fit)
        else:
            train_examples = self._encode(train_dataset, "train_dataset", args)
        eval_examples = self._encode_all(eval_dataset, args)
        for fitted in models_to_fit:
            startup.check_fit(fitted, train_examples, eval_examples)
        rows = len(train_examples) if isinstance(train_examples, ExampleDataset) else None
        learning.refuse_schedule(args, optimizers, rows)
        late_failures.check_best_metric(args, eval_examples, callbacks or [], trainer=type(self))
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or startup.collator(policy, args, self._router_coef),
            train_dataset=train_examples,
            eval_dataset=eval_examples,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.add_callback(ranks.StartLine())
        if self.args.n_gpu > 1:
            raise UnsupportedArgumentError(
                "torch.nn.DataParallel is not supported, and one process sees several GPUs: start with "
                "`accelerate launch` or `torchrun`, or make one GPU visible with CUDA_VISIBLE_DEVICES"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            if args.max_tokens_per_forward:
                raise UnsupportedArgumentError(
                    "max_tokens_per_forward: ranks would run different numbers of forward passes, on which FSDP and "
                    "DeepSpeed wait for each other; use per_device_train_batch_size and gradient_accumulation_steps"
                )
            startup.refuse_passes_of_unequal_number(policy, train_examples)
            self.data_collator = data_collator or PreferenceCollator()
        per_pass = self.args.train_batch_size * self.args.world_size
        if (
            args.dataloader_drop_last
            and isinstance(train_examples, ExampleDataset)
            and len(train_examples) < per_pass
        ):
            raise RecipeError(
                f"dataloader_drop_last: {len(train_examples)} rows are less than one batch of {per_pass}, so all are "
                "dropped; leave it out, or lower per_device_train_batch_size"
            )
        self._metric_rule = MetricRule.of(self.mixture)
        self._metric_sums = {"train": MetricSums(), "eval": MetricSums()}
        self._step_record: list[tuple[PackedBatch, ResponseLogps, LossTerms]] = []
        self._unseen_step: list[list[PackedBatch]] = []
        self._step_values: list[Tensor | None] = [None] * len(self.mixture)
        self._averages = self._no_averages()
        self._is_checked = False
        self._has_own_collator = data_collator is None
        self._aux_loss: Tensor | None = None
        self._aux_share = 1.0
        self._has_trained = False
        self._given_name = model if isinstance(model, str) else ""
        self.base_name = name if name != "model" else None
        self.dataset_names: Sequence[str] = ()
        if hasattr(policy, "add_model_tags"):
            policy.add_model_tags(tags_of(self.mixture))  # type: ignore[operator]
        self._adapter_is_fresh = peft_config is not None
        if not (
            self.is_fsdp_enabled or self.is_deepspeed_enabled
        ):  # there a process holds no whole model yet
            learning.check_gradients(
                policy, startup.first(train_examples), args, self.accelerator.autocast, self._quiet
            )
        self._set_up_reference(ref_model, quantization_config)
        if self.is_world_process_zero():
            sides = " and ".join(sorted(self.reference_sides)) or "no"
            print(printable(f"objective: {self.objective_in_words()}"))
            print(printable(f"reference: {self.reference_in_words}, for {sides} responses"))
            if self.reference_store is not None:
                print(printable(f"reference store: {self.reference_store.in_words()}"))
            print(printable(f"log-probs: {self.logps_in_words}"))
            if args.disable_dropout and (
                dropout := late_failures.dropout_in_words(policy, is_fresh=self._adapter_is_fresh)
            ):
                print(dropout)
            if absent := absent_in_training(self._metric_rule, self.reference_sides):
                print(absent)

    # ---- objective and reference -------------------------------------------------------------------------------

    def objective_in_words(self) -> str:
        """Returns name and parameters of the loss, e.g. `InfoPO (beta=1.0, length_normalized=False, cap=5.0)`."""
        parts = []
        for name, parameters, weight in self.mixture:
            factor = "" if len(self.mixture) == 1 else f"{weight:g} x "
            values = ", ".join(f"{key}={value}" for key, value in parameters.items())
            parts.append(f"{factor}{OBJECTIVES[name].title} ({values})")
        return " + ".join(parts)

    @property
    def reference_sides(self) -> frozenset[str]:
        """Sides whose reference log-probs are computed for training."""
        return reference_sides(self.mixture, self.args.reference_sides, "train")

    @property
    def eval_reference_sides(self) -> frozenset[str]:
        """Sides whose reference log-probs are computed for evaluation."""
        return reference_sides(self.mixture, self.args.reference_sides, "eval")

    def _set_up_reference(self, ref_model: nn.Module | None, quantization_config: Any) -> None:
        """Decides where reference log-probs come from, and puts precomputed ones into the datasets.

        There are four cases: no objective needs a reference, `adapter-off` (the policy without its adapter, in each
        step), `live` (a frozen copy of the policy or another model, in each step), and `precompute` (once, now).
        """
        source = "precompute" if self.args.precompute_ref_log_probs else self.args.reference
        source = resolve(source, self.train_dataset)
        named_model = source not in REFERENCE_MODES
        if named_model and ref_model is not None:
            raise RecipeError(f"reference={source!r} and ref_model are both given: give one of the two")
        if source == "adapter-off" and ref_model is not None:
            raise RecipeError("reference='adapter-off' and ref_model are both given: give one of the two")
        if source == "adapter-off" and not models.is_peft_model(self.model):
            raise RecipeError("reference='adapter-off': the model has no adapter to switch off")
        if named_model:
            ref_model = self._load_model(source, quantization_config)
            startup.check_fit(ref_model, self.train_dataset, self.eval_dataset)
        policy_weights = hashing.hash_weights(self.model)
        self.policy_hash = policy_weights.whole
        # A new adapter changes nothing at first, unless its initialisation rewrites the base (PiSSA, OLoRA).
        self._policy_is_reference = ref_model is None and (source != "adapter-off" or self._adapter_is_fresh)
        self.reference_in_words = "the policy as it is now" if ref_model is None else "a model of its own"
        self.ref_model: nn.Module | None = None
        self.reference: Reference = StoredReference(self.reference_sides)
        self.eval_reference: Reference = StoredReference(self.eval_reference_sides)
        self.reference_store: ReferenceStore | None = None
        self._late: LateReference | None = None
        if not self.reference_sides:
            self.reference_hash = None
        elif source == "adapter-off":
            self.reference_in_words = "the policy without its adapter"
            self.reference_hash = policy_weights.base
            off = self.accelerator.unwrap_model(self.model).disable_adapter
            self._live(self.model, off)
        else:
            weights = policy_weights if ref_model is None else hashing.hash_weights(ref_model)
            self.reference_hash = weights.whole
            if source == "live":
                self.ref_model = self._freeze(
                    ref_model if ref_model is not None else copy.deepcopy(self.model)
                )
                self._live(self.ref_model, self.accelerator.autocast)
            else:
                model = ref_model if ref_model is not None else self.model
                load = partial(
                    self._load_model, source if named_model else self._given_name, quantization_config
                )
                self._late = LateReference(
                    weights.whole,
                    lend(None if named_model else ref_model),
                    load if named_model or (ref_model is None and self._given_name) else None,
                    is_policy=ref_model is None,
                )
                self.reference_store = self._open_store(model, weights)
                self._store_reference(model)

    def _load_model(self, name: str, quantization_config: Any) -> nn.Module:
        """Loads a reference by name and prepares it as the policy, because values that are compared must agree."""
        kwargs = init_kwargs(self.args, quantization_config)
        kwargs["dtype"] = self.model.dtype
        kwargs.setdefault("attn_implementation", attention.implementation_of(self.model))
        loaded = models.load_policy(name, **kwargs)
        if self.args.disable_dropout:
            models.disable_dropout(loaded)
        self.logps_in_words = startup.choose_path(self.model, loaded, self.args)
        if self._has_own_collator and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # The path may be another one now, on which tokens are counted otherwise.
            self.data_collator = startup.collator(self.model, self.args, self._router_coef)
        return loaded

    def _live(
        self, model: nn.Module, context: Callable[[], contextlib.AbstractContextManager[object]]
    ) -> None:
        self.reference = LiveReference(model, self.reference_sides, context)
        self.eval_reference = LiveReference(model, self.eval_reference_sides, context)

    def _freeze(self, model: nn.Module) -> nn.Module:
        model.requires_grad_(False).eval()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return model.to(self.args.device)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _open_store(self, model: nn.Module, weights: hashing.WeightsHash) -> ReferenceStore | None:
        """Returns the store that the settings name, or None for memory only. All ranks decide alike.

        Raises:
            ReferenceStoreError: A folder that the user named cannot be written to.
        """
        folder = folder_of(self.args.reference_store)
        if folder is None:
            return None
        problem = check_folder(folder)
        if problem and self.args.reference_store != "auto":
            raise ReferenceStoreError(f"reference_store: {problem}")
        problems = torch.tensor(int(problem is not None), device=self.args.device)
        if self.args.world_size > 1:
            problems = self.accelerator.reduce(problems, reduction="sum")
        if int(problems):
            logger.warning("reference log-probs are kept in memory only: %s", problem or "see another rank")
            return None
        identity = identity_of(model, weights, self.args.device, self.accelerator.autocast)
        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        return ReferenceStore(folder, identity, name, self.args.device.type)

    def _store_reference(self, model: nn.Module) -> None:
        # A stream has a live reference.
        if isinstance(self.train_dataset, ExampleDataset):
            self.train_dataset = self._with_reference(self.train_dataset, model, self.reference_sides)
        sides = self.eval_reference_sides
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: self._with_reference(dataset, model, sides)
                for name, dataset in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_reference(self.eval_dataset, model, sides)

    def _with_reference(
        self, dataset: ExampleDataset, model: nn.Module, sides: frozenset[str]
    ) -> ExampleDataset:
        home = next(model.parameters()).device
        if getattr(model, "quantization_method", None) is None:
            model.to(self.args.device)
        stored = precompute(
            dataset,
            model,
            sides,
            batch_size=self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size,
            device=self.args.device,
            context=self.accelerator.autocast,
            store=self.reference_store,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            add_over_ranks=partial(self.accelerator.reduce, reduction="sum"),
            progress=partial(tqdm, desc="reference log-probs", disable=self.args.disable_tqdm, leave=False),
        )
        if getattr(model, "quantization_method", None) is None:
            model.to(home)
        return stored

    # ---- data ----------------------------------------------------------------------------------------------------

    def _encode(self, dataset: RawDataset, name: str, args: InfoPOConfig) -> ExampleDataset:
        if isinstance(dataset, ExampleDataset):
            return self._judged(dataset, name)
        counts = DataCounts(on_bad_row=args.on_bad_row, source=name)
        examples = encode_rows(
            read_rows(dataset, counts, rule=self._rule, columns=args.column_names()),
            self._encoder,
            counts,
            num_proc=args.dataset_num_proc,
        )
        if args.process_index == 0:
            print(*counts.lines(), sep="\n")
        return self._judged(examples, name)

    def _streamed(
        self, dataset: "datasets.IterableDataset | ExampleStream", args: InfoPOConfig, fit: list[nn.Module]
    ) -> ExampleStream:
        """Returns the stream, which judges each example when it is read, as a dataset is judged as a whole."""
        if not isinstance(dataset, ExampleStream):
            rows, rule, columns = dataset, self._rule, args.column_names()
            counts = DataCounts(on_bad_row=args.on_bad_row, source="train_dataset")
            dataset = ExampleStream(
                lambda c: read_rows(rows, c, rule=rule, columns=columns), self._encoder, counts
            )

        def judge(example: PreferenceExample) -> None:
            alone = ExampleDataset.from_examples([example])
            self._check_pairs(alone)
            for model in fit:
                startup.check_fit(model, alone)

        judge(dataset.first())
        return dataset.for_rank(judge, args.process_index, args.world_size)

    def _judged(self, dataset: ExampleDataset, name: str) -> ExampleDataset:
        """Returns the dataset if every example has what the objective compares.

        The loss of other examples would silently be zero.
        """
        if not len(dataset):
            raise DataError("holds no example", name)
        sides = {"chosen": dataset.has(Role.CHOSEN), "rejected": dataset.has(Role.REJECTED)}
        for objective in (OBJECTIVES[objective] for objective, _, _ in self.mixture):
            if not any(sides[side].any() for side in objective.sides):
                raise DataError(
                    f"holds no {' or '.join(sorted(objective.sides))} response, which {objective.title} needs",
                    name,
                )
        self._check_pairs(dataset)
        return dataset.mismatched(self._encoder.max_length) if self._mismatches else dataset

    def _check_pairs(self, dataset: ExampleDataset) -> None:
        sides = {"chosen": dataset.has(Role.CHOSEN), "rejected": dataset.has(Role.REJECTED)}
        for objective in (OBJECTIVES[objective] for objective, _, _ in self.mixture):
            for side, present in sides.items():
                if objective.pairs and not present.all():
                    raise DataError(
                        f"has no {side} response; {objective.title} compares pairs; data with one side "
                        f"train {', '.join(UNPAIRED)}",
                        dataset.row_ids[int(present.argmin())],
                    )

    def _encode_all(self, dataset: Any, args: InfoPOConfig) -> Any:
        if dataset is None or isinstance(dataset, str):
            return dataset
        if isinstance(dataset, Mapping):
            return {name: self._encode(rows, f"eval_dataset[{name}]", args) for name, rows in dataset.items()}
        return self._encode(dataset, "eval_dataset", args)

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
        batch_size = self._train_batch_size
        if self.args.train_sampling_strategy == "group_by_length":
            group = batch_size * self.args.gradient_accumulation_steps
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler: Sampler[int] = LengthGroupedEpochs(dataset.lengths.tolist(), group, seed)
        else:
            sampler = super()._get_train_sampler(dataset)
        if self.args.world_size == 1 or self.args.dataloader_drop_last:
            return sampler
        if isinstance(sampler, RandomSampler):
            # accelerate would replace the sampler, so that all ranks have the same order, if it were not nested.
            sampler = SeedableRandomSampler(dataset, data_seed=self.args.data_seed)
        return PaddedSampler(sampler, batch_size * self.args.world_size, lambda: int(self.state.epoch or 0))

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
        if self.args.world_size == 1:
            return SequentialSampler(eval_dataset)
        return PaddedSampler(
            SequentialSampler(eval_dataset), self.args.eval_batch_size * self.args.world_size
        )

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
        counts = (
            torch.stack([b.counts for batch in batches for b in batch]).sum(0)
            if batches
            else torch.zeros(len(PER))
        )
        counts = counts.to(device)
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
        self._averages, self._step_values = self._no_averages(), [None] * len(self.mixture)
        if resume_from_checkpoint:
            resume_from_checkpoint = self.find_checkpoint(resume_from_checkpoint)
            self._has_trained = True
            if any(statistic and statistic.rate < 1 for statistic in self._statistics):
                saved = checkpoints.read_averages(Path(resume_from_checkpoint))
                for average, value in zip(self._averages, saved, strict=True):
                    average.fill_(value)
        self._metric_sums["train"], self._step_record = MetricSums(), []
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
                if self._mismatches:  # their part is done: z has no gradient
                    batch = _only(batch, {Role.CHOSEN, Role.REJECTED})
                self._aux_share = _row_tokens(batch) / max(1, sum(map(_row_tokens, inputs)))
                loss = loss + super().training_step(model, batch, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._check_finite(loss)
        return loss

    def _look_ahead(self, model: nn.Module) -> None:
        """Computes the step statistics of the objectives before a step's first gradient, by a pass without gradient.

        Only responses that enter the statistics are run. Dropout is off, because a statistic is one of the policy
        itself.
        """
        batches, self._unseen_step = self._unseen_step, []
        roles = {statistic.role for statistic in self._statistics if statistic}
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
        self._step_values = self._statistics_of(seen, "train")
        for index, (statistic, now) in enumerate(zip(self._statistics, self._step_values, strict=True)):
            if statistic and now is not None:
                self._averages[index] = statistic.averaged(self._averages[index], now)
                self._step_values[index] = self._averages[index]

    def _statistics_of(self, seen: list[ResponseLogps], mode: str) -> list[Tensor | None]:
        """Returns each objective's statistic over these batches of all ranks, or None if it has none."""
        needed = [statistic for statistic in self._statistics if statistic]
        if not needed:
            return [None] * len(self._statistics)
        parts = self._gather(step_parts(needed, seen)).reshape(-1, len(needed), 2).unbind(1)
        values = iter([statistic.combined(part) for statistic, part in zip(needed, parts, strict=True)])
        for statistic, part in zip(needed, parts, strict=True):
            if statistic.role == Role.KL:  # KTO's reference point; below 0, the loss takes 0
                raw = statistic.unclamped(part)
                self._metric_sums[mode].add({"kl": (raw.clamp(min=0), 1), "kl_unclamped": (raw, 1)})
        return [next(values) if statistic else None for statistic in self._statistics]

    def _no_averages(self) -> list[Tensor]:
        dtype = sum_dtype(self.args.device)
        return [torch.tensor(float("nan"), dtype=dtype, device=self.args.device) for _ in self.mixture]

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
        terms = self._terms(logps, self._step_values)
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
        return loss

    def _logps(self, model: nn.Module, batch: PackedBatch, mode: str = "train") -> ResponseLogps:
        with router.aux_losses(self._router_coef != 0) as found:
            policy = response_logps(model, batch)
        self._aux_loss = router.mean(found)
        reference = self.reference if mode == "train" else self.eval_reference
        return with_layout(policy, reference(batch) if reference.sides else batch.reference, batch)

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

    def _check_finite(self, loss: Tensor) -> None:
        """Refuses an optimizer step whose loss is not finite, before it is taken.

        Reading the loss synchronises with the GPU.
        """
        record, self._step_record = self._step_record, []
        # The loss of the last piece alone would hide a NaN of an earlier one.
        values = [term.values.sum() for _, _, terms in record for term in terms]
        if torch.stack([loss.detach(), *values]).isfinite().all().item():
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
        if self._policy_is_reference and self.reference_sides and self.state.global_step == 0:
            startup.check_step_0(
                model,
                batch,
                self.reference,
                self._quiet if self.args.disable_dropout else None,
                partial(tolerance, is_exact=exact, noise=rounding),
            )

    # ---- metrics, evaluation, checkpoints ------------------------------------------------------------------------

    def _record_metrics(self, mode: str, logps: ResponseLogps) -> None:
        sides = self.reference_sides if mode == "train" else self.eval_reference_sides
        self._metric_sums[mode].add(*preference_metrics(logps, self._metric_rule, sides))

    def _gather(self, values: Tensor) -> Tensor:
        return self.accelerator.gather(values) if self.args.world_size > 1 else values

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
            RecipeError: The reference was computed before training, and its model cannot be had any more.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._encode_all(eval_dataset, self.args)
            startup.check_fit(self.model, eval_dataset)
            if isinstance(self.eval_reference, StoredReference) and self.eval_reference_sides:
                eval_dataset = self._complete_late(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _complete_late(self, dataset: Any) -> Any:
        """A dataset (or dict of them) with reference log-probs, from wherever the reference can be had by now."""
        datasets_given = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
        if all(d.reference is not None for d in datasets_given):
            return dataset
        assert self._late is not None
        sides = self.eval_reference_sides
        model, context = self._late.find(
            self.accelerator.unwrap_model(self.model),
            self.train_dataset,
            partial(self._late_values, self.reference_sides),
            has_trained=self._has_trained,
            is_exact=is_exact(self.model, self.args.device, self.accelerator.autocast),
        )
        if isinstance(dataset, dict):
            return {name: self._late_values(sides, d, model, context) for name, d in dataset.items()}
        return self._late_values(sides, dataset, model, context)

    def _late_values(
        self, sides: frozenset[str], dataset: ExampleDataset, model: nn.Module, context: Context
    ) -> ExampleDataset:
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with context():
                return self._with_reference(dataset, model, sides)
        finally:
            for module, mode in modes:
                module.training = mode

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused.

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
        if len(self.accelerator._models) == 0 and model is self.model:
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
        statistics = self._statistics_of([logps for _, logps in seen], "eval")
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
        rows = len(self.train_dataset) if isinstance(self.train_dataset, ExampleDataset) else None
        hub = (args.hub_model_id or "").split("/")[-1]
        return Card(
            name=model_name or hub or Path(args.output_dir).resolve().name,
            base=self.base_name,
            mixture=self.mixture,
            reference=self.reference_in_words,
            datasets=datasets or self.dataset_names,
            rows=rows,
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
        """Writes `README.md` to `output_dir`, as TRL's trainers do; transformers' other arguments have no effect."""
        if self.is_world_process_zero():
            data = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name or ())
            text = render(self.card(model_name, data, [tags] if isinstance(tags, str) else list(tags or ())))
            (Path(self.args.output_dir) / "README.md").write_text(masked(text), encoding="utf-8")

    def _card_text(self) -> str:
        return masked(render(self.card()))

    def data_hash(self) -> str | None:
        """SHA-256 of the tokens that are trained on; None of a stream, whose end is not known."""
        return self.train_dataset.content_hash() if isinstance(self.train_dataset, ExampleDataset) else None

    @property
    def kept_averages(self) -> list[float]:
        """Logarithm of each objective's moving average (nats), NaN if it keeps none."""
        return [float(average) for average in self._averages]


def _only(batch: PackedBatch, roles: set[Role]) -> PackedBatch:
    """The batch with its responses of these roles. Waits for the device."""
    return select(batch, [i for i, role in enumerate(batch.role.tolist()) if role in roles])


def _row_tokens(batch: PackedBatch) -> int:
    """Tokens of all responses with their prompts, as rows."""
    start = batch.segment_start
    return sum(start[s + 1] - start[s] for r in range(batch.num_responses) for s in batch.path(r))
