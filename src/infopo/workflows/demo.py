"""`infopo demo` compares what several methods do to a small model, at three learning rates, on the same pairs."""

import itertools
import json
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from infopo.build import build_examples, build_trainer_on
from infopo.config import Recipe, parse_recipe, to_yaml
from infopo.data.examples import ExampleDataset
from infopo.errors import TrainingError
from infopo.evaluation.results import FOLDER, ITEMS
from infopo.generate import sample
from infopo.intervals import Z_95
from infopo.lab import Problem, make_problems
from infopo.lab.evaluation import MAX_NEW_TOKENS, AccuracyResult, as_prompt, one_thread
from infopo.losses.catalog import OBJECTIVES
from infopo.models import LAB_POLICY, load_policy, load_tokenizer
from infopo.output import say
from infopo.preflight import check_demo
from infopo.provenance import environment
from infopo.records import PreferenceExample, Role
from infopo.reference_pass import precompute
from infopo.report.figures import draw_demo
from infopo.runs import (
    RunDirectoryError,
    RunWriter,
    read_run,
    write_json_atomic,
    write_text_atomic,
)
from infopo.settings import DataSettings, ModelSettings, ReferenceSettings
from infopo.sweep_grid import cells
from infopo.workers import WorkerPool
from infopo.workflows.demo_comparison import against_start, comparison_lines, solve
from infopo.workflows.demo_pairs import lab_pairs
from infopo.workflows.report import report
from infopo.workflows.terminal import judge_of
from infopo.workflows.train import write_recipe
from infopo.yaml_tree import as_override

METHODS: Mapping[str, tuple[str, dict[str, float]]] = {
    "infopo": ("infopo", {"beta": 1.0}),
    "dpo_beta0.1": ("dpo", {"beta": 0.1}),
    "dpo_beta1": ("dpo", {"beta": 1.0}),
    "dpo_nll": ("dpo", {"beta": 0.1, "nll_weight": 1.0}),
    "sft": ("sft", {}),
}
"""Name in the summary -> objective and its parameters."""

LEARNING_RATES = (1e-5, 5.6e-5, 3.2e-4)
"""Learning rates over a decade and a half, the same for every method."""

TRAIN_PAIRS = 1200
HELD_OUT_PAIRS = 300
EPOCHS = 2
BATCH_SIZE = 32
EVALUATION_PROBLEMS = 1000
KL_SAMPLES = 512
MAX_WORKERS = 8


@dataclass(frozen=True)
class Result:
    """Results of one trained model. Log-probs and KL are in nats per response, on held-out problems.

    Attributes:
        learning_rate: Peak learning rate.
        beta: β of the objective, or None if it has none.
        accuracy: Share of `n` held-out problems that greedy decoding solves.
        accuracy_ci95: 95 % Wilson interval.
        n: Number of problems.
        chosen_logp_change: Mean log π_θ(y_w|x) - log π_ref(y_w|x) over held-out pairs.
        rejected_logp_change: The same of rejected responses.
        kl_from_reference: KL(π_θ ‖ π_ref), the mean of log π_θ - log π_ref over `KL_SAMPLES` samples of π_θ.
        kl_standard_error: Its standard error.
        seconds: Wall time of training.
        run: The run directory.
    """

    learning_rate: float
    beta: float | None
    accuracy: float
    accuracy_ci95: tuple[float, float]
    n: int
    chosen_logp_change: float
    rejected_logp_change: float
    kl_from_reference: float
    kl_standard_error: float
    seconds: float
    run: str


@dataclass(frozen=True)
class World:
    """Objects that all runs share: the starting model, the pairs, and the held-out problems."""

    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel
    train: ExampleDataset
    held_out: ExampleDataset
    held_out_logps: npt.NDArray[np.float64]
    """Log-probs of the reference (nats), (responses,)."""
    problems: list[Problem]


@dataclass(frozen=True)
class Setting:
    """Choices of the user, from which a worker process finds or loads everything else."""

    directory: Path
    labels: str
    seed: int

    def pairs_path(self, part: str) -> Path:
        return self.directory / f"pairs_{self.labels}_seed{self.seed}_{part}.jsonl"

    @property
    def sweep_path(self) -> Path:
        return self.directory / f"sweep_{self.labels}_seed{self.seed}.yaml"

    @property
    def start_dir(self) -> Path:
        return self.directory / f"start_{self.labels}_seed{self.seed}"

    def run_dir(self, method: str, learning_rate: float) -> Path:
        return self.directory / "runs" / f"{self.labels}_seed{self.seed}" / f"{method}_lr{learning_rate:g}"


