"""`infopo evaluate` asks a model the items of tasks, marks the answers, and writes what came of it."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from infopo.adapters import load_for_use
from infopo.durable import with_home
from infopo.errors import ConfigError
from infopo.evaluation.asking import Wanted, answers, ask, wanted
from infopo.evaluation.given import as_sample, given_responses
from infopo.evaluation.harness import Standard
from infopo.evaluation.law import Law
from infopo.evaluation.marking import Loaded, loaded_tasks, marked, task_record
from infopo.evaluation.prompting import Prompts
from infopo.evaluation.results import (
    FOLDER,
    Response,
    default_folder,
    refuse_other_subject,
    refuse_smaller,
    replaced_lines,
    with_earlier_tasks,
    write_evaluation,
)
from infopo.evaluation.samples import SampleStore
from infopo.evaluation.server import ServerSettings
from infopo.evaluation.settings import DRAWING, LOADING, EvaluationSettings, unread
from infopo.evaluation.subjects import LoadedModel, ServedSubject, Subject
from infopo.evaluation.tasks import TASKS
from infopo.model_card import refresh
from infopo.models import load_tokenizer
from infopo.output import counted, say
from infopo.preflight import check_writable
from infopo.provenance import environment
from infopo.run_state import MODELS, last
from infopo.runs import Record, runs_beneath
from infopo.workflows.overlap import overlap_of_run


def evaluate(
    model: str | None,
    settings: EvaluationSettings,
    *,
    output: str | Path | None = None,
    responses: str | Path | None = None,
) -> Path:
    """Evaluates a model, or responses that something else wrote.

    Args:
        model: Local folder, adapter, run directory, hub name or `lab:policy`, or None for given responses and for
            the only model of a server.
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
    if (model is None and settings.server is None) == (responses is None):
        raise ConfigError("expected either a model (or --server URL) or --responses FILE")
    _refuse_unread(settings, responses)
    own = [name for name in settings.tasks if name in TASKS]
    standard = Standard.of([name for name in settings.tasks if name not in TASKS], settings, responses)
    name = model or (settings.server.url if settings.server is not None else str(responses))
    folder = Path(output) if output is not None else default_folder(name)
    check_writable(folder, "--output")
    refuse_other_subject(folder, settings.server.base_url if settings.server is not None else name)
    loaded = loaded_tasks(settings, own)
    if responses is not None:
        return _of_responses(Path(responses), loaded, settings, folder)
    found = _of_model(model, loaded, standard, settings, folder)
    if (
        model is not None
        and settings.shard is None
        and folder == Path(model) / FOLDER
        and refresh(Path(model))
    ):
        say(f"{Path(model) / 'README.md'}: results are in the model card")
    return found


def _refuse_unread(settings: EvaluationSettings, responses: object) -> None:
    """Refuses settings that are not read of what is evaluated.

    Raises:
        ConfigError: There are some.
    """
    problems = []
    if responses is not None:
        problems += unread(settings, DRAWING, "responses of a file, which are marked as they are")
    elif settings.server is not None:
        problems += unread(settings, LOADING, "a model behind a server")
    if set(settings.tasks) <= set(TASKS):
        problems += unread(
            settings, ("include_path",), f"{', '.join(settings.tasks)}, but to lm-evaluation-harness's tasks"
        )
    if problems:
        raise ConfigError(problems)


def _of_model(
    model: str | None,
    loaded: Sequence[Loaded],
    standard: Standard,
    settings: EvaluationSettings,
    folder: Path,
) -> Path:
    subject = subject_of(model, settings.server, settings.dtype, settings.batch_size)
    about = {**subject.record, "name": model or subject.name}
    if settings.shard is None:
        refuse_smaller(folder, about, _sizes(loaded, settings))
    prompts = [
        Prompts(subject.tokenizer, each.task, settings.prompting, settings.num_fewshot) for each in loaded
    ]
    # Their data and task files can be missing, which should not cost samples of the others.
    harness = standard.run(subject, settings)
    found = dict(harness.tasks)
    all_responses = list(harness.responses)
    with SampleStore(folder, settings.shard) as store:
        for each, asked in zip(loaded, prompts):
            law = settings.law(each.task, asked.stop)
            needed = _draw(subject, asked, each, law, store, settings)
            if settings.shard is None:
                samples = list(answers(needed, store))
                responses = marked(each.task, samples)
                logps = [sample.logp for _, sample in samples]
                found[each.task.name] = task_record(each, settings, responses, logps) | {
                    "prompting": asked.style,
                    "num_fewshot": settings.num_fewshot,
                    "prompt_sha256": _hash_of_all(needed),
                    "law": law.record,
                }
                all_responses += responses
    if settings.shard is not None:
        number, count = settings.shard
        say(f"shard {number} of {count} is drawn; without --shard, all shards are marked")
        return folder
    if model is not None:
        for name, overlap in overlap_of_run(model, {each.task.name: each.items for each in loaded}).items():
            found[name]["overlap"] = overlap
    return _write(folder, about, settings, found, all_responses, harness.groups)


