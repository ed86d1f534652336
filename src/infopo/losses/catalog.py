"""Objectives as data: their parameters and needs, one row beside each function of this folder. Imports no torch.

Recipes, command line, documentation and trainer check names and values against this table. A test checks the table
against the functions.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from infopo.catalog import suggestion
from infopo.errors import ConfigError


@dataclass(frozen=True)
class Parameter:
    """One parameter of an objective.

    Attributes:
        default: Value when the user names none.
        kind: Type of the value (`float` takes integers too).
        domain: Description of the admissible values, e.g. `> 0`.
        admits: Returns whether a value of the right type lies in the domain.
        help: One sentence for recipe authors.
    """

    default: Any
    kind: type
    domain: str
    admits: Callable[[Any], bool] = field(repr=False)
    help: str

    def problem(self, value: Any) -> str | None:
        """Returns what is wrong with `value`, or None if nothing is.

        Example:
            >>> OBJECTIVES["dpo"].parameters["beta"].problem(-1.0)
            'expected a value > 0, got -1.0'
        """
        accepted = int | float if self.kind is float else self.kind
        right_type = isinstance(value, accepted) and isinstance(value, bool) == (self.kind is bool)
        if not right_type:
            return f"expected {self.kind.__name__} {self.domain}, got {value!r}"
        # The comparison fails for NaN, infinities, and integers that no float can represent.
        if self.kind is float and not abs(value) <= sys.float_info.max:
            return f"expected a finite number {self.domain}, got {value!r}"
        return None if self.admits(value) else f"expected a value {self.domain}, got {value!r}"


def _positive(default: float, help: str) -> Parameter:
    return Parameter(default, float, "> 0", lambda v: v > 0, help)


def _at_least_zero(default: float, help: str) -> Parameter:
    return Parameter(default, float, ">= 0", lambda v: v >= 0, help)


def _flag(default: bool, help: str) -> Parameter:
    return Parameter(default, bool, "(true or false)", lambda v: True, help)


def _choice(default: str, choices: tuple[str, ...], help: str) -> Parameter:
    return Parameter(default, str, f"among {', '.join(choices)}", lambda v: v in choices, help)


def _share(default: float, domain: str, admits: Callable[[Any], bool], help: str) -> Parameter:
    return Parameter(default, float, domain, admits, help)


_LENGTH_NORMALIZED = "Divide each log-prob by the response's number of tokens."
_CRITIC = "Scale of the log-ratio critic."
_CAP = "Log-ratio beyond which exp() is extended linearly (nats)."
_OF_CRITIC = {"beta": _positive(1.0, _CRITIC), "length_normalized": _flag(False, _LENGTH_NORMALIZED)}
_STRENGTH = "Strength of the pull towards the reference."
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
        title: Name of the objective in tables of results.
        formula: The loss in one line, w for chosen and l for rejected, r = π_θ/π_ref.
        parameters: Its parameters by name.
        reference: Sides whose reference log-probs the *loss* needs, a subset of {chosen, rejected}.
        pairs: Whether it needs a chosen and a rejected response of the same prompt.
        sides: Sides whose policy log-probs it uses. Data must contain at least one of them.
        source: Publication of the loss.
        bound: The divergence of p_w from p_l that minus the loss bounds from below, up to stated constants and factors,
            and its maximum. Empty if the loss is not a bound on a divergence. (SMILE is an estimate, not a bound.)
        statistic: The number of the whole optimizer step that couples its examples, a key of `STEP_STATISTICS`. Empty
            if the loss of a step is a sum over examples.
        trl_loss_type: Name in TRL's `DPOConfig.loss_type`, or None if TRL lacks the loss.
        ratio: Whether the loss contains r(l)^β itself, whose tail the metrics `ratio/*` show.
        reward: What metrics call the reward of a response. `log_ratio` is β log r. Losses without a reference have
            the rewards of TRL's trainers for them: `logp` is β log π_θ, and `mean_logp` is β log π_θ / |y| (β = 1 for
            SFT).
    """

    title: str
    formula: str
    parameters: Mapping[str, Parameter]
    reference: frozenset[str]
    pairs: bool
    sides: frozenset[str]
    source: str
    bound: str = ""
    statistic: str = ""
    trl_loss_type: str | None = None
    ratio: bool = False
    reward: str = "log_ratio"


