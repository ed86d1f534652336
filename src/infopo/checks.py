"""The checks behind verdicts: pure functions of what was measured, one for each row of the table in `verdicts.py`."""

import math
from dataclasses import dataclass

from infopo.evidence import Evidence, History
from infopo.intervals import Z_95, Z_99, wilson

MOVED = 0.01
"""Nats by which a reference log-prob may differ when it is computed again on the same rows: rounding."""

FELL = 0.02
"""Nats per token by which chosen responses may fall."""

DAMAGE = 0.5
"""Nats per token which chosen responses lose only in a policy that is broken."""

LEAST_STEPS = 20
"""Number of optimizer steps below which a run is not expected to learn anything."""

LEARNED = 0.05
"""Nats by which the margin of a pair moves at least in a run that learns."""

FEW = 8
"""Number of examples below which a mean is not judged without its interval."""

TOO_FEW = f"the probe set has fewer than {FEW} examples, whose mean says little"
NO_PROBE = "the run has no probe set, or no record of it after step 0 yet"
STREAMED = "the training data are streamed, and their rows are not known beforehand"


@dataclass(frozen=True)
class Finding:
    """What a check saw.

    Attributes:
        fired: Whether the effect and its interval are both beyond the threshold.
        effect: Size of the effect, in the check's unit.
        interval: The 95 % interval of the effect, or None if it has none.
        text: One sentence with the numbers.
    """

    fired: bool
    effect: float
    interval: tuple[float, float] | None
    text: str


Outcome = Finding | str
"""A finding, or the reason why there is none."""


def frozen(evidence: Evidence) -> Outcome:
    """Fires if log-probs of the reference, computed again on the same rows, differ by more than rounding (`MOVED`)."""
    moved = evidence.history.last("reference/moved")
    if moved is None:
        return "the reference is stored or absent, so that it cannot move"
    return Finding(
        moved > MOVED,
        moved,
        None,
        f"Log-probs of the reference moved by up to {moved:.2g} nats on the same rows.",
    )


def conflicts(evidence: Evidence) -> Outcome:
    """Fires if at least 1 % of the rows prefer what another row of the same prompt rejects."""
    return _share_of_rows(evidence, "conflicts", 0.01, 0.005, "contradict another row")


def near_duplicates(evidence: Evidence) -> Outcome:
    """Fires if the sides of at least 10 % of the rows differ in hardly any token."""
    return _share_of_rows(evidence, "near_duplicates", 0.1, 0.05, "have sides that are nearly the same")


def _share_of_rows(evidence: Evidence, name: str, least: float, bound: float, what: str) -> Outcome:
    """Fires if the share of rows reaches `least` and its interval is above `bound`."""
    if evidence.facts is None:
        return STREAMED
    fact = evidence.facts[name]
    if not fact["n"]:
        return "no row has both sides"
    interval = wilson(fact["share"], fact["n"])
    first = f" (first: {fact['rows'][0]})" if fact["rows"] else ""
    text = f"{fact['count']} of {fact['n']} rows ({fact['share']:.1%}) {what}{first}."
    return Finding(fact["share"] >= least and interval[0] > bound, fact["share"], interval, text)


def labels(evidence: Evidence) -> Outcome:
    """Looks at the pairs of the training data, or else at those of the probe set before the first update."""
    known = (evidence.facts or {}).get("reference_prefers_rejected")
    if known:
        share, per_token, n = known["share"], known["share_per_token"], known["n"]
        is_so_per_token = per_token > 0.5
    else:
        right, n = (_at_start(evidence.history, name) for name in ("probe/ranking_accuracy", "probe/n_pairs"))
        sides = [
            _at_start(evidence.history, f"probe/logps/{side}_per_token") for side in ("chosen", "rejected")
        ]
        if right is None or not n or None in sides:
            return "log-probs of both sides before the first update are not known"
        share, is_so_per_token = 1 - right, sides[0] < sides[1]  # type: ignore[operator]
    # A longer response is less likely by its length alone.
    fired = share >= 0.6 and wilson(share, n, z=Z_99)[0] > 0.5 and is_so_per_token
    text = f"Before training, the rejected response is the more likely one in {share:.0%} of {n:.0f} pairs."
    return Finding(fired, share, wilson(share, n), text)


