"""What the first steps of training will do to the chosen responses of some rows, before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from infopo import probes
from infopo.data.examples import ExampleDataset
from infopo.diagnostics import ches
from infopo.records import PreferenceExample
from infopo.reference import LiveReference
from infopo.trainer import InfoPOTrainer

SHOWN = 10
"""Rows that are named."""


@dataclass(frozen=True)
class RowForecast:
    """What is expected of one pair.

    Attributes:
        row_id: Name of the row.
        falls: Whether a small step of gradient descent on this pair alone lowers its chosen response, or None if that
            was not measured.
        ches: Its length-normalised CHES, or None if the model does not show its hidden states. A higher value than
            other rows have means that the chosen response is more likely to fall.
    """

    row_id: str
    falls: bool | None
    ches: float | None


def forecast(trainer: InfoPOTrainer, dataset: ExampleDataset) -> list[RowForecast]:
    """Returns what is expected of the first pair of random rows, the worst first.

    There are `probe_size` rows, whose hidden states are compared. Gradients are measured of the first `gradient_size`.

    Args:
        trainer: A trainer that has not trained.
        dataset: The data that it would be trained on.
    """
    subject = trainer.subject()
    # Before the first update, the policy is its own reference.
    itself = LiveReference(trainer.model, frozenset({"chosen", "rejected", "kl"}))
    tools = replace(subject.instruments, reference=itself)
    is_known = subject.starts_as_reference and subject.without_gradients is None
    found = []
    for number, example in enumerate(probes.choose(dataset, trainer.args.probe_size, trainer.args.seed)):
        if not example.chosen_ids or not example.rejected_ids:
            continue
        pair = _first_pair(example)
        sums = tools.hidden_sums(pair)
        found.append(
            RowForecast(
                pair.row_id,
                tools.balance([pair]).chosen_falls
                if is_known and number < trainer.args.gradient_size
                else None,
                None if sums is None else ches(sums[0][0], sums[1][0], sums[0][1], sums[1][1])[1],
            )
        )
    return sorted(found, key=lambda row: (not row.falls, -(row.ches or 0.0)))


def _first_pair(example: PreferenceExample) -> PreferenceExample:
    sides = len(example.chosen_ids)
    context = [example.spans[0], example.spans[sides]]
    return replace(
        example,
        chosen_ids=example.chosen_ids[:1],
        rejected_ids=example.rejected_ids[:1],
        context=context,
        reference=None,
    )


def lines(rows: Sequence[RowForecast]) -> list[str]:
    """Returns a forecast as text.

    Example:
        >>> first, second = lines([RowForecast("p.jsonl:2", True, -0.1), RowForecast("p.jsonl:1", False, -2.0)])
        >>> first
        'forecast: a step on each of 2 rows alone would lower the chosen response of 1 (50 %)'
        >>> second
        'most likely to fall: p.jsonl:2 (falls, CHES -0.1), p.jsonl:1 (CHES -2)'
    """
    if not rows:
        return ["forecast: none of the rows has both a chosen and a rejected response"]
    judged = [row for row in rows if row.falls is not None]
    falling = sum(bool(row.falls) for row in judged)
    first = (
        f"forecast: a step on each of {len(judged)} rows alone would lower the chosen response of {falling} "
        f"({falling / len(judged):.0%})".replace("%", " %")
        if judged
        else f"forecast: {len(rows)} rows by their hidden states alone, because gradients were not measured, or the "
        "reference is another model"
    )
    named = ", ".join(
        f"{row.row_id} ({', '.join(part for part in (_falls(row), _ches(row)) if part)})"
        for row in rows[:SHOWN]
    )
    return [first, f"most likely to fall: {named}"]


def _falls(row: RowForecast) -> str:
    return "falls" if row.falls else ""


def _ches(row: RowForecast) -> str:
    return "" if row.ches is None else f"CHES {row.ches:.3g}"
