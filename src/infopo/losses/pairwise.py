"""Losses that compare a chosen with a rejected response of one prompt: DPO and what followed it.

`losses/__init__.py` has the notation. The examples are of one pair: log r(w) = 1 and log r(l) = -1 nat, 2 and 4 tokens.
"""

import math

import torch
import torch.nn.functional as F

from infopo.losses.common import capped_exp, critic_scores, likelihood, smoothed_nll
from infopo.losses.declaration import (
    CAP,
    LABEL_SMOOTHING,
    LENGTH_NORMALIZED,
    NLL_WEIGHT,
    STRENGTH,
    at_least_zero,
    choice,
    flag,
    objective,
    positive,
    within,
)
from infopo.records import LossTerm, LossTerms, ResponseLogps


@objective(
    title="DPO",
    formula="-(1-ε) log σ(β (log r(w) - λ log r(l))) - ε log σ(-β (log r(w) - λ log r(l))) + a NLL(w)",
    source="Rafailov et al. 2023, arXiv 2305.18290; label smoothing: Mitchell 2023, 'A note on DPO with noisy "
    "preferences'; NLL: Pang et al. 2024, arXiv 2404.19733; per token: Lambert et al. 2024, arXiv 2411.15124; λ: "
    "Yang et al. 2025 (DPO-Shift), arXiv 2502.07599",
    when="the usual baseline; add `nll_weight` where the chosen log-prob falls",
    parameters={
        "beta": STRENGTH,
        "label_smoothing": LABEL_SMOOTHING,
        "nll_weight": NLL_WEIGHT,
        "length_normalized": LENGTH_NORMALIZED,
        "rejected_weight": within(
            "(0, 1]", "The λ of DPO-Shift: weight of the rejected response's log-ratio."
        ),
    },
    pairs=True,
    trl_loss_type="sigmoid",
)
def dpo(
    logps: ResponseLogps,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    length_normalized: bool = False,
    rejected_weight: float = 1.0,
) -> LossTerms:
    """DPO, with conservative label smoothing ε and an optional likelihood term.

        L = E_pairs[-(1-ε) log σ(β Δ) - ε log σ(-β Δ)] + a Σ_w -log π(w) / Σ_w |w|,   Δ = log r(w) - λ log r(l)

    With `length_normalized`, each log-ratio is divided by |y| first (Tülu 3, OLMo 2; TRL's `sigmoid_norm`). A
    `rejected_weight` λ below 1 is DPO-Shift, which keeps the chosen response likely at the cost of a smaller margin.

    References:
        Rafailov et al., 2023, arXiv 2305.18290, eq. 7. Label smoothing: Mitchell, 2023, "A note on DPO with noisy
        preferences", eq. 3. Likelihood term (as a token mean over the step): Pang et al., 2024, arXiv 2404.19733.
        Length-normalised: Lambert et al., 2024, arXiv 2411.15124. λ: Yang et al., 2025, arXiv 2502.07599.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in dpo(pair)]
        [0.5981]
    """
    scores = critic_scores(logps, beta, length_normalized)
    logits = scores[logps.pairs[:, 0]] - rejected_weight * scores[logps.pairs[:, 1]]
    values = smoothed_nll(logits, label_smoothing)
    return [LossTerm(values, per="pair", name="preference"), *likelihood(logps, nll_weight)]


@objective(
    title="IPO",
    formula="(log r(w)/|w| - log r(l)/|l| - 1/(2β))²",
    source="Azar et al. 2023, arXiv 2310.12036, eq. 17",
    when="pairs ranked without error, where DPO's margin would grow without limit",
    parameters={
        "beta": positive("The paper's τ: regularisation strength."),
        "length_normalized": flag(LENGTH_NORMALIZED.help + " The authors' own runs did (see TRL)."),
    },
    pairs=True,
    trl_loss_type="ipo",
)
def ipo(logps: ResponseLogps, *, beta: float = 0.1, length_normalized: bool = True) -> LossTerms:
    """IPO: squared distance of the log-ratio margin from 1/(2β).

        L = E_pairs[(h(w) - h(l) - 1/(2β))²],   h = log r / |y|   (log r without `length_normalized`)

    The paper writes sums over tokens. Its authors ran means over tokens, as TRL and this default do.

    References:
        Azar et al., 2023, arXiv 2310.12036, eq. 17 (β is its τ).

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in ipo(pair)]
        [18.0625]
    """
    margins = logps.margins(critic_scores(logps, 1.0, length_normalized))
    return [LossTerm((margins - 1 / (2 * beta)) ** 2, per="pair", name="preference")]