STEP_STATISTICS: Mapping[str, str] = {
    "log_mean": "log of the mean of e^f over the rejected responses of the step",
    "moving_log_mean": "log of a moving average, over steps, of the mean of e^f over rejected responses",
    "kl": "mean log-ratio of the step's prompts with responses to other prompts (role kl), at least 0",
}
"""Descriptions of the numbers of a whole optimizer step that an objective may need."""

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
            "cap": _at_least_zero(5.0, _CAP),
        },
        reference=_REJECTED,
        pairs=False,
        sides=_BOTH,
        source="Xiao et al. 2025, arXiv 2505.08507",
        bound="KL(p_w‖p_l), no maximum",
        ratio=True,
    ),
    "infonce": Objective(
        title="InfoNCE",
        formula="-log(r(w)^β / (r(w)^β + Σ_l r(l)^β)), all rejected responses of the prompt",
        parameters=_OF_CRITIC,
        reference=_BOTH,
        pairs=True,
        sides=_BOTH,
        source="van den Oord et al. 2018, arXiv 1807.03748, eq. 4",
        bound="KL(p_w‖p_l), at most log(1 + K) with K rejected responses",
        ratio=True,
    ),
    "interpolated": Objective(
        title="Interpolated",
        formula="log(α m₀ + 1-α) - β log r(w) + r(l)^β/(α m + 1-α), m₀, m: means of r^β over the prompt",
        parameters={
            "beta": _positive(1.0, _CRITIC),
            "alpha": _share(
                0.5, "in [0, 1)", lambda v: 0 <= v < 1, "0 is InfoPO; towards 1, InfoNCE over the prompt."
            ),
            "length_normalized": _flag(False, _LENGTH_NORMALIZED),
            "cap": _at_least_zero(5.0, _CAP),
        },
        reference=_BOTH,
        pairs=True,
        sides=_BOTH,
        source="Poole et al. 2019, arXiv 1905.06922, section 2.4",
        bound="KL(p_w‖p_l), at most 1 + log(M/α) with M rejected responses",
        ratio=True,
    ),
    "js": Objective(
        title="JS (MIO)",
        formula="-log σ(β log r(w)) - log σ(-β log r(l))",
        parameters=_OF_CRITIC,
        reference=_BOTH,
        pairs=False,
        sides=_BOTH,
        source="Lv et al. 2025 (MIO), arXiv 2506.22578; bound: Nowozin et al. 2016, arXiv 1606.00709",
        bound="2 JS(p_w, p_l), at most 2 log 2",
        trl_loss_type="bco_pair",
    ),
    "chi2": Objective(
        title="χ²",
        formula="-2 (r(w)^β - 1) + r(l)^2β - 1",
        parameters=_OF_CRITIC | {"cap": _at_least_zero(5.0, _CAP)},
        reference=_BOTH,
        pairs=False,
        sides=_BOTH,
        source="Nowozin et al. 2016, arXiv 1606.00709, tables 1 and 2",
        bound="χ²(p_w‖p_l), no maximum",
        ratio=True,
    ),
    "hellinger": Objective(
        title="Hellinger",
        formula="r(w)^(-β/2) - 1 + r(l)^(β/2) - 1",
        parameters=_OF_CRITIC | {"cap": _at_least_zero(5.0, _CAP)},
        reference=_BOTH,
        pairs=False,
        sides=_BOTH,
        source="Nowozin et al. 2016, arXiv 1606.00709, tables 1 and 2",
        bound="H²(p_w, p_l), at most 2",
        ratio=True,
    ),
    "dv": Objective(
        title="Donsker-Varadhan",
        formula="-β log r(w) + log E_l[r(l)^β], E_l over the whole step",
        parameters=_OF_CRITIC,
        reference=_BOTH,
        pairs=False,
        sides=_BOTH,
        source="Belghazi et al. 2018, arXiv 1801.04062, theorem 1",
        bound="KL(p_w‖p_l), no maximum; biased upwards in a finite step",
        statistic="log_mean",
        ratio=True,
    ),
    "smile": Objective(
        title="SMILE",
        formula="-β log r(w) + log E_l[clip(r(l)^β, e^-τ, e^τ)], E_l over the whole step",
        parameters={
            "beta": _positive(1.0, _CRITIC),
            "tau": _positive(5.0, "Rejected responses whose critic is beyond ±τ are not pushed on (nats)."),
            "length_normalized": _flag(False, _LENGTH_NORMALIZED),
        },
        reference=_BOTH,
        pairs=False,
        sides=_BOTH,
        source="Song, Ermon 2020, arXiv 1910.06222, section 4.2",
        bound="KL(p_w‖p_l) from either side, at most E_w[f] + τ",
        statistic="log_mean",
        ratio=True,
    ),
    "mine": Objective(
        title="MINE",
        formula="-β log r(w) + log m + r(l)^β/m - 1, m a moving average of E_l[r(l)^β]",
        parameters={
            "beta": _positive(1.0, _CRITIC),
            "rate": _share(0.01, "in (0, 1]", lambda v: 0 < v <= 1, "Weight of a new step in m; 1 is DV."),
            "length_normalized": _flag(False, _LENGTH_NORMALIZED),
            "cap": _at_least_zero(5.0, "β log r(l) - log m beyond which exp() is extended linearly (nats)."),
        },
        reference=_BOTH,
        pairs=False,
        sides=_BOTH,
        source="Belghazi et al. 2018, arXiv 1801.04062, section 3.2; value: Poole et al. 2019, arXiv 1905.06922",
        bound="KL(p_w‖p_l), no maximum",
        statistic="moving_log_mean",
        ratio=True,
    ),
    "dpo": Objective(
        title="DPO",
        formula="-(1-ε) log σ(β (log r(w) - log r(l))) - ε log σ(-β (log r(w) - log r(l))) + a NLL(w)",
        parameters={
            "beta": _positive(0.1, _STRENGTH),
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
        reward="mean_logp",
    ),
    "fdpo": Objective(
        title="f-DPO",
        formula="-log σ(β (φ'(r(w)) - φ'(r(l)))), φ the divergence's generator",
        parameters={
            "beta": _positive(0.1, _STRENGTH),
            "divergence": _choice(
                "js", ("forward_kl", "js", "alpha"), "Divergence from the reference (reverse KL is DPO)."
            ),
            "alpha": _share(
                0.5, "in (0, 1)", lambda v: 0 < v < 1, "α of the α-divergence; the others ignore it."
            ),
            "cap": _at_least_zero(20.0, _CAP),
        },
        reference=_BOTH,
        pairs=True,
        sides=_BOTH,
        source="Wang et al. 2023, arXiv 2309.16240, table 1",
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
        reward="logp",
    ),
    "cpo": Objective(
        title="CPO",
        formula="-(1-ε) log σ(β (log π_θ(w) - log π_θ(l))) - ε log σ(β (log π_θ(l) - log π_θ(w))) + a NLL(w)",
        parameters={
            "beta": _positive(0.1, "Scale of the log-prob margin."),
            "label_smoothing": _LABEL_SMOOTHING,
            "nll_weight": replace(_NLL_WEIGHT, default=1.0),
        },
        reference=_NONE,
        pairs=True,
        sides=_BOTH,
        source="Xu et al. 2024, arXiv 2401.08417",
        reward="logp",
    ),
    "slic": Objective(
        title="SLiC-HF",
        formula="max(0, 1 - β (log π_θ(w) - log π_θ(l))) + a NLL(w)",
        parameters={
            "beta": _positive(1.0, "Inverse of the margin in nats."),
            "nll_weight": _NLL_WEIGHT,
        },
        reference=_NONE,
        pairs=True,
        sides=_BOTH,
        source="Zhao et al. 2023, arXiv 2305.10425",
        reward="logp",
    ),
    "orpo": Objective(
        title="ORPO",
        formula="NLL(w) - β log σ(log odds(w) - log odds(l)), odds = p/(1-p), p = π_θ(y)^(1/|y|)",
        parameters={"beta": _positive(0.1, "The paper's λ: weight of the odds ratio.")},
        reference=_NONE,
        pairs=True,
        sides=_BOTH,
        source="Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7",
        reward="mean_logp",
    ),
    "rdpo": Objective(
        title="R-DPO",
        formula="-log σ(β (log r(w) - log r(l)) + α (|w| - |l|))",
        parameters={
            "beta": _positive(0.1, _STRENGTH),
            "alpha": _at_least_zero(0.01, "Reward taken off a token."),
        },
        reference=_BOTH,
        pairs=True,
        sides=_BOTH,
        source="Park et al. 2024, arXiv 2403.19159",
    ),
    "dpop": Objective(
        title="DPOP",
        formula="-log σ(β (log r(w) - log r(l) - λ max(0, -log r(w))))",
        parameters={
            "beta": _positive(0.3, _STRENGTH),
            "penalty": _at_least_zero(50.0, "The paper's λ: weight of a chosen response's fall."),
        },
        reference=_BOTH,
        pairs=True,
        sides=_BOTH,
        source="Pal et al. 2024 (Smaug), arXiv 2402.13228, eq. 3",
    ),
    "nca": Objective(
        title="NCA",
        formula="-log σ(β log r(w)) - log σ(-β log r(w))/2 - log σ(-β log r(l))/2",
        parameters={"beta": _positive(0.1, _STRENGTH)},
        reference=_BOTH,
        pairs=True,
        sides=_BOTH,
        source="Chen et al. 2024, arXiv 2402.05369",
        trl_loss_type="nca_pair",
    ),
    "exo": Objective(
        title="EXO",
        formula="q log(q/(1-ε)) + (1-q) log((1-q)/ε), q = σ(β (log r(w) - log r(l)))",
        parameters={
            "beta": _positive(0.1, _STRENGTH),
            "label_smoothing": replace(
                _LABEL_SMOOTHING, default=1e-3, domain="in (0, 0.5)", admits=lambda v: 0 < v < 0.5
            ),
        },
        reference=_BOTH,
        pairs=True,
        sides=_BOTH,
        source="Ji et al. 2024, arXiv 2402.00856, eq. 16",
        trl_loss_type="exo_pair",
    ),
    "kto": Objective(
        title="KTO",
        formula="λ_w σ(β (z - log r(w))), λ_l σ(β (log r(l) - z)), z the KL of policy from reference, at least 0",
        parameters={
            "beta": _positive(0.1, _STRENGTH),
            "desirable_weight": _at_least_zero(1.0, "λ_w, weight of chosen responses."),
            "undesirable_weight": _at_least_zero(1.0, "λ_l, weight of rejected responses."),
        },
        reference=_BOTH,
        pairs=False,
        sides=_BOTH,
        source="Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7",
        statistic="kl",
    ),
    "apo_zero": Objective(
        title="APO-zero",
        formula="1 - σ(β log r(w)) + σ(β log r(l))",
        parameters={"beta": _positive(0.1, _STRENGTH)},
        reference=_BOTH,
        pairs=False,
        sides=_BOTH,
        source="D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7",
        trl_loss_type="apo_zero",
    ),
    "apo_down": Objective(
        title="APO-down",
        formula="σ(β log r(w)) + 1 - σ(β (log r(w) - log r(l)))",
        parameters={"beta": _positive(0.1, _STRENGTH)},
        reference=_BOTH,
        pairs=True,
        sides=_BOTH,
        source="D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8",
        trl_loss_type="apo_down",
    ),
    "cal_dpo": Objective(
        title="Cal-DPO",
        formula="-log σ(log r(w) - log r(l)) + (log r(w) - 1/(2β))² + (log r(l) + 1/(2β))²",
        parameters={"beta": _positive(0.1, "Inverse of twice the calibrated log-ratio (1/nats).")},
        reference=_BOTH,
        pairs=True,
        sides=_BOTH,
        source="Xiao et al. 2024, arXiv 2412.14516",
    ),
    "robust_dpo": Objective(
        title="Robust DPO",
        formula="(-(1-ε) log σ(β (log r(w) - log r(l))) + ε log σ(β (log r(l) - log r(w)))) / (1 - 2ε)",
        parameters={
            "beta": _positive(0.1, _STRENGTH),
            "label_smoothing": _LABEL_SMOOTHING,
        },
        reference=_BOTH,
        pairs=True,
        sides=_BOTH,
        source="Chowdhury et al. 2024, arXiv 2403.00409",
        trl_loss_type="robust",
    ),
}
"""All objectives by the name that recipes use."""

