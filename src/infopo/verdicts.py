"""Verdicts on a run: named checks of what was measured, each with an effect size and an interval as its threshold.

The input is records of metrics and facts about the data, the output is what `verdicts.json` contains. Imports neither
torch nor transformers, so that a run directory is judged wherever it is read.

The order of `CHECKS` is the order of verdicts: causes come before their symptoms. An unfrozen reference or swapped
labels also make chosen responses fall, and what has to be mended is the cause. Length comes before labels, because a
longer response is less likely to the reference by its length alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from infopo import checks
from infopo.checks import Outcome
from infopo.evidence import Evidence

SCHEMA_VERSION = 1

VERDICTS = "verdicts.json"
DATA = "data.json"
"""Names in a run directory: the verdicts, and the facts about the training data."""


@dataclass(frozen=True)
class Verdict:
    """A check and what it saw: an entry of `verdicts.json`.

    Attributes:
        name: Name of the check.
        fired: Whether it fired, now or earlier in the run.
        step: The step at which it first fired, or None.
        effect: Size of the effect when it last fired, or else now. None if it was not checked, as for `interval`.
        interval: 95 % interval of the effect.
        unit: Unit of both.
        threshold: The threshold in words.
        text: One sentence of what was seen.
        advice: One sentence of what to do.
        not_checked: Why it was not checked, or None.
    """

    name: str
    fired: bool
    step: int | None
    effect: float | None
    interval: tuple[float, float] | None
    unit: str
    threshold: str
    text: str
    advice: str
    not_checked: str | None = None


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        name: Name of the verdict.
        unit: Unit of the effect.
        threshold: In words, when it fires.
        advice: What to do, in one sentence.
        judge: The check itself.
    """

    name: str
    unit: str
    threshold: str
    advice: str
    judge: Callable[[Evidence], Outcome] = field(repr=False)


def judge(evidence: Evidence, earlier: Iterable[Verdict] = ()) -> list[Verdict]:
    """Runs all checks, and returns their verdicts in the order of `CHECKS`.

    Args:
        evidence: Metrics and facts.
        earlier: Verdicts that were reached before. One that fired stays, with the step at which it first did.

    Example:
        >>> from infopo.evidence import History
        >>> history = History([{"step": 0, "reference/moved": 0.0}, {"step": 10, "reference/moved": 0.4}])
        >>> [(v.name, v.step) for v in judge(Evidence(history)) if v.fired]
        [('reference not frozen', 10)]
    """
    fired = {verdict.name: verdict for verdict in earlier if verdict.fired}
    return [_verdict(check, evidence, fired.get(check.name)) for check in CHECKS]


def _verdict(check: Check, evidence: Evidence, earlier: Verdict | None) -> Verdict:
    outcome = check.judge(evidence)
    if earlier is not None and (isinstance(outcome, str) or not outcome.fired):
        return earlier
    about = {"name": check.name, "unit": check.unit, "threshold": check.threshold, "advice": check.advice}
    if isinstance(outcome, str):
        return Verdict(
            fired=False, step=None, effect=None, interval=None, text=f"not checked: {outcome}",
            not_checked=outcome, **about,
        )  # fmt: skip
    step = earlier.step if earlier is not None else evidence.history.step if outcome.fired else None
    return Verdict(
        fired=outcome.fired, step=step, effect=outcome.effect, interval=outcome.interval, text=outcome.text, **about
    )  # fmt: skip


def line_of(verdict: Verdict) -> str:
    """Returns a verdict for a log or a terminal: where it was reached, what was seen and what to do."""
    when = "before training" if not verdict.step else f"step {verdict.step}"
    return f"verdict: {verdict.name} ({when}). {verdict.text} {verdict.advice}"


def in_words(verdicts: Sequence[Verdict]) -> str:
    """Returns the end of a run in one line: which verdicts were reached, of how many checks.

    Example:
        >>> from infopo.evidence import History
        >>> in_words(judge(Evidence(History())))
        'verdicts: none (0 of 13 checks made)'
    """
    fired = [verdict.name for verdict in verdicts if verdict.fired]
    made = sum(verdict.not_checked is None for verdict in verdicts)
    return f"verdicts: {', '.join(fired) or 'none'} ({made} of {len(CHECKS)} checks made)"


def record_of(verdicts: Sequence[Verdict], step: int, finished: bool) -> dict[str, Any]:
    """Returns what `verdicts.json` contains: `verdicts` are those that fired, most important first."""
    return {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "finished": finished,
        "verdicts": [asdict(verdict) for verdict in verdicts if verdict.fired],
        "checked": [asdict(verdict) for verdict in verdicts],
    }


