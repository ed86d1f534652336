"""What the first steps of training will do to the chosen responses of some rows, before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from infopo import probes
from infopo.data.examples import ExampleDataset
from infopo.diagnostics import Balance, ches
from infopo.output import counted
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
        change: Change of the log-prob of its chosen response (nats per unit of learning rate) by a small step of
            gradient descent on all rows together, or None if that was not measured.
        ches: Its length-normalised CHES, or None if the model does not show its hidden states.
    """

    row_id: str
    change: float | None
    ches: float | None

    @property
    def falls(self) -> bool:
        """Whether the step lowers its chosen response."""
        return self.change is not None and self.change < 0


def forecast(trainer: InfoPOTrainer, dataset: ExampleDataset) -> list[RowForecast]:
    """Returns what is expected of the first pair of `probe_size` random rows, the worst first.

    Args:
        trainer: A trainer that has not trained.
        dataset: The data that it would be trained on.
    """
    subject = trainer.subject()
    # Before the first update, the policy is its own reference.
    itself = LiveReference(trainer.model, frozenset({"chosen", "rejected", "kl"}))
    tools = replace(subject.instruments, reference=itself)
    chosen = probes.choose(dataset, trainer.args.probe_size, trainer.args.seed)
    pairs = [_first_pair(each) for each in chosen if each.chosen_ids and each.rejected_ids]
    is_known = subject.starts_as_reference and subject.without_gradients is None
    changes: list[float | None] = [None] * len(pairs)
    if is_known and trainer.args.gradient_size and pairs:
        changes = [*tools.along_a_step(pairs, pairs)]
    found = []
    for pair, change in zip(pairs, changes, strict=True):
        sums = tools.hidden_sums(pair)
        score = None if sums is None else ches(sums[0][0], sums[1][0], sums[0][1], sums[1][1])[1]
        found.append(RowForecast(pair.row_id, change, score))
    return sorted(found, key=lambda row: (row.change or 0.0, -(row.ches or 0.0)))


def band(trainer: InfoPOTrainer, dataset: ExampleDataset) -> str:
    """Returns how the two sides of the first gradient stand to each other, in a sentence, or "" if that is not known.

    It is measured on the first pairs of `gradient_size` rows of the probe set, at the objective's β.

    Args:
        trainer: A trainer that has not trained.
        dataset: The data that it would be trained on.
    """
    subject = trainer.subject()
    chosen = probes.choose(dataset, trainer.args.probe_size, trainer.args.seed)
    pairs = [_first_pair(each) for each in chosen if each.chosen_ids and each.rejected_ids]
    pairs = pairs[: trainer.args.gradient_size]
    if not pairs or subject.without_gradients is not None or not subject.starts_as_reference:
        return ""
    itself = LiveReference(trainer.model, frozenset({"chosen", "rejected", "kl"}))
    return in_words(replace(subject.instruments, reference=itself).balance(pairs), len(pairs))


def in_words(found: Balance, pairs: int) -> str:
    """Returns a balance as a sentence.

    Example:
        >>> found = Balance(chosen=2.0, rejected=1.0, inner=1.0, weight_chosen=1.0, weight_rejected=1.0)
        >>> in_words(found, 16).partition("; ")[2]
        'd_w/d_l = 1 is inside the band [0.25, 1]'
    """
    values = found.metrics()
    text = f"gradients of the first step on {counted(pairs, 'pair')}: "
    text += f"chosen {found.chosen:.3g}, rejected {found.rejected:.3g}"
    if not found.chosen or not found.rejected:
        return text
    text += f", cosine {found.cosine:.2g}"
    if "gradients/in_band" not in values:
        return f"{text}; without a positive cosine, the step neither lowers chosen responses nor raises rejected ones"
    place = "inside" if values["gradients/in_band"] else "outside"
    low, high = values["gradients/band_low"], values["gradients/band_high"]
    return f"{text}; d_w/d_l = {values['gradients/weight_ratio']:.3g} is {place} the band [{low:.3g}, {high:.3g}]"


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
        >>> worst = RowForecast("p.jsonl:2", -3.0, -0.1)
        >>> first, second, third = lines([worst, RowForecast("p.jsonl:1", 8.0, -2.0)])
        >>> first
        'forecast: the first step on 2 rows together would lower the chosen response of 1 (50 %)'
        >>> third
        'most likely to fall: p.jsonl:2 (falls, CHES -0.1), p.jsonl:1 (CHES -2)'
    """
    if not rows:
        return ["forecast: none of the rows has both a chosen and a rejected response"]
    named = ", ".join(
        f"{row.row_id} ({', '.join(part for part in (_falls(row), _ches(row)) if part)})"
        for row in rows[:SHOWN]
    )
    if rows[0].change is None:
        return [
            f"forecast: {counted(len(rows), 'row')} by their hidden states alone, because gradients were not measured, "
            "or the reference is another model",
            f"most alike (in the study of forecasts, CHES told no better than chance who falls): {named}",
        ]
    falling = sum(row.falls for row in rows)
    return [
        f"forecast: the first step on {counted(len(rows), 'row')} together would lower the chosen response of "
        f"{falling} ({falling / len(rows):.0%})".replace("%", " %"),
        RELIABILITY,
        f"most likely to fall: {named}",
    ]


RELIABILITY = (
    "take it as an order of rows, not as a number: how many have fallen in the end depends on the learning rate "
    "and the number of steps, too"
)
"""What study 07 says of this forecast, in a line."""


def _falls(row: RowForecast) -> str:
    return "falls" if row.falls else ""


def _ches(row: RowForecast) -> str:
    return "" if row.ches is None else f"CHES {row.ches:.3g}"