UNPAIRED = tuple(name for name, objective in OBJECTIVES.items() if not objective.pairs)
"""Objectives that compare no pairs: rows with one side train them too."""


def objective_name(name: str) -> str:
    """Returns the catalog's spelling of an objective's name or title. Case, hyphens and spaces do not matter.

    Example:
        >>> objective_name("KTO"), objective_name("R-DPO"), objective_name("SFT on chosen"), objective_name("nonsense")
        ('kto', 'rdpo', 'sft', 'nonsense')
    """

    def bare(text: str) -> str:
        return re.sub(r"[^\w]|_", "", text.lower())

    titles = {bare(spec.title): key for key, spec in OBJECTIVES.items()}
    names = {bare(key): key for key in OBJECTIVES}
    return (titles | names).get(bare(name), name)


def check_objective(name: str, parameters: Mapping[str, Any]) -> list[str]:
    """Returns everything that is wrong with an objective's name and parameters.

    Args:
        name: Name of the objective.
        parameters: Values by parameter name.

    Returns:
        One sentence per problem, which begins with the path of the setting.

    Example:
        >>> check_objective("ipo", {"beta": 0.0})
        ['objective.beta: expected a value > 0, got 0.0']
    """
    if name not in OBJECTIVES:
        hint, names = suggestion(name.lower(), OBJECTIVES), ", ".join(OBJECTIVES)
        return [f"objective.name: no objective {name!r}{hint}; there are {names}"]
    specs = OBJECTIVES[name].parameters
    problems = []
    for key, value in parameters.items():
        if key not in specs:
            hint, names = suggestion(key, specs), ", ".join(specs)
            problems.append(f"objective.{key}: {name} has no such parameter{hint}; it has {names}")
        elif problem := specs[key].problem(value):
            problems.append(f"objective.{key}: {problem}")
    return problems


