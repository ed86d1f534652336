"""Runs one variant in a process of its own, turn by turn, and reports each turn.

`speed.py` starts it with its job as JSON, and lets it run a turn by a line on standard input. A turn is answered with
one line of JSON on what was standard output. All that libraries print goes to standard error.
"""

import copy
import ctypes
import gc
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

import regimes
from flops import COMPACT
from infopo import InfoPOConfig, InfoPOTrainer
from infopo.data.examples import ExampleDataset
from infopo.data.packing import pack
from infopo.logps import attention
from infopo.logps.forward import response_logps
from infopo.records import PreferenceExample, Role
from infopo.reference_pass import precompute
from shapes import build_model, build_tokenizer

BETA = 0.1
PROMPT, RESPONSE = 512, 128
"""Tokens of the prompts and responses that show how time grows with tokens."""
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""Where a job's seconds come from: the clock on the wall, or the time that processors worked for this process."""
Job = dict[str, Any]
ReferencePass = Callable[[list[PreferenceExample]], list[float]]
"""Returns log π_ref of the rejected responses of examples. What else it computes and stores counts in its time."""


class Line:
    """The conversation with `speed.py`."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def wait(self) -> None:
        """Returns when `speed.py` asks for a turn, and ends the process if `speed.py` has ended."""
        if not sys.stdin.readline():
            sys.exit(0)

    def report(self, **values: Any) -> None:
        self.answers.write(json.dumps(values) + "\n")


# ---- training -------------------------------------------------------------------------------------------------------


def settings(job: Job, folder: str) -> dict[str, Any]:
    """Returns the settings of both trainers, under the names that they share."""
    cuda = job["device"] == "cuda"
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta": BETA,
        "loss_type": "sigmoid",
        "max_length": None,
        "gradient_checkpointing": cuda,
        # On a GPU the weights themselves are bfloat16, unless autocast is asked for.
        "bf16": bool(job.get("autocast")),
        "use_cpu": not cuda,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def turns_of(job: Job) -> list[regimes.Turn]:
    """Returns the job's turns in the form that its variant takes."""
    turns = regimes.plan(
        job["regime"], job["rounds"], job["steps"], job["batch"], job["vocabulary"], job["seed"]
    )
    if job["variant"].startswith("infopo"):
        return turns
    turns = regimes.as_pairs(turns)
    return [regimes.grouped(turn) for turn in turns] if job["variant"] == "trl_best" else turns


def build_trainer(job: Job, turns: list[regimes.Turn], folder: str) -> Any:
    """Returns the variant's trainer over all turns, in their order."""
    policy = build_model(job, seed=0)
    # With adapters, the reference is the model without them.
    reference = None if job.get("lora") else build_model(job, seed=1)
    adapter = {"peft_config": lora()} if job.get("lora") else {}
    examples = [e for turn in turns for step in turn for e in step]
    common = settings(job, folder) | {"per_device_train_batch_size": len(turns[0][0])}
    if job["variant"] == "trl_accumulated":
        common |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(turns[0][0])}
    tokenizer = build_tokenizer(job["vocabulary"])
    if job["variant"].startswith("infopo"):
        if job["variant"] == "infopo_objective":
            del common["loss_type"], common["beta"]
        if job["variant"] == "infopo_compiled":
            common["torch_compile"] = True
        if job["variant"] == "infopo_whole":
            common["max_tokens_per_forward"] = 10**9
        return InfoPOTrainer(
            model=policy,
            ref_model=reference,
            # With a store, the values of an earlier run would be reused.
            args=InfoPOConfig(**common, reference_store="off"),
            train_dataset=ExampleDataset.from_examples(examples),
            processing_class=tokenizer,
            **adapter,
        )
    from trl import DPOConfig

    from peer import CompactDPOTrainer, TokenizedDPOTrainer, dataset_of

    precomputed = job["variant"] != "trl"
    trainer = (CompactDPOTrainer if job["variant"] in COMPACT else TokenizedDPOTrainer)(
        model=policy,
        ref_model=reference,
        args=DPOConfig(**common, precompute_ref_log_probs=precomputed),
        train_dataset=dataset_of(examples),
        processing_class=tokenizer,
        **adapter,
    )
    if precomputed:
        # Its values are computed, so that it would only take memory.
        trainer.ref_model = None
    return trainer


