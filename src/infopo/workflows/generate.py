"""`infopo generate` lets a model, or two side by side, answer prompts: on the terminal, or into a file."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from infopo import durable
from infopo.errors import ConfigError
from infopo.evaluation.asking import Wanted, answers, ask, wanted
from infopo.evaluation.given import IDS
from infopo.evaluation.items import Item, Task, shown_text
from infopo.evaluation.prompting import Prompts
from infopo.evaluation.questions import prompts_in, with_system
from infopo.evaluation.samples import Sample, SampleStore
from infopo.evaluation.server import ServerSettings
from infopo.evaluation.settings import LOADING, EvaluationSettings, unread
from infopo.evaluation.subjects import Subject
from infopo.output import counted, say
from infopo.preflight import check_writable
from infopo.runs import Record, os_errors_named, to_json
from infopo.workflows.evaluate import subject_of
from infopo.workflows.new_file import refuse_foreign, rows_in, say_if_fewer

TASK = "generate"
"""Name of what is asked, in settings and in the sample store."""

MAX_NEW_TOKENS = 256

Answer = tuple[Item, Sample]


def generate(
    model: str | None,
    settings: EvaluationSettings,
    *,
    prompts: Sequence[str] = (),
    file: str | None = None,
    system: str | None = None,
    against: str | None = None,
    output: str | Path | None = None,
) -> list[list[Sample]]:
    """Answers prompts, through the sample store and the prompt rendering of `infopo evaluate`.

    Args:
        model: Run directory, checkpoint, adapter, folder, hub name or `lab:policy`, or None for that of a server.
        settings: How responses are drawn. Its only task is `generate`.
        prompts: Texts of prompts.
        file: A file with prompts (`prompts_in`).
        system: System message that is put before each of them.
        against: A second model, or the URL of a server.
        output: A `.jsonl` file. Samples are kept beside it, so that a killed command goes on. Without it, responses are
            printed, and kept nowhere.

    Returns:
        The samples of each model, in the order of the prompts.

    Raises:
        ConfigError: A setting is wrong, or there is no prompt.
        DataError: A prompt cannot be used. Names the row.
        ModelError: A model cannot be loaded.
    """
    if model is None and settings.server is None:
        raise ConfigError("MODEL: expected a model, or --server URL")
    _refuse_unread(settings, against)
    path = _output_file(output)
    if path is not None:
        for each in (path, *([_second(path)] if against is not None else [])):
            refuse_foreign(each, (_store(path),), (file,))
    items = _items(prompts, file, system, settings.limit)
    own = replace(settings, server=None)
    if against is not None and _is_url(against):
        server = settings.server or ServerSettings(against)
        own = replace(settings, server=ServerSettings(against, concurrency=server.concurrency))
    sides: list[tuple[str | None, EvaluationSettings]] = [(model, settings)]
    sides += [(None if own.server else against, own)] if against is not None else []
    found: list[tuple[str, list[Answer]]] = []
    with tempfile.TemporaryDirectory(prefix="infopo-") as forgotten:
        folder = Path(forgotten) if path is None else _store(path)
        for name, how in sides:
            found.append(_answered(name, items, how, folder, has_bar=path is not None))
    if path is None:
        _show(found)
    else:
        _write(found, path, system)
    return [[sample for _, sample in side] for _, side in found]


def _refuse_unread(settings: EvaluationSettings, against: str | None) -> None:
    """Refuses settings that are not read of any of the models.

    Raises:
        ConfigError: There are some.
    """
    unused = ("data", "num_fewshot", "shard", "include_path", "allow_code_execution")
    problems = unread(settings, unused, "prompts that are answered and not marked")
    if settings.server is not None and (against is None or _is_url(against)):
        problems += unread(settings, LOADING, "models behind a server")
    if problems:
        raise ConfigError(problems)


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _store(path: Path) -> Path:
    """Returns the folder of the samples that are kept beside the output."""
    return path.with_name(f"{path.stem}.samples")


def _second(path: Path) -> Path:
    """Returns the file of the second model's responses."""
    return path.with_name(f"{path.stem}.against.jsonl")


def _output_file(output: str | Path | None) -> Path | None:
    """Returns the file to write.

    Raises:
        ConfigError: It is no `.jsonl` file, or cannot be written.
    """
    if output is None:
        return None
    path = Path(output)
    if path.suffix != ".jsonl":
        raise ConfigError(f"--output: expected a .jsonl file, got {path}")
    if path.is_dir():
        raise ConfigError(f"--output: {path} is a folder; expected a file")
    check_writable(path.parent, "--output")
    return path