def demo(output: str | Path, *, seed: int = 0, labels: str = "verified") -> dict[str, Any]:
    """Trains every method at every learning rate, prints a table, and writes `summary.json`, two pictures and a report.

    The recipes are those of a sweep, which is written for `infopo sweep`, too. Runs go side by side, with one thread
    each. The results of runs that an earlier call with the same settings has finished are used again.

    Returns:
        The summary.

    Raises:
        ConfigError: The output folder or the seed cannot be used.
    """
    begin = time.perf_counter()
    setting = Setting(Path(output), labels, seed)
    check_demo(output, seed)
    disable_progress_bar()  # transformers' own, for weights that load at once
    say(f"sampling {TRAIN_PAIRS + HELD_OUT_PAIRS} {labels} pairs from the SFT policy ...")
    with one_thread():
        say(_sample_pairs(setting))
        say(f"solving {EVALUATION_PROBLEMS} problems with the SFT policy ...")
        world = _world(setting)
        start = solve(world.reference, world.tokenizer, world.problems, setting.start_dir, LAB_POLICY)
    say(f"SFT policy (start): accuracy {start}")
    write_text_atomic(setting.sweep_path, to_yaml(sweep_of(setting)))
    methods = {name: [asdict(r) for r in results] for name, results in _run_all(setting).items()}
    runs = [(m, rate) for m in METHODS for rate in LEARNING_RATES]
    compared = against_start(setting.start_dir, [setting.run_dir(*run) for run in runs])
    summary = {
        "schema_version": 1,
        "labels": labels,
        "start": {"accuracy": start.accuracy, "accuracy_ci95": start.ci95, "n": start.n},
        "methods": methods,
        "against_start": compared,
        "settings": {
            "train_pairs": TRAIN_PAIRS,
            "held_out_pairs": HELD_OUT_PAIRS,
            "epochs": EPOCHS,
            "batch_size": BATCH_SIZE,
            "kl_samples": KL_SAMPLES,
        },
        "environment": environment(seed=seed),
        "seconds": time.perf_counter() - begin,
    }
    write_json_atomic(setting.directory / "summary.json", summary)
    pictures = draw_demo(summary, setting.directory)
    names = [f"{title(method)}, lr {rate:.1e}" for method, rate in runs]
    say(*table(summary), "", *comparison_lines(compared, names))
    written = [setting.directory / "summary.json", *pictures]
    say(f"\n{summary['seconds']:.0f} s; written: {', '.join(str(path) for path in written)}")
    page = setting.directory / "report.html"
    report([setting.run_dir(*run) for run in runs], page)
    say(
        f"open {page.resolve()} in a browser: what each run did to chosen and rejected responses, on the same axes"
    )
    return summary


