"""Win rates: what both orders of a judge add up to, with intervals over prompts. Imports no torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from infopo.evaluation.judge import Judge, Judgements, Question, messages, verdict
from infopo.intervals import wilson
from infopo.paired import mean_interval, mean_score, sign_flips, smallest_mean, varies

RIDGE = 0.01
"""Weight of the squares of θ and φ, which keeps them finite if one side wins everything."""

ADJUSTED_RESAMPLES = 1000


@dataclass(frozen=True)
class Duel:
    """Two responses to one prompt.

    Attributes:
        item: Name of the prompt. Several duels of a prompt are one observation.
        prompt: What was asked, as people read it.
        a: Response of the first model.
        b: Response of the second.
    """

    item: str
    prompt: str
    a: str
    b: str

    def questions(self, template: str) -> tuple[Question, Question]:
        """Returns the questions of both orders: A first, and B first."""
        return (
            Question(self.item, "ab", messages(template, self.prompt, self.a, self.b)),
            Question(self.item, "ba", messages(template, self.prompt, self.b, self.a)),
        )


@dataclass(frozen=True)
class Outcome:
    """What both answers to a duel come to.

    Attributes:
        kind: "win" or "loss" of A if both orders agree on it, "flip" if the judge chose the first, or the second, both
            times, "tie" if it called at least one of them a tie, "identical" if the responses are the same and were not
            asked about, "invalid" if an answer names no winner.
        score: 1 for a win, 1/2 for a tie of any kind, 0 for a loss, None if the outcome is invalid.
        is_cut_off: Whether an answer was cut off before it named a winner.
    """

    kind: str
    score: float | None
    is_cut_off: bool = False


def outcome(first: str | None, second: str | None) -> Outcome:
    """Returns the outcome of the verdicts on A before B, and on B before A.

    Example:
        >>> outcome("1", "2").kind, outcome("1", "1").kind, outcome("tie", "2").kind, outcome(None, "2").kind
        ('win', 'flip', 'tie', 'invalid')
    """
    if first is None or second is None:
        return Outcome("invalid", None)
    if "tie" in (first, second):
        return Outcome("tie", 0.5)
    if first == second:
        return Outcome("flip", 0.5)
    return Outcome("win", 1.0) if first == "1" else Outcome("loss", 0.0)


def judged(duels: Sequence[Duel], store: Judgements, judge: Judge, template: str) -> list[Outcome]:
    """Returns the outcome of each duel, whose answers are all in the store."""
    found = []
    for duel in duels:
        if is_identical(duel):
            found.append(Outcome("identical", 0.5))
            continue
        answers = [store.answer(question, judge) for question in duel.questions(template)]
        said = [verdict(str(answer["answer"])) for answer in answers]
        cut = any(v is None and not answer.get("finished", True) for v, answer in zip(said, answers))
        refused = any(answer.get("refusal") for answer in answers)
        found.append(replace(outcome(*said), is_cut_off=cut and not refused))
    return found


def is_identical(duel: Duel) -> bool:
    """Whether both responses are the same, so that there is nothing to ask."""
    return duel.a.strip() == duel.b.strip()


def win_rate(duels: Sequence[Duel], outcomes: Sequence[Outcome], seed: int = 0) -> dict[str, Any]:
    """Returns the win rate of A with its interval, and what it is made of.

    Prompts are drawn with replacement, because both orders of a prompt and several duels of it depend on each other.

    Returns:
        prompts (with an answer), asked (duels), answered, invalid, cut_off (of those), wins, losses, ties, flips,
        identical, win_rate, ci95, p (of the null hypothesis that it is 1/2), smallest (difference from 1/2 that so many
        prompts show), longer_wins (share of the decided duels that the longer response wins), characters (means of both
        sides), and `length_adjusted`.
    """
    kinds = Counter(each.kind for each in outcomes)
    kept = [(duel, each.score) for duel, each in zip(duels, outcomes, strict=True) if each.score is not None]
    scores: dict[str, list[float]] = {}
    for duel, score in kept:
        scores.setdefault(duel.item, []).append(score)
    means = np.array([mean_score(each) for each in scores.values()])
    decided = [(len(duel.a) - len(duel.b), score) for duel, score in kept if score != 0.5]
    longer = [float((delta > 0) == (score == 1)) for delta, score in decided if delta]
    return {
        "prompts": len(scores),
        "asked": len(duels),
        "answered": len(kept),
        "invalid": kinds["invalid"],
        "cut_off": sum(each.is_cut_off for each in outcomes),
        "wins": kinds["win"],
        "losses": kinds["loss"],
        "ties": kinds["tie"],
        "flips": kinds["flip"],
        "identical": kinds["identical"],
        "win_rate": float(means.mean()) if means.size else None,
        "ci95": mean_interval(means, seed=seed) if means.size else None,
        "p": sign_flips(means - 0.5, seed=seed),
        "smallest": smallest_mean(means),
        "longer_wins": float(np.mean(longer)) if longer else None,
        "characters": [float(np.mean([len(text) for text in side])) for side in _sides(duels)],
        "length_adjusted": length_adjusted(
            [duel.item for duel, _ in kept],
            [len(d.a) - len(d.b) for d, _ in kept],
            [s for _, s in kept],
            seed,
        ),
    }


def _sides(duels: Sequence[Duel]) -> tuple[list[str], list[str]]:
    return [duel.a for duel in duels] or [""], [duel.b for duel in duels] or [""]


def length_adjusted(
    items: Sequence[str], differences: npt.ArrayLike, scores: npt.ArrayLike, seed: int = 0
) -> dict[str, Any] | None:
    """Returns the win rate that responses of equal length would have had.

        logit P(A wins) = θ + φ tanh(Δ / sd(Δ)),  win rate σ(θ)

    Δ is the length of A's response minus that of B's, in characters. θ and φ maximise the likelihood of the scores, of
    which 1/2 is half a win and half a loss, with `RIDGE` (θ² + φ²)/2 subtracted. AlpacaEval's
    `length_controlled_minimal` is the same model with an L1 penalty, whose weight five folds choose. Its default adds
    the difficulties of its own 805 instructions, which other prompts do not have.

    Args:
        items: Name of the prompt of each duel, by which the bootstrap draws.
        differences: Δ, (duels,).
        scores: 1, 1/2 or 0, (duels,).
        seed: Seed of the bootstrap.

    Returns:
        `{"value", "ci95", "phi"}`, or None without duels.

    References:
        Dubois et al., 2024, Length-Controlled AlpacaEval, arXiv 2404.04475.
    """
    if not len(items):
        return None
    delta = np.asarray(differences, dtype=np.float64)
    spread = float(delta.std(ddof=1)) if len(delta) > 1 else 0.0
    x = np.tanh(delta / spread) if spread > 0 else np.zeros(len(delta))
    y = np.asarray(scores, dtype=np.float64)
    theta, phi = (float(each[0]) for each in _fit(x, y, np.ones((1, len(y)))))
    value = float(special.expit(theta))
    names, places = np.unique(np.asarray(items), return_inverse=True)
    if not varies(np.bincount(places, weights=y) / np.bincount(places)):
        # As in `mean_interval`: a bootstrap would take prompts that all end alike for certainty.
        return {"value": value, "ci95": wilson(value, len(names)), "phi": phi}
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(0, ADJUSTED_RESAMPLES, 50):  # few at a time, because each has a weight per duel
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=50)
        rates.append(special.expit(_fit(x, y, drawn[:, places].astype(np.float64))[0]))
    low, high = np.quantile(np.concatenate(rates), [0.025, 0.975])
    return {"value": value, "ci95": (float(low), float(high)), "phi": phi}


def _fit(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns θ and φ, (fits,), of logistic regressions of y on x by Newton's method.

    Args:
        x: (duels,).
        y: (duels,).
        weights: Weights of the duels in each regression, (fits, duels).
    """
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(30):
        p = special.expit(theta[:, None] + phi[:, None] * x)
        above = weights * (y - p)
        g0, g1 = above.sum(1) - RIDGE * theta, above @ x - RIDGE * phi
        curve = weights * p * (1 - p)
        h00, h01, h11 = curve.sum(1) + RIDGE, curve @ x, curve @ (x * x) + RIDGE
        determinant = h00 * h11 - h01 * h01
        # A whole step can overshoot where the curve is flat, and then never come back.
        step = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0]) / determinant
        step *= np.minimum(1, 2 / np.maximum(np.abs(step).max(0), 1e-12))
        theta, phi = theta + step[0], phi + step[1]
        if np.abs(step).max() < 1e-9:
            break
    return theta, phi


