"""How far a policy agrees with the tokens of a response, which WPO weighs pairs by.

The agreement of a token is log π(y_t) - log Σ_v π(v)² (nats), where Σ_v π(v)² is the expected probability of a token
that the policy samples itself. It is measured only if it is asked for, and is then a second column beside the log-probs
of tokens, because paths select and reorder rows.
"""

from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from infopo.logps.collecting import Collector

_collected = Collector[list[Tensor]]("agreement")


def measured(wanted: bool) -> AbstractContextManager[list[Tensor]]:
    """Within it, `response_logps` leaves the agreement of each response, summed over tokens, in the list, if wanted.

    Example:
        >>> with measured(True):
        ...     is_wanted()
        True
    """
    return _collected.into([], wanted)


def is_wanted() -> bool:
    """Returns whether the agreement of the next forward pass is asked for."""
    return _collected.current is not None


def beside(
    logps: Float[Tensor, " tokens"], log_squares: Float[Tensor, " tokens"]
) -> Float[Tensor, "tokens 2"]:
    """Returns log-probs with the agreement of each token beside them, which has no gradient.

    Args:
        logps: log π(y_t) (nats).
        log_squares: log Σ_v π(v)² (nats).

    Example:
        >>> beside(torch.tensor([-1.0]), torch.tensor([-0.25]))
        tensor([[-1.0000, -0.7500]])
    """
    return torch.stack([logps, (logps - log_squares).detach()], dim=1)


def note(sums: Float[Tensor, "responses 2"]) -> Float[Tensor, " responses"]:
    """Keeps the agreement of responses, and returns their log-probs."""
    found = _collected.current
    if found is not None:
        found.append(sums[:, 1].detach())
    return sums[:, 0]
