"""How far rounding alone moves a log-prob, measured on the model at hand.

In half precision no bound on a number of tokens holds for every model. A router that sends a token to another expert
because two of them are nearly as good, sinks, and soft caps all turn a rounding into a jump. So where two values of one
response differ by more than is usual, the response is computed again with its embeddings moved by one rounding: a
difference that this makes as well is no sign of another function.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from infopo.logps.wrappers import base_of

DRAWS = 3
"""Number of times that a response is computed with other roundings."""
TIMES = 4.0
"""How many times as far as its embeddings' rounding a log-prob may move, since each layer rounds again."""


@contextmanager
def rounded_otherwise(model: nn.Module, seed: int) -> Iterator[None]:
    """Makes each embedding h of a model h (1 ± ε/2), as if it had been rounded the other way.

    ε is the relative spacing of numbers in the precision in which the model computes, which is autocast's under
    autocast. The signs come from `seed`, and the global random generators are not used.
    """

    def moved(embeddings: nn.Module, args: Any, hidden: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        signs = torch.randint(0, 2, hidden.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        return hidden * (1 + signs.to(hidden.device) * torch.finfo(dtype).eps / 2).to(hidden.dtype)

    handle = base_of(model).get_input_embeddings().register_forward_hook(moved)
    try:
        yield
    finally:
        handle.remove()


def moved_by_rounding(
    model: nn.Module,
    run: Callable[[], Float[Tensor, " responses"]],
    expected: Float[Tensor, " responses"] | None = None,
) -> Float[Tensor, " responses"]:
    """Returns how far rounding may move each value of `run` (nats): `TIMES` the largest change of `DRAWS` draws.

    Args:
        model: The model that `run` calls.
        run: Computes log-probs, e.g. of one response on the slow path.
        expected: What `run` returns, if the caller has it already.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=4, **tiny)).to(torch.bfloat16)
        >>> ids = torch.tensor([[1, 2]])
        >>> moved_by_rounding(model, lambda: model(ids).logits.float().log_softmax(-1)[0, :1, 2]).shape
        torch.Size([1])
    """
    with torch.no_grad():
        if expected is None:
            expected = run()
        largest = torch.zeros_like(expected)
        for seed in range(DRAWS):
            with rounded_otherwise(model, seed):
                largest = torch.maximum(largest, (run() - expected).abs())
    return TIMES * largest
