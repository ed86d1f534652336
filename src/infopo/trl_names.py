"""TRL's names: which objective and parameters its settings mean here, and which settings cannot be honoured.

Read by `InfoPOConfig`, by the documentation (`docs/from-trl.md`, whose lists a test compares with these tables) and by
the tests of every setting. Imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from infopo.catalog import suggestion
from infopo.losses import foreign
from infopo.losses.catalog import OBJECTIVES, check_objective, objective_name, row_of
from infopo.losses.mixture import is_weight, read_terms

_OF_DPO_TRAINER = {spec.trl_loss_type: name for name, spec in OBJECTIVES.items() if spec.trl_loss_type}
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sigmoid_norm": ("dpo", {"length_normalized": True}),
    "alphapo": ("simpo", {}),
}
"""Loss types of TRL that are an objective with other parameters -> that objective and these."""

LOSS_TYPES: Mapping[str, str] = (
    _OF_DPO_TRAINER
    | {name: objective for name, (objective, _) in VARIANTS.items()}
    | {n: n for n in OBJECTIVES if n not in _OF_DPO_TRAINER}
)
"""Names that `loss_type` takes -> objective: those of TRL's DPOTrainer, and every name of the catalog."""

TOLD: Mapping[str, str] = {
    "apo_zero_unpaired": "objective='apo_zero' is this loss; it adds the means of both sides (1.0 at the start), where "
    "TRL takes one mean over them (0.5)",
    "kto_pair": "TRL removed it; objective='kto' takes pairs too",
}
"""Loss types of TRL that are not here -> what to write."""

FEEDBACK = "scales the loss of one side in KTO; write objective='kto' beside it"
PARAMETERS: Mapping[str, tuple[str, tuple[str, ...], str]] = {
    "desirable_weight": ("desirable_weight", ("kto",), FEEDBACK),
    "undesirable_weight": ("undesirable_weight", ("kto",), FEEDBACK),
    "simpo_gamma": ("gamma", ("simpo",), "is SimPO's margin; write loss_type='simpo' beside it"),
    "alpha": ("alpha", ("simpo",), "is the shape of AlphaPO's reward; write loss_type='simpo' beside it"),
    "discopop_tau": ("tau", ("discopop",), "is DiscoPOP's τ; write loss_type='discopop' beside it"),
    "cpo_alpha": (
        "nll_weight",
        ("cpo", "slic"),
        "is the weight of CPO's likelihood; write objective='cpo' beside it (CPOTrainer's default loss), or "
        "objective='slic' for its hinge; with SimPO, loss_type=['simpo', 'sft'] and loss_weights=[1.0, cpo_alpha]",
    ),
}
"""Setting of KTOConfig or CPOConfig -> (parameter here, objectives that have it, what to do with another one)."""

DIVERGENCES: Mapping[str, str] = {
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}
"""`f_divergence_type` -> `divergence` of the objective fdpo; `reverse_kl` is DPO itself."""

NOT_HONOURED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "truncation_mode": (
        ("keep_start",),
        "a response's end is cut, its start is kept; cut prompts with max_prompt_length",
    ),
    "padding_free": (
        (False,),
        "nothing is padded already, where the model's attention allows it (see logps_path)",
    ),
    "pad_to_multiple_of": (
        (None, "auto"),
        "nothing is padded where the model's attention allows it; else rows are, to the longest of their batch",
    ),
    "padding_value": ((None,), "tokens are padded with pad_token"),
    "max_completion_length": (
        (None,),
        "a response may have what max_length leaves after its prompt; set max_length and max_prompt_length",
    ),
    "is_encoder_decoder": ((None, False), "models are decoders: causal language models"),
    "generate_during_eval": ((False,), "generate in a TrainerCallback's on_evaluate"),
    "ld_alpha": (
        (None,),
        "LD-DPO weighs tokens beyond the shorter response apart, and a loss here sees sums over a response; "
        "loss_type='sigmoid_norm' and objective='rdpo' discount length, too",
    ),
    "activation_offloading": ((False,), "use gradient_checkpointing to save memory"),
    "sync_ref_model": ((False,), "the reference is frozen: it is part of InfoPO's definition"),
    "train_sampling_strategy": (
        ("random", "group_by_length", "sequential"),
        "use group_by_length for batches of similar rows",
    ),
    "label_smoothing_factor": (
        (0.0,),
        "smooths tokens of a cross-entropy; of preferences, set label_smoothing",
    ),
    "neftune_noise_alpha": ((None, 0), "noise on the policy alone makes it differ from its reference"),
    "use_liger_kernel": (
        (False,),
        "its kernels replace modules of the policy alone, after the reference was computed with the model's own; the "
        "chunked head that saves the memory is always on here (see logps_path)",
    ),
    "liger_kernel_config": ((None,), "goes with use_liger_kernel, which is refused"),
    "use_cache": ((False,), "training keeps no cache of keys and values"),
    "parallelism_config": (
        (None,),
        "tensor, sequence and context parallelism would split prompts that are shared; use FSDP or DDP",
    ),
    "debug": (
        ([], ""),
        "its hooks read logits, which are not formed here; a loss that is not finite stops the run, with its rows",
    ),
    "prediction_loss_only": ((False,), "evaluation always gives the loss and the metrics"),
    "include_for_metrics": (([],), "there is no compute_metrics to pass anything to"),
    "batch_eval_metrics": ((False,), "there is no compute_metrics to call"),
    "eval_accumulation_steps": ((None,), "evaluation keeps no predictions"),
    "label_names": ((None,), "responses are their own labels"),
    "fp16_full_eval": ((False,), "evaluation runs in the precision of training, as its reference did"),
    "bf16_full_eval": ((False,), "evaluation runs in the precision of training, as its reference did"),
    "average_tokens_across_devices": ((True,), "the loss is always a mean over all ranks"),
    "logging_nan_inf_filter": ((False,), "it would hide a loss that is NaN"),
}
"""Setting -> (values that change nothing, why others are refused)."""


