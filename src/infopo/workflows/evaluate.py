"""`infopo evaluate` asks a model the items of tasks, marks the answers, and writes what came of it."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from infopo.errors import ConfigError, DataError
from infopo.evaluation.asking import Subject, Wanted, answers, ask, wanted
from infopo.evaluation.drawing import Law
from infopo.evaluation.given import given_responses
from infopo.evaluation.items import Answered, Item, Mark, Task, shown_text
from infopo.evaluation.prompting import Prompts
from infopo.evaluation.results import Response, default_folder, summary, write_evaluation
from infopo.evaluation.samples import SampleStore, prompt_hash
from infopo.evaluation.tasks import task as task_named
from infopo.models import load_for_use, load_tokenizer
from infopo.output import say
from infopo.preflight import check_writable
from infopo.run_state import MODELS, last
from infopo.runs import Record, environment, to_json


@dataclass(frozen=True)
class Settings:
    """How an evaluation is made.

    Attributes:
        tasks: Names of tasks.
        data: A file or hub name by task. Tasks without one use their own source.
        limit: Largest number of items of a task, the first of its data. None means all.
        num_samples: Responses per item.
        temperature: Divisor of the logits. None means greedy decoding for one sample, and 1 for several.
        top_p: Mass of the nucleus that tokens are drawn from.
        max_new_tokens: Largest number of tokens of a response. None means that of the task.
        prompting: "chat" or "plain". None means chat if the tokenizer has a chat template.
        num_fewshot: Number of worked examples before each problem.
        batch_size: Number of sequences that are drawn together.
        seed: Seed of the samples.
        dtype: Type of the weights.
        shard: (number from 1, count) of a process that draws its share of the samples and marks nothing.
        allow_code_execution: Whether code that the model wrote may run.
    """

    tasks: Sequence[str]
    data: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    num_samples: int = 1
    temperature: float | None = None
    top_p: float = 1.0
    max_new_tokens: int | None = None
    prompting: str | None = None
    num_fewshot: int = 0
    batch_size: int = 32
    seed: int = 0
    dtype: str = "auto"
    shard: tuple[int, int] | None = None
    allow_code_execution: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not self.tasks:
            problems.append("--tasks: expected at least one")
        if len(set(self.tasks)) != len(self.tasks):
            problems.append("--tasks: a task is named twice")
        for name in sorted(set(self.data) - set(self.tasks)):
            problems.append(f"--data: {name!r} is none of the tasks {', '.join(self.tasks)}")
        counts = {"--limit": self.limit, "--num-samples": self.num_samples, "--batch-size": self.batch_size,
                  "--max-new-tokens": self.max_new_tokens}  # fmt: skip
        problems += [
            f"{name}: expected at least 1, got {n}" for name, n in counts.items() if n is not None and n < 1
        ]
        if self.temperature == 0 and self.num_samples > 1:
            problems.append("--num-samples: greedy decoding has one response; set --temperature above 0")
        if not 0 <= self.seed < 2**32:
            problems.append(f"--seed: expected a number in [0, 2**32), got {self.seed}")
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            problems.append(f"--shard: expected I/N with 1 <= I <= N, got {self.shard[0]}/{self.shard[1]}")
        if problems:
            raise ConfigError(problems)

    def law(self, task: Task, stop: tuple[str, ...]) -> Law:
        """Returns the distribution that answers to a task are drawn from."""
        temperature = self.temperature
        if temperature is None:
            temperature = 0.0 if self.num_samples == 1 else 1.0
        return Law(self.max_new_tokens or task.max_new_tokens, temperature, self.top_p, stop)


@dataclass(frozen=True)
class Loaded:
    """A task with the items that are evaluated.

    Attributes:
        task: The task.
        items: Its items, up to the limit.
        source: The file or name that they come from.
        sha256: Hash of the items with what they are graded against, whatever file they came from.
    """

    task: Task
    items: Sequence[Item]
    source: str
    sha256: str


def evaluate(
    model: str | None,
    settings: Settings,
    *,
    output: str | Path | None = None,
    responses: str | Path | None = None,
) -> Path:
    """Evaluates a model, or responses that something else wrote.

    Args:
        model: Local folder, adapter, run directory, hub name or `lab:policy`, or None for given responses.
        settings: What is evaluated, and how.
        output: Folder of the results. By default it is `evaluation` in a run directory, else `infopo-eval/NAME` here.
        responses: A file of responses (see `given_responses`).

    Returns:
        The folder with `eval.json`, `items.jsonl` and `samples.jsonl`.

    Raises:
        ConfigError: A setting is wrong, or a task does not exist.
        DataError: Data of a task, or a response, cannot be used.
        ModelError: The model cannot be loaded.
    """
    if (model is None) == (responses is None):
        raise ConfigError("expected either a model or --responses FILE")
    tasks = [task_named(name) for name in settings.tasks]
    for task in tasks:
        if task.executes_code and not settings.allow_code_execution:
            raise ConfigError(
                f"--tasks {task.name}: marking runs code that a model wrote; add --allow-code-execution if it may run "
                "on this machine"
            )
    folder = Path(output) if output is not None else default_folder(model or str(responses))
    check_writable(folder, "--output")
    loaded = [_load(task, settings) for task in tasks]
    if responses is not None:
        return _of_responses(Path(responses), loaded, settings, folder)
    assert model is not None
    return _of_model(model, loaded, settings, folder)


def _of_model(model: str, loaded: Sequence[Loaded], settings: Settings, folder: Path) -> Path:
    name = model_in(model)
    disable_progress_bar()  # transformers' own, for weights that load at once
    tokenizer = load_tokenizer(name)
    prompts = [Prompts(tokenizer, each.task, settings.prompting, settings.num_fewshot) for each in loaded]
    subject = Subject.of(model, load_for_use(name, settings.dtype), tokenizer)
    found: dict[str, Record] = {}
    marked: list[Response] = []
    with SampleStore(folder, settings.shard) as store:
        for each, asked in zip(loaded, prompts):
            law = settings.law(each.task, asked.stop)
            needed = wanted(
                subject, asked, each.items, law, num_samples=settings.num_samples, seed=settings.seed
            )
            if settings.shard is not None:
                needed = needed[settings.shard[0] - 1 :: settings.shard[1]]
            missing = sum(sample.key not in store for sample in needed)
            begin = time.perf_counter()
            with tqdm(total=missing, desc=each.task.name, unit=" samples", disable=None) as bar:
                ask(subject, asked, each.task.name, needed, law, store, batch_size=settings.batch_size,
                    on_progress=bar.update)  # fmt: skip
            say(_drawn_line(each, len(needed), missing, time.perf_counter() - begin))
            if settings.shard is not None:
                continue
            pairs = list(answers(needed, store))
            texts = {sample.item.id: shown_text(sample.prompt) for sample in needed}
            given = [Answered(item, sample.text, sample.finished) for item, sample in pairs]
            numbers = [(sample.sample, sample.tokens) for _, sample in pairs]
            responses = _mark(each.task, given, numbers, texts)
            found[each.task.name] = _record(each, settings, responses) | {
                "prompting": asked.style,
                "num_fewshot": settings.num_fewshot,
                "prompt_sha256": _hash_of_all(needed),
                "law": law.record,
            }
            marked += responses
    if settings.shard is not None:
        say(
            f"shard {settings.shard[0]} of {settings.shard[1]} is drawn; without --shard, all shards are marked"
        )
        return folder
    about = {"name": model, "path": name, "weights": subject.weights, "dtype": str(subject.model.dtype)}
    return _write(folder, about, settings, found, marked)


def _of_responses(path: Path, loaded: Sequence[Loaded], settings: Settings, folder: Path) -> Path:
    found: dict[str, Record] = {}
    marked: list[Response] = []
    for each in loaded:
        given, how = given_responses(path, each.task.name, each.items)
        answered = [Answered(one.item, text) for one in given for text in one.responses]
        numbers = [(number, None) for one in given for number in range(len(one.responses))]
        texts = {one.item.id: shown_text(one.item.prompt) for one in given}
        responses = _mark(each.task, answered, numbers, texts)
        found[each.task.name] = _record(each, settings, responses) | {"matched_by": how}
        without = len(each.items) - len(given)
        say(f"{each.task.name}: {len(answered)} responses, matched by {how}; {without} items have none")
        marked += responses
    about = {"name": str(path), "weights": None, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return _write(folder, about, settings, found, marked)


def _hash_of_all(needed: Sequence[Wanted]) -> str:
    """Returns one hash of all prompts, by which two evaluations are known to have asked the same."""
    return hashlib.sha256("".join(prompt_hash(each.prompt_ids) for each in needed).encode()).hexdigest()


def _load(task: Task, settings: Settings) -> Loaded:
    source = settings.data.get(task.name)
    items = task.load(source)
    if not items:
        raise DataError(f"task {task.name} has no items", source or task.name, "no items")
    items = items[: settings.limit]
    digest = hashlib.sha256(to_json([vars(item) for item in items]).encode()).hexdigest()
    return Loaded(task, items, source or "default", digest)


def _mark(
    task: Task,
    answered: Sequence[Answered],
    numbers: Sequence[tuple[int, int | None]],
    texts: Mapping[str, str],
) -> list[Response]:
    """Returns the responses with the marks of every rule."""
    marks: dict[str, Sequence[Mark]] = {name: rule(answered) for name, rule in task.rules.items()}
    return [
        Response(
            task.name,
            each.item.id,
            sample,
            texts[each.item.id],
            each.response,
            tokens,
            each.finished,
            {name: found[place] for name, found in marks.items()},
        )
        for place, (each, (sample, tokens)) in enumerate(zip(answered, numbers, strict=True))
    ]


def _record(each: Loaded, settings: Settings, responses: Sequence[Response]) -> Record:
    lengths = [response.tokens for response in responses if response.tokens is not None]
    return {
        "headline": each.task.headline,
        "items": len({response.item for response in responses}),
        "samples": settings.num_samples,
        "data": {"source": each.source, "sha256": each.sha256},
        "rules": {rule: summary(responses, rule) for rule in each.task.rules},
        "tokens_mean": sum(lengths) / len(lengths) if lengths else None,
        "finished_share": sum(response.finished for response in responses) / max(1, len(responses)),
    }


def _write(
    folder: Path, about: Record, settings: Settings, found: Mapping[str, Record], marked: Sequence[Response]
) -> Path:
    record = {
        "model": about,
        "settings": vars(settings),
        "environment": environment(seed=settings.seed),
        "tasks": found,
    }
    write_evaluation(folder, record, marked)
    say("", *table(found), "", f"written: {folder / 'eval.json'}, {folder / 'items.jsonl'}")
    return folder


def table(tasks: Mapping[str, Record]) -> list[str]:
    """Returns the results as the lines of a Markdown table, the headline of each task first."""
    lines = ["| task | rule | right [95 %] | n | without an answer |", "|---|---|---|---|---|"]
    for name, record in tasks.items():
        for rule, found in record["rules"].items():
            label = rule if rule != record["headline"] else f"**{rule}**"
            notes = ", ".join(f"{count} {note}" for note, count in sorted(found["notes"].items())) or "0"
            lines.append(
                f"| {name} | {label} | {_figure(found['accuracy'], found['ci95'])} | {found['n']} | {notes} |"
            )
            for key, value in found.items():
                if key.startswith("pass@") or key == "majority":
                    lines.append(
                        f"| {name} | {label} {key} | {_figure(value['value'], value['ci95'])} | {record['items']} | |"
                    )
    return lines


def _figure(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None or interval is None:
        return "-"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _drawn_line(each: Loaded, needed: int, missing: int, seconds: float) -> str:
    kept = f", {needed - missing} of them from the store" if needed > missing else ""
    speed = f" ({missing / seconds:.1f} a second)" if missing else ""
    return f"{each.task.name}: {len(each.items)} items, {needed} samples{kept}{speed}"


def model_in(name: str) -> str:
    """Returns what a name stands for: of a run directory without a final model its last checkpoint, else the name.

    Raises:
        ConfigError: A run directory has neither.
    """
    folder = Path(name)
    is_run = folder.is_dir() and not (folder / "config.json").is_file()
    if not is_run or any((folder / file).is_file() for file in MODELS):
        return name
    checkpoint = last(folder)
    if checkpoint is None:
        raise ConfigError(f"{name}: holds no model, adapter or checkpoint")
    say(f"{name} has no final model yet: {checkpoint} is evaluated")
    return checkpoint