def _items(prompts: Sequence[str], file: str | None, system: str | None, limit: int | None) -> list[Item]:
    given = [Item(f"--prompt {number}", text, {}) for number, text in enumerate(prompts, start=1)]
    items = [*given, *(prompts_in(file) if file is not None else [])]
    if not items:
        raise ConfigError("expected --prompt TEXT or --prompts FILE")
    if limit is not None:
        items = items[:limit]
    if system is None:
        return items
    return [replace(item, prompt=with_system(item.prompt, system, item.id)) for item in items]


def _answered(
    name: str | None, items: Sequence[Item], settings: EvaluationSettings, folder: Path, *, has_bar: bool
) -> tuple[str, list[Answer]]:
    """Returns the name of a model and its samples, the missing of which are drawn."""
    subject = subject_of(name, settings.server, settings.dtype, settings.batch_size)
    task = Task(TASK, lambda _: list(items), {}, MAX_NEW_TOKENS, plain="{prompt}")
    asked = Prompts(subject.tokenizer, task, settings.prompting)
    _refuse_roles(asked, items)
    law = settings.law(task, asked.stop)
    needed = list(wanted(subject, asked, items, law, num_samples=settings.num_samples, seed=settings.seed))
    with SampleStore(folder) as store:
        _draw(subject, asked, needed, law, store, has_bar=has_bar)
        return subject.name, list(answers(needed, store))


def _refuse_roles(asked: Prompts, items: Sequence[Item]) -> None:
    """Refuses system messages for plain text, in which they would be read as part of the question."""
    if asked.style != "plain":
        return
    for item in items:
        if not isinstance(item.prompt, str) and item.prompt[0].get("role") == "system":
            raise ConfigError(
                f"{item.id}: a system message needs a chat template, and the prompts of this model are plain text; "
                "leave the system message out"
            )


def _draw(
    subject: Subject, asked: Prompts, needed: Sequence[Wanted], law: Any, store: SampleStore, *, has_bar: bool
) -> None:
    missing = sum(each.key not in store for each in needed)
    with tqdm(total=missing, desc=subject.name, unit=" samples", disable=None if has_bar else True) as bar:
        ask(subject, asked, TASK, needed, law, store, on_progress=bar.update)
    if has_bar:
        kept = f", {len(needed) - missing} of them from the store" if missing < len(needed) else ""
        say(f"{subject.name}: {counted(len(needed), 'response')}{kept} ({asked.style} prompts)")


# --- what comes of it ---


def _show(found: Sequence[tuple[str, Sequence[Answer]]]) -> None:
    """Prints each prompt with the responses of each model, one below the other."""
    sides = [(name, _by_item(answers)) for name, answers in found]
    for place, (item, _) in enumerate(sides[0][1]):
        say(*([""] if place else []), f"> {shown_text(item.prompt)}")
        for name, groups in sides:
            samples = groups[place][1]
            for number, sample in enumerate(samples, start=1):
                which = f", {number} of {len(samples)}" if len(samples) > 1 else ""
                cut = "" if sample.finished else f" [cut off at {sample.tokens} tokens]"
                say(f"[{name}{which}]{cut}", sample.text.strip("\n") or "(an empty response)")


def _by_item(answers: Sequence[Answer]) -> list[tuple[Item, list[Sample]]]:
    # Two prompts may be the same text, but not the same row.
    groups = groupby(answers, key=lambda each: id(each[0]))
    pairs = [list(group) for _, group in groups]
    return [(group[0][0], [sample for _, sample in group]) for group in pairs]


def _write(found: Sequence[tuple[str, Sequence[Answer]]], path: Path, system: str | None) -> None:
    """Writes the responses of each model to a file of its own, since readers take a row for a sample of one model."""
    for number, (name, given) in enumerate(found):
        file = path if number == 0 else _second(path)
        several = any(sample.sample for _, sample in given)
        lines = (f"{to_json(_row(name, *each, several=several, system=system))}\n".encode() for each in given)
        before = rows_in(file)
        with os_errors_named(file):
            durable.write(file, lines)
        say_if_fewer(file, len(given), before, _store(path))
        say(f"{file}: {counted(len(given), 'response')} of {name}")


def _row(name: str, item: Item, sample: Sample, *, several: bool, system: str | None) -> Record:
    """Returns a row that `infopo evaluate --responses` and `infopo winrate` read back without settings."""
    gold: Mapping[str, Any] = item.gold
    prompt = item.prompt
    if system is not None and not isinstance(prompt, str):
        # Apart from its system message, it is the prompt that a task or another file has.
        prompt = prompt[1:]
        prompt = str(prompt[0]["content"]) if len(prompt) == 1 and prompt[0].get("role") == "user" else prompt
    return {
        **{key: gold[key] for key in IDS if gold.get(key) is not None},
        "prompt": prompt,
        "response": sample.text,
        **({"sample": sample.sample} if several else {}),
        **({"system": system} if system is not None else {}),
        "model": name,
        "tokens": sample.tokens,
        "finished": sample.finished,
    }
