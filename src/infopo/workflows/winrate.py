"""`infopo winrate` lets a judge compare the responses of two sides to the same prompts, in both orders."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from infopo.errors import ConfigError
from infopo.evaluation.duels import (
    Answers,
    has_responses,
    is_side,
    make_duels,
    prompts_of_responses,
    read_answers,
    read_prompts,
)
from infopo.evaluation.items import Item
from infopo.evaluation.judge import Judgements
from infopo.evaluation.server import ServerSettings
from infopo.evaluation.settings import refuse_unread
from infopo.evaluation.winrate import Duel, Outcome, win_rate
from infopo.output import counted, say
from infopo.preflight import check_writable
from infopo.provenance import environment
from infopo.runs import read_object, to_json, write_json_atomic, write_text_atomic
from infopo.workflows.ask_judge import JudgeSettings, refuse_arguments, refuse_without_verdicts, run_judge

FORMATS = ("markdown", "json", "alpaca_eval")

CLAIM = 0.6
"""Win rate over the chosen responses that the paper reports for InfoPO on summaries and dialogue."""

WINRATE = "winrate.json"
DUELS = "duels.jsonl"


@dataclass(frozen=True)
class SamplingSettings:
    """How a side that is a model answers the prompts.

    Attributes:
        max_new_tokens: Largest number of tokens of a response.
        temperature: 0 is greedy decoding.
        seed: Seed of the samples, and of the bootstrap.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


def winrate(
    a: str,
    b: str,
    settings: JudgeSettings,
    *,
    prompts: str | None = None,
    sampling: SamplingSettings | None = None,
    limit: int | None = None,
    output: str | Path | None = None,
    format: str = "markdown",
) -> dict[str, Any]:
    """Judges the responses of two sides to the same prompts, in both orders.

    Args:
        a: A file of responses, a folder of `infopo evaluate`, a model, the URL of a server, or `chosen` or
            `rejected` of the prompts' data.
        b: The same of the other side.
        settings: Who judges, and how.
        prompts: File or hub name of the prompts. By default the prompts that stand beside the responses.
        sampling: How models answer.
        limit: Largest number of prompts.
        output: Folder of the results, by default `infopo-winrate/A-against-B`.
        format: "markdown" or "json" on the terminal, or "alpaca_eval", which also writes what AlpacaEval reads.

    Returns:
        The content of `winrate.json`.

    Raises:
        ConfigError: A setting is wrong, nobody has agreed to the cost, or the judge decides no pair.
        DataError: Prompts and responses do not match.
        ServerError: The judge does not answer. What it has answered is kept.
    """
    refuse_arguments(format, FORMATS, limit)
    sampling = sampling or SamplingSettings()
    if all(has_responses(side) or is_side(side) for side in (a, b)):
        refuse_unread(sampling, ("max_new_tokens", "temperature"), f"{a} and {b}, whose responses are there")
    folder = Path(output) if output is not None else Path("infopo-winrate") / f"{_name(a)}-against-{_name(b)}"
    check_writable(folder, "--output")
    items, answers = _both_sides(a, b, prompts, sampling, limit, folder)
    duels, only_a, only_b = make_duels(items, *answers)
    _refuse_smaller(folder, a, b, len(duels))
    judge = settings.make()
    store = Judgements(folder)
    outcomes = run_judge(duels, store, judge, settings)
    refuse_without_verdicts(duels, outcomes, store, judge, settings)
    who = {"name": judge.name, "version": judge.version, "template": settings.template, "url": settings.judge}
    record = {
        "schema_version": 1, "a": a, "b": b, "prompts": prompts, "only_a": only_a, "only_b": only_b, "judge": who,
        "result": win_rate(duels, outcomes, sampling.seed), "environment": environment(seed=sampling.seed),
    }  # fmt: skip
    write_text_atomic(folder / DUELS, "".join(f"{to_json(_line(*each))}\n" for each in zip(duels, outcomes)))
    write_json_atomic(folder / WINRATE, record)
    if format == "alpaca_eval":
        _write_alpaca_eval(folder, a, b, judge.name, duels, outcomes)
    if format == "json":
        sys.stdout.write(f"{to_json(record, indent=2)}\n")
    else:
        say(*lines(record), f"written: {folder / WINRATE}, {folder / DUELS}, {store.path}")
    return record


def _refuse_smaller(folder: Path, a: str, b: str, duels: int) -> None:
    """Refuses to replace a result of both sides by one of fewer duels, before a judge is asked.

    Raises:
        ConfigError: There is one of more.
    """
    there = read_object(folder / WINRATE) or {}
    result = there.get("result")
    asked = result.get("asked") if isinstance(result, dict) else None
    if (there.get("a"), there.get("b")) == (a, b) and isinstance(asked, int) and asked > duels:
        raise ConfigError(
            f"--output: {folder} holds the result of {asked} duels, which one of {duels} would replace; name another "
            "folder, remove that one, or leave out --limit"
        )


def _both_sides(
    a: str, b: str, prompts: str | None, sampling: SamplingSettings, limit: int | None, folder: Path
) -> tuple[list[Item], tuple[Answers, Answers]]:
    if prompts is None and (is_side(a) or is_side(b) or not (has_responses(a) or has_responses(b))):
        raise ConfigError("--prompts: name the data with the prompts, since the sides do not have them")
    items = read_prompts(prompts) if prompts is not None else prompts_of_responses([a, b])
    # A side is matched to all prompts, so that rows beyond the limit are no strangers.
    given = {side: read_answers(side, items) for side in (a, b) if has_responses(side)}
    items = (
        [item for item in items if all(item.id in answers for answers in given.values())][:limit]
        if (limit is not None)
        else items
    )
    drawn = {side: _drawn(side, items, sampling, folder) for side in (a, b) if side not in given}
    both = {**given, **drawn}
    return items, (both[a], both[b])


