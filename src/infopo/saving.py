"""A trainer whose checkpoints are whole, finite and free of secrets, and are judged before a run is resumed.

No mathematics: `InfoPOTrainer` builds on this as on transformers' `Trainer`.
"""

import contextlib
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerState
from transformers.utils.hub import hf_api

from infopo import checkpoints, durable, models, ranks, resuming, run_state, sharding
from infopo.arguments import InfoPOConfig
from infopo.data.examples import ExampleDataset
from infopo.errors import CheckpointError, ConfigError, InfoPOError, NonFiniteWeightsError, SaveError
from infopo.evaluation.results import DURING, FOLDER
from infopo.loading import LoadingTrainer
from infopo.losses.catalog import with_defaults
from infopo.losses.coupling import Averages
from infopo.model_card import card_of, render
from infopo.output import get_logger
from infopo.runs import ENVIRONMENT, FORECAST, GENERATIONS, PROBE
from infopo.secrets import masked, masked_tree
from infopo.sharding import local_part
from infopo.verdicts import DATA

logger = get_logger(__name__)


_PRIVATE = [PROBE, GENERATIONS, FORECAST, DATA, ENVIRONMENT, "recipe*.yaml", f"{DURING}/*", f"{FOLDER}/*"]
"""Files of a run that have rows of data or paths of the machine, and are not uploaded beside the model."""


@contextlib.contextmanager
def _private_files_kept() -> Iterator[None]:
    """Within it, an upload of the output folder leaves out `_PRIVATE`. transformers uploads all that is there.

    A checkpoint, which a setting has to ask for, is uploaded as a whole: it could not be resumed from otherwise.
    """
    api = hf_api()
    upload = api.upload_folder

    def upload_some(**kwargs: Any) -> Any:
        if not kwargs.get("path_in_repo"):
            kwargs["ignore_patterns"] = [*(kwargs.get("ignore_patterns") or []), *_PRIVATE]
        return upload(**kwargs)

    outer = vars(api).get("upload_folder")
    api.upload_folder = upload_some
    try:
        yield
    finally:
        if outer is None:
            del api.upload_folder  # of this object, which leaves that of its class
        else:
            api.upload_folder = outer


