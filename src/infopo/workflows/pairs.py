"""Preference data from a model's own samples: sample, verify, pair, write. Texts are never all in memory."""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO

from tqdm import tqdm

from infopo import durable
from infopo.errors import ConfigError, DataError
from infopo.evaluation.asking import Wanted, answers, ask, wanted
from infopo.evaluation.items import Answered, Item, shown_text
from infopo.evaluation.pairing import Candidate, Paired, PairingSettings, pair_up
from infopo.evaluation.prompting import Prompts
from infopo.evaluation.samples import Sample, SampleStore, samples_by_item
from infopo.evaluation.settings import DRAWING, LOADING, EvaluationSettings, unread
from infopo.evaluation.subjects import Subject
from infopo.evaluation.verifiers import Verifier, verifier_named
from infopo.output import counted, say
from infopo.preflight import check_writable
from infopo.provenance import environment
from infopo.records import Text
from infopo.runs import Record, os_errors_named, to_json, write_json_atomic
from infopo.workflows.ask_judge import JudgeSettings
from infopo.workflows.evaluate import subject_of
from infopo.workflows.judged_pairs import judge_verifier
from infopo.workflows.new_file import refuse_foreign, rows_in, say_if_fewer

_PROMPTS_AT_A_TIME = 256
"""Prompts whose samples are drawn, marked and paired at a time."""

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Group:
    """A prompt with all its samples.

    Attributes:
        item: The prompt, with what it is marked against.
        samples: Its samples, in the order of their numbers.
    """

    item: Item
    samples: Sequence[Sample]


@dataclass
class Account:
    """What became of prompts and samples."""

    prompts: int = 0
    samples: int = 0
    rows: int = 0
    pairs: int = 0
    without_samples: int = 0
    pooled: int = 0
    fewest: int | None = None
    most: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    why_not: Counter[str] = field(default_factory=Counter)
    origins: Counter[str] = field(default_factory=Counter)
    rates: Counter[float] = field(default_factory=Counter)

    @property
    def pass_rate(self) -> float | None:
        """Mean over prompts of the share of right samples, or None if nothing says what is right."""
        n = sum(self.rates.values())
        return sum(rate * count for rate, count in self.rates.items()) / n if n else None

    @property
    def record(self) -> Record:
        counts = {
            key: dict(value)
            for key, value in vars(self).items()
            if isinstance(value, Counter) and key != "rates"
        }
        numbers = {key: value for key, value in vars(self).items() if isinstance(value, int)}
        return {**numbers, **counts, "pass_rate": self.pass_rate}

    def lines(self, output: Path) -> list[str]:
        """Returns it as sentences."""
        found = [
            f"{output}: {counted(self.rows, 'row')} with {counted(self.pairs, 'pair')}, from "
            f"{counted(self.samples, 'sample')} of {counted(self.prompts, 'prompt')}"
        ]
        for what, counts in (("prompts without a pair", self.why_not), ("samples left out", self.left_out)):
            if counts:
                found.append(f"  {what}: " + ", ".join(f"{n} {why}" for why, n in counts.most_common()))
        if self.without_samples:
            found.append(f"  prompts without samples: {self.without_samples}")
        if self.pooled:
            found.append(f"  {self.pooled} prompts have samples of several seeds, which are taken together")
        if self.fewest is not None and self.fewest != self.most:
            found.append(f"  samples per prompt: {self.fewest} to {self.most}")
        if self.pass_rate is not None:
            found.append(f"  right: {self.pass_rate:.1%} of the samples of a prompt")
        if len(self.origins) > 1:
            found.append(f"  the samples are of {len(self.origins)} models or laws: {dict(self.origins)}")
        return found