def refused(settings: object) -> list[str]:
    """A sentence for each setting that is not honoured and was set."""
    return [
        f"{name}={getattr(settings, name)!r}: {why}; expected {neutral[0]!r}"
        for name, (neutral, why) in NOT_HONOURED.items()
        if getattr(settings, name) not in neutral
    ]


@dataclass(frozen=True)
class LossSettings:
    """What names the loss, under TRL's and our names; see `InfoPOConfig` for each."""

    objective: str | list[Any] | None = None
    loss_type: list[str] | None = None
    loss_weights: list[float] | None = None
    beta: float | None = None
    objective_parameters: Mapping[str, Any] | None = None
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    desirable_weight: float | None = None
    undesirable_weight: float | None = None
    simpo_gamma: float | None = None
    cpo_alpha: float | None = None
    alpha: float = 0.0
    discopop_tau: float = 0.05
    use_weighting: bool = False

    def problems(self) -> list[str]:
        """Everything that is wrong with them, one sentence each."""
        if isinstance(self.objective, list):
            return self._names() + read_terms(self.objective)[1] + self._beside_terms()
        if problems := (self._names() + self._weights()) or self._divergence():
            return problems
        problems = self._weighting() + self._foreign() + self._set_twice()
        for name, parameters, _ in self.mixture():
            problems += [in_arguments(problem) for problem in check_objective(name, parameters)]
        # Several losses take the same β.
        return list(dict.fromkeys(problems))

    def _names(self) -> list[str]:
        problems = []
        if self.objective is not None and self.loss_type is not None:
            problems.append(
                f"objective={self.objective!r} and loss_type={self.loss_type!r}: give one of the two"
            )
        if self.loss_type is not None and not self.loss_type:
            problems.append("loss_type: is empty; name a loss, or leave it out for InfoPO")
        for name in self.loss_type or []:
            if name in TOLD:
                problems.append(f"loss_type={name!r}: {TOLD[name]}")
            elif foreign.is_foreign(name):
                problems += _of_name(name)
            elif name not in LOSS_TYPES:
                problems.append(
                    f"loss_type: {name!r} is not implemented{suggestion(str(name), LOSS_TYPES)}; there are "
                    f"{', '.join(LOSS_TYPES)}"
                )
        if isinstance(self.objective, str) and self.objective not in OBJECTIVES:
            problems += _of_name(self.objective)
        return problems

    def _beside_terms(self) -> list[str]:
        """Settings of a single loss beside a list of objectives, each of which has its own."""
        return [
            f"{name}={value!r}: stands beside a list of objectives; write it into the one that it is for"
            for name, value in vars(self).items()
            if name not in ("objective", "loss_type")
            and value not in (None, [], {}, _DEFAULTS[name], _NEUTRAL.get(name))
        ]

    def _weights(self) -> list[str]:
        weights = self.loss_weights
        problems = []
        if weights is not None and len(weights) != len(self.loss_type or []):
            problems.append(f"loss_weights: expected one weight a loss type, got {weights!r}")
        if not all(map(is_weight, weights or [])):
            problems.append(f"loss_weights: expected finite numbers >= 0, got {weights!r}")
        elif weights and not any(weights):
            problems.append("loss_weights: all are 0, so that there is nothing to minimise")
        return problems

    def _divergence(self) -> list[str]:
        kind = self.f_divergence_type
        if kind == "reverse_kl":
            return []
        if kind not in DIVERGENCES:
            return [
                f"f_divergence_type: expected one of reverse_kl, {', '.join(DIVERGENCES)}, got {kind!r}"
                f"{suggestion(str(kind), DIVERGENCES)}"
            ]
        if kind == "alpha_divergence" and not 0 < self.f_alpha_divergence_coef < 1:
            return [
                f"f_alpha_divergence_coef: expected a value in (0, 1), got {self.f_alpha_divergence_coef!r}"
            ]
        losses = [*([self.objective] if isinstance(self.objective, str) else []), *(self.loss_type or [])]
        if "sigmoid_norm" in losses:
            return [
                f"f_divergence_type={kind!r}: a mean over tokens (loss_type='sigmoid_norm') has no divergence here"
            ]
        # Beside DPO under a divergence, TRL's `sft` is what it is alone.
        kinds = {LOSS_TYPES.get(loss, loss) for loss in losses}
        if not kinds & {"dpo", "fdpo"} or kinds - {"dpo", "fdpo", "sft"}:
            return [
                f"f_divergence_type={kind!r}: belongs to DPO's loss, not to {' + '.join(losses) or 'InfoPO'}; "
                f"write loss_type='sigmoid' beside it (or objective='fdpo', objective_parameters="
                f"{{'divergence': {DIVERGENCES[kind]!r}}})"
            ]
        return []

    def _weighting(self) -> list[str]:
        """WPO's weights are those of DPO's plain loss here."""
        losses = [name for name, _, _ in self.mixture()]
        if not self.use_weighting or set(losses) == {"wpo"}:
            return []
        title = " + ".join(row_of(name).title for name in losses)
        return [
            "use_weighting=True: is WPO, which weighs the pairs of DPO under reverse KL; write loss_type='sigmoid' "
            f"beside it, or objective='wpo' instead (the loss is {title})"
        ]

    def _foreign(self) -> list[str]:
        """Settings of KTOConfig and CPOConfig beside an objective that has no such parameter."""
        losses = [name for name, _, _ in self.mixture()]
        title = " + ".join(row_of(name).title for name in losses)
        problems = []
        for setting, (_, owners, remedy) in PARAMETERS.items():
            value = getattr(self, setting)
            # TRL's CPOTrainer reads the margin of SimPO with that loss only, and takes a weight of 0 with every loss.
            is_ignored = setting == "simpo_gamma" and bool({"cpo", "slic"} & set(losses))
            is_neutral = is_ignored or value in (None, _DEFAULTS[setting], _NEUTRAL.get(setting))
            if not is_neutral and not set(owners) & set(losses):
                problems.append(f"{setting}={value!r}: {remedy} (the loss is {title})")
        return problems

    def mixture(self) -> list[tuple[str, dict[str, Any], float]]:
        """The objectives to add up: (name, the parameters that are given, weight)."""
        if isinstance(self.objective, list):
            return read_terms(self.objective)[0]
        if not self.loss_type:
            name = self.objective or "infopo"
            return [self._as_divergence(name, self._given(name), 1.0)]
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        return [
            self._as_divergence(LOSS_TYPES.get(loss, loss), self._of_trl(loss), weight)
            for loss, weight in zip(self.loss_type, weights, strict=True)
        ]

    def _given(self, objective: str) -> dict[str, Any]:
        """All parameters that were set, whether the objective has them or not."""
        return dict(self.objective_parameters or {}) | {
            parameter: getattr(self, setting) for setting, parameter in self._set_alone(objective).items()
        }

    def _set_alone(self, objective: str) -> dict[str, str]:
        """The settings that are a parameter of the objective and were set -> that parameter.

        A setting at its default says nothing. Otherwise the defaults of `alpha` and `discopop_tau`, which are numbers
        as in TRL, would replace what `objective_parameters` gives.
        """
        found = {"beta": "beta", "label_smoothing": "label_smoothing"}
        found |= {setting: p for setting, (p, owners, _) in PARAMETERS.items() if objective in owners}
        return {setting: p for setting, p in found.items() if getattr(self, setting) != _DEFAULTS[setting]}

    def _set_twice(self) -> list[str]:
        """Parameters that are set both alone and in `objective_parameters`, to different values."""
        inside = self.objective_parameters or {}
        alone = [
            (setting, parameter, getattr(self, setting))
            for name, _, _ in self.mixture()
            for setting, parameter in self._set_alone(name).items()
        ]
        alone += [
            (setting, parameter, value) for setting, (parameter, value) in self._of_divergence().items()
        ]
        return [
            f"{setting}={getattr(self, setting)!r} and objective_parameters={{{parameter!r}: {inside[parameter]!r}}}: "
            "give one of the two"
            for setting, parameter, value in alone
            if parameter in inside and not _is_same(inside[parameter], value)
        ]

    def _of_trl(self, loss_type: str) -> dict[str, Any]:
        """Parameters in the sense of TRL: one β for all, SFT as a mean over tokens.

        Of several losses each takes what it knows; a single one takes all that is given, to refuse what it does not.
        """
        name = LOSS_TYPES.get(loss_type, loss_type)
        known, given = row_of(name).parameters, self._given(name)
        if len(self.loss_type or []) > 1:
            given = {name: value for name, value in given.items() if name in known}
        is_trls = loss_type in _DEFAULT_BETA_OF_TRL
        defaults = {"token_mean": True} | ({"beta": 0.1} if is_trls else {})
        defaults |= VARIANTS.get(loss_type, ("", {}))[1]
        return {name: value for name, value in defaults.items() if name in known} | given

    def _as_divergence(
        self, name: str, parameters: dict[str, Any], weight: float
    ) -> tuple[str, dict[str, Any], float]:
        """DPO under `f_divergence_type` is fdpo, whose α is 1 - TRL's. With `use_weighting`, DPO is wpo."""
        of_divergence = dict(self._of_divergence().values())
        if self.use_weighting and not of_divergence and name == "dpo":
            return "wpo", parameters, weight
        if not of_divergence or name not in ("dpo", "fdpo"):
            return name, parameters, weight
        return "fdpo", of_divergence | parameters, weight

    def _of_divergence(self) -> dict[str, tuple[str, Any]]:
        """The settings that choose a divergence and were set -> the parameter of fdpo that each is, and its value."""
        divergence = DIVERGENCES.get(self.f_divergence_type)
        found: dict[str, tuple[str, Any]] = {}
        if divergence is not None:
            found["f_divergence_type"] = ("divergence", divergence)
        # As in `_set_alone`, a default says nothing if the parameter itself is given.
        is_default = self.f_alpha_divergence_coef == _DEFAULTS["f_alpha_divergence_coef"]
        if divergence == "alpha" and not (is_default and "alpha" in (self.objective_parameters or {})):
            found["f_alpha_divergence_coef"] = ("alpha", 1 - self.f_alpha_divergence_coef)
        return found


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values are one, for numbers up to rounding: α is 1 - TRL's."""
    are_numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (one, other))
    return math.isclose(one, other, abs_tol=1e-12) if are_numbers else bool(one == other)