@objective(
    title="Hinge",
    formula="max(0, 1 - β (log r(w) - log r(l)))",
    source="Liu et al. 2023 (RSO), arXiv 2309.06657; TRL's `hinge`",
    when="DPO that stops at a margin",
    parameters={"beta": positive("Inverse of the margin in nats.")},
    pairs=True,
    trl_loss_type="hinge",
)
def hinge(logps: ResponseLogps, *, beta: float = 0.1) -> LossTerms:
    """Hinge loss on DPO's margin, zero once the margin reaches 1/β nats.

        L = E_pairs[max(0, 1 - β Δ)],   Δ = log r(w) - log r(l)

    References:
        Liu et al., 2023 (RSO), arXiv 2309.06657, with the reference as in TRL's `hinge`.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in hinge(pair)]
        [0.8]
    """
    values = F.relu(1 - beta * logps.margins(logps.policy - logps.reference))
    return [LossTerm(values, per="pair", name="preference")]


@objective(
    title="f-DPO",
    formula="-log σ(β (φ'(r(w)) - φ'(r(l)))), φ the divergence's generator",
    source="Wang et al. 2023, arXiv 2309.16240, table 1; χPO: Huang et al. 2024, arXiv 2407.13399; SquaredPO: arXiv "
    "2602.06788 (both second-hand)",
    when="DPO with more weight on covering the reference (forward KL, JS)",
    parameters={
        "beta": STRENGTH,
        "divergence": choice(
            ("forward_kl", "js", "alpha", "chi2_kl", "squared"),
            "Divergence from the reference (reverse KL is DPO). `squared` wants a smaller cap, such as 3.",
        ),
        "alpha": within("(0, 1)", "α of the α-divergence; the others ignore it."),
        "cap": CAP,
        "clip": at_least_zero(
            "Margin β(φ'(r(w)) - φ'(r(l))) beyond which a pair has no gradient; 0 is none."
        ),
    },
    pairs=True,
)
def fdpo(
    logps: ResponseLogps,
    *,
    beta: float = 0.1,
    divergence: str = "js",
    alpha: float = 0.5,
    cap: float = 20.0,
    clip: float = 0.0,
) -> LossTerms:
    """f-DPO: DPO with another divergence from the reference than reverse KL (with which it is DPO).

        L = E_pairs[-log σ(β (φ'(r(w)) - φ'(r(l))))],
        φ'(r) = 1 - 1/r (forward KL),   log(2r/(1 + r)) (JS),   (1 - r^-α)/α (α-divergence, forward KL at α = 1),
        r + log r (χPO: χ² and KL),   log r / r (SquaredPO)

    Beyond `cap` nats, the exponential is extended linearly (`capped_exp`). χPO's paper clips the argument of σ at
    twice the largest reward, beyond which a pair has no gradient; `clip` does so, and 0 does not. TRL's α is
    1 - α here.

    The default cap of 20 nats is too large for `squared`: for a chosen response that has lost 20 nats, φ' is -20 e^20,
    so that one pair can have a loss of 1e10 β. A run on the pairs of HH has logged 4.9e9. With a cap of 3 nats the same
    pair has a loss of about 7,000 β.

    References:
        Wang et al., 2023, arXiv 2309.16240, table 1. χPO: Huang et al., 2024, arXiv 2407.13399, algorithm 1.
        SquaredPO: arXiv 2602.06788. The formulas of these two are second-hand: their papers could not be read.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in fdpo(pair)]
        [0.6444]
    """
    log_ratio = logps.policy - logps.reference
    if divergence == "js":
        score = math.log(2) + F.logsigmoid(log_ratio)
    elif divergence == "chi2_kl":
        score = capped_exp(log_ratio, cap) + log_ratio
    elif divergence == "squared":
        score = log_ratio * capped_exp(-log_ratio, cap)
    else:
        power = 1.0 if divergence == "forward_kl" else alpha
        score = (1 - capped_exp(-power * log_ratio, cap)) / power
    logits = beta * logps.margins(score)
    logits = logits.clamp(-clip, clip) if clip else logits
    return [LossTerm(-F.logsigmoid(logits), per="pair", name="preference")]