def lora() -> Any:
    """Returns adapters for all linear layers but the head.

    They begin at 0, so that the first loss is log 2 in each variant. The losses of the next steps tell variants apart.
    """
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


class Parts:
    """Seconds of a turn, by part of a step. On a GPU, each measurement synchronises with it."""

    def __init__(self, cuda: bool, clock: Callable[[], float]) -> None:
        self.seconds: dict[str, float] = {}
        self.cuda, self.clock = cuda, clock

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - begin

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return self.clock()

    def watch(self, trainer: InfoPOTrainer) -> None:
        """Times log-probs, the layers' forward pass within them, and the backward pass."""
        trainer._loss.piece = self._timed("logps", trainer._loss.piece)  # type: ignore[method-assign]
        layers = trainer.model.model
        layers.forward = self._timed("layers", layers.forward)
        trainer.accelerator.backward = self._timed("backward", trainer.accelerator.backward)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return function(*args, **kwargs)

        return timed


class Turns(TrainerCallback):
    """Blocks training between turns.

    A turn lasts from the request to the end of its last step. It includes collating its batches, clipping, the
    optimizer and what the trainer itself does. The last turn is for memory, and its time means nothing.
    """

    def __init__(self, sizes: list[int], line: Line, cuda: bool, clock: Callable[[], float]) -> None:
        self.line, self.cuda = line, cuda
        self.parts = Parts(cuda, clock)
        self.left = sizes
        self.loss: torch.Tensor | None = None
        self.losses: list[torch.Tensor] = []
        self.step_mib: list[float | None] = []

    def watch(self, trainer: Any) -> None:
        """Records each step's loss, which is the sum over its accumulated batches."""
        step = trainer.training_step

        def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = step(*args, **kwargs).detach()
            self.loss = loss if self.loss is None else self.loss + loss
            return loss

        trainer.training_step = recorded

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin()

    def _begin(self) -> None:
        self.size = self.left.pop(0)
        self.line.wait()
        self.losses.clear()
        self.parts.seconds.clear()
        self.begin = self.parts.now()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self.left:
            self.memory = Memory(self.cuda)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.optimizer = self.parts("optimizer")
        self.optimizer.__enter__()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.optimizer.__exit__(None, None, None)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self.loss is not None
        self.losses.append(self.loss)
        self.loss = None
        if not self.left:
            self.step_mib.append(self.memory.peak_mib())
        if len(self.losses) < self.size:
            return
        seconds = self.parts.now() - self.begin
        losses = [float(loss) for loss in self.losses]
        self.line.report(seconds=seconds, losses=losses, parts=self.parts.seconds, step_mib=self.step_mib)
        if self.left:
            self._begin()


class Memory:
    """Memory that a step adds to what was there when it began, which is model, optimizer state and libraries.

    On a CPU, memory that was freed before stays in the heap, under the settings of the allocator that both sides have,
    and would hide what a step needs. It is therefore returned first, and the kernel's record of the peak is reset.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        gc.collect()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / 2**20
            return
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.start = _status_mib("VmRSS")
        except OSError:
            # The system is not Linux with glibc, or does not allow this.
            self.start = None

    def peak_mib(self) -> float | None:
        """Returns the peak in MiB, or None if it cannot be measured."""
        if self.start is None:
            return None
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else _status_mib("VmHWM")
        return peak - self.start


def _status_mib(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[1]) / 1024


def train(job: Job, line: Line) -> None:
    """Runs the trainer's own `train()`, one turn at a time."""
    turns = turns_of(job)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(job, turns, folder)
        callback = Turns([len(turn) for turn in turns], line, job["device"] == "cuda", CLOCKS[job["clock"]])
        callback.watch(trainer)
        trainer.add_callback(callback)
        if job["parts"] and isinstance(trainer, InfoPOTrainer):
            callback.parts.watch(trainer)
        trainer.train()


# ---- the reference pass, and time against tokens --------------------------------------------------------------------