def _at_start(history: History, name: str) -> float | None:
    return history.first(name) if history.steps.get(name, [1])[0] == 0 else None


def poor_chosen(evidence: Evidence) -> Outcome:
    """Fires if chosen responses surprise the policy more than its own samples do, by 1.5 nats per token.

    The surprise is -log π per token; that of its own samples is the entropy of the next token.
    """
    history = evidence.history
    chosen, entropy = (_at_start(history, n) for n in ("probe/logps/chosen_per_token", "anchor/entropy"))
    if chosen is None or entropy is None:
        return "log-probs of chosen responses and of the policy's own samples before the first update are not known"
    if _has_few(history):
        return TOO_FEW
    surprise = -chosen - entropy
    return Finding(
        surprise > 1.5,
        surprise,
        None,
        f"A token of a chosen response is {surprise:.2f} nats less likely to the policy than one of its own samples.",
    )


def instability(evidence: Evidence) -> Outcome:
    """Fires if the loss is not finite, if chosen responses lost `DAMAGE`, or if the loss spikes at three records."""
    number, found = len(evidence.history.series.get("loss", [])), evidence.history.spikes
    if not number:
        return "no loss was logged yet"
    if broken := [step for step, loss in found if not math.isfinite(loss)]:
        text = f"The loss is NaN or infinite at {len(broken)} of {number} records, first at step {broken[0]}."
        return Finding(True, len(broken), None, text)
    lost = evidence.history.with_interval("probe/change/chosen_per_token")
    if lost is not None and lost[0] + lost[1] < -DAMAGE:
        text = f"Chosen responses lost {-lost[0]:.2f} nats per token: the policy no longer writes such text at all."
        return Finding(True, lost[0], _around(lost), text)
    where = f", first at step {found[0][0]}" if found else ""
    text = f"The loss is far above the 20 records before it at {len(found)} of {number} records{where}."
    interval = wilson(len(found) / number, number)
    return Finding(len(found) >= 3 and interval[0] > 0.002, len(found), None, text)


def length(evidence: Evidence) -> Outcome:
    """Fires if the lengths of the sides differ by 0.8 standard deviations (Cohen's d) and by a tenth of a mean."""
    if evidence.facts is None:
        return STREAMED
    fact = evidence.facts["length"]
    d, interval = fact["cohens_d"], fact["cohens_d_ci95"]
    if d is None:
        return "a side has fewer than two responses"
    low, high = interval
    nearest = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    means = fact["chosen_mean"], fact["rejected_mean"]
    differs = abs(means[0] - means[1]) >= 0.1 * min(means)
    which = "longer" if d > 0 else "shorter"
    explained = evidence.history.last("length/r2")
    learned = (
        "" if explained is None else f" Length explains {max(0.0, explained):.0%} of the implicit reward."
    )
    text = (
        f"Chosen responses are {which} than rejected ones ({means[0]:.0f} against {means[1]:.0f} tokens, Cohen's d "
        f"{d:+.2f}).{learned}"
    )
    return Finding(abs(d) >= 0.8 and nearest > 0.5 and differs, d, (low, high), text)


def longer_samples(evidence: Evidence) -> Outcome:
    """Samples have no interval in the records, so that the effect has to be large."""
    history = evidence.history
    sampled, anchor = history.last("length/sampled"), history.last("length/anchor")
    if sampled is None or not anchor:
        return "no responses were sampled in this run"
    if _has_few(history):
        return TOO_FEW
    factor = sampled / anchor
    text = f"Sampled responses have {sampled:.0f} tokens, {factor:.1f} times those before training ({anchor:.0f})."
    return Finding(factor > 2 and history.step > 0, factor, None, text)