def complete_parameters(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all parameters of an objective, with defaults filled in and numbers as floats.

    Raises:
        ConfigError: A name or a value is wrong.

    Example:
        >>> complete_parameters("dpo", {"beta": 1})
        {'beta': 1.0, 'label_smoothing': 0.0, 'nll_weight': 0.0}
    """
    if problems := check_objective(name, parameters):
        raise ConfigError(problems)
    specs = OBJECTIVES[name].parameters
    values = {key: parameters.get(key, spec.default) for key, spec in specs.items()}
    return {key: float(value) if specs[key].kind is float else value for key, value in values.items()}


def mixture_in_words(mixture: Sequence[tuple[str, Mapping[str, Any], float]]) -> str:
    """Returns names and parameters of a loss that is made of (objective, parameters, weight).

    Example:
        >>> mixture_in_words([("dpo", {"beta": 0.1}, 1.0)])
        'DPO (beta=0.1)'
        >>> mixture_in_words([("dpo", {"beta": 0.1}, 1.0), ("sft", {}, 0.5)])
        '1 x DPO (beta=0.1) + 0.5 x SFT on chosen ()'
    """
    parts = []
    for name, parameters, weight in mixture:
        factor = "" if len(mixture) == 1 else f"{weight:g} x "
        values = ", ".join(f"{key}={value}" for key, value in parameters.items())
        parts.append(f"{factor}{OBJECTIVES[name].title} ({values})")
    return " + ".join(parts)