def reference(job: Job, line: Line) -> None:
    """Runs the reference pass over the examples of each turn, from tokens to stored log-probs."""
    turns, now = turns_of(job), CLOCKS[job["clock"]]
    with tempfile.TemporaryDirectory() as folder:
        run = _our_reference(job) if job["variant"].startswith("infopo") else _trl_reference(job, folder)
        for turn in turns[:-1]:
            line.wait()
            begin = now()
            rejected = run([e for step in turn for e in step])
            line.report(seconds=now() - begin, sum=float(sum(rejected)))


def _our_reference(job: Job) -> ReferencePass:
    sides = {"rejected"} if job["variant"] == "infopo_objective" else {"chosen", "rejected"}
    model = build_model(job, seed=1)
    attention.enable(model)

    def run(examples: list[PreferenceExample]) -> list[float]:
        dataset = ExampleDataset.from_examples(examples)
        stored = precompute(
            dataset, model, frozenset(sides), batch_size=job["batch"], device=model.device
        ).reference
        return stored[dataset.roles == Role.REJECTED].tolist()

    return run


def _trl_reference(job: Job, folder: str) -> ReferencePass:
    from peer import dataset_of

    # The variant `trl` keeps its reference model, and its pass stores the same values.
    turns = turns_of(job)
    trainer = build_trainer(job | {"variant": "trl"}, turns[:1], folder)

    def run(examples: list[PreferenceExample]) -> list[float]:
        stored = trainer._precompute_ref_logps(dataset_of(examples), "train", len(turns[0][0]))
        return stored["ref_rejected_logps"]

    return run


def linearity(job: Job, line: Line) -> None:
    """Runs forward and backward pass of one packed row, with another number of equally long examples each turn."""
    model = build_model(job, seed=0)
    attention.enable(model)
    rng, now = torch.Generator().manual_seed(job["seed"]), CLOCKS[job["clock"]]
    ids = partial(torch.randint, regimes.FIRST_ID, job["vocabulary"], generator=rng)
    for count in job["counts"]:
        examples = []
        for i in range(count):
            prompt, chosen, rejected = (ids((n,)).tolist() for n in (PROMPT, RESPONSE, RESPONSE))
            # The first tokens differ, so that the two responses have no common beginning by chance.
            chosen[0], rejected[0] = regimes.FIRST_ID, regimes.FIRST_ID + 1
            examples.append(PreferenceExample(prompt, [chosen], [rejected], str(i)))
        line.wait()
        begin = now()
        batch = pack(examples).to(model.device)
        logps = response_logps(model, batch)
        ratio = logps[batch.role == Role.CHOSEN] - logps[batch.role == Role.REJECTED]
        nn.functional.logsigmoid(BETA * ratio).mean().neg().backward()
        if job["device"] == "cuda":
            torch.cuda.synchronize()
        line.report(seconds=now() - begin, tokens=len(batch.input_ids))
        model.zero_grad()


# ---- from text to a saved model -------------------------------------------------------------------------------------


def end_to_end(job: Job, line: Line) -> None:
    """Does what a user's script does, from rows of text and a model's folder to a trained model."""
    from datasets import load_dataset

    if not job["variant"].startswith("infopo"):
        from trl import DPOConfig, DPOTrainer
    line.wait()
    begin = time.perf_counter()
    common = settings(job, job["output"]) | {"per_device_train_batch_size": job["batch"]}
    data = load_dataset("json", data_files=job["data"], split="train", cache_dir=job["cache"])
    if job["variant"].startswith("infopo"):
        ours = InfoPOConfig(**common, reference_store="off")
        trainer: Any = InfoPOTrainer(model=job["folder"], args=ours, train_dataset=data)
    else:
        common["precompute_ref_log_probs"] = job["variant"] == "trl_precomputed"
        trainer = DPOTrainer(model=job["folder"], args=DPOConfig(**common), train_dataset=data)
    result = trainer.train()
    trainer.save_model()
    line.report(seconds=time.perf_counter() - begin, loss=result.training_loss)


KINDS = {"train": train, "reference": reference, "linearity": linearity, "end_to_end": end_to_end}


def main() -> None:
    line = Line()
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    KINDS[job["kind"]](copy.deepcopy(job), line)


if __name__ == "__main__":
    main()