def pairs(
    model: str | None,
    verifier: str,
    settings: EvaluationSettings,
    pairing: PairingSettings,
    *,
    prompts: str | None = None,
    skip: int = 0,
    samples: str | Path | None = None,
    judge: JudgeSettings | None = None,
    output: str | Path = "pairs.jsonl",
) -> Path:
    """Makes preference data from samples of a model.

    Args:
        model: Local folder, adapter, run directory, hub name, `lab:policy`, or the name of a served model.
        verifier: What marks samples (`verifier_named`).
        settings: How samples are drawn. `tasks` is not used, and of `samples` neither is `num_samples`.
        pairing: How samples become pairs.
        prompts: A file or hub name with prompts, or `lab`.
        skip: Number of prompts at the front that are left out. `settings.limit` counts those after them.
        samples: A file of samples to pair again, in place of a model.
        judge: Who judges, for the verifier `judge:...`.
        output: File of the pairs. Beside it are `NAME.provenance.json`, `NAME.pass-rates.jsonl` and the folder
            `NAME.samples` with all that was drawn.

    Returns:
        The file of the pairs.

    Raises:
        ConfigError: A setting is wrong.
        DataError: The prompts or samples cannot be used, or no prompt gives a pair. Samples are kept.
    """
    if (model is None and settings.server is None) == (samples is None):
        raise ConfigError("expected either a model (or --server URL) or --samples FILE")
    _refuse_unread(settings, samples)
    if settings.num_samples < 2 and samples is None:
        raise ConfigError(f"--num-generations: expected at least 2, got {settings.num_samples}")
    if settings.temperature == 0:
        raise ConfigError("--temperature: greedy decoding has one response; expected a number above 0")
    if skip < 0:
        raise ConfigError(f"--skip: expected a number of prompts of at least 0, got {skip}")
    output = Path(output)
    folder = output.with_name(f"{output.stem}.samples")
    provenance = output.with_name(f"{output.stem}.provenance.json")
    refuse_foreign(output, (folder, provenance), (prompts, samples))
    check_writable(output.parent, "--output")
    most = None if settings.limit is None else skip + settings.limit
    marker = marker_of(verifier, settings, judge, folder, limit=most)
    items = marker.load(prompts)[skip:][: settings.limit]
    if not items:
        behind = f" behind the first {skip}" if skip else ""
        raise DataError(f"holds no prompts{behind}", str(prompts), "no prompts")
    origin: Record
    if samples is not None:
        origin = {"samples": str(samples)}
        groups = _stored(Path(samples), items)
        return _write(output, groups, marker, pairing, origin, settings, prompts, items)
    subject = subject_of(model, settings.server, settings.dtype, settings.batch_size)
    asked = Prompts(subject.tokenizer, marker.task, settings.prompting, settings.num_fewshot)
    law = settings.law(marker.task, asked.stop)
    origin = {
        "model": {**subject.record, "name": model or subject.name},
        "law": law.record,
        "samples": str(folder),
    }
    with SampleStore(folder, settings.shard) as store:
        groups = _drawn(subject, asked, marker, items, store, settings)
        if settings.shard is not None:
            for _ in groups:
                pass
            say(
                f"shard {settings.shard[0]} of {settings.shard[1]} is drawn; without --shard, all shards are paired"
            )
            return folder
        return _write(output, groups, marker, pairing, origin, settings, prompts, items)


def _refuse_unread(settings: EvaluationSettings, samples: object) -> None:
    """Refuses settings that are not read of what is paired.

    Raises:
        ConfigError: There are some.
    """
    problems = unread(settings, ("data", "include_path"), "pairs, whose verifier marks --prompts")
    if samples is not None:
        drawing = [name for name in DRAWING if name != "num_samples"]
        problems += unread(
            settings, drawing, "--samples, which are paired as they are", {"temperature": [1.0]}
        )
    elif settings.server is not None:
        problems += unread(settings, LOADING, "a model behind a server")
    if problems:
        raise ConfigError(problems)


def marker_of(
    verifier: str,
    settings: EvaluationSettings,
    judge: JudgeSettings | None,
    folder: Path,
    *,
    limit: int | None,
) -> Verifier:
    """Returns what marks samples.

    Args:
        verifier: Its name (`verifier_named`).
        settings: How samples are drawn, and whether code may run.
        judge: Who judges, for the verifier `judge:...`.
        folder: Folder of a judge's answers.
        limit: Number of prompts of the lab, or None.

    Raises:
        ConfigError: There is no such verifier, or it may not run.
    """
    if judge is not None and verifier != f"judge:{judge.judge}":
        raise ConfigError(
            f"--verifier: expected judge:{judge.judge} beside settings of a judge, got {verifier!r}"
        )
    if judge is not None:
        return judge_verifier(judge, folder, settings.num_samples)
    return verifier_named(
        verifier,
        limit=limit,
        allow_code_execution=settings.allow_code_execution,
        isolation=settings.isolation,
    )


