"""What a loss says of itself: one declaration above its function. Imports no torch.

`@objective(...)` above a function of `ResponseLogps` says what the loss needs and which values its parameters take. The
package's own losses and those of users are declared alike. Catalog, recipes, command line, documentation and the
generic tests all follow from it.

Example:
    >>> @objective(
    ...     title="Margin",
    ...     formula="max(0, m - log r(w) + log r(l))",
    ...     pairs=True,
    ...     parameters={"margin": at_least_zero("Margin below which a pair is pushed on (nats).")},
    ... )
    ... def margin_loss(logps, *, margin: float = 1.0):
    ...     values = (margin - logps.margins(logps.policy - logps.reference)).clamp(min=0)
    ...     return [LossTerm(values, per="pair")]
    >>> declared(margin_loss).parameters["margin"].problem(-1.0)
    'expected a value >= 0, got -1.0'
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

Loss = TypeVar("Loss", bound=Callable[..., Any])

KINDS: Mapping[str, type] = {"float": float, "int": int, "bool": bool, "str": str}
"""Types that a parameter may have, by the names that annotations write."""


@dataclass(frozen=True)
class Domain:
    """The values that a parameter takes. `positive`, `at_least_zero`, `within`, `flag` and `choice` make one.

    Attributes:
        words: Description of the admissible values, e.g. `> 0`.
        admits: Returns whether a value of the right type is one of them.
        help: One sentence for recipe authors.
        unit: Unit of the value, e.g. `nats`, or an empty string.
    """

    words: str
    admits: Callable[[Any], bool] = field(repr=False)
    help: str = ""
    unit: str = ""


def positive(help: str, unit: str = "") -> Domain:
    """The numbers above 0."""
    return Domain("> 0", lambda v: v > 0, help, unit)


def at_least_zero(help: str, unit: str = "") -> Domain:
    """The numbers that are not negative."""
    return Domain(">= 0", lambda v: v >= 0, help, unit)


def number(help: str, unit: str = "") -> Domain:
    """All finite numbers."""
    return Domain("(any finite number)", lambda v: True, help, unit)


def within(interval: str, help: str) -> Domain:
    """The numbers of an interval, each end of which is open or closed.

    Example:
        >>> share = within("[0, 0.5)", "Assumed share of flipped labels.")
        >>> share.words, share.admits(0.0), share.admits(0.5)
        ('in [0, 0.5)', True, False)
    """
    low, high = (float(end) for end in interval[1:-1].split(","))

    def admits(value: float) -> bool:
        above = low <= value if interval[0] == "[" else low < value
        return above and (value <= high if interval[-1] == "]" else value < high)

    return Domain(f"in {interval}", admits, help)


def flag(help: str) -> Domain:
    """True and false."""
    return Domain("(true or false)", lambda v: True, help)


def choice(choices: tuple[str, ...], help: str) -> Domain:
    """One of several texts."""
    return Domain(f"among {', '.join(choices)}", lambda v: v in choices, help)


CRITIC = positive("Scale of the log-ratio critic.")
STRENGTH = positive("Strength of the pull towards the reference.")
LENGTH_NORMALIZED = flag("Divide each log-prob by the response's number of tokens.")
CAP = at_least_zero("Log-ratio beyond which exp() is extended linearly (nats).", "nats")
NLL_WEIGHT = at_least_zero("Weight of the added negative log-likelihood of chosen responses, a token mean.")
LABEL_SMOOTHING = within("[0, 0.5)", "Assumed probability that a preference label is flipped.")


@dataclass(frozen=True)
class Parameter:
    """One parameter of an objective.

    Attributes:
        default: Value when the user names none. `REQUIRED` if there is none.
        kind: Type of the value (`float` takes integers too), or `object` for a foreign loss that does not say.
        domain: Description of the admissible values, e.g. `> 0`.
        admits: Returns whether a value of the right type lies in the domain.
        help: One sentence for recipe authors.
        unit: Unit of the value, e.g. `nats`, or an empty string.
    """

    default: Any
    kind: type
    domain: str
    admits: Callable[[Any], bool] = field(repr=False)
    help: str
    unit: str = ""

    def problem(self, value: Any) -> str | None:
        """Returns what is wrong with `value`, or None if nothing is.

        Example:
            >>> Parameter(0.1, float, "> 0", lambda v: v > 0, "").problem(-1.0)
            'expected a value > 0, got -1.0'
        """
        if self.kind is not object:
            accepted = int | float if self.kind is float else self.kind
            right_type = isinstance(value, accepted) and isinstance(value, bool) == (self.kind is bool)
            if not right_type:
                return f"expected {self.kind.__name__} {self.domain}, got {value!r}"
        # The comparison fails for NaN, infinities, and integers that no float can represent.
        if self.kind is float and not abs(value) <= sys.float_info.max:
            return f"expected a finite number {self.domain}, got {value!r}"
        return None if self.admits(value) else f"expected a value {self.domain}, got {value!r}"


REQUIRED = inspect.Parameter.empty
"""Default of a parameter that has none: whoever names the objective must give a value."""


@dataclass(frozen=True)
class Objective:
    """One row of the table of objectives: what its function declares.

    Attributes:
        title: Name of the objective in tables of results.
        formula: The loss in one line, w for chosen and l for rejected, r = π_θ/π_ref.
        parameters: Its parameters by name.
        reference: Sides whose reference log-probs the *loss* needs, a subset of {chosen, rejected}.
        pairs: Whether it needs a chosen and a rejected response of the same prompt.
        sides: Sides whose policy log-probs it uses. Data must contain at least one of them.
        source: Publication of the loss.
        when: When to use it, for readers of the table of objectives.
        bound: The divergence of p_w from p_l that minus the loss bounds from below, up to stated constants and factors,
            and its maximum. Empty if the loss is not a bound on a divergence. (SMILE is an estimate, not a bound.)
        statistic: The number of the whole optimizer step that couples its examples: a key of `STEP_STATISTICS`, or a
            function that makes a `StepStatistic` from the parameters. Empty if the loss of a step is a sum over
            examples.
        trl_loss_type: Name in TRL's `DPOConfig.loss_type`, or None if TRL lacks the loss.
        ratio: Whether the loss contains r(l)^β itself, whose tail the metrics `ratio/*` show.
        agreement: Whether it reads `ResponseLogps.agreement`, which takes one more pass over the logits.
        reward: What metrics call the reward of a response. `log_ratio` is β log r. Losses without a reference have
            the rewards of TRL's trainers for them: `logp` is β log π_θ, and `mean_logp` is β log π_θ / |y| (β = 1 for
            SFT).
        location: File that a loss from outside the package was found in. Empty for the package's own.
        digest: Hash of the source of a loss from outside, without comments and layout. Empty for the package's own.
    """

    title: str
    formula: str
    parameters: Mapping[str, Parameter]
    reference: frozenset[str]
    pairs: bool
    sides: frozenset[str]
    source: str
    when: str = ""
    bound: str = ""
    statistic: str | Callable[..., Any] = ""
    trl_loss_type: str | None = None
    ratio: bool = False
    agreement: bool = False
    reward: str = "log_ratio"
    location: str = ""
    digest: str = ""

    @property
    def needs(self) -> str:
        """The data and the reference that it needs, in words."""
        data = "pairs" if self.pairs else "unpaired will do"
        if len(self.sides) == 1:
            data = f"{next(iter(self.sides))} responses"
        both = len(self.reference) == 2
        side = "both" if both else next(iter(self.reference), "")
        return f"{data}; {f'reference of {side}' if side else 'no reference'}"


STEP_STATISTICS: Mapping[str, str] = {
    "log_mean": "log of the mean of e^f over the rejected responses of the step",
    "moving_log_mean": "log of a moving average, over steps, of the mean of e^f over rejected responses",
    "sorted_margins": "margins log π(w) - log π(l) of the step's pairs in order, and those of the reference in theirs",
    "sorted_log_ratios": "log-ratios of the step's chosen responses in order, and those of the rejected ones in theirs",
    "moving_margins": "moving mean and deviation, over steps, of log r(w) - log r(l), and which pairs are kept",
    "moving_gains": "moving mean and deviation, over steps, of log r(w)/|w| - log r(l)/|l|",
    "moving_rewards": "moving mean, over steps, of β log r of chosen and rejected responses",
    "kl": "mean log-ratio of the step's prompts with responses to other prompts (role kl), at least 0",
}
"""Descriptions of the numbers of a whole optimizer step that the package's own objectives need."""

