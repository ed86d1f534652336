"""A checkpoint is whole or not there, is finite, and runs nothing when it is read."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    MixtralConfig,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from infopo import checkpoints, run_state
from infopo.arguments import InfoPOConfig
from infopo.errors import CheckpointError, NonFiniteWeightsError
from infopo.hashing import hash_weights
from infopo.lab.tokenizer import build_tokenizer
from infopo.trainer import InfoPOTrainer
from saved_runs import FILES, Killed, tiny_trainer
from worlds import random_dataset, tiny_llama, tiny_of

# ---- damaged and hostile files -------------------------------------------------------------------------------------


class Hostile:
    """Unpickled, it would run a program."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def poison(path: Path, kind: str, mark: Path) -> None:
    if kind == "hostile":
        torch.save(Hostile(mark), path)
    else:
        path.write_bytes({"empty": b"", "nonsense": b"no archive at all"}[kind])


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_trainer(folder).train()
    return folder


@pytest.mark.parametrize("kind", ["hostile", "nonsense"])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "model.safetensors"]
)
def test_damaged_and_hostile_files_run_nothing_and_are_named(
    tmp_path: Path, two_checkpoints: Path, name: str, kind: str
) -> None:
    """Even if the same hand has written the checkpoint's record of its files."""
    run_dir = Path(shutil.copytree(two_checkpoints, tmp_path / "run"))
    folder, mark = run_dir / "checkpoint-2", tmp_path / "ran"
    if name == "pytorch_model.bin":  # in place of the weights
        (folder / "model.safetensors").unlink()
    poison(folder / name, kind, mark)
    run_state.seal(folder)
    with pytest.raises(CheckpointError, match=r"checkpoint-2") as refused:
        tiny_trainer(run_dir, max_steps=3).train(resume_from_checkpoint=str(folder))
    assert len(str(refused.value)) < 500 + len(str(run_dir))
    assert "weights_only" not in str(refused.value)  # torch's advice, which would run what is in the file
    assert not mark.exists()


def test_a_damaged_checkpoint_is_passed_over_unless_it_is_named(
    tmp_path: Path, two_checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = Path(shutil.copytree(two_checkpoints, tmp_path / "run"))
    newest, mark = run_dir / "checkpoint-2", tmp_path / "ran"
    poison(newest / "optimizer.pt", "hostile", mark)
    with pytest.raises(CheckpointError, match=r"checkpoint-2/optimizer.pt: is damaged"):
        tiny_trainer(run_dir).train(resume_from_checkpoint=str(newest))
    trainer = tiny_trainer(run_dir)
    trainer.train(resume_from_checkpoint=True)
    assert f"{run_dir / 'checkpoint-1'} is taken instead" in caplog.text
    assert trainer.state.global_step == 2
    run_state.verify(newest)  # written anew
    assert not mark.exists()


@pytest.mark.long
def test_a_mixture_of_experts_resumes_with_its_experts(tmp_path: Path) -> None:
    """Its files name weights as first published, and transformers would leave those as they were."""

    def trainer(folder: str, steps: int) -> InfoPOTrainer:
        settings = MixtralConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, pad_token_id=0, eos_token_id=2, bos_token_id=1,
            router_aux_loss_coef=0.0,
        )  # fmt: skip
        args = InfoPOConfig(
            output_dir=str(tmp_path / folder), max_steps=steps, save_steps=1, use_cpu=True, disable_tqdm=True,
            learning_rate=1e-2, lr_scheduler_type="constant", activation_checkpointing=False, report_to="none",
            save_strategy="steps",
        )  # fmt: skip
        return InfoPOTrainer(
            tiny_of(settings), args=args, train_dataset=random_dataset(32), processing_class=build_tokenizer()
        )

    whole = trainer("whole", 3)
    whole.train()
    trainer("parts", 2).train()
    resumed = trainer("parts", 3)
    resumed.train(resume_from_checkpoint=True)
    assert hash_weights(resumed.model) == hash_weights(whole.model)


# ---- nothing that is not finite is saved ---------------------------------------------------------------------------


