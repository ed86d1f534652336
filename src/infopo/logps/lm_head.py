"""Chunked LM head: hidden states of scored positions -> log-probs, never the whole (tokens, vocabulary) matrix.

`token_logps` is the function; `logps_of` has a model of transformers use it within its own forward pass, so that
wrappers which shard or gather the head's weight see the call that they expect.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from infopo.errors import LogpsError
from infopo.logps.wrappers import base_of

TILE = {"cpu": 2**20}
"""Logits at a time, by device type: on a CPU, what stays in its cache."""
TILE_ELSEWHERE = 2**26
COLUMNS = {"cpu": 1024}
"""Tokens of the vocabulary at a time; all of them where no entry says otherwise."""

KEPT = 2**24
"""Logits (64 MiB in float32) that are kept for the backward pass, which computes all others again."""


@dataclass(frozen=True)
class LogitMap:
    """What a model does to the logits of its head: z -> u = c·tanh(s z / c), without the cap: u = s z.

    Attributes:
        scale: s.
        softcap: c, or None.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "LogitMap":
        """The map that `learn_map` has found, else what settings say (Gemma's cap, Granite's divisor)."""
        learnt = getattr(model, _MAP, None)
        if learnt is not None:
            return learnt
        config = getattr(model, "config", None)
        scale = float(getattr(model, "logit_scale", 1.0)) / float(getattr(config, "logits_scaling", 1.0))
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def apply_(self, logits: Tensor) -> Tensor:
        """In place: z -> u."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def token_logps(
    hidden: Float[Tensor, "scored width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"] | None,
    targets: Int[Tensor, " scored"],
    logit_map: LogitMap | None = None,
) -> Float[Tensor, " scored"]:
    """u_y − log Σ_v exp(u_v) with u = map(W h + b), in nats, in float32 at least.

    Under autocast the product is taken in autocast's precision, as the head itself would. Exact for any gradient
    weights; at most `TILE` logits exist at a time beside the `KEPT` ones.

    Args:
        hidden: Last hidden state before each scored token.
        weight: Of the head.
        bias: Of the head.
        targets: Token ids.
        logit_map: What the model does to its logits.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _TokenLogps.apply(hidden.to(dtype), weight.to(dtype), bias, targets, logit_map or LogitMap())


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logit_map: LogitMap
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        target_logit = hidden.new_zeros(len(hidden), dtype=exact)
        lse = hidden.new_full((len(hidden),), -torch.inf, dtype=exact)
        kept: dict[tuple[int, int], Tensor] = {}
        room = KEPT if any(ctx.needs_input_grad) else 0
        for rows, columns in _tiles(hidden, weight):
            logits = logit_map.apply_(_logits(hidden[rows], weight[columns], bias, columns))
            inside, place = _targets_in(targets[rows], columns)
            target_logit[rows] += logits.gather(1, place)[:, 0].where(inside, 0.0)
            lse[rows] = torch.logaddexp(lse[rows], logits.logsumexp(dim=1))
            if logits.numel() <= room:
                room -= logits.numel()
                kept[rows.start, columns.start] = logits
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.logit_map, ctx.kept = logit_map, kept
        return target_logit - lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        logit_map: LogitMap = ctx.logit_map
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        # Sums over tiles, in the precision of the sum; a gradient of the weight is as large as the weight.
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if to_hidden else None
        d_weight = torch.zeros_like(weight) if to_weight else None
        d_bias = torch.zeros_like(bias) if to_bias else None
        for rows, columns in _tiles(hidden, weight):
            # Taken away, for it is changed below: a second backward pass computes it anew.
            u = ctx.kept.pop((rows.start, columns.start), None)
            if u is None:
                u = logit_map.apply_(_logits(hidden[rows], weight[columns], bias, columns))
            slope = None if logit_map.softcap is None else 1 - (u / logit_map.softcap).square_()
            inside, place = _targets_in(targets[rows], columns)
            g = grad[rows, None]
            d_logits = u.sub_(lse[rows, None]).exp_().mul_(-g)  # ∂L/∂u = g (onehot(y) − softmax(u))
            d_logits.scatter_add_(
                1, place, g.where(inside[:, None], 0.0)
            )  # one target a row: in a fixed order
            if slope is not None:
                d_logits.mul_(slope)
            if logit_map.scale != 1.0:
                d_logits.mul_(logit_map.scale)
            if d_bias is not None:
                d_bias[columns] += d_logits.sum(0).to(d_bias.dtype)
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                _add_product(d_hidden[rows], d_logits, weight[columns])
            if d_weight is not None:
                _add_product(d_weight[columns], d_logits.T, hidden[rows])
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias, None, None