def _drawn(model: str, items: Sequence[Item], sampling: SamplingSettings, folder: Path) -> Answers:
    """Returns a model's responses to the prompts, drawn through the sample store in the folder of the results."""
    from infopo.evaluation.asking import answers, ask, wanted
    from infopo.evaluation.items import Task
    from infopo.evaluation.law import Law
    from infopo.evaluation.prompting import Prompts
    from infopo.evaluation.samples import SampleStore
    from infopo.workflows.evaluate import subject_of

    is_served = model.startswith(("http://", "https://"))
    subject = subject_of(None, ServerSettings(model)) if is_served else subject_of(model)
    task = Task("winrate", lambda _: list(items), {}, sampling.max_new_tokens, plain="{prompt}")
    asked = Prompts(subject.tokenizer, task)
    law = Law(sampling.max_new_tokens, sampling.temperature, 1.0, asked.stop)
    needed = list(wanted(subject, asked, items, law, num_samples=1, seed=sampling.seed))
    with SampleStore(folder) as store:
        missing = sum(sample.key not in store for sample in needed)
        with tqdm(total=missing, desc=subject.name, unit=" samples", disable=None) as bar:
            ask(subject, asked, "winrate", needed, law, store, on_progress=bar.update)
        return {item.id: [sample.text] for item, sample in answers(needed, store)}


def lines(record: Mapping[str, Any]) -> list[str]:
    """Returns a result as lines of Markdown: a table, and a sentence."""
    r, a, b = record["result"], record["a"], record["b"]
    low, high = r["ci95"]
    adjusted = r["length_adjusted"]
    rows = [
        ("win rate of A [95 %]", f"{r['win_rate']:.3f} [{low:.3f}, {high:.3f}]"),
        (
            "length_adjusted [95 %]",
            f"{adjusted['value']:.3f} [{adjusted['ci95'][0]:.3f}, {adjusted['ci95'][1]:.3f}]",
        ),
        ("asked / answered / invalid", f"{r['asked']} / {r['answered']} / {r['invalid']}"),
        ("wins / losses", f"{r['wins']} / {r['losses']}"),
        ("ties / flips / identical", f"{r['ties']} / {r['flips']} / {r['identical']}"),
        (
            "longer response wins",
            "-" if r["longer_wins"] is None else f"{r['longer_wins']:.1%} of decided pairs",
        ),
        ("characters of A / B", f"{r['characters'][0]:.0f} / {r['characters'][1]:.0f}"),
    ]
    table = [f"A: {a}; B: {b}; judge: {record['judge']['name']}", "", "| | |", "|---|---|"]
    table += [f"| {name} | {value} |" for name, value in rows]
    return [*table, "", _sentence(record)]


def _sentence(record: Mapping[str, Any]) -> str:
    r, b = record["result"], record["b"]
    low, high = r["ci95"]
    better = "A is preferred" if r["win_rate"] > 0.5 else "B is preferred"
    said = (
        f"{better} (p = {r['p']:.3g})"
        if r["p"] <= 0.05
        else f"the difference may be chance (p = {r['p']:.3g})"
    )
    text = f"A wins {r['win_rate']:.1%} of {counted(r['prompts'], 'prompt')}, ties counted as half; {said}."
    if r["flips"]:
        text += f" The judge flips with the order on {r['flips']} of {counted(r['answered'], 'pair')}."
    if b == "chosen":
        where = "above" if low > CLAIM else "below" if high < CLAIM else "within"
        text += (
            f" The paper claims about {CLAIM:.0%} against chosen responses: the interval [{low:.3f}, {high:.3f}] "
            + (f"lies {where} that." if where != "within" else "contains that.")
        )
    if record["only_a"] or record["only_b"]:
        only_a = counted(record["only_a"], "prompt")
        text += f" Left out: {only_a} that only A answers, {record['only_b']} that only B does."
    return text


def _line(duel: Duel, outcome: Outcome) -> dict[str, Any]:
    return {**vars(duel), "outcome": outcome.kind, "score": outcome.score}


def _write_alpaca_eval(
    folder: Path, a: str, b: str, judge: str, duels: Sequence[Duel], outcomes: Sequence[Outcome]
) -> None:
    """Writes outputs of both sides and annotations under AlpacaEval's names: A is `output_2`, which it evaluates."""
    for side, name, file in (("a", a, "model_outputs.json"), ("b", b, "reference_outputs.json")):
        rows = [{"instruction": d.prompt, "output": getattr(d, side), "generator": name} for d in duels]
        write_json_atomic(folder / file, rows)
    annotations = [
        {
            "instruction": duel.prompt,
            "output_1": duel.b,
            "generator_1": b,
            "output_2": duel.a,
            "generator_2": a,
            "annotator": judge,
            "preference": None if each.score is None else 1 + each.score,
        }
        for duel, each in zip(duels, outcomes)
    ]
    write_json_atomic(folder / "annotations.json", annotations)
    say(f"written for AlpacaEval: model_outputs.json, reference_outputs.json, annotations.json in {folder}")


def _name(source: str) -> str:
    return re.sub(r"[^\w.-]+", "-", source).strip("-.")[-60:]