@objective(
    title="R-DPO",
    formula="-log σ(β (log r(w) - log r(l)) + α (|w| - |l|))",
    source="Park et al. 2024, arXiv 2403.19159",
    when="DPO's responses grow longer",
    parameters={"beta": STRENGTH, "alpha": at_least_zero("Reward taken off a token.")},
    pairs=True,
)
def rdpo(logps: ResponseLogps, *, beta: float = 0.1, alpha: float = 0.01) -> LossTerms:
    """R-DPO: DPO that discounts length. A pair whose chosen response is the longer one teaches less.

        L = E_pairs[-log σ(β Δ + α (|w| - |l|))]

    References:
        Park et al., 2024, arXiv 2403.19159.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in rdpo(pair)]
        [0.6072]
    """
    logits = beta * logps.margins(logps.policy - logps.reference)
    longer = logps.margins(logps.length.to(logits.dtype))
    return [LossTerm(-F.logsigmoid(logits + alpha * longer), per="pair", name="preference")]


@objective(
    title="DPOP",
    formula="-log σ(β (log r(w) - log r(l) - λ max(0, -log r(w))))",
    source="Pal et al. 2024 (Smaug), arXiv 2402.13228, eq. 3",
    when="chosen and rejected differ in few tokens, and DPO lowers both",
    parameters={
        "beta": STRENGTH,
        "penalty": at_least_zero("The paper's λ: weight of a chosen response's fall."),
    },
    pairs=True,
)
def dpop(logps: ResponseLogps, *, beta: float = 0.3, penalty: float = 50.0) -> LossTerms:
    """DPO-Positive: DPO with a penalty if the chosen response is less likely than under the reference.

        L = E_pairs[-log σ(β (Δ - λ max(0, -log r(w))))]

    References:
        Pal et al., 2024 (Smaug), arXiv 2402.13228, eq. 3.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in dpop(pair)]
        [0.4375]
    """
    log_ratio = logps.policy - logps.reference
    fallen = F.relu(-log_ratio)[logps.pairs[:, 0]]
    logits = beta * (logps.margins(log_ratio) - penalty * fallen)
    return [LossTerm(-F.logsigmoid(logits), per="pair", name="preference")]


@objective(
    title="NCA",
    formula="-log σ(β log r(w)) - log σ(-β log r(w))/2 - log σ(-β log r(l))/2",
    source="Chen et al. 2024, arXiv 2402.05369",
    when="as DPO, with an absolute reward that keeps the chosen log-prob up",
    parameters={"beta": STRENGTH},
    pairs=True,
    trl_loss_type="nca_pair",
)
def nca(logps: ResponseLogps, *, beta: float = 0.1) -> LossTerms:
    """NCA on pairs: noise contrast of each response with the reference, so that rewards are absolute.

        L = E_pairs[-log σ(f(w)) - ½ log σ(-f(w)) - ½ log σ(-f(l))],   f = β log r

    References:
        Chen et al., 2024, arXiv 2402.05369, its pairwise preference form (TRL's `nca_pair`). By second-hand accounts
        this is also the pair loss of MIO (Lv et al., 2025, arXiv 2506.22578, eq. 15).

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in nca(pair)]
        [1.3388]
    """
    chosen, rejected = (beta * (logps.policy - logps.reference)[logps.pairs]).unbind(1)
    values = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return [LossTerm(values, per="pair", name="preference")]