class SavingTrainer(LoadingTrainer):
    """transformers' `Trainer` with such checkpoints. Subclasses say which run a checkpoint belongs to.

    Attributes:
        kept_averages: Each objective's moving averages, NaN if it keeps none.
    """

    args: InfoPOConfig
    _staging: str | None = None
    _verified: str | None = None
    _rate_factor: float = 1.0
    _load_result: Any = None
    _changed_config: models.ConfigValues = []  # noqa: RUF012 - never changed here

    def _identity(self) -> dict[str, Any]:
        """What a run that resumes must have in common with the one that made the checkpoint."""
        raise NotImplementedError

    @property
    def kept_averages(self) -> list[Averages]:
        raise NotImplementedError

    # ---- resuming --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Overrides `Trainer`'s to keep other runs out of `output_dir` meanwhile."""
        writes = self.args.save_strategy != "no" and self.is_world_process_zero()
        with run_state.in_use(self.args.output_dir) if writes else contextlib.nullcontext():
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def find_checkpoint(self, resume_from_checkpoint: str | bool) -> str:
        """Returns the checkpoint to resume from, if it is sound and belongs to this run.

        Settings that differ from those it was made with, and take effect, are warned about.

        Raises:
            CheckpointError: There is none, the one that is named is damaged, or it was made with another reference,
                objective or data, or with settings that cannot be changed.
        """
        if resume_from_checkpoint == self._verified:
            return str(self._verified)
        run_dir = self.args.output_dir
        path = ranks.from_first(lambda: run_state.find(resume_from_checkpoint, run_dir), self.args)
        saved = run_state.read_identity(path)
        saved = saved | {"objective": with_defaults(saved.get("objective"))}
        checkpoints.check_identity(path, saved, self._identity())
        with _readable(path, run_state.STATE):
            step = int(TrainerState.load_from_json(str(path / run_state.STATE)).global_step)
        if not self.is_deepspeed_enabled and not (path / "scheduler.pt").is_file():
            raise CheckpointError(
                f"{path}: optimizer and schedule were not saved (save_only_model), so the run cannot go on from it as "
                "it was. Start a new run with this folder as its model"
            )
        rows = len(self.train_dataset) if isinstance(self.train_dataset, ExampleDataset) else None
        now = resuming.settings_of(self.args, self.model)
        changed = resuming.check_settings(path, saved, now, step, resuming.steps_of(self.args, rows))
        if changed and self.is_world_process_zero():
            logger.warning("%s: from step %d on, other settings hold: %s", path, step + 1, "; ".join(changed))
        self._rate_factor = resuming.learning_rate_factor(saved, self.args)
        self._verified = str(path)
        return str(path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Overrides `Trainer`'s to name the checkpoint in errors, and to load weights of other names."""
        with _readable(resume_from_checkpoint, "its weights"):
            try:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            except StrictDataclassError:
                # transformers reads the configuration as one of no class in particular, which refuses layers of kinds
                # that only the model's own class knows (DeepSeek V4).
                self._load_by_class(resume_from_checkpoint)
            self._complete(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Overrides `Trainer`'s as `_load_from_checkpoint` does."""
        with _readable(self.state.best_model_checkpoint, "its weights"):
            super()._load_best_model()
            self._complete(str(self.state.best_model_checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Overrides `Trainer`'s to keep the result for `_complete`. It leaves out the warnings of missing weights."""
        self._load_result = load_result

    def _complete(self, checkpoint: str) -> None:
        """Loads a checkpoint by `from_pretrained` if its files name weights otherwise than the model does.

        Some architectures, mixtures of experts among them, are saved under the names of their first publication.
        transformers would leave such weights of a resumed run as they were.
        """
        result, self._load_result = self._load_result, None
        if result is None or not (_absent(self.model, result.missing_keys) or result.unexpected_keys):
            return
        self._load_by_class(checkpoint)

    def _load_by_class(self, checkpoint: str) -> None:
        """Loads a checkpoint by the `from_pretrained` of the model's class."""
        config = getattr(self.model, "config", None)
        loaded, info = type(self.model).from_pretrained(
            checkpoint, config=config, dtype=self.model.dtype, output_loading_info=True
        )
        if names := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
            raise CheckpointError(f"{checkpoint}: its weights are not those of this model, e.g. {names[0]}")
        self.model.load_state_dict(loaded.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Overrides `Trainer`'s, which would bring back the old learning rate, to take over a changed one."""
        with _readable(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._rate_factor != 1:
            resuming.scale_learning_rate(self.optimizer, self.lr_scheduler, self._rate_factor)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Overrides `Trainer`'s to name the checkpoint in errors."""
        with _readable(checkpoint, "scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Overrides `Trainer`'s to name the checkpoint in errors."""
        with _readable(checkpoint, "the state of random numbers (rng_state.pth)"):
            super()._load_rng_state(checkpoint)

    # ---- saving ----------------------------------------------------------------------------------------------------

    def save_final_model(self) -> None:
        """Writes model and tokenizer to `output_dir`, each file whole or not there.

        Raises:
            NonFiniteWeightsError: A weight is NaN or infinite.
            SaveError: The files cannot be written.
        """
        self._refuse_non_finite(self._weights())
        run_dir = Path(self.args.output_dir)
        lock = run_state.in_use(run_dir) if self.args.should_save else contextlib.nullcontext()
        with (
            lock,
            _written(run_dir, "the trained model"),
            checkpoints.staged_files(run_dir, self.args, self.accelerator.wait_for_everyone) as new,
        ):
            self.save_model(str(new))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Overrides `Trainer`'s to refuse weights that are not finite, and to save those of a sharded model as a whole.

        `Trainer` saves nothing here if FSDP's checkpoints are made of shards, and the run would end without a model.

        Raises:
            NonFiniteWeightsError: A weight is NaN or infinite.
        """
        if not _internal_call:
            self._refuse_non_finite(self._weights())
        with contextlib.nullcontext() if _internal_call else sharding.saved_whole(self.accelerator):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Overrides `Trainer`'s to leave out `training_args.bin`, a pickle that may hold secrets."""
        self._set_optimizer("eval")
        if self.is_deepspeed_enabled and ranks.has_all_weights(self.accelerator):
            # DeepSpeed's copy has tied weights twice.
            state_dict = None
        token, self.args.hub_token = self.args.hub_token, None
        try:
            with models.original_config(self._changed_config):
                super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
            if self.args.should_save:
                folder = Path(output_dir if output_dir is not None else self.args.output_dir)
                (folder / "training_args.bin").unlink(missing_ok=True)
                # That of peft is a blank form.
                (folder / "README.md").write_text(masked(render(card_of(self))), encoding="utf-8")

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
            text = render(
                card_of(self, model_name, data, [tags] if isinstance(tags, str) else list(tags or ()))
            )
            durable.write(Path(self.args.output_dir) / "README.md", [masked(text).encode()])

    def _set_optimizer(self, mode: Literal["train", "eval"]) -> None:
        """Schedule-free optimizers hold other weights for training than for evaluation and saving."""
        if callable(switch := getattr(self.optimizer, mode, None)):
            switch()

    def _get_output_dir(self, trial: Any) -> str:
        """Overrides `Trainer`'s to give the temporary folder while a checkpoint is written."""
        return self._staging or super()._get_output_dir(trial)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Overrides `Trainer`'s to raise what the hub answers as a `ConfigError`, before anything is computed."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # of the network, of the hub's client, or of its answer
            raise ConfigError(
                f"push_to_hub: the repository cannot be made: {type(error).__name__}: {models.first_lines(error)[:250]}"
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Overrides `Trainer`'s to upload no checkpoint before it has its name."""
        if self._staging is None:
            with _private_files_kept():
                super()._push_from_checkpoint(checkpoint_folder)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Overrides `Trainer`'s to upload no file with rows of the data, or that tells where its author lives."""
        with _private_files_kept():
            return super().push_to_hub(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Overrides `Trainer`'s to write under another name and rename: a checkpoint is whole or not there."""
        self._refuse_non_finite([*self._weights(), *self._optimizer_state()])
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        wait = self.accelerator.wait_for_everyone
        with _written(run_dir, name), checkpoints.staged(run_dir, self.state, self.args, wait) as staging:
            self._staging = str(staging)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self.args.should_save:
                settings = resuming.settings_of(self.args, self.model)
                about = {**masked_tree(self._identity()), resuming.SETTINGS: settings}
                checkpoints.write_identity(staging / name, about, averages=self.kept_averages)
                checkpoints.copy_probe(Path(self.args.output_dir), staging / name)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def _weights(self) -> list[tuple[str, Tensor]]:
        return list(self.model.named_parameters())

    def _optimizer_state(self) -> list[tuple[str, Tensor]]:
        states = getattr(self.optimizer, "state", None) or {}
        return [
            (f"the optimizer's {key}", value)
            for state in states.values()
            if isinstance(state, dict)
            for key, value in state.items()
            if isinstance(value, Tensor) and value.numel() > 1
        ]

    def _refuse_non_finite(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """On all ranks alike, whichever of them holds the value."""
        name = first_non_finite(named)
        found = torch.tensor(int(name is not None), device=self.args.device)
        if self.args.world_size > 1:
            found = self.accelerator.reduce(found, reduction="sum")
        if int(found):
            raise NonFiniteWeightsError(
                f"step {self.state.global_step}: {name or 'a value of another rank'} is NaN or infinite, so nothing is "
                f"saved: the update overflowed. {run_state.kept(self.args.output_dir)}. A lower learning_rate, which "
                "takes effect from there on, or bf16 in place of fp16, is the usual remedy"
            )


def first_non_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor with a NaN or an infinity, or None. Waits for each device once."""
    tensors = [(name, local_part(value)) for name, value in named]
    tensors = [(name, value) for name, value in tensors if value.is_floating_point() and not value.is_meta]
    flags: dict[torch.device, list[Tensor]] = {}
    for _, value in tensors:
        flags.setdefault(value.device, []).append(value.isfinite().all())
    if all(bool(torch.stack(each).all()) for each in flags.values()):
        return None
    return next(name for name, value in tensors if not bool(value.isfinite().all()))


def _absent(model: nn.Module, missing: list[str]) -> list[str]:
    """Those of the missing weights that are not tied to one that is there."""
    weights = model.state_dict()
    there = {value.data_ptr() for name, value in weights.items() if name not in set(missing)}
    return [name for name in missing if name not in weights or weights[name].data_ptr() not in there]


@contextlib.contextmanager
def _readable(checkpoint: Path | str | None, what: str) -> Iterator[None]:
    """What is wrong with a file of a checkpoint, whoever reads it, as an error that names the checkpoint."""
    try:
        yield
    except (InfoPOError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged and hostile files fail in as many ways as there are libraries
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        reason = f"{type(error).__name__}: {lines[0][:200]}"
        if isinstance(error, pickle.UnpicklingError):  # torch's own words say how to run what is in the file
            reason = (
                "it holds no tensors and plain values alone, or is damaged, and what it would run is not run"
            )
        raise CheckpointError(
            f"{checkpoint}: {what} cannot be read: {reason}; resume from an earlier checkpoint"
        ) from error


@contextlib.contextmanager
def _written(run_dir: Path, what: str) -> Iterator[None]:
    """What the file system refuses, as an error that says what is kept. What was written in part is removed."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, InfoPOError) as error:
        reason = _refusal(error)
        if reason is None:
            raise
        with contextlib.suppress(OSError):
            checkpoints.remove_staging(run_dir)
        raise SaveError(
            f"{run_dir}: {what} cannot be written: {reason}. {run_state.kept(run_dir)}"
        ) from error


def _refusal(error: BaseException) -> str | None:
    """Returns what the file system says in an error of any library, or None if it is another kind of error."""
    if isinstance(error, InfoPOError):
        return None if error.__cause__ is None else _refusal(error.__cause__)
    if isinstance(error, OSError):  # those of the network have no number, or are of these classes
        is_of_files = error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)
        return (error.strerror or str(error)) if is_of_files else None
    # torch's writer of archives has no class of its own.
    of_torch = any(mark in str(error) for mark in ("PytorchStreamWriter", "inline_container"))
    if isinstance(error, SafetensorError) or (isinstance(error, RuntimeError) and of_torch):
        return f"the file system takes no more ({str(error).splitlines()[0][:150]})"
    return None
