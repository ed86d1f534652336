"""Later losses of a pair's margin Δ = log r(w) - log r(l), or of its margin of mean log-probs: other curves than DPO's,
and DPO whose pairs have weights.

`losses/__init__.py` has the notation. The examples are of one pair: log r(w) = 1 and log r(l) = -1 nat, 2 and 4 tokens.
"""

import torch
import torch.nn.functional as F

from infopo.losses.common import capped_exp
from infopo.losses.declaration import CAP, STRENGTH, at_least_zero, objective, positive
from infopo.records import LossTerm, LossTerms, ResponseLogps


@objective(
    title="BPO",
    formula="R^(λ+1)/(s(λ+1)) - (R^(-λ) - 1)/(sλ), R = (r(l)/r(w))^β; λ = 0: (R + log R)/s",
    source="arXiv 2505.19601 (BPO), table 2",
    when="DPO under another Bregman divergence; power 0, scale 1 is InfoPO's bound on the pair",
    parameters={
        "beta": STRENGTH,
        "power": at_least_zero("The paper's λ; 0 is KLIEP."),
        "scale": positive("The paper's s: at 4 the gradient at the reference is DPO's, whatever λ is."),
        "cap": CAP,
    },
    pairs=True,
)
def bpo(
    logps: ResponseLogps, *, beta: float = 0.1, power: float = 0.5, scale: float = 4.0, cap: float = 5.0
) -> LossTerms:
    """BPO: the ratio of a pair's two orders is matched under a Bregman divergence, that of scaled Basu's power λ.

        L = E_pairs[R^(λ+1)/(s(λ+1)) - (R^-λ - 1)/(sλ)],   R = e^(-βΔ),   Δ = log r(w) - log r(l)

    The paper prints R^-λ without the constant 1, with which λ → 0 has a limit, KLIEP: (R + log R)/s. With s = 1 that is
    the NWJ bound with the critic βΔ of the *pair*, so it tells the estimator of InfoPO from the pairing. Beyond `cap`
    nats, exponentials are extended linearly. The default of λ is ours.

    References:
        arXiv 2505.19601 (BPO), table 2.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in bpo(pair, power=0.0, scale=1.0)]
        [0.6187]
    """
    x = beta * logps.margins(logps.policy - logps.reference)
    growth = (capped_exp(power * x, cap) - 1) / power if power else x
    values = (capped_exp(-(power + 1) * x, cap) / (power + 1) - growth) / scale
    return [LossTerm(values, per="pair", name="preference")]


@objective(
    title="RePO",
    formula="max(0, γ - (log π_θ(w)/|w| - log π_θ(l)/|l|))",
    source="RePO, by its authors' code (junkangwu/RePO)",
    when="no reference model; SimPO that stops at a margin, with one parameter",
    parameters={"gamma": at_least_zero("Target margin of mean log-probs (nats per token).")},
    reference=(),
    pairs=True,
    reward="mean_logp",
)
def repo(logps: ResponseLogps, *, gamma: float = 0.5) -> LossTerms:
    """RePO: a hinge on the margin of length-normalised log-probs. No reference, and no β.

        L = E_pairs[max(0, γ - (log π(w)/|w| - log π(l)/|l|))]

    It is SimPO with γ/β held fixed as β → ∞. The default of γ is ours.

    References:
        RePO, as its authors' code has it (junkangwu/RePO).

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in repo(pair)]
        [0.75]
    """
    values = F.relu(gamma - logps.margins(logps.policy / logps.length))
    return [LossTerm(values, per="pair", name="preference")]


@objective(
    title="DiscoPOP",
    formula="(1-m) (-log σ(βΔ)) + m e^(-βΔ), m = σ(βΔ/τ), Δ = log r(w) - log r(l)",
    source="Lu et al. 2024, arXiv 2406.08414, eq. 5",
    when="as DPO; a curve that was found by search and is not convex",
    parameters={
        "beta": STRENGTH,
        "tau": positive("The paper's τ: width of the passage from the logistic to the exponential loss."),
        "cap": CAP,
    },
    pairs=True,
    trl_loss_type="discopop",
)
def discopop(logps: ResponseLogps, *, beta: float = 0.1, tau: float = 0.05, cap: float = 5.0) -> LossTerms:
    """DiscoPOP: DPO's logistic loss for pairs in the wrong order, an exponential one for those in the right order.

        L = E_pairs[(1-m) (-log σ(x)) + m e^-x],   x = β Δ,   m = σ(x/τ)

    Beyond `cap` nats of -x, where m is all but 0, the exponential is extended linearly.

    References:
        Lu et al., 2024, arXiv 2406.08414, eq. 5, as TRL's `discopop`.

    Example:
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> [round(term.values.item(), 4) for term in discopop(pair)]
        [0.8148]
    """
    x = beta * logps.margins(logps.policy - logps.reference)
    share = torch.sigmoid(x / tau)
    return [
        LossTerm((share - 1) * F.logsigmoid(x) + share * capped_exp(-x, cap), per="pair", name="preference")
    ]


@objective(
    title="WPO",
    formula="-a(w) a(l) log σ(β (log r(w) - log r(l))), a = e^(mean over tokens of log π_θ(y_t) - log Σ_v π_θ(v)²)",
    source="Zhou et al. 2024, arXiv 2406.11827, eq. 2, as TRL's `use_weighting`",
    when="as DPO, with responses of another model than the policy: those that it would not sample count less",
    parameters={"beta": STRENGTH},
    pairs=True,
    agreement=True,
)
def wpo(logps: ResponseLogps, *, beta: float = 0.1) -> LossTerms:
    """WPO: DPO whose pairs are weighed by how likely the policy would be to sample them.

        L = E_pairs[-a(w) a(l) log σ(β Δ)],   a = e^(1/|y| Σ_t (log π(y_t) - log Σ_v π(v)²)),   Δ = log r(w) - log r(l)

    The weights have no gradient. Dividing by Σ π², the expected probability of a sampled token, makes the weight of
    what the policy samples itself about 1, whatever its entropy is. The sum over the vocabulary comes from the same
    tiles as the log-probs: it takes about an eighth more of the head's forward pass, and nothing with other losses.
    Without a trainer, `logps.agreement` is None, and the weights are 1.

    References:
        Zhou et al., 2024, arXiv 2406.11827, eq. 2, as TRL's `use_weighting`.

    Example:
        >>> from dataclasses import replace
        >>> pair = ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0), length=(2, 4))
        >>> weighed = replace(pair, agreement=torch.tensor([-0.5, -0.5]))  # e^-1 of DPO's loss
        >>> [round(term.values.item(), 4) for term in wpo(weighed)]
        [0.22]
    """
    values = -F.logsigmoid(beta * logps.margins(logps.policy - logps.reference))
    if logps.agreement is not None:
        values = values * logps.agreement[logps.pairs].sum(dim=1).exp()
    return [LossTerm(values, per="pair", name="preference")]
