"""Whether a loss is what it says: judged on small random batches, before anything is computed for a run.

The trainer judges every loss from outside the package. `check_loss` is for the author of one: it also compares the
gradient with finite differences.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from infopo.errors import ConfigError, ObjectiveError
from infopo.losses import foreign
from infopo.losses.catalog import check_objective, row_of
from infopo.losses.coupling import AnyStatistic
from infopo.losses.declaration import Objective
from infopo.losses.registry import LossFunction, loss_function, step_statistic
from infopo.records import PER, LossTerm, LossTerms, ResponseLogps, Role

Layout = list[tuple[int, int]]
"""Numbers of chosen and of rejected responses of each example."""

PAIRS: Layout = [(1, 1), (1, 1), (1, 1)]
MANY: Layout = [(2, 3), (1, 1)]
LONE: Layout = [(1, 0), (0, 1), (1, 1)]


def random_logps(layout: Layout, seed: int = 0) -> ResponseLogps:
    """Returns random log-probs of examples in float64, with responses of 1 to 9 tokens and log-ratios of a few nats.

    Example:
        >>> random_logps([(1, 2)]).pairs.tolist()
        [[0, 1], [0, 2]]
    """
    draw = torch.Generator().manual_seed(seed)
    who = [(i, r) for i, (n, m) in enumerate(layout) for r in [Role.CHOSEN] * n + [Role.REJECTED] * m]
    who += [(i, Role.KL) for i in range(len(layout))]
    length = torch.randint(1, 10, (len(who),), generator=draw)
    reference = -length * (0.5 + torch.rand(len(who), generator=draw, dtype=torch.float64))
    policy = reference + 2 * torch.randn(len(who), generator=draw, dtype=torch.float64)
    return ResponseLogps.of(
        policy.clamp(max=-0.01).requires_grad_(),
        reference,
        length,
        torch.tensor([int(role) for _, role in who], dtype=torch.int64),
        torch.tensor([example for example, _ in who], dtype=torch.int64),
    )


def judge(name: str, parameters: Mapping[str, Any]) -> list[str]:
    """Returns the first thing that is wrong with a loss from outside the package, as a list of at most one sentence.

    Args:
        name: Name of the objective.
        parameters: All its parameters, which `check_objective` has found in their domains.
    """
    row = row_of(name)
    try:
        loss = _Repeatable(loss_function(name, parameters))
        statistic = step_statistic(name, parameters)
    except Exception as error:
        return [
            f"objective: {_name_and_file(name, row)}: its step statistic cannot be made: {_in_words(error)}"
        ]
    if foreign.is_undeclared(name) and _has_pairs(loss):
        row = foreign.compares_pairs(name)
    for problem in _problems(loss, row, statistic):
        return [f"objective: {_name_and_file(name, row)}: {problem}"]
    return []


class _Repeatable:
    """A loss that draws the same random numbers at each call, and leaves the global generator as it is.

    Attributes:
        draws: Whether it has drawn any.
    """

    def __init__(self, loss: LossFunction) -> None:
        self._loss = loss
        self.draws = False

    def __call__(self, logps: ResponseLogps) -> Any:  # what it returns is judged by `_form`
        with torch.random.fork_rng(devices=[]):
            before = torch.manual_seed(0).get_state()
            terms = self._loss(logps)
            self.draws = self.draws or not torch.equal(torch.get_rng_state(), before)
        return terms


def _has_pairs(loss: LossFunction) -> bool:
    """Whether a loss that declares nothing has values of pairs."""
    try:
        return any(term.per == "pair" for term in loss(random_logps(PAIRS)))
    except Exception:
        return False  # `_problems` names it


def _name_and_file(name: str, row: Objective) -> str:
    return f"{foreign.plain_name(name)} ({row.location})" if row.location else name


def _problems(loss: _Repeatable, row: Objective, statistic: AnyStatistic | None) -> Iterator[str]:
    layouts = [PAIRS, MANY] if row.pairs else [PAIRS, MANY, LONE]
    is_pulled = False
    for seed, layout in enumerate([*layouts, []]):
        logps = _of_step(random_logps(layout, seed), statistic)
        before = [t.detach().clone() for t in (logps.policy, logps.reference)]
        try:
            terms = loss(logps)
        except Exception as error:
            yield f"fails on {_batch(logps)}: {_in_words(error)}"
            return
        if problem := _form(terms, logps, row):
            yield problem
            return
        if any(
            not torch.equal(t.detach(), b)
            for t, b in zip((logps.policy, logps.reference), before, strict=True)
        ):
            yield "changes the log-probs that it is given; write a.clamp(max=0), not a.clamp_(max=0)"
            return
        if problem := _undeclared(loss, row, logps) or _gradient(terms, logps):
            yield problem
            return
        is_pulled = is_pulled or any(_slope(terms, logps).tolist())
    if not is_pulled:
        yield "has a gradient of 0 for every response of several random batches, so that nothing would be trained"
    elif statistic is None and not loss.draws:  # draws of a part of a batch are others
        yield from _coupling(loss, random_logps(MANY, seed=7))


def _of_step(logps: ResponseLogps, statistic: AnyStatistic | None) -> ResponseLogps:
    return replace(logps, statistic=statistic.of(logps)) if statistic and len(logps.pairs) else logps


def _batch(logps: ResponseLogps) -> str:
    return f"a batch of {len(logps.chosen)} chosen and {len(logps.rejected)} rejected responses"


def _in_words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _form(terms: Any, logps: ResponseLogps, row: Objective) -> str | None:
    """Returns what is wrong with the form of the terms: types, names of `per`, numbers of values, NaN."""
    if not isinstance(terms, list) or not all(isinstance(term, LossTerm) for term in terms) or not terms:
        got = type(terms).__name__
        of_what = (
            f" of {', '.join(sorted({type(t).__name__ for t in terms}))}"
            if isinstance(terms, list) and terms
            else ""
        )
        return f"expected a list of LossTerm(values, per=...), got {got}{of_what}"
    counts = {
        "pair": len(logps.pairs),
        "chosen": len(logps.chosen),
        "rejected": len(logps.rejected),
        "response": len(logps.chosen) + len(logps.rejected),
        "token": len(logps.chosen),
    }
    for term in terms:
        if term.per not in counts:
            return f"per={term.per!r}: expected one of {', '.join(PER)}"
        if not isinstance(term.values, Tensor) or not term.values.is_floating_point():
            return f"expected a tensor of floats as values of a LossTerm, got {type(term.values).__name__}"
        if term.values.shape != (counts[term.per],):
            return (
                f"per={term.per!r}: expected {counts[term.per]} values, one per {_item(term.per)}, for "
                f"{_batch(logps)}, got {'one number' if term.values.ndim == 0 else tuple(term.values.shape)}; "
                "the trainer divides their sum by the count of the whole step"
            )
        if term.per == "pair" and not row.pairs:
            return "has one value per pair; declare @objective(pairs=True), so that data without pairs are refused"
        if not torch.isfinite(term.values).all():
            return f"is {'NaN' if term.values.isnan().any() else 'infinite'} on {_batch(logps)} with finite log-probs"
    return None


def _item(per: str) -> str:
    return {"token": "chosen response", "pair": "pair", "response": "response"}.get(per, f"{per} response")


def _total(terms: LossTerms) -> Tensor:
    return torch.stack([term.values.double().sum() for term in terms]).sum()


def _undeclared(loss: LossFunction, row: Objective, logps: ResponseLogps) -> str | None:
    """Returns which reference log-probs the loss reads without a declaration; in a run they would be NaN."""
    clean = _total(loss(logps))
    for side, role in (("chosen", Role.CHOSEN), ("rejected", Role.REJECTED)):
        if side in row.reference:
            continue
        damaged = logps.reference.masked_fill(logps.role == role, math.nan)
        if not torch.equal(_total(loss(replace(logps, reference=damaged))), clean):
            declared = ", ".join(sorted(row.reference)) or "none"
            return (
                f"reads the reference of {side} responses, which it does not declare (declared: {declared}), so that "
                f"it would not be computed; add {side!r} to reference= of @objective"
            )
    return None


def _gradient(terms: LossTerms, logps: ResponseLogps) -> str | None:
    if not len(logps.chosen) + len(logps.rejected):
        return None
    if not _total(terms).requires_grad:
        return "has no gradient: its values do not depend on logps.policy, or are detached from it"
    if not torch.isfinite(_slope(terms, logps)).all():
        return f"has a gradient that is not finite on {_batch(logps)}, though its value is"
    return None


def _slope(terms: LossTerms, logps: ResponseLogps) -> Tensor:
    total = _total(terms)
    if not total.requires_grad:
        return torch.zeros_like(logps.policy)
    (slope,) = torch.autograd.grad(total, logps.policy, allow_unused=True, retain_graph=True)
    return torch.zeros_like(logps.policy) if slope is None else slope


def _coupling(loss: LossFunction, logps: ResponseLogps) -> Iterator[str]:
    """Names a loss whose value for an example depends on the others, which a step may hold in another batch."""
    alone = [_only(logps, logps.example == i) for i in range(int(logps.example.max()) + 1)]
    try:
        parts = torch.stack([_total(loss(each)) for each in alone]).sum()
    except Exception as error:
        yield f"fails on a batch of a single example: {_in_words(error)}"
        return
    if not torch.allclose(parts, _total(loss(logps)), rtol=1e-6, atol=1e-9):
        yield (
            "the value of an example depends on the other examples of its batch, so that it would change with the "
            "batch size; sum over examples only, or declare a statistic= of the whole step"
        )


def _only(logps: ResponseLogps, where: Tensor) -> ResponseLogps:
    return ResponseLogps.of(
        logps.policy[where],
        logps.reference[where],
        logps.length[where],
        logps.role[where],
        logps.example[where],
    )


def check_loss(
    function: Callable[..., Any] | str, *, finite_differences: bool = True, **parameters: Any
) -> None:
    """Checks a loss of yours: form, needs, and its gradient against finite differences. For scripts and notebooks.

    The batches are random `ResponseLogps` in float64. It returns nothing if all is well.

    Args:
        function: The loss, or a name such as `my_module:my_loss`.
        finite_differences: Whether the gradient has to be the derivative of the value. It is not for a loss that
            detaches a part of itself on purpose.
        parameters: Parameters of the loss. What is not given takes the default.

    Raises:
        ObjectiveError: The loss is not what it declares, or its gradient is not its derivative.
        ConfigError: A parameter is unknown, missing, or outside its domain.

    Example:
        >>> check_loss("ipo", beta=0.2)
    """
    name = function if isinstance(function, str) else foreign.register(function)
    if problems := check_objective(name, parameters):
        raise ConfigError(problems)
    if problems := judge(name, parameters):
        raise ObjectiveError(problems)
    if not finite_differences:
        return
    loss = _Repeatable(loss_function(name, parameters))
    statistic = step_statistic(name, parameters)
    for seed, layout in enumerate([PAIRS, MANY]):
        logps = _of_step(random_logps(layout, seed + 20), statistic)
        try:
            torch.autograd.gradcheck(partial(_value_at, loss, logps), logps.policy)
        except RuntimeError as error:
            raise ObjectiveError(
                f"objective: {_name_and_file(name, row_of(name))}: the gradient is not the derivative of the value, "
                f"by finite differences on {_batch(logps)}: {_in_words(error)}"
            ) from error


def _value_at(loss: LossFunction, logps: ResponseLogps, policy: Tensor) -> Tensor:
    return _total(loss(replace(logps, policy=policy)))