def squeezing(evidence: Evidence) -> Outcome:
    """Fires if chosen responses fall while the most likely token gains: probability leaves both sides of pairs."""
    change = evidence.history.with_interval("probe/change/chosen_per_token")
    peak = evidence.history.since_start("probe/p_max")
    if change is None or peak is None:
        return NO_PROBE
    fired = _has_fallen(change) and peak > FELL
    text = (
        f"Chosen responses changed by {change[0]:+.3f} nats per token while the most likely token gained {peak:+.3f}: "
        f"{'the probability goes to responses that are in no pair' if fired else 'no squeezing'}."
    )
    return Finding(fired, change[0], _around(change), text)


def chosen_falling(evidence: Evidence) -> Outcome:
    """Fires if chosen responses lost more than `FELL` on the probe set, beyond the interval of the mean."""
    history = evidence.history
    change = history.with_interval("probe/change/chosen_per_token")
    if change is None:
        return NO_PROBE
    share = history.last("probe/chosen_fell")
    fell = "" if share is None else f"; {share:.0%} of them are below their start"
    text = f"Chosen responses changed by {change[0]:+.3f} ± {change[1]:.3f} nats per token{fell}."
    return Finding(_has_fallen(change), change[0], _around(change), text)


def _has_few(history: History) -> bool:
    number = history.last("probe/n")
    return number is not None and number < FEW


def _has_fallen(change: tuple[float, float]) -> bool:
    mean, half = change
    return mean + half < 0 and mean < -FELL


def _around(mean_and_half: tuple[float, float]) -> tuple[float, float]:
    mean, half = mean_and_half
    return mean - half, mean + half


def drift(evidence: Evidence) -> Outcome:
    """Fires if the KL from the start, with its interval, is above the budget of the run."""
    kl, error = evidence.history.last("kl/forward"), evidence.history.last("kl/forward_se")
    if kl is None or error is None:
        return "the run has no anchor set, or no record of it yet"
    low, high = kl - Z_95 * error, kl + Z_95 * error
    budget = evidence.kl_budget
    text = f"KL from the start is {kl:.2f} ± {Z_95 * error:.2f} nats per response, of a budget of {budget:g}."
    return Finding(kl > budget and low > budget, kl, (low, high), text)


def entropy(evidence: Evidence) -> Outcome:
    """Fires if the entropy of the next token has halved, and samples, if there are any, repeat themselves more."""
    history = evidence.history
    for name in ("anchor/entropy", "probe/entropy"):
        now, start = history.last(name), _at_start(history, name)
        if now is not None and start and history.steps[name][-1] > 0:
            break
    else:
        return "the entropy at the start and now is not known"
    if _has_few(history):
        return TOO_FEW
    ratio = now / start
    distinct, before = history.last("generations/distinct_2"), _at_start(history, "generations/distinct_2")
    poorer = distinct is None or before is None or distinct < before
    text = f"The entropy of the next token is {ratio:.0%} of that at the start ({now:.3f} against {start:.3f} nats)."
    return Finding(ratio < 0.5 and start > 0.1 and poorer, ratio, None, text)


def nothing_learned(evidence: Evidence) -> Outcome:
    """Fires at the end of a run whose margin, or chosen log-prob without pairs, moved by less than `LEARNED`."""
    history = evidence.history
    if not evidence.finished:
        return "this is judged at the end of training"
    if history.step < LEAST_STEPS:
        return f"the run has fewer than {LEAST_STEPS} steps"
    # Rows with one side have no margin.
    name = "probe/margin" if "probe/margin" in history.series else "probe/change/chosen"
    moved = history.with_interval(name)
    if moved is None or history.steps[name][-1] == 0:
        return NO_PROBE
    mean, half = moved
    text = f"{name} moved by {mean:+.3f} ± {half:.3f} nats in {history.step} steps."
    return Finding(abs(mean) < LEARNED and mean + half < 2 * LEARNED, mean, _around(moved), text)