@objective(
    title="EXO",
    formula="q log(q/(1-ε)) + (1-q) log((1-q)/ε), q = σ(β (log r(w) - log r(l)))",
    source="Ji et al. 2024, arXiv 2402.00856, eq. 16",
    when="as DPO, with the reverse of its divergence between preferences",
    parameters={"beta": STRENGTH, "label_smoothing": within("(0, 0.5)", LABEL_SMOOTHING.help)},
    pairs=True,
    trl_loss_type="exo_pair",
)
def exo(logps: ResponseLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> LossTerms:
    """EXO on pairs: reverse KL, over the two responses, of the policy's preference from the label's.

        L = E_pairs[q log(q/(1-ε)) + (1-q) log((1-q)/ε)],   q = σ(β Δ)

    ε must be above 0, because at 0 the divergence is infinite.

    References:
        Ji et al., 2024, arXiv 2402.00856, eq. 16 (TRL's `exo_pair`).

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in exo(pair)]
        [2.422]
    """
    logits = beta * logps.margins(logps.policy - logps.reference)
    right = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return [LossTerm(right + wrong, per="pair", name="preference")]


@objective(
    title="APO-down",
    formula="σ(β log r(w)) + 1 - σ(β (log r(w) - log r(l)))",
    source="D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8",
    when="chosen responses worse than the model's own",
    parameters={"beta": STRENGTH},
    pairs=True,
    trl_loss_type="apo_down",
)
def apo_down(logps: ResponseLogps, *, beta: float = 0.1) -> LossTerms:
    """APO-down: pushes both down, the rejected one further. For chosen responses worse than the model's own.

        L = E_pairs[σ(β log r(w)) + 1 - σ(β Δ)]

    References:
        D'Oosterlinck et al., 2024, arXiv 2408.06266, eq. 8.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in apo_down(pair)]
        [0.9751]
    """
    log_ratio = beta * (logps.policy - logps.reference)
    values = torch.sigmoid(log_ratio[logps.pairs[:, 0]]) + torch.sigmoid(-logps.margins(log_ratio))
    return [LossTerm(values, per="pair", name="preference")]


@objective(
    title="Cal-DPO",
    formula="-log σ(log r(w) - log r(l)) + (log r(w) - 1/(2β))² + (log r(l) + 1/(2β))²",
    source="Xiao et al. 2024, arXiv 2412.14516",
    when="rewards that should have a fixed scale",
    parameters={"beta": positive("Inverse of twice the calibrated log-ratio (1/nats).")},
    pairs=True,
)
def cal_dpo(logps: ResponseLogps, *, beta: float = 0.1) -> LossTerms:
    """Cal-DPO: DPO's contrast, with log-ratios calibrated to ±1/(2β) (nats).

        L = E_pairs[-log σ(Δ) + (log r(w) - 1/(2β))² + (log r(l) + 1/(2β))²]

    The authors' published trainer halves the two squares, and takes their means over the pairs first.

    References:
        Xiao et al., 2024, arXiv 2412.14516.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in cal_dpo(pair)]
        [32.1269]
    """
    chosen, rejected = (logps.policy - logps.reference)[logps.pairs].unbind(1)
    target = 1 / (2 * beta)
    values = -F.logsigmoid(chosen - rejected) + (chosen - target) ** 2 + (rejected + target) ** 2
    return [LossTerm(values, per="pair", name="preference")]


@objective(
    title="Robust DPO",
    formula="(-(1-ε) log σ(β (log r(w) - log r(l))) + ε log σ(β (log r(l) - log r(w)))) / (1 - 2ε)",
    source="Chowdhury et al. 2024, arXiv 2403.00409",
    when="labels flipped at a known rate",
    parameters={"beta": STRENGTH, "label_smoothing": LABEL_SMOOTHING},
    pairs=True,
    trl_loss_type="robust",
)
def robust_dpo(logps: ResponseLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> LossTerms:
    """Robust DPO: an unbiased estimate of DPO's loss on clean labels, from labels flipped with probability ε.

        L = E_pairs[-(1-ε) log σ(β Δ) + ε log σ(-β Δ)] / (1 - 2ε)

    References:
        Chowdhury, Kini, Natarajan, 2024, arXiv 2403.00409 (TRL's `robust`).

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in robust_dpo(pair, label_smoothing=0.1)]
        [0.5731]
    """
    logits = beta * logps.margins(logps.policy - logps.reference)
    flipped = label_smoothing * F.logsigmoid(-logits)
    values = (-(1 - label_smoothing) * F.logsigmoid(logits) + flipped) / (1 - 2 * label_smoothing)
    return [LossTerm(values, per="pair", name="preference")]