_NEUTRAL = {"cpo_alpha": 0}
"""Values beside the defaults that say nothing, whatever the loss is."""

_DEFAULTS = {field.name: field.default for field in fields(LossSettings)}
"""Default of each setting."""

_DEFAULT_BETA_OF_TRL = {*_OF_DPO_TRAINER, *VARIANTS, "kto", "simpo", "cpo", "orpo"}
"""Losses of TRL, whose β is 0.1 where none is set; others take the catalog's."""


def _of_name(name: Any) -> list[str]:
    """What is wrong with the name of an objective, whatever its parameters are."""
    problems = check_objective(str(name), {})
    return [in_arguments(problem) for problem in problems if problem.startswith("objective.name: ")]


def in_arguments(problem: str) -> str:
    """A problem of an objective, under the name of the argument that a caller from Python has set.

    >>> in_arguments("objective.beta: expected a value > 0, got -1")
    'beta: expected a value > 0, got -1'
    >>> in_arguments("objective.gamma: infopo has no such parameter")
    'objective_parameters.gamma: infopo has no such parameter'
    """
    place, _, rest = problem.partition(": ")
    key = place.removeprefix("objective.")
    if key == "name":
        return f"objective: {rest}"
    return f"{key if key in ('beta', 'label_smoothing') else f'objective_parameters.{key}'}: {rest}"


def canonical(name: Any) -> Any:
    """The catalog's spelling of an objective or loss type; what is no text, or unknown, as it came.

    >>> canonical("KTO"), canonical("APO-zero"), canonical("Sigmoid"), canonical("nonsense")
    ('kto', 'apo_zero', 'sigmoid', 'nonsense')
    """
    if not isinstance(name, str) or ":" in name:
        return name
    lower = name.lower()
    return lower if lower in LOSS_TYPES or lower in TOLD else objective_name(name)