BOTH = ("chosen", "rejected")


@dataclass(frozen=True)
class Declaration:
    """The arguments of `objective`, which becomes an `Objective` beside a function's parameters."""

    title: str = ""
    formula: str = ""
    source: str = ""
    when: str = ""
    bound: str = ""
    parameters: Mapping[str, Domain] = field(default_factory=dict)
    reference: Iterable[str] = BOTH
    sides: Iterable[str] = BOTH
    pairs: bool = False
    statistic: str | Callable[..., Any] = ""
    trl_loss_type: str | None = None
    ratio: bool = False
    agreement: bool = False
    reward: str = "log_ratio"

    def row(self, name: str, signature: Mapping[str, tuple[Any, type | None]]) -> Objective:
        """Returns the row of the table.

        Args:
            name: Name of the function.
            signature: Default and annotated type of each of its parameters.

        Raises:
            ValueError: The declaration does not fit the function, or is not consistent.
        """
        for problem in self._problems(signature):
            raise ValueError(f"@objective of {name}: {problem}")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["parameters"] = {
            key: _parameter(default, kind, self.parameters.get(key))
            for key, (default, kind) in signature.items()
        }
        values |= {"reference": frozenset(self.reference), "sides": frozenset(self.sides)}
        return Objective(**values | {"title": self.title or name})

    def _problems(self, signature: Mapping[str, Any]) -> Iterable[str]:
        for key in self.parameters.keys() - signature.keys():
            has = ", ".join(signature) or "none"
            yield f"parameters has {key!r}, which is no parameter of the function; it has {has}"
        for which in ("reference", "sides"):
            given = getattr(self, which)
            if isinstance(given, str) or not set(given) <= set(BOTH):
                yield f"{which}: expected a subset of {{'chosen', 'rejected'}}, got {given!r}"
        if not set(self.sides):
            yield "sides: expected at least one of chosen and rejected"
        if self.pairs and set(self.sides) != set(BOTH):
            yield f"pairs=True needs both sides, got sides={self.sides!r}"
        if isinstance(self.statistic, str) and self.statistic not in ("", *STEP_STATISTICS):
            yield f"statistic: expected one of {', '.join(STEP_STATISTICS)}, or a function, got {self.statistic!r}"
        if self.reward not in ("log_ratio", "logp", "mean_logp"):
            yield f"reward: expected log_ratio, logp or mean_logp, got {self.reward!r}"


