"""Decides where the reference log-probs of a run come from, and puts the precomputed ones into its data.

There are four cases: no objective needs a reference, `adapter-off` (the policy without its adapter, in each step),
`live` (a frozen copy of the policy or another model, in each step), and `precompute` (once, before training).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from infopo import hashing, models, ranks, sharding, startup
from infopo.arguments import InfoPOConfig, init_kwargs
from infopo.catalog import REFERENCE_MODES
from infopo.data.examples import ExampleDataset
from infopo.errors import ConfigError, ReferenceStoreError
from infopo.evaluation.sampled_logps import sampled_logps, spot_check, subject_hash
from infopo.late_reference import Context, LateReference, lend
from infopo.logps import attention
from infopo.noise import evaluating
from infopo.output import get_logger
from infopo.records import PreferenceExample
from infopo.reference import (
    LiveReference,
    Reference,
    StoredReference,
    identity_of,
    is_exact,
    reference_sides,
    resolve,
    tolerance,
)
from infopo.reference_pass import Values, precompute
from infopo.reference_store import ReferenceStore, check_folder, folder_of

logger = get_logger(__name__)

Mixture: TypeAlias = Sequence[tuple[str, Mapping[str, Any], float]]


@dataclass(frozen=True)
class ReferenceSetup:
    """What the reference of a run is.

    Attributes:
        train: Gives the reference log-probs of a batch in training.
        evaluation: Gives those of a batch in evaluation.
        policy_hash: Hash of the policy's weights before training.
        base_hash: That of the weights beneath its adapter, or the same if it has none.
        hash: Hash of the reference's weights, or None if nothing needs a reference.
        description: What the reference is, in words.
        policy_is_reference: Whether policy and reference are the same function before the first update.
        model: The model that runs beside the policy, or None.
        store: The store of precomputed values, or None if they are kept in memory or computed in each step.
        late: How to find the reference of precomputed values again, for data that come later.
    """

    train: Reference
    evaluation: Reference
    policy_hash: str
    base_hash: str
    hash: str | None
    description: str
    policy_is_reference: bool
    model: nn.Module | None = None
    store: ReferenceStore | None = None
    late: LateReference | None = None


@dataclass(frozen=True)
class ReferenceChoice:
    """Which model is the reference.

    Attributes:
        source: `live`, `precompute`, `adapter-off`, or the name of a model.
        is_named: Whether it was loaded by name.
        is_own: Whether it is a model of its own, and not the policy or a copy of it.
        model: The model that computes its values beside the policy, or None if the policy does.
        policy_weights: Hashes of the policy's weights.
        weights: Hashes of the reference's weights.
    """

    source: str
    is_named: bool
    is_own: bool
    model: nn.Module | None
    policy_weights: hashing.WeightsHash
    weights: hashing.WeightsHash


@dataclass(frozen=True)
class ReferenceBuilder:
    """Builds the reference of a policy.

    Attributes:
        policy: The policy, as the trainer holds it.
        args: Settings.
        accelerator: What distributes models over processes.
        mixture: The loss, as (objective, parameters, weight).
        policy_name: Name or folder that the policy was loaded from for this run, or an empty text.
        adapter_is_fresh: Whether the policy's adapter was added for this run.
        quantization_config: Argument of `from_pretrained` of a reference that is loaded by name.
        on_path: Is told how log-probs are computed when a reference that was loaded has changed it.
    """

    policy: nn.Module
    args: InfoPOConfig
    accelerator: Accelerator
    mixture: Mixture
    policy_name: str
    adapter_is_fresh: bool
    quantization_config: Any
    on_path: Callable[[str], None]

    def sides(self, mode: Literal["train", "eval"]) -> frozenset[str]:
        """Returns the sides whose reference log-probs are computed for `train` or for `eval`."""
        return reference_sides(self.mixture, self.args.reference_sides, mode)

    def choose(self, ref_model: nn.Module | None, train_data: Any, eval_data: Any) -> ReferenceChoice:
        """Returns which model the reference is, and what its weights and the policy's are.

        All ranks must call this, while they hold models as they were loaded: the weights of a sharded model cannot be
        hashed, and it cannot be copied.

        Args:
            ref_model: The reference if it is given, else None.
            train_data: The training data.
            eval_data: A dataset, a dict of them, or None.

        Raises:
            ConfigError: Settings contradict each other.
            ModelError: The reference cannot be loaded or does not fit the data.
        """
        source = "precompute" if self.args.precompute_ref_log_probs else self.args.reference
        source = resolve(source, train_data)
        self._refuse_contradictions(source, ref_model)
        is_named = source not in REFERENCE_MODES
        if is_named:
            ref_model = self.load(source)
            startup.check_fit(ref_model, train_data, eval_data)
        policy_weights = hashing.hash_over_ranks(self.policy, self.args)
        weights = policy_weights if ref_model is None else hashing.hash_over_ranks(ref_model, self.args)
        model, is_own = ref_model, ref_model is not None
        if self.sides("train") and source == "live":
            model = ref_model if ref_model is not None else models.frozen_copy(self.policy)
        return ReferenceChoice(source, is_named, is_own, model, policy_weights, weights)

    def build(
        self, choice: ReferenceChoice, train_data: Any, eval_data: Any
    ) -> tuple[ReferenceSetup, Any, Any]:
        """Returns the reference, and both datasets with precomputed values if the reference is one that is precomputed.

        Args:
            choice: Which model the reference is.
            train_data: The training data.
            eval_data: A dataset, a dict of them, or None.

        Raises:
            ReferenceStoreError: A folder that the user named cannot be written to.
        """
        source, is_own = choice.source, choice.is_own
        # A new adapter changes nothing at first, unless its initialisation rewrites the base (PiSSA, OLoRA).
        common: dict[str, Any] = {
            "policy_hash": choice.policy_weights.whole,
            "base_hash": choice.policy_weights.base,
            "policy_is_reference": not is_own and (source != "adapter-off" or self.adapter_is_fresh),
            "description": "a model of its own" if is_own else "the policy as it is now",
        }
        stored = self._of_both(StoredReference)
        if not self.sides("train"):
            return ReferenceSetup(**common, **stored, hash=None), train_data, eval_data
        if source == "adapter-off":
            common["description"] = "the policy without its adapter"
            off = self.accelerator.unwrap_model(self.policy).disable_adapter
            self._check_adapter_off(startup.first(train_data), off)
            live = self._live(self.policy, off)
            return ReferenceSetup(**common, **live, hash=choice.policy_weights.base), train_data, eval_data
        common["hash"] = choice.weights.whole
        model = self.policy if choice.model is None else self._frozen(choice.model, source)
        if source == "live":
            live = self._live(model, self.accelerator.autocast)
            return ReferenceSetup(**common, **live, model=model), train_data, eval_data
        late = self._late(choice, model)
        store = self._open_store(model, choice.weights)
        # A stream has a live reference.
        if isinstance(train_data, ExampleDataset):
            known, said = self._sampled(train_data, model, choice.weights)
            common["description"] += said
            train_data = self.with_values(train_data, model, self.sides("train"), store, known)
        setup = ReferenceSetup(**common, **stored, store=store, late=late)
        if isinstance(eval_data, dict):
            eval_data = {
                name: self.with_values(dataset, model, self.sides("eval"), store)
                for name, dataset in eval_data.items()
            }
        elif eval_data is not None:
            eval_data = self.with_values(eval_data, model, self.sides("eval"), store)
        return setup, train_data, eval_data

    def _sampled(
        self, dataset: ExampleDataset, model: nn.Module, weights: hashing.WeightsHash
    ) -> tuple[Values | None, str]:
        """Returns the log-probs of stored samples if some that are computed agree, and what to say of them.

        Raises:
            DataError: The file of samples cannot be read.
        """
        if self.args.reference_samples is None:
            return None, ""
        path, sides = Path(self.args.reference_samples), self.sides("train")
        values = sampled_logps(path, dataset, sides, subject_hash(model, weights))
        if not np.isfinite(values).any():
            return None, f" (no response is a sample of it in {path})"
        check = spot_check(dataset, values)
        computed = self.with_values(check.examples, model, sides, None).reference
        assert computed is not None
        theirs, tokens = values[check.places], check.examples.response_lengths
        exact = is_exact(model, self.args.device, self.accelerator.autocast)
        allowed = np.array([tolerance(int(count), is_exact=exact) for count in tokens])
        difference = np.abs(computed - theirs)
        if (difference > allowed).any():
            logger.warning(
                "%s: its log-probs differ by up to %.2g nats from those that the reference gives here, and are not "
                "taken; all are computed", path, np.nanmax(difference),
            )  # fmt: skip
            return None, ""
        count = int(np.isfinite(values).sum())
        return values, f", whose log-probs of {count} responses are those of its samples ({path})"

    def _check_adapter_off(self, example: PreferenceExample, off: Context) -> None:
        is_fsdp = sharding.is_fsdp(self.accelerator)
        if ranks.is_sharded(self.accelerator) and not is_fsdp:
            logger.warning(
                "reference='adapter-off' is not tried before training, because DeepSpeed prepares the model then: see "
                "that the adapter trains no weight of the model itself (bias='all', say)"
            )
            return
        exact = is_exact(self.policy, self.args.device, self.accelerator.autocast)
        most = partial(ranks.largest, args=self.args) if is_fsdp else int
        with self.accelerator.autocast():
            startup.check_adapter_off(
                self.policy, example, off, is_fresh=self.adapter_is_fresh, exact=exact, most=most
            )

    def _refuse_contradictions(self, source: str, ref_model: nn.Module | None) -> None:
        if source not in REFERENCE_MODES and ref_model is not None:
            raise ConfigError(f"reference={source!r} and ref_model are both given: give one of the two")
        if source == "adapter-off" and ref_model is not None:
            raise ConfigError("reference='adapter-off' and ref_model are both given: give one of the two")
        if source == "adapter-off" and not models.is_peft_model(self.policy):
            raise ConfigError("reference='adapter-off': the model has no adapter to switch off")

    def load(self, name: str) -> nn.Module:
        """Loads a reference and prepares it as the policy is prepared, because values that are compared must agree."""
        kwargs = init_kwargs(self.args, self.quantization_config)
        kwargs["dtype"] = self.policy.dtype
        kwargs.setdefault("attn_implementation", attention.implementation_of(self.policy))
        loaded = models.load_policy(name, **kwargs)
        if self.args.disable_dropout:
            models.disable_dropout(loaded)
        self.on_path(startup.choose_path(self.policy, loaded, self.args))
        return loaded

    def _live(self, model: nn.Module, context: Context) -> dict[str, Any]:
        return self._of_both(lambda sides: LiveReference(model, sides, context))

    def _of_both(self, make: Callable[[frozenset[str]], Reference]) -> dict[str, Any]:
        return {"train": make(self.sides("train")), "evaluation": make(self.sides("eval"))}

    def _frozen(self, model: nn.Module, source: str) -> nn.Module:
        """Returns a reference beside the policy as it will run: distributed as the policy is, or on its device."""
        if sharding.is_fsdp(self.accelerator):
            return sharding.shard_reference(model.requires_grad_(False), self.accelerator)
        if source == "precompute":  # it comes to its device for the pass, and is the caller's afterwards
            return model
        model.requires_grad_(False).eval()
        if ranks.is_sharded(self.accelerator):
            return model.to(self.args.device)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _late(self, choice: ReferenceChoice, model: nn.Module) -> LateReference:
        is_sharded = sharding.is_fsdp(self.accelerator)
        name = choice.source if choice.is_named else "" if choice.is_own else self.policy_name
        return LateReference(
            choice.weights.whole,
            lend(model if choice.is_own and not choice.is_named else None),
            # A model that is loaded late could not be prepared without running the policy.
            partial(self.load, name) if name and not is_sharded else None,
            is_policy=not choice.is_own,
            args=self.args if is_sharded else None,
        )

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

    def with_values(
        self,
        dataset: ExampleDataset,
        model: nn.Module,
        sides: frozenset[str],
        store: ReferenceStore | None,
        known: Values | None = None,
    ) -> ExampleDataset:
        """Returns the dataset with the log-probs of `sides` under `model`, which is back on its device afterwards.

        Those that are `known`, (responses,) and not NaN, are not computed.
        """
        home = next(model.parameters()).device
        is_sharded = sharding.is_cut_up(model, self.accelerator)
        is_fixed = is_sharded or getattr(model, "quantization_method", None) is not None
        if not is_fixed:
            model.to(self.args.device)
        stored = precompute(
            dataset,
            model,
            sides,
            batch_size=self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size,
            device=self.args.device,
            context=self.accelerator.autocast,
            store=store,
            known=known,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            is_sharded=is_sharded,
            add_over_ranks=partial(self.accelerator.reduce, reduction="sum"),
            # None shows it on terminals and in notebooks, and not in log files.
            progress=partial(
                tqdm, desc="reference log-probs", disable=self.args.disable_tqdm or None, leave=False, delay=1
            ),
        )
        if not is_fixed:
            model.to(home)
        return stored

    def with_late_values(
        self, setup: ReferenceSetup, data: Any, policy: nn.Module, train_data: Any, *, has_trained: bool
    ) -> Any:
        """Returns a dataset (or dict of them) with reference log-probs, from wherever the reference can be had by now.

        Args:
            setup: The reference of the run.
            data: Evaluation data that come after training began.
            policy: The policy as it is now.
            train_data: The training data with their stored values.
            has_trained: Whether the policy may have changed.

        Raises:
            ConfigError: The reference's model cannot be had any more.
        """
        given = list(data.values()) if isinstance(data, dict) else [data]
        if all(dataset.reference is not None for dataset in given):
            return data
        assert setup.late is not None

        def values(
            sides: frozenset[str],
            store: ReferenceStore | None,
            dataset: ExampleDataset,
            model: nn.Module,
            context: Context,
        ) -> Any:
            with evaluating(model), context():
                return self.with_values(dataset, model, sides, store)

        model, context = setup.late.find(
            self.accelerator.unwrap_model(policy),
            train_data,
            # Whether a model is the reference cannot be asked of the store, which would answer for the reference.
            partial(values, self.sides("train"), None),
            has_trained=has_trained,
            is_exact=is_exact(policy, self.args.device, self.accelerator.autocast),
        )
        computed = partial(values, self.sides("eval"), setup.store)
        if isinstance(data, dict):
            return {name: computed(dataset, model, context) for name, dataset in data.items()}
        return computed(data, model, context)