def _drawn(
    subject: Subject,
    asked: Prompts,
    verifier: Verifier,
    items: Sequence[Item],
    store: SampleStore,
    settings: EvaluationSettings,
) -> Iterator[Group]:
    """Draws what the store lacks, a few hundred prompts at a time, and yields each prompt with its samples."""
    law = settings.law(verifier.task, asked.stop)
    begin = 0
    with tqdm(total=len(items) * settings.num_samples, desc="samples", unit="", disable=None) as bar:
        for place in range(0, len(items), _PROMPTS_AT_A_TIME):
            piece = items[place : place + _PROMPTS_AT_A_TIME]
            needed = list(
                wanted(subject, asked, piece, law, num_samples=settings.num_samples, seed=settings.seed)
            )
            mine = needed
            if settings.shard is not None:
                number, count = settings.shard
                mine = [each for at, each in enumerate(needed, begin) if at % count == number - 1]
            begin += len(needed)
            bar.update(sum(each.key in store for each in mine))
            ask(subject, asked, verifier.task.name, mine, law, store, on_progress=bar.update)
            if settings.shard is None:
                yield from _groups(needed, store)


def _groups(needed: Sequence[Wanted], store: SampleStore) -> Iterator[Group]:
    found: dict[str, Group] = {}
    for item, sample in answers(needed, store):
        group = found.setdefault(item.id, Group(item, []))
        found[item.id] = Group(item, [*group.samples, sample])
    yield from found.values()


def _stored(path: Path, items: Sequence[Item]) -> Iterator[Group]:
    """Yields prompts with their samples in a file.

    Raises:
        DataError: The file is none of samples, or they are of other prompts.
    """
    has_samples = False
    for item, found in samples_by_item(path, items):
        for sample in found:
            if _bare(item.prompt) not in _bare(sample.prompt):
                raise DataError(
                    f"{item.id} asks {_bare(item.prompt)!r:.80} in --prompts, and its sample was asked "
                    f"{_bare(sample.prompt)!r:.80}; name the prompts that were sampled",
                    str(path),
                    "other prompts",
                )
        has_samples |= bool(found)
        yield Group(item, found)
    if not has_samples:
        raise DataError("holds no samples of these prompts", str(path), "no samples")


def _bare(prompt: Text) -> str:
    texts = prompt if isinstance(prompt, str) else " ".join(str(turn.get("content")) for turn in prompt)
    return " ".join(texts.split())


def _write(
    output: Path,
    groups: Iterator[Group],
    verifier: Verifier,
    pairing: PairingSettings,
    origin: Record,
    settings: EvaluationSettings,
    prompts: str | None,
    items: Sequence[Item],
) -> Path:
    account = Account()
    rates = output.with_name(f"{output.stem}.pass-rates.jsonl")
    before = rows_in(output)
    with tempfile.TemporaryFile() as by_prompt, os_errors_named(output):
        rows = _rows(groups, verifier, pairing, account, by_prompt)
        durable.write(output, rows if not before else _refused_if_none(rows, account, output))
        by_prompt.seek(0)
        durable.write(rates, by_prompt)
    digest = hashlib.sha256()
    for item in items:
        digest.update(to_json(vars(item)).encode())
    provenance = {
        "schema_version": SCHEMA_VERSION,
        **origin,
        "prompts": {"source": prompts, "n": len(items), "sha256": digest.hexdigest()},
        "verifier": verifier.name,
        "pairing": asdict(pairing),
        # Samples of a file have their own law and seeds, which stand in its lines.
        "sampling": None if "model" not in origin else {
            "num_generations": settings.num_samples, "seed": settings.seed, "prompting": settings.prompting,
            "num_fewshot": settings.num_fewshot,
        },
        "counts": account.record,
        "environment": environment(seed=settings.seed),
    }  # fmt: skip
    write_json_atomic(output.with_name(f"{output.stem}.provenance.json"), provenance)
    say(*account.lines(output))
    say_if_fewer(output, account.rows, before, output.with_name(f"{output.stem}.samples"))
    if not account.rows:
        raise _no_pairs(output)
    return output