class Overflow(TrainerCallback):
    """An update that overflows: the loss before it was finite."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                next(kwargs["model"].parameters()).view(-1)[5] = math.inf


def test_weights_that_overflowed_are_not_saved_and_a_lower_rate_goes_on_from_the_checkpoint_before(
    tmp_path: Path,
) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=3)
    trainer.add_callback(Overflow(2))
    with pytest.raises(
        NonFiniteWeightsError, match=r"step 2: model.embed_tokens.weight .*checkpoint-1 is whole"
    ):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-1"]
    resumed = tiny_trainer(tmp_path, max_steps=3, learning_rate=1e-8)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


@pytest.mark.parametrize("save", ["save_final_model", "save_model"])
def test_no_final_model_is_written_that_is_not_finite(tmp_path: Path, save: str) -> None:
    trainer = tiny_trainer(tmp_path, save_strategy="no")
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(NonFiniteWeightsError, match=r"lm_head.weight is NaN .* No checkpoint had been saved"):
        getattr(trainer, save)()
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_that_overflowed_is_not_saved(tmp_path: Path) -> None:
    class Poisoned(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for values in kwargs["optimizer"].state.values():
                values["exp_avg_sq"].view(-1)[0] = math.inf

    trainer = tiny_trainer(tmp_path)
    trainer.add_callback(Poisoned())
    with pytest.raises(NonFiniteWeightsError, match="the optimizer's exp_avg_sq is NaN or infinite"):
        trainer.train()


# ---- checkpoints are whole -----------------------------------------------------------------------------------------


def save(run_dir: Path, step: int, content: str) -> None:
    args = TrainingArguments(output_dir=str(run_dir), use_cpu=True, save_total_limit=2)
    state = TrainerState(global_step=step)
    with checkpoints.staged(run_dir, state, args, lambda: None) as staging:
        (staging / f"checkpoint-{step}").mkdir()
        for name in FILES:
            (staging / f"checkpoint-{step}" / name).write_text(json.dumps({"saved": content}))


def test_a_kill_at_any_file_operation_leaves_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving checkpoint-9 over an older one of that name, while the oldest of three is to go."""
    countdown = [10**9]
    plain = {"rmtree": shutil.rmtree, "replace": Path.replace, "mkdir": Path.mkdir, "fsync": os.fsync}

    def tick() -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise Killed

    def rmtree(path: Any, **kwargs: Any) -> None:
        for file in sorted(Path(path).rglob("*")):
            if file.is_file():
                tick()
                file.unlink()
        tick()
        plain["rmtree"](path, **kwargs)

    def ticking(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tick()
            return plain[name](*args, **kwargs)

        return call

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    monkeypatch.setattr(Path, "replace", ticking("replace"))
    monkeypatch.setattr(Path, "mkdir", ticking("mkdir"))
    monkeypatch.setattr(os, "fsync", ticking("fsync"))
    outcomes = set()
    for number in range(1, 200):
        run_dir = tmp_path / str(number)
        countdown[0] = 10**9
        for step in (3, 6, 9):
            save(run_dir, step, "old")
        countdown[0] = number
        try:
            save(run_dir, 9, "new")
        except Killed:
            last = run_state.last(str(run_dir))
            assert last is not None
            run_state.verify(Path(last))  # whole, and of one save
            saved = json.loads((Path(last) / "infopo_state.json").read_text())["saved"]
            outcomes.add((Path(last).name, saved))
        else:
            break
    assert number > 10
    assert not (run_dir / run_state.STAGING).exists()
    assert outcomes >= {("checkpoint-9", "old"), ("checkpoint-9", "new")}


def test_a_checkpoint_is_durable_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        events.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        events.append(f"-> {target}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    save(tmp_path, 3, "x")
    named = events.index(f"-> {tmp_path / 'checkpoint-3'}")
    staged = tmp_path / run_state.STAGING / "checkpoint-3"
    assert set(events[:named]) >= {str(staged), *(str(staged / name) for name in FILES)}
    assert str(tmp_path) in events[named:]  # and its name is, before an older checkpoint goes


def test_the_checkpoint_of_a_trainer_holds_its_identity(tmp_path: Path) -> None:
    trainer = InfoPOTrainer(
        tiny_llama(),
        args=InfoPOConfig(
            output_dir=str(tmp_path), max_steps=2, save_steps=1, use_cpu=True, disable_tqdm=True,
            save_strategy="steps", activation_checkpointing=False, report_to="none",
        ),
        train_dataset=random_dataset(8),
        processing_class=build_tokenizer(),
    )  # fmt: skip
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-2" / "infopo_state.json").read_text())
    assert saved["reference"] == trainer.policy_hash == hash_weights(tiny_llama()).whole
    assert saved["data"] == random_dataset(8).content_hash()
    assert saved["objective"] == [["infopo", {"beta": 1.0, "length_normalized": False, "cap": 5.0}, 1.0]]
    assert trainer.find_checkpoint(True) == str(tmp_path / "checkpoint-2")
