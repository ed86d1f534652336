"""What TRL's users override, set late or pass: it does what it does there, or is refused by name."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from trl import DPOTrainer
from trl.experimental.bema_for_ref_model import BEMACallback as BEMAOfReference
from trl.trainer.callbacks import BEMACallback, LogCompletionsCallback, SyncRefModelCallback

from infopo.arguments import InfoPOConfig
from infopo.errors import ConfigError, DataError, UnsupportedArgumentError
from infopo.refusals import FIXED, NEVER_CALLED
from infopo.trainer import InfoPOTrainer
from test_startup import SIZE
from trainers import SETTINGS, TOKENIZER, step_records, trainer_of, weights
from worlds import random_dataset, tiny_llama, tiny_of

CUTS: dict[str, dict[str, Any]] = {
    "one batch": {"per_device_train_batch_size": 6},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    "pieces": {"per_device_train_batch_size": 6, "max_tokens_per_forward": 30},
    "accumulated pieces": {
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_tokens_per_forward": 30,
    },
}  # fmt: skip


class Raised(InfoPOTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().compute_loss(*args, **kwargs) + 1.0


class Doubled(InfoPOTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2.0 * super().compute_loss(*args, **kwargs)


class Decayed(InfoPOTrainer):
    """A penalty on a weight, as users write it."""

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        penalty = next(model.parameters()).square().sum()
        return super().compute_loss(model, *args, **kwargs) + penalty


class Alone(InfoPOTrainer):
    """Of TRL's scripts before transformers had `num_items_in_batch`."""

    def compute_loss(
        self, model: torch.nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Tensor:
        return super().compute_loss(model, inputs, return_outputs)


def trained(kind: type[InfoPOTrainer], folder: Path, model: Any = None, **settings: Any) -> InfoPOTrainer:
    trainer = kind(
        model=tiny_llama() if model is None else model,
        args=InfoPOConfig(output_dir=str(folder), **SETTINGS | {"objective": "dpo"} | settings),
        train_dataset=random_dataset(12),
        eval_dataset=random_dataset(4, seed=5),
        processing_class=TOKENIZER,
    )
    trainer.train()
    return trainer


def losses(trainer: InfoPOTrainer) -> list[float]:
    return [record["loss"] for record in step_records(trainer)]


@pytest.mark.parametrize("cut", CUTS)
def test_what_an_overridden_loss_adds_counts_once_a_step_however_the_step_is_cut(
    tmp_path: Path, cut: str
) -> None:
    plain = trained(InfoPOTrainer, tmp_path / "plain", **CUTS[cut])
    raised = trained(Raised, tmp_path / "raised", **CUTS[cut])
    assert losses(raised) == pytest.approx([loss + 1 for loss in losses(plain)], abs=2e-4)
    torch.testing.assert_close(weights(raised.model), weights(plain.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cut", CUTS)
def test_what_an_overridden_loss_multiplies_is_the_loss_of_the_step(tmp_path: Path, cut: str) -> None:
    """Under plain SGD, twice the loss is twice the learning rate."""
    rate = SETTINGS["learning_rate"]
    plain = trained(InfoPOTrainer, tmp_path / "plain", **CUTS[cut], learning_rate=2 * rate)
    doubled = trained(Doubled, tmp_path / "doubled", **CUTS[cut])
    assert losses(doubled) == pytest.approx([2 * loss for loss in losses(plain)], abs=5e-4)
    torch.testing.assert_close(weights(doubled.model), weights(plain.model), rtol=0, atol=1e-6)


def test_a_penalty_has_the_same_weight_however_a_step_is_cut(tmp_path: Path) -> None:
    found = [weights(trained(Decayed, tmp_path / name, **cut).model) for name, cut in CUTS.items()]
    plain = weights(trained(InfoPOTrainer, tmp_path / "plain", **CUTS["one batch"]).model)
    assert (found[0] - plain).abs().max() > 1e-3
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("cut", ["one batch", "accumulated"])
def test_a_loss_that_does_not_pass_on_the_number_of_items_is_a_mean_of_batches(
    tmp_path: Path, cut: str
) -> None:
    """Each batch has as many pairs, so that the mean of means, which TRL takes, is the mean over the step."""
    plain = trained(InfoPOTrainer, tmp_path / "plain", **CUTS[cut])
    alone = trained(Alone, tmp_path / "alone", **CUTS[cut])
    assert losses(alone) == pytest.approx(losses(plain), abs=2e-4)
    torch.testing.assert_close(weights(alone.model), weights(plain.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [Raised, Alone])
@pytest.mark.parametrize("cut", CUTS)
def test_the_balance_of_experts_has_its_weight_in_an_overridden_loss(
    tmp_path: Path, cut: str, kind: Any
) -> None:
    """It is a mean over device batches, of which pieces have shares by their tokens."""
    if kind is Alone and "pieces" in cut:
        pytest.skip("pieces have unequal numbers of pairs, whose means of means are another loss")
    experts = MixtralConfig(**SIZE, num_local_experts=4, output_router_logits=True)
    settings = {**CUTS[cut], "router_aux_loss_coef": 5.0, "max_steps": 1}
    plain, own = (
        trained(each, tmp_path / each.__name__, tiny_of(experts), **settings)
        for each in (InfoPOTrainer, kind)
    )
    more = 1.0 if kind is Raised else 0.0
    assert losses(own) == pytest.approx([loss + more for loss in losses(plain)], abs=5e-4)
    torch.testing.assert_close(weights(own.model), weights(plain.model), rtol=0, atol=1e-6)


def test_a_loss_that_is_set_on_the_trainer_is_kept_and_weighed(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, **CUTS["accumulated pieces"])
    usual = trainer.compute_loss
    set_one = lambda *args, **kwargs: usual(*args, **kwargs) + 1.0  # noqa: E731
    trainer.compute_loss = set_one
    trainer.train()
    plain = trainer_of(tmp_path / "plain", **CUTS["accumulated pieces"])
    plain.train()
    assert losses(trainer) == pytest.approx([loss + 1 for loss in losses(plain)], abs=2e-4)
    assert trainer.compute_loss is set_one


def test_evaluation_says_that_it_gives_the_loss_of_the_objective(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raised, plain = (trained(kind, tmp_path / kind.__name__) for kind in (Raised, InfoPOTrainer))
    caplog.clear()
    value = raised.evaluate()["eval_loss"]
    assert (
        "compute_loss is overridden: it trains, and evaluation gives the loss of the objective" in caplog.text
    )
    caplog.clear()
    assert value == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-4)
    assert "overridden" not in caplog.text


# ---- methods that nothing calls ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEVER_CALLED)
def test_a_method_that_nothing_calls_is_refused(tmp_path: Path, name: str) -> None:
    kind = type("Mine", (type("Between", (InfoPOTrainer,), {name: lambda self, *args: None}),), {})
    with pytest.raises(UnsupportedArgumentError, match=f"{name}: this method is never called; "):
        kind(
            model=tiny_llama(),
            args=InfoPOConfig(str(tmp_path), use_cpu=True),
            train_dataset=random_dataset(4),
        )


def test_what_a_subclass_calls_by_itself_and_keeps_before_it_is_made_is_its_own(tmp_path: Path) -> None:
    class Own(Raised):
        def __init__(self, **kwargs: Any) -> None:
            self.beta = 0.1
            super().__init__(**kwargs)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return self._compute_loss(*args, **kwargs)

        def _compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().compute_loss(*args, **kwargs)

    assert trained(Own, tmp_path, max_steps=1).beta == 0.1


def test_every_method_of_trls_trainer_is_called_here_or_refused() -> None:
    data = {"_tag_names", "_name", "_paper", "_template_file"}
    of_trl = {
        name
        for kind in DPOTrainer.__mro__
        if kind.__module__.startswith("trl.")
        for name in vars(kind)
        if not name.startswith("__") and callable(getattr(DPOTrainer, name))
    }
    unknown = {name for name in of_trl - data - set(NEVER_CALLED) if not hasattr(InfoPOTrainer, name)}
    assert unknown == {"_send_telemetry"}  # nothing is sent anywhere


def test_tags_of_a_subclass_are_those_of_the_model_too(tmp_path: Path) -> None:
    kind = type("Mine", (InfoPOTrainer,), {"_tag_names": ["mine"]})
    trainer = trained(kind, tmp_path, max_steps=1)
    assert trainer.model.model_tags == ["infopo", "dpo", "mine"]


# ---- settings that are changed late ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("ld_alpha", 0.5, UnsupportedArgumentError, "ld_alpha=0.5: LD-DPO weighs tokens"),
        ("sync_ref_model", True, UnsupportedArgumentError, "sync_ref_model=True: the reference is frozen"),
        ("beta", -1.0, ConfigError, "beta: expected a value > 0"),
        ("loss_type", "sigmod", ConfigError, "did you mean 'sigmoid'"),
        ("max_length", 0, ConfigError, "max_length: expected a value >= 2"),
    ],
)
def test_settings_that_are_changed_after_the_config_was_made_are_judged(
    tmp_path: Path, name: str, value: Any, error: type[Exception], message: str
) -> None:
    args = InfoPOConfig(str(tmp_path), use_cpu=True)
    setattr(args, name, value)
    with pytest.raises(error, match=message):
        InfoPOTrainer(
            model=tiny_llama(), args=args, train_dataset=random_dataset(4), processing_class=TOKENIZER
        )


def test_a_loss_that_is_named_late_is_taken(tmp_path: Path) -> None:
    args = InfoPOConfig(str(tmp_path), **SETTINGS)
    args.loss_type, args.beta = "Sigmoid", 0.3
    trainer = InfoPOTrainer(
        model=tiny_llama(), args=args, train_dataset=random_dataset(4), processing_class=TOKENIZER
    )
    assert [(name, parameters["beta"]) for name, parameters, _ in trainer.mixture] == [("dpo", 0.3)]


@pytest.mark.parametrize("name", FIXED)
def test_an_attribute_that_would_change_the_loss_during_training_is_refused(
    tmp_path: Path, name: str
) -> None:
    trainer = trainer_of(tmp_path)
    with pytest.raises(UnsupportedArgumentError, match=rf"trainer\.{name}: the objective is fixed when"):
        setattr(trainer, name, 0.2)


# ---- callbacks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (SyncRefModelCallback, "the reference is frozen"),
        (LogCompletionsCallback, "generations.jsonl"),
        (type("Mine", (SyncRefModelCallback,), {}), "the reference is frozen"),
    ],
)
def test_a_callback_of_trl_that_could_do_nothing_is_refused(
    tmp_path: Path, kind: Any, why: str, late: bool
) -> None:
    callback = object.__new__(kind)  # its own constructor asks for a model or a trainer
    trainer = trainer_of(tmp_path)
    give = trainer.add_callback if late else lambda each: trainer_of(tmp_path, callbacks=[each])
    with pytest.raises(UnsupportedArgumentError, match=rf"{kind.__name__}: .*{why}"):
        give(callback)


