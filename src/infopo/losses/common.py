"""What several losses share."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from infopo.records import LossTerm, LossTerms, ResponseLogps


def critic_scores(
    logps: ResponseLogps, beta: float, length_normalized: bool = False
) -> Float[Tensor, " responses"]:
    """The critic f = β log r of each response in nats, or β log r / |y| if `length_normalized`.

    Example:
        >>> critic_scores(ResponseLogps.pair((-3.0, -5.0), (-4.0, -4.0)), beta=0.5).tolist()
        [0.5, -0.5]
    """
    scores = beta * (logps.policy - logps.reference)
    return scores / logps.length if length_normalized else scores


def capped_exp(log_ratio: Float[Tensor, " items"], cap: float) -> Float[Tensor, " items"]:
    """exp(z) up to the cap c, extended linearly beyond it as e^c (1 + z - c).

    The extension keeps the push on a rejected response finite, and still lets it rise. Value and derivative are
    continuous at the cap.

    Args:
        log_ratio: z, in nats.
        cap: c, in nats.

    Example:
        >>> capped_exp(torch.tensor([0.0, 1.0, 3.0]), cap=1.0)
        tensor([1.0000, 2.7183, 8.1548])
    """
    # One product, no `where`: e^c itself is never formed, so a cap too large to exponentiate ("no cap") is harmless.
    return torch.exp(log_ratio.clamp(max=cap)) * (1 + F.relu(log_ratio - cap))


def smoothed_nll(logits: Float[Tensor, " pairs"], label_smoothing: float) -> Float[Tensor, " pairs"]:
    """-(1-ε) log σ(x) - ε log σ(-x): the loss of a label that is flipped with probability ε.

    Example:
        >>> smoothed_nll(torch.zeros(1), 0.1)
        tensor([0.6931])
    """
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def likelihood(logps: ResponseLogps, weight: float) -> LossTerms:
    """a Σ_w -log π(w) / Σ_w |w|: the likelihood of chosen responses as a mean over tokens. No term if a is 0.

    Example:
        >>> likelihood(ResponseLogps.pair((-3.0, -5.0)), weight=0.0)
        []
    """
    return [LossTerm(-weight * logps.policy[logps.chosen], per="token", name="nll")] if weight else []