# --- calibration against people ---


def calibration(votes: Sequence[Sequence[str]], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns how far a judge agrees with people, beside how far they agree with each other.

    Args:
        votes: For each pair the votes of three people or more: "1", "2" or "tie".
        outcomes: What the judge said of each pair.

    Returns:
        asked, invalid, flips, tie shares of judge and people, majority (pairs with one), agreement with the majority
        and Cohen's kappa, agreement_decided (where neither is a tie), ceiling and judge_on_ceiling: of each person left
        out, the agreement of that person, and of the judge, with the majority of the others where they have one.
    """
    said = [{"win": "1", "loss": "2", "invalid": None}.get(each.kind, "tie") for each in outcomes]
    valid = [(mine, people) for mine, people in zip(said, votes, strict=True) if mine is not None]
    pairs = [(mine, top) for mine, people in valid if (top := majority(people)) is not None]
    decided = [(mine, top) for mine, top in pairs if "tie" not in (mine, top)]
    people_left_out, judge_too = [], []
    for mine, people in valid:
        for left in range(len(people)):
            others = majority([*people[:left], *people[left + 1 :]])
            if others is not None:
                people_left_out.append(people[left] == others)
                judge_too.append(mine == others)
    return {
        "asked": len(outcomes),
        "invalid": sum(mine is None for mine in said),
        "cut_off": sum(each.is_cut_off for each in outcomes),
        "flips": sum(each.kind == "flip" for each in outcomes),
        "tie_share_judge": _share([mine == "tie" for mine, _ in valid]),
        "tie_share_people": _share([vote == "tie" for _, people in valid for vote in people]),
        "majority": len(pairs),
        "agreement": _share([mine == top for mine, top in pairs]),
        "ci95": mean_interval([float(mine == top) for mine, top in pairs]) if pairs else None,
        "kappa": kappa(pairs),
        "agreement_decided": _share([mine == top for mine, top in decided]),
        "decided": len(decided),
        "ceiling": _share(people_left_out),
        "judge_on_ceiling": _share(judge_too),
    }


def majority(votes: Sequence[str]) -> str | None:
    """Returns the vote that more than half cast, or None.

    Example:
        >>> majority(["1", "2", "1"]), majority(["1", "2", "tie"]), majority(["1", "2"])
        ('1', None, None)
    """
    top, count = Counter(votes).most_common(1)[0]
    return top if 2 * count > len(votes) else None


def kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Returns Cohen's κ = (p_o - p_e) / (1 - p_e): agreement beyond what two raters with these habits reach by chance.

    Args:
        pairs: What both raters said of each item.

    Returns:
        κ, or None if there is nothing to compare, or both always say the same one thing.

    References:
        Cohen, 1960, Educational and Psychological Measurement 20.

    Example:
        >>> kappa([("1", "1"), ("1", "1"), ("2", "2"), ("2", "1")])
        0.5
    """
    n = len(pairs)
    if not n:
        return None
    first, second = (Counter(pair[side] for pair in pairs) for side in (0, 1))
    by_chance = sum(first[key] * second[key] for key in first) / n**2
    return (sum(a == b for a, b in pairs) / n - by_chance) / (1 - by_chance) if by_chance < 1 else None


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
