"""How the policy spreads its probability over the next token: its entropy and largest log-prob where it is scored.

They are measured in passes that compute log-probs anyway, if `measured` is around them.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from infopo.logps.collecting import Collector


@dataclass
class Spread:
    """Sums over the positions of forward passes. A token that several responses share counts once.

    Attributes:
        entropy: Σ_t H(π(·|x, y_<t)) (nats).
        log_p_max: Σ_t log max_v π(v|x, y_<t) (nats).
        positions: Number of positions.
    """

    entropy: list[Tensor] = field(default_factory=list)
    log_p_max: list[Tensor] = field(default_factory=list)
    positions: int = 0

    def add(self, entropy: Float[Tensor, " scored"], log_p_max: Float[Tensor, " scored"]) -> None:
        """Adds the positions of a forward pass."""
        self.entropy.append(entropy.double().sum())
        self.log_p_max.append(log_p_max.double().sum())
        self.positions += len(entropy)

    def means(self) -> tuple[float, float]:
        """Returns mean entropy and mean log p_max (nats). Synchronises with the GPU. They are NaN without positions."""
        if not self.positions:
            return float("nan"), float("nan")
        sums = torch.stack([torch.stack(self.entropy).sum(), torch.stack(self.log_p_max).sum()])
        entropy, log_p_max = (sums / self.positions).tolist()
        return entropy, log_p_max


_measured = Collector[Spread]("spread")


def measured() -> AbstractContextManager[Spread]:
    """Within it, forward passes that compute log-probs add to the spread that is yielded."""
    return _measured.into(Spread())


def wanted() -> Spread | None:
    """Returns the spread that the next forward pass adds to, or None if nobody asks for it."""
    return _measured.current


def of_logits(logits: Float[Tensor, "scored vocabulary"]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log Σ e^u, the mean of u under the softmax, and the largest u, of each row of logits u (nats).

    The entropy of a row is the first less the second, and its log p_max the third less the first.

    Example:
        >>> lse, mean, largest = of_logits(torch.zeros(1, 4))
        >>> round(float(lse - mean), 4), round(float(largest - lse), 4)  # log 4 and -log 4
        (1.3863, -1.3863)
    """
    lse = logits.logsumexp(dim=1)
    # A logit of -inf has probability 0, and adds nothing.
    weighted = (logits - lse[:, None]).exp() * logits.where(logits.isfinite(), 0.0)
    return lse, weighted.sum(dim=1), logits.amax(dim=1)