def table(summary: Mapping[str, Any]) -> list[str]:
    """Returns all results of a summary as the lines of a Markdown table."""
    start = summary["start"]
    lines = [
        f"labels: {summary['labels']}; start: accuracy {start['accuracy']:.3f} "
        f"[{start['accuracy_ci95'][0]:.3f}, {start['accuracy_ci95'][1]:.3f}], n = {start['n']}; "
        "log-probs and KL in nats per response, on held-out problems",
        "",
        "| method | learning rate | accuracy [95 %] | chosen log-prob | rejected log-prob | KL from start | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, results in summary["methods"].items():
        for r in results:
            low, high = r["accuracy_ci95"]
            lines.append(
                f"| {title(name)} | {r['learning_rate']:.1e} | {r['accuracy']:.3f} [{low:.3f}, {high:.3f}] "
                f"| {r['chosen_logp_change']:+.2f} | {r['rejected_logp_change']:+.2f} "
                f"| {r['kl_from_reference']:.2f} ± {Z_95 * r['kl_standard_error']:.2f} | {r['seconds']:.0f} |"
            )
    return lines


def title(method: str) -> str:
    """Returns the title of a method of `METHODS`."""
    objective, parameters = METHODS[method]
    values = {"beta": "β", "nll_weight": "NLL"}
    shown = ", ".join(f"{values[key]} {value:g}" for key, value in parameters.items())
    return f"{OBJECTIVES[objective].title}{f' ({shown})' if shown else ''}"


def _line(name: str, r: Result) -> str:
    return (
        f"{title(name):24} lr {r.learning_rate:.1e}  accuracy {r.accuracy:.3f}  chosen {r.chosen_logp_change:+7.2f}  "
        f"rejected {r.rejected_logp_change:+8.2f}  KL {r.kl_from_reference:6.2f}  {r.seconds:.0f} s"
    )


def _sample_pairs(setting: Setting) -> str:
    """Writes the pairs, of which the last are held out, and returns an account of them."""
    rows, said = lab_pairs(setting.labels, TRAIN_PAIRS + HELD_OUT_PAIRS, setting.seed, setting.directory)
    for part, own in (("train", rows[:TRAIN_PAIRS]), ("held_out", rows[TRAIN_PAIRS:])):
        write_text_atomic(setting.pairs_path(part), "".join(json.dumps(row) + "\n" for row in own))
    return said


@cache
def _world(setting: Setting) -> World:
    reference, tokenizer = load_policy(LAB_POLICY), load_tokenizer(LAB_POLICY)
    train, _ = build_examples(DataSettings(path=str(setting.pairs_path("train")), cache="off"), tokenizer)
    held_out, _ = build_examples(
        DataSettings(path=str(setting.pairs_path("held_out")), cache="off"), tokenizer
    )
    problems = make_problems(EVALUATION_PROBLEMS, setting.seed, "evaluation")
    logps = _logps(held_out, reference)
    return World(tokenizer, reference, train, held_out, logps, problems)


def _run_all(setting: Setting) -> dict[str, list[Result]]:
    """Runs everything, with as many runs at a time as there are cores, and prints a line as each run ends."""
    results: dict[tuple[str, float], Result] = {}
    workers = min(os.cpu_count() or 1, MAX_WORKERS)
    runs = len(METHODS) * len(LEARNING_RATES)
    say(f"{runs} runs, {workers} at a time, which share the work on one reference ...")
    # It is of the same context as the processes that share the terminal.
    tqdm.set_lock(multiprocessing.get_context("spawn").RLock())
    with tqdm(total=runs, desc="runs", position=0, disable=None) as bar:
        try:
            with WorkerPool(workers, "spawn", _start_worker, (tqdm.get_lock(),)) as pool:
                waiting = {
                    pool.submit(_run, setting, m, rate): (m, rate) for m in METHODS for rate in LEARNING_RATES
                }
                for done in as_completed(waiting):
                    method, _ = key = waiting[done]
                    results[key] = done.result()
                    bar.update()
                    tqdm.write(_line(method, results[key]))
        except BrokenProcessPool as error:
            raise TrainingError(
                "a process of the demo ended before its run did (killed, or out of memory?). Start the demo again: "
                "what is finished is kept"
            ) from error
        finally:
            # A worker that was killed may have held the lock of the terminal, and the bar is still to be closed.
            tqdm.set_lock(threading.RLock())
    return {method: [results[method, rate] for rate in LEARNING_RATES] for method in METHODS}


def sweep_of(setting: Setting) -> Recipe:
    """Returns the recipe of all runs, which `infopo sweep` takes, too."""
    return Recipe(
        model=ModelSettings(LAB_POLICY),
        data=DataSettings(path=str(setting.pairs_path("train")), cache="off"),
        # Fifteen runs, one reference: whichever comes to a batch first computes it for all.
        reference=ReferenceSettings(sides="both", store=str(setting.directory / "reference")),
        train={
            "num_train_epochs": EPOCHS,
            "per_device_train_batch_size": BATCH_SIZE,
            "activation_checkpointing": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 5,
            "seed": setting.seed,
            # More often than by default, so that the report of these short runs shows curves.
            "probe_steps": 10,
            "gradient_steps": 25,
            "gradient_size": 8,
            "anchor_tokens": MAX_NEW_TOKENS,
        },
        output_dir=str(setting.sweep_path.with_suffix("")),
        sweep={
            "objective": [{"name": name, **parameters} for name, parameters in METHODS.values()],
            "train.learning_rate": list(LEARNING_RATES),
        },
    )


def recipes(setting: Setting) -> dict[tuple[str, float], Recipe]:
    """Returns the recipe of each run by method and learning rate."""
    base = sweep_of(setting)
    assert base.sweep is not None
    text, runs = to_yaml(base), itertools.product(METHODS, LEARNING_RATES)
    found = {}
    for run, cell in zip(runs, cells(base.sweep), strict=True):
        own = [*cell.overrides, "sweep=null", f"output_dir={as_override(str(setting.run_dir(*run)))}"]
        found[run] = parse_recipe(text, source=str(setting.sweep_path), overrides=own)
    return found


def _start_worker(lock: Any) -> None:
    """Prepares a worker process. There are as many as cores, with one thread and one progress bar each."""
    disable_progress_bar()
    # The runs of the demo share one reference: that one waits for another's batches is how it works, and no warning.
    logging.getLogger(precompute.__module__).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    tqdm.set_lock(lock)


def _run(setting: Setting, method: str, learning_rate: float) -> Result:
    """Trains one model, or finds it trained, and returns its measurements."""
    world = _world(setting)
    recipe = recipes(setting)[method, learning_rate]
    run_dir = Path(recipe.output_dir)
    if (finished := _finished(run_dir, recipe)) is not None:
        return finished
    writer = RunWriter(run_dir)
    name = f"{title(method)}, lr {learning_rate:.1e}"
    bar = StepBar(name)
    trainer = build_trainer_on(recipe, world.tokenizer, world.train, world.held_out, [bar])
    write_recipe(trainer, recipe)
    trainer.remove_callback(PrinterCallback)
    # Several runs share the terminal, so a verdict says whose it is.
    judge_of(trainer).announce = lambda verdict: tqdm.write(f"{name}: {verdict}")
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    trainer.save_final_model()
    result = _measure(
        world,
        trainer.model,
        learning_rate,
        METHODS[method][1].get("beta"),
        seconds,
        str(run_dir),
        setting.seed,
    )
    writer.write_evaluation(asdict(result))
    return result


def _finished(run_dir: Path, recipe: Recipe) -> Result | None:
    """Returns the result of an earlier run with the same recipe, or None if there is none that was finished."""
    try:
        run = read_run(run_dir)
        has_marks = (run_dir / FOLDER / ITEMS).is_file()
        if run.recipe != to_yaml(recipe) or run.evaluation is None or not has_marks:
            return None
        return Result(**{**run.evaluation, "accuracy_ci95": tuple(run.evaluation["accuracy_ci95"])})
    except (RunDirectoryError, KeyError, TypeError):
        return None  # killed before it wrote anything, or written by another version


def _measure(
    world: World,
    policy: PreTrainedModel,
    learning_rate: float,
    beta: float | None,
    seconds: float,
    run: str,
    seed: int,
) -> Result:
    score: AccuracyResult = solve(policy, world.tokenizer, world.problems, Path(run), run)
    log_ratio = _logps(world.held_out, policy) - world.held_out_logps
    chosen = world.held_out.roles == Role.CHOSEN
    kl = _log_ratios_of_samples(world, policy, seed)
    return Result(
        learning_rate=learning_rate,
        beta=beta,
        accuracy=score.accuracy,
        accuracy_ci95=score.ci95,
        n=score.n,
        chosen_logp_change=float(log_ratio[chosen].mean()),
        rejected_logp_change=float(log_ratio[~chosen].mean()),
        kl_from_reference=float(kl.mean()),
        kl_standard_error=float(kl.std(ddof=1) / len(kl) ** 0.5),
        seconds=seconds,
        run=run,
    )


def _logps(dataset: ExampleDataset, model: PreTrainedModel) -> npt.NDArray[np.float64]:
    """Returns log π(y|x) of every response (nats), (responses,)."""
    sides = frozenset({"chosen", "rejected"})
    values = precompute(dataset, model, sides, batch_size=128, device=torch.device("cpu")).reference
    assert values is not None
    return values


def _log_ratios_of_samples(world: World, policy: PreTrainedModel, seed: int) -> npt.NDArray[np.float64]:
    """Returns log π_θ(y|x) - log π_ref(y|x) of samples y of π_θ, (samples,), whose mean is KL(π_θ ‖ π_ref)."""
    prompts = [as_prompt(problem) for problem in world.problems[:KL_SAMPLES]]
    drawn = sample(
        policy,
        world.tokenizer,
        prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=1.0,
        batch_size=256,
        seed=seed,
    )
    examples = []
    for prompt, (response,) in zip(prompts, drawn, strict=True):
        ids = world.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        end = [world.tokenizer.eos_token_id] if response.finished else []
        examples.append(PreferenceExample(ids, [[*response.token_ids, *end]], [], "sample"))
    dataset = ExampleDataset.from_examples(examples)
    return _logps(dataset, policy) - _logps(dataset, world.reference)


class StepBar(TrainerCallback):
    """Shows a progress bar with the latest metrics, in one line beneath the bar of runs."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        worker = multiprocessing.current_process()._identity[-1:] or (1,)
        self.bar = tqdm(
            total=state.max_steps, desc=self.description, position=worker[0], leave=False, disable=None
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        shown = {key: logs[key] for key in ("loss", "logps/chosen", "logps/rejected") if logs and key in logs}
        self.bar.set_postfix({key: f"{value:.2f}" for key, value in shown.items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