def _refused_if_none(rows: Iterator[bytes], account: Account, output: Path) -> Iterator[bytes]:
    """Yields the rows, and raises at their end if there were none, which leaves the earlier file as it was."""
    yield from rows
    if not account.rows:
        say(*account.lines(output))
        raise _no_pairs(output, "; the earlier file is left as it was")


def _no_pairs(output: Path, more: str = "") -> DataError:
    return DataError(
        "no prompt gives a pair; a model that is sometimes right and sometimes wrong gives some: raise "
        f"--temperature or --num-generations, or take other prompts{more}",
        str(output),
        "no pairs",
    )


def _rows(
    groups: Iterator[Group],
    verifier: Verifier,
    pairing: PairingSettings,
    account: Account,
    by_prompt: IO[bytes],
) -> Iterator[bytes]:
    while piece := list(islice(groups, _PROMPTS_AT_A_TIME)):
        answered = [
            Answered(each.item, sample.text, sample.finished) for each in piece for sample in each.samples
        ]
        scores = iter(verifier.score(answered) if answered else ())
        for group in piece:
            candidates = [
                Candidate(sample.sample, sample.text, next(scores), sample.finished)
                for sample in group.samples
            ]
            paired = pair_up(candidates, pairing, group.item.id)
            rows = list(_as_rows(group, paired, as_lists=pairing.rule == "lists"))
            _count(account, group, paired, len(rows))
            by_prompt.write(_line(_of_prompt(group, paired, len(rows))))
            yield from map(_line, rows)


def _count(account: Account, group: Group, paired: Paired, rows: int) -> None:
    account.prompts += 1
    account.samples += len(group.samples)
    account.rows += rows
    account.left_out.update(paired.left_out)
    account.origins.update(f"{sample.weights} {to_json(dict(sample.law))}" for sample in group.samples)
    if not group.samples:
        account.without_samples += 1
        return
    numbers = Counter((sample.weights, to_json(dict(sample.law)), sample.sample) for sample in group.samples)
    account.pooled += max(numbers.values()) > 1
    account.most = max(account.most, len(group.samples))
    account.fewest = min(len(group.samples), account.fewest or len(group.samples))
    if paired.pass_rate is not None:
        account.rates[paired.pass_rate] += 1
    if paired.why_not is not None:
        account.why_not[paired.why_not] += 1
    account.pairs += len(paired.chosen) * len(paired.rejected) if rows == 1 else rows


def _of_prompt(group: Group, paired: Paired, rows: int) -> Record:
    return {
        "prompt_id": group.item.id,
        "prompt": shown_text(group.item.prompt),
        "samples": len(group.samples),
        "pass_rate": paired.pass_rate,
        "rows": rows,
        "why_not": paired.why_not,
        "chosen": [each.sample for each in paired.chosen],
        "rejected": [each.sample for each in paired.rejected],
    }


def _as_rows(group: Group, paired: Paired, *, as_lists: bool) -> Iterator[Record]:
    """Yields rows in TRL's format, or one with lists. The prompt is what the model was asked."""
    if not paired.chosen:
        return
    prompt = group.samples[0].prompt
    is_chat = not isinstance(prompt, str)

    def response(candidate: Candidate) -> Text:
        return [{"role": "assistant", "content": candidate.text}] if is_chat else candidate.text

    chosen, rejected = ([response(each) for each in side] for side in (paired.chosen, paired.rejected))
    if as_lists:
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        return
    for good, bad in zip(chosen, rejected, strict=True):
        yield {"prompt": prompt, "chosen": good, "rejected": bad}


def _line(record: Mapping[str, object]) -> bytes:
    return f"{to_json(record)}\n".encode("utf-8", errors="backslashreplace")