def _sizes(loaded: Sequence[Loaded], settings: EvaluationSettings) -> dict[str, tuple[int, int]]:
    """Returns number of items and of samples per item by task, if they are known beforehand."""
    sizes = {each.task.name: (len(each.items), settings.num_samples) for each in loaded}
    if settings.limit is not None:
        sizes = dict.fromkeys(settings.tasks, (settings.limit, 1)) | sizes
    return sizes


def subject_of(
    model: str | None, server: ServerSettings | None = None, dtype: str = "auto", batch_size: int = 32
) -> Subject:
    """Returns the model that is asked, loaded or served.

    Args:
        model: Its name. None means the only model of the server.
        server: Where it is served, or None for a model that is loaded.
        dtype: Type of the weights of a loaded model.
        batch_size: Number of sequences that a loaded model draws together.

    Raises:
        ModelError: It cannot be loaded.
        ServerError: The server cannot be reached.
    """
    if server is not None:
        return ServedSubject(server)
    assert model is not None
    path = model_in(model)
    disable_progress_bar()  # transformers' own, for weights that load at once
    tokenizer = load_tokenizer(path)
    return LoadedModel(model, load_for_use(path, dtype), tokenizer, batch_size)


def _draw(
    subject: Subject,
    prompts: Prompts,
    each: Loaded,
    law: Law,
    store: SampleStore,
    settings: EvaluationSettings,
) -> list[Wanted]:
    """Draws the samples that the store lacks, and returns all that are needed, or those of the shard."""
    needed = list(
        wanted(subject, prompts, each.items, law, num_samples=settings.num_samples, seed=settings.seed)
    )
    if settings.shard is not None:
        needed = needed[settings.shard[0] - 1 :: settings.shard[1]]
    missing = sum(sample.key not in store for sample in needed)
    begin = time.perf_counter()
    with tqdm(total=missing, desc=each.task.name, unit=" samples", disable=None) as bar:
        ask(subject, prompts, each.task.name, needed, law, store, on_progress=bar.update)
    say(_drawn_line(each, len(needed), missing, time.perf_counter() - begin))
    return needed


def _of_responses(path: Path, loaded: Sequence[Loaded], settings: EvaluationSettings, folder: Path) -> Path:
    found: dict[str, Record] = {}
    all_responses: list[Response] = []
    for each in loaded:
        given, how = given_responses(path, each.task.name, each.items)
        answered = [
            (one.item, as_sample(each.task.name, one.item, number, text, finished=finished))
            for one in given
            for number, (text, finished) in enumerate(zip(one.responses, one.finished, strict=True))
        ]
        responses = marked(each.task, answered)
        found[each.task.name] = task_record(each, settings, responses) | {"matched_by": how}
        without = len(each.items) - len(given)
        say(
            f"{each.task.name}: {counted(len(answered), 'response')} to {counted(len(given), 'item')}, "
            f"matched by {how}; {counted(without, 'item')} without one"
        )
        all_responses += responses
    about = {"name": str(path), "weights": None, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    refuse_smaller(folder, about, {name: (task["items"], task["samples"]) for name, task in found.items()})
    return _write(folder, about, settings, found, all_responses, unused=DRAWING)


def _hash_of_all(needed: Sequence[Wanted]) -> str:
    """Returns one hash of all prompts, by which two evaluations are known to have asked the same."""
    return hashlib.sha256("".join(each.prompt_sha256 for each in needed).encode()).hexdigest()


def _write(
    folder: Path,
    about: Record,
    settings: EvaluationSettings,
    found: Mapping[str, Record],
    responses: Sequence[Response],
    groups: Mapping[str, Record] | None = None,
    unused: Sequence[str] = (),
) -> Path:
    record = {
        "model": about,
        "settings": {key: value for key, value in asdict(settings).items() if key not in unused},
        "environment": environment(seed=settings.seed),
        "tasks": found,
        **({"groups": groups} if groups else {}),
    }
    replaced = replaced_lines(folder, record)
    record, responses, dropped = with_earlier_tasks(folder, record, responses)
    write_evaluation(folder, record, responses)
    if replaced:
        say(*replaced)
    if dropped:
        say(f"left out, because the model has changed since, or cannot be told: {', '.join(dropped)}")
    say(
        "",
        *table({**found, **(groups or {})}),
        "",
        f"written: {folder / 'eval.json'}, {folder / 'items.jsonl'}",
    )
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
    return f"{each.task.name}: {counted(len(each.items), 'item')}, {counted(needed, 'sample')}{kept}{speed}"


def model_in(name: str) -> str:
    """Returns what a name stands for: of a run directory without a final model its last checkpoint, else the name.

    Raises:
        ConfigError: A run directory has neither.
    """
    name = with_home(name)
    folder = Path(name)
    is_run = folder.is_dir() and not (folder / "config.json").is_file()
    if not is_run or any((folder / file).is_file() for file in MODELS):
        return name
    checkpoint = last(folder)
    if checkpoint is None:
        raise ConfigError(f"{name}: holds no model, adapter or checkpoint{runs_beneath(folder)}")
    say(f"{name} has no final model yet: {checkpoint} is taken")
    return checkpoint