def _parameter(default: Any, kind: type | None, domain: Domain | None) -> Parameter:
    if kind is None:
        kind = type(default) if type(default) in KINDS.values() else object
        # A default of 1 says nothing against 0.5.
        kind = float if kind is int else kind
    if domain is None:
        words = "(any finite number)" if kind is float else "(any)"
        domain = flag("") if kind is bool else Domain(words, lambda value: True)
    return Parameter(default, kind, domain.words, domain.admits, domain.help, domain.unit)


def objective(**declaration: Any) -> Callable[[Loss], Loss]:
    """Declares a function to be a loss. The arguments are the attributes of `Declaration`; all have defaults.

    The function takes a `ResponseLogps` and keyword parameters, and returns a list of `LossTerm`. Defaults and types of
    the parameters are those of its signature.

    Args:
        declaration: `title`, `formula`, `source`, `when`, `bound` for readers. `parameters`: a `Domain` by parameter.
            `reference`, `sides`: those of ("chosen", "rejected") that the loss reads; both by default. `pairs`: whether
            it compares two responses of one prompt. `statistic`, `ratio`, `agreement`, `reward`, `trl_loss_type`: see
            `Objective`.

    Raises:
        ValueError: The declaration does not fit the function.

    Example:
        >>> @objective(title="Chosen only", sides=("chosen",), reference=())
        ... def chosen_only(logps, *, weight: float = 1.0): ...
        >>> declared(chosen_only).title
        'Chosen only'
    """

    def mark(function: Loss) -> Loss:
        row = Declaration(**declaration).row(function.__name__, signature_of(function))
        function.__objective__ = row  # type: ignore[attr-defined]
        return function

    return mark


def declared(function: Callable[..., Any]) -> Objective | None:
    """Returns what a function declares, or None if it declares nothing."""
    return getattr(function, "__objective__", None)


def signature_of(function: Callable[..., Any]) -> dict[str, tuple[Any, type | None]]:
    """Returns default and annotated type of each parameter after the first. The type is None if it is none of `KINDS`.

    Example:
        >>> def loss(logps, *, margin: float = 1.0, hard=False): ...
        >>> signature_of(loss)
        {'margin': (1.0, <class 'float'>), 'hard': (False, None)}
    """
    found = {}
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        name = parameter.annotation
        kind = KINDS.get(name if isinstance(name, str) else getattr(name, "__name__", ""))
        found[parameter.name] = (parameter.default, kind)
    return found


def with_place(row: Objective, location: str, digest: str) -> Objective:
    """Returns the row of a loss from outside, with where it was found and the hash of its source."""
    return replace(row, location=location, digest=digest)
