"""What there is to choose from, as data: objectives with their parameters and needs. Imports no torch.

Recipes, command line, documentation and trainer check names and values against these tables; a test checks the
tables against the functions in `objectives.py`.
"""

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from infopo.errors import RecipeError


@dataclass(frozen=True)
class Parameter:
    """One parameter of an objective.

    Attributes:
        default: Value when the user names none.
        kind: Type of the value (`float` takes integers too).
        domain: The admissible values in words, e.g. `> 0`.
        admits: Whether a value of the right type lies in the domain.
        help: One sentence for recipe authors.
    """

    default: Any
    kind: type
    domain: str
    admits: Callable[[Any], bool] = field(repr=False)
    help: str

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, or None."""
        accepted = int | float if self.kind is float else self.kind
        right_type = isinstance(value, accepted) and isinstance(value, bool) == (self.kind is bool)
        if not right_type:
            return f"expected {self.kind.__name__} {self.domain}, got {value!r}"
        if (
            self.kind is float and not abs(value) <= sys.float_info.max
        ):  # NaN, infinities, integers beyond any float
            return f"expected a finite number {self.domain}, got {value!r}"
        return None if self.admits(value) else f"expected a value {self.domain}, got {value!r}"


def _positive(default: float, help: str) -> Parameter:
    return Parameter(default, float, "> 0", lambda v: v > 0, help)


def _at_least_zero(default: float, help: str) -> Parameter:
    return Parameter(default, float, ">= 0", lambda v: v >= 0, help)


def _flag(default: bool, help: str) -> Parameter:
    return Parameter(default, bool, "(true or false)", lambda v: True, help)


_LENGTH_NORMALIZED = "Divide each log-prob by the response's number of tokens."
_NLL_WEIGHT = _at_least_zero(
    0.0, "Weight of the added negative log-likelihood of chosen responses, a token mean."
)
_LABEL_SMOOTHING = Parameter(
    0.0,
    float,
    "in [0, 0.5)",
    lambda v: 0 <= v < 0.5,
    "Assumed probability that a preference label is flipped.",
)


@dataclass(frozen=True)
class Objective:
    """One row of the table of objectives.

    Attributes:
        title: What a table of results calls it.
        formula: The loss in one line, w for chosen and l for rejected, r = π_θ/π_ref.
        parameters: Its parameters by name.
        reference: Sides whose reference log-probs the *loss* needs: subset of {chosen, rejected}.
        pairs: Whether it needs a chosen and a rejected response of the same prompt.
        sides: Sides whose policy log-probs it uses; data must hold at least one of them.
        source: Where it was published.
        trl_loss_type: Name in TRL's `DPOConfig.loss_type`, where there is one.
    """

    title: str
    formula: str
    parameters: Mapping[str, Parameter]
    reference: frozenset[str]
    pairs: bool
    sides: frozenset[str]
    source: str
    trl_loss_type: str | None = None


_BOTH = frozenset({"chosen", "rejected"})
_REJECTED = frozenset({"rejected"})
_CHOSEN = frozenset({"chosen"})
_NONE: frozenset[str] = frozenset()

OBJECTIVES: Mapping[str, Objective] = {
    "infopo": Objective(
        title="InfoPO",
        formula="-β log π_θ(w) + r(l)^β",
        parameters={
            "beta": _positive(1.0, "Scale of the log-ratio critic; 1 is the paper's loss."),
            "length_normalized": _flag(False, _LENGTH_NORMALIZED),
            "cap": _at_least_zero(5.0, "Log-ratio beyond which exp() goes on linearly (nats)."),
        },
        reference=_REJECTED,
        pairs=False,
        sides=_BOTH,
        source="Xiao et al. 2025, arXiv 2505.08507",
    ),
    "dpo": Objective(
        title="DPO",
        formula="-(1-ε) log σ(β (log r(w) - log r(l))) - ε log σ(-β (log r(w) - log r(l))) + a NLL(w)",
        parameters={
            "beta": _positive(0.1, "Strength of the pull towards the reference."),
            "label_smoothing": _LABEL_SMOOTHING,
            "nll_weight": _NLL_WEIGHT,
        },
        reference=_BOTH,
        pairs=True,
        sides=_BOTH,
        source="Rafailov et al. 2023, arXiv 2305.18290; label smoothing: Mitchell 2023, 'A note on DPO with noisy "
        "preferences'; NLL: Pang et al. 2024, arXiv 2404.19733",
        trl_loss_type="sigmoid",
    ),
    "ipo": Objective(
        title="IPO",
        formula="(log r(w)/|w| - log r(l)/|l| - 1/(2β))²",
        parameters={
            "beta": _positive(0.1, "The paper's τ: regularisation strength."),
            "length_normalized": _flag(True, _LENGTH_NORMALIZED + " The authors' own runs did (see TRL)."),
        },
        reference=_BOTH,
        pairs=True,
        sides=_BOTH,
        source="Azar et al. 2023, arXiv 2310.12036, eq. 17",
        trl_loss_type="ipo",
    ),
    "hinge": Objective(
        title="Hinge",
        formula="max(0, 1 - β (log r(w) - log r(l)))",
        parameters={"beta": _positive(0.1, "Inverse of the margin in nats.")},
        reference=_BOTH,
        pairs=True,
        sides=_BOTH,
        source="Liu et al. 2023 (RSO), arXiv 2309.06657; TRL's `hinge`",
        trl_loss_type="hinge",
    ),
    "simpo": Objective(
        title="SimPO",
        formula="-log σ(β log π_θ(w)/|w| - β log π_θ(l)/|l| - γ)",
        parameters={
            "beta": _positive(2.0, "Scale of the length-normalised reward."),
            "gamma": _at_least_zero(0.5, "Target reward margin."),
        },
        reference=_NONE,
        pairs=True,
        sides=_BOTH,
        source="Meng et al. 2024, arXiv 2405.14734, eq. 6",
    ),
    "sft": Objective(
        title="SFT on chosen",
        formula="-log π_θ(w)",
        parameters={
            "token_mean": _flag(
                False, "Average over tokens of chosen responses (TRL's `sft`), not over responses."
            ),
        },
        reference=_NONE,
        pairs=False,
        sides=_CHOSEN,
        source="maximum likelihood of the chosen responses",
        trl_loss_type="sft",
    ),
}
"""All objectives by the name that recipes use."""

DATA_SHAPES: Mapping[str, str] = {
    "standard": "prompt, chosen, rejected: text",
    "standard_implicit": "chosen, rejected: text; the prompt is the beginning they share",
    "conversational": "prompt, chosen, rejected: lists of messages {role, content}",
    "conversational_implicit": "chosen, rejected: whole conversations; the prompt is the leading turns they share",
    "hh": "chosen, rejected: transcripts of Anthropic's hh-rlhf, '\\n\\nHuman: ...\\n\\nAssistant: ...'",
    "sharegpt": "conversations: turns {from, value}; chosen, rejected: a turn each",
    "alpaca": "instruction (or question), chosen, rejected: text; input, system, history where there are any",
    "alpaca_unpaired": "instruction (or question), output: text; kto_tag (or label): true or false",
    "unpaired": "prompt, completion: text or messages; label: true or false",
    "unpaired_messages": "messages (or conversations): turns, the last of which is the response; label: true or false",
    "lists": "prompt: text or messages; chosen, rejected: lists of such responses, one of which may be empty",
    "scored": "prompt: text or messages; responses: list of such; scores: a number each",
    "votes": "instruction, response1, response2: text; annotator1, annotator2, ...: 0 (tie), 1 or 2",
}
"""All shapes by the name that recipes use; a shape is detected where none is named."""

SCORE_RULES = ("best-worst", "best-rest", "threshold")
"""How the responses of a scored row are split into chosen and rejected ones; the first is the default."""

ON_TOO_LONG = ("cut", "drop")
"""What to do with a row that has more tokens than it may: cut it by the one rule, or leave it out and count it."""

ON_BAD_ROW = ("raise", "skip")
"""What to do with a row that cannot be used: stop, or count it and go on."""

REFERENCE_MODES = ("auto", "live", "precompute", "adapter-off")
"""Where reference log-probs come from (besides a model's path)."""

REFERENCE_STORES = ("auto", "off")
"""Where precomputed values are kept: in the user's cache, or in memory only (besides a folder's path)."""

REFERENCE_SIDES = ("needed", "both")
"""Whose reference log-probs are computed: those the loss needs, or all (for metrics)."""


LOGPS_PATHS = ("auto", "naive")
"""How log-probs are computed: the fastest way that the model allows, or one padded row a response."""


def suggestion(word: str, known: Mapping[str, Any] | tuple[str, ...] | list[str]) -> str:
    """` (did you mean 'beta'?)` for a near miss, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_objective(name: str, parameters: Mapping[str, Any]) -> list[str]:
    """Everything wrong with an objective's name and parameters, one sentence each, with its place.

    Args:
        name: Name of the objective.
        parameters: Values by parameter name.
    """
    if name not in OBJECTIVES:
        return [
            f"objective.name: no objective {name!r}{suggestion(name, OBJECTIVES)}; there are {', '.join(OBJECTIVES)}"
        ]
    known = OBJECTIVES[name].parameters
    problems = []
    for key, value in parameters.items():
        if key not in known:
            problems.append(
                f"objective.{key}: {name} has no such parameter{suggestion(key, known)}; it has {', '.join(known)}"
            )
        elif problem := known[key].problem(value):
            problems.append(f"objective.{key}: {problem}")
    return problems


def complete_parameters(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of an objective, defaults filled in.

    Raises:
        RecipeError: A name or a value is wrong.
    """
    if problems := check_objective(name, parameters):
        raise RecipeError(problems)
    given = {key: parameters.get(key, spec.default) for key, spec in OBJECTIVES[name].parameters.items()}
    kinds = {key: spec.kind for key, spec in OBJECTIVES[name].parameters.items()}
    return {key: float(value) if kinds[key] is float else value for key, value in given.items()}