def _tiles(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    vocabulary = len(weight)
    width = min(COLUMNS.get(hidden.device.type, vocabulary), vocabulary)
    height = max(1, TILE.get(hidden.device.type, TILE_ELSEWHERE) // width)
    for column in range(0, vocabulary, width):
        for row in range(0, len(hidden), height):
            yield slice(row, min(row + height, len(hidden))), slice(column, min(column + width, vocabulary))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: slice) -> Tensor:
    exact = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.dtype != exact and hidden.is_cuda:  # products of halves, summed and returned in float32
        logits = torch.mm(hidden, weight.T, out_dtype=exact)
    else:
        logits = hidden.to(exact) @ weight.to(exact).T
    return logits if bias is None else logits.add_(bias[columns])


def _targets_in(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in these columns, and where, (rows, 1); no wait for the device."""
    place = targets - columns.start
    inside = (place >= 0) & (targets < columns.stop)
    return inside, place.clamp(0, columns.stop - columns.start - 1)[:, None]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


# ---- inside a model ----------------------------------------------------------------------------------------------

_MAP = "_infopo_logit_map"
"""Attribute of a model: what it does to its logits, as it was found out. None: nothing that `LogitMap` can say."""


def learn_map(model: nn.Module) -> None:
    """Finds out what a model does to the logits of its head, by one token for which the head returns known numbers.

    Settings have other names and other senses in each architecture (Granite divides its logits by `logits_scaling`,
    HyperCLOVA X multiplies by it, MiniCPM3 divides the hidden states), so they are believed only if they explain the
    result. Otherwise a factor and a cap are measured. If these do not explain it, the head counts as not plain, so
    that the model's own logits are taken. A model that cannot be run so keeps what its settings say.
    """
    base = base_of(model)
    if hasattr(base, _MAP):
        delattr(base, _MAP)
    head = plain_head(model)
    if head is None:
        return
    calls: list[Tensor] = []

    def known_numbers(head: nn.Module, args: tuple[Tensor], logits: Tensor) -> Tensor:
        grid = torch.linspace(-100.0, 100.0, logits.numel(), dtype=torch.float32)
        grid[0], grid[-1] = 1.0, 1e9  # the cap shows at the end, and the factor where the cap does little
        calls.append(grid.reshape(logits.shape))
        return calls[-1].to(logits.device)

    handle = head.register_forward_hook(known_numbers)
    try:
        with torch.no_grad():
            ids = torch.zeros(1, 1, dtype=torch.long, device=base.get_input_embeddings().weight.device)
            mapped = base(input_ids=ids, use_cache=False).logits.float().cpu()
    except Exception:  # the self-test stays
        return
    finally:
        handle.remove()
    setattr(base, _MAP, _explained(LogitMap.of(base), calls, mapped))


def _explained(said: LogitMap, calls: list[Tensor], mapped: Tensor) -> LogitMap | None:
    """The map, of what settings say and what was measured, that turns the numbers of the head into these logits."""
    if len(calls) != 1 or calls[0].shape != mapped.shape:
        return None
    first, last = float(mapped.flatten()[0]), float(mapped.flatten()[-1])
    maps = [said, LogitMap(scale=first)]
    if 0 < abs(first) < last < 1e6:  # tanh has long reached 1
        maps.append(LogitMap(last * math.atanh(first / last), last))
    fits = (m for m in maps if torch.allclose(m.apply_(calls[0].clone()), mapped, rtol=1e-5, atol=1e-5))
    return next(fits, None)


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The output layer, if it is a linear layer and nothing more: no adapter, quantisation or offloading, and the model
    does nothing to its logits beside a factor and a cap.
    """
    base = base_of(model)
    if getattr(base, _MAP, LogitMap()) is None:
        return None
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    is_plain = (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and "forward" not in vars(head)
        and (type(head.weight) in (Tensor, nn.Parameter) or _is_gathered((model, base, head), head.weight))
    )
    return head if is_plain else None


def _is_gathered(holders: Sequence[nn.Module], weight: Tensor) -> bool:
    """Whether FSDP2, and nothing else, has cut the weight up: it is whole, and plain, while the model runs."""
    if not hasattr(weight, "device_mesh"):
        return False
    from torch.distributed.fsdp import FSDPModule

    return weight.device_mesh.ndim == 1 and any(isinstance(holder, FSDPModule) for holder in holders)


def logps_of(
    model: nn.Module, positions: Int[Tensor, " scored"], targets: Int[Tensor, " scored"], **inputs: Any
) -> Float[Tensor, " scored"]:
    """Log-probs of `targets` at `positions`: one call of a model with a plain head, which gives no logits in it.

    Args:
        model: With a `plain_head`, and whatever wrappers.
        positions: Into the rows x width positions of the inputs, flattened.
        targets: Token ids.
        inputs: What the model is called with.

    Raises:
        LogpsError: The model does not call its output layer.
    """
    head = plain_head(model)
    assert head is not None
    logit_map = LogitMap.of(base_of(model))
    found: list[Tensor] = []
    states: list[Tensor] = []

    def before(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        states.append(args[0])
        return (args[0][:, :0],)  # the head itself computes nothing

    def after(head: nn.Linear, args: tuple[Tensor], nothing: Tensor) -> Tensor:
        hidden = states.pop().flatten(0, 1)[positions]
        found.append(token_logps(hidden, head.weight, head.bias, targets, logit_map))
        return found[-1][None, :, None]

    # First among the hooks after the head: a wrapper that takes its weight away again does so in one of them.
    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after, prepend=True)]
    try:
        output = model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    if len(found) != 1:
        raise LogpsError(
            f"{type(base_of(model)).__name__} does not call its output layer once: set logps_path to 'naive'"
        )
    # The model has put its map on what the head returned, so the head's own result is taken; but the gradient passes
    # the output too, where wrappers that gather weights for the backward pass listen for it.
    return found[0] + 0.0 * output.flatten()