def verdicts_in(record: Mapping[str, Any]) -> list[Verdict]:
    """Returns the verdicts of a `verdicts.json` that `record_of` made. Entries of another form are left out."""
    found = []
    for entry in record.get("checked", []):
        try:
            interval = entry["interval"]
            found.append(Verdict(**{**entry, "interval": tuple(interval) if interval else None}))
        except (TypeError, KeyError):
            continue
    return found


CHECKS: Sequence[Check] = (
    Check(
        "reference not frozen",
        "nats",
        f"a log-prob of the reference on fixed rows moves by more than {checks.MOVED} nats",
        "Give the reference a model of its own that no optimizer updates, or let it be computed once "
        "(reference: precompute).",
        checks.frozen,
    ),
    Check(
        "conflicting rows",
        "share of rows",
        "at least 1 % of the rows contradict another row, and the 95 % interval of the share is above 0.5 %",
        "Take the rows out, or decide each of them once: `data.json` names the first.",
        checks.conflicts,
    ),
    Check(
        "near-duplicate sides",
        "share of rows",
        "the sides of at least 10 % of the rows differ in at most 5 % of their tokens, and the 95 % interval of the "
        "share is above 5 %",
        "Take these rows out, or lower β or the learning rate: what such a pair takes from its rejected response, it "
        "takes from its chosen one as well.",
        checks.near_duplicates,
    ),
    Check(
        "length bias",
        "Cohen's d",
        "Cohen's d of the lengths of chosen and rejected responses is at least 0.8, its 95 % interval is beyond 0.5, "
        "and the means differ by at least 10 %",
        "Balance the lengths in the data, or take a length-normalised loss (simpo, or length_normalized: true), and "
        "compare the length of samples before and after.",
        checks.length,
    ),
    Check(
        "suspect labels",
        "share of pairs",
        "the rejected response is the more likely one before training in at least 60 % of the pairs, by its sum and "
        "per token, and the 99 % interval of the share is above 50 %",
        "Look whether chosen and rejected are swapped. If they are not, train on the chosen responses first (sft), or "
        "make pairs from samples of this policy.",
        checks.labels,
    ),
    Check(
        "instability",
        "records, or nats per token",
        "a loss is NaN or infinite, or at least 3 records of the loss are 8 robust standard deviations above the 20 "
        f"before them, or chosen responses lose more than {checks.DAMAGE} nats per token with the whole 95 % interval",
        "Lower the learning rate (a third is a good first try), add warm-up steps, or use larger batches.",
        checks.instability,
    ),
    Check(
        "poor chosen responses",
        "nats per token",
        "before training, a token of a chosen response is more than 1.5 nats less likely than one that the policy "
        "samples",
        "Train on the chosen responses first (sft), or take responses that a model like this one would write.",
        checks.poor_chosen,
    ),
    Check(
        "longer samples",
        "ratio",
        "sampled responses are more than twice as long as before training",
        "Balance the lengths in the data, or take a length-normalised loss.",
        checks.longer_samples,
    ),
    Check(
        "entropy collapse",
        "ratio",
        "the entropy of the next token is below 50 % of that at the start, and samples repeat themselves more",
        "Stop earlier, lower the learning rate, or raise β, which holds the policy nearer to its reference.",
        checks.entropy,
    ),
    Check(
        "squeezing",
        "nats per token",
        f"chosen responses fall, and the most likely token gains more than {checks.FELL} nats",
        "Lower the learning rate, raise β, or take a loss with a likelihood term (infopo, cpo, or nll_weight for dpo), "
        "and compare with sft.",
        checks.squeezing,
    ),
    Check(
        "chosen falling",
        "nats per token",
        f"chosen responses fall by more than {checks.FELL} nats per token, and the 95 % interval is below 0",
        "Lower the learning rate, raise β, or take a loss with a likelihood term (infopo, cpo, or nll_weight for dpo), "
        "and compare with sft.",
        checks.chosen_falling,
    ),
    Check(
        "drift beyond budget",
        "nats per response",
        "kl/forward is beyond kl_budget with its whole 95 % interval",
        "Take an earlier checkpoint, fewer steps, a lower learning rate or a larger β, or raise kl_budget.",
        checks.drift,
    ),
    Check(
        "nothing learned",
        "nats",
        f"at the end of at least {checks.LEAST_STEPS} steps, the margin of the probe set has moved by less than "
        f"{checks.LEARNED} nats, and its 95 % interval is below {2 * checks.LEARNED}",
        "Raise the learning rate (10 times as much is a good first try), or train for longer.",
        checks.nothing_learned,
    ),
)
"""The table of checks, most important first: what is wrong with the set-up, the data, the step, then the symptoms."""