def test_a_moving_average_of_the_policy_is_taken_and_one_of_the_reference_is_not(tmp_path: Path) -> None:
    trainer_of(tmp_path / "policy", callbacks=[BEMACallback(update_freq=1)]).train()
    with pytest.raises(UnsupportedArgumentError, match="BEMACallback: update_ref_model=True"):
        trainer_of(tmp_path / "reference", callbacks=[BEMAOfReference(update_ref_model=True)])


# ---- errors of data ------------------------------------------------------------------------------------------------

COLUMNS = "(in a script: InfoPOConfig(columns={...}), with None for null)"


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3", "context": "Of natural numbers."}, COLUMNS),
        ({"ask": "1 + 1 =", "yes": " 2", "no": " 3"}, COLUMNS),
        (
            {"prompt": "1 + 1 =", "chosen": "", "rejected": " 3"},
            "(in a script: InfoPOConfig(on_bad_row='skip'))",
        ),
        ({"question: it": "w", "chosen": "y", "rejected": "z"}, "question: it"),
        ({"chosen": "data.x: {a: b: c}", "rejected": "other"}, "data.x: {a: b: c}"),
    ],
)
def test_errors_of_data_say_what_a_script_writes(
    tmp_path: Path, row: dict[str, str], said: str, streams: bool
) -> None:
    data = datasets.Dataset.from_list([row] * 3)
    with pytest.raises(DataError) as caught:
        trainer_of(tmp_path, data.to_iterable_dataset() if streams else data)
    assert said in str(caught.value)
