"""Chunked LM head: hidden states of scored positions -> log-probs, without the whole (tokens, vocabulary) matrix.

`token_logps` is the function. `logps_of` makes a model of transformers use it within its own forward pass, so that
wrappers which shard or gather the head's weight see the call that they expect.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from infopo.errors import LogpsError
from infopo.logps import agreement, router, spread
from infopo.logps.wrappers import base_of

TILE_LOGITS = {"cpu": 2**20}
"""Logits that are computed at a time, by device type. A CPU is fastest if they stay in its cache."""
DEFAULT_TILE_LOGITS = 2**27
"""Logits at a time on devices that `TILE_LOGITS` does not list, 512 MiB in float32."""
TILE_COLUMNS = {"cpu": 1024}
"""Tokens of the vocabulary in a tile, by device type. Other devices take as many as fit beside all rows."""
LEAST_COLUMNS = 4096
"""Least number of columns on devices that `TILE_COLUMNS` does not list. Products of fewer are slow."""

KEPT_LOGITS = {"cpu": 2**24}
"""Largest number of logits that are kept for the backward pass, which computes the others again, by device type. A tile
is kept whole or not at all. Other devices keep none, for the reason that benchmarks/LOG.md gives."""


_OUT_OF_GRAPHS = "_infopo_out_of_graphs"
"""Attribute of a module that compiled graphs leave out: the handle of the hook that does it."""


@dataclass(frozen=True)
class LogitMap:
    """What a model does to the logits z of its head: u = c·tanh(s z / c), or u = s z without a cap.

    Attributes:
        scale: s.
        softcap: c, or None.

    Example:
        >>> LogitMap(scale=0.5).apply_(torch.tensor([[2.0, 4.0]]))
        tensor([[1., 2.]])
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "LogitMap":
        """Returns the map that `learn_map` measured, else what settings say (Gemma's cap, Granite's divisor)."""
        learnt = getattr(model, _MAP, None)
        if learnt is not None:
            return learnt
        config = getattr(model, "config", None)
        scale = float(getattr(model, "logit_scale", 1.0)) / float(getattr(config, "logits_scaling", 1.0))
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def apply_(self, logits: Tensor) -> Tensor:
        """Replaces z by u, in place."""
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
) -> Float[Tensor, "scored *agreement"]:
    """Returns u_y − log Σ_v exp(u_v) with u = map(W h + b), in nats, in float32 at least.

    Values and gradients are those of the whole logits, for any weights of the gradient. At most `TILE_LOGITS` logits
    exist at a time, beside the `KEPT_LOGITS` that wait for the backward pass. Under autocast the product is computed in
    autocast's precision, as by the head itself.

    Args:
        hidden: Last hidden state before each scored token.
        weight: The head's weight W.
        bias: The head's bias b, or None.
        targets: Id of each scored token, y.
        logit_map: What the model does to its logits. By default nothing.

    Returns:
        Log-probs, or (scored, 2) with the agreement beside them if it is asked for (see `logps/agreement.py`). Its sum
        over the vocabulary is formed tile by tile, too, and takes one more pass over the logits.

    Example:
        >>> token_logps(torch.ones(1, 2), torch.zeros(4, 2), None, torch.tensor([3]))  # -log 4
        tensor([-1.3863])
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        is_wanted = agreement.is_wanted()
        result = _TokenLogps.apply(
            hidden.to(dtype), weight.to(dtype), bias, targets, logit_map or LogitMap(), is_wanted
        )
    return agreement.beside(*result) if is_wanted else result


@torch.no_grad()
def token_spread(
    hidden: Float[Tensor, "scored width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"] | None,
    logit_map: LogitMap | None = None,
) -> tuple[Float[Tensor, " scored"], Float[Tensor, " scored"]]:
    """Returns the entropy of the next token and its largest log-prob at each position (nats), in tiles.

    Args:
        hidden: Last hidden state of each position.
        weight: The head's weight.
        bias: The head's bias, or None.
        logit_map: What the model does to its logits. By default nothing.

    Example:
        >>> entropy, log_p_max = token_spread(torch.ones(1, 2), torch.zeros(4, 2), None)  # log 4 and -log 4
        >>> entropy, log_p_max
        (tensor([1.3863]), tensor([-1.3863]))
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    exact = torch.promote_types(dtype, torch.float32)
    lse = hidden.new_full((len(hidden),), -torch.inf, dtype=exact)
    mean, largest = torch.zeros_like(lse), lse.clone()
    with torch.autocast(device, enabled=False):
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        for columns, tiles in _tiles(hidden, weight):
            for rows in tiles:
                logits = (logit_map or LogitMap()).apply_(
                    _logits(hidden[rows], weight[columns], bias, columns)
                )
                part_lse, part_mean, part_largest = spread.of_logits(logits)
                both = torch.logaddexp(lse[rows], part_lse)
                mean[rows] = (lse[rows] - both).exp() * mean[rows] + (part_lse - both).exp() * part_mean
                lse[rows], largest[rows] = both, torch.maximum(largest[rows], part_largest)
    return lse - mean, largest - lse


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logit_map: LogitMap,
        with_squares: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        target_logit = hidden.new_zeros(len(hidden), dtype=exact)
        lse = hidden.new_full((len(hidden),), -torch.inf, dtype=exact)
        lse_twice = lse.clone() if with_squares else None
        kept: dict[tuple[int, int], Tensor] = {}
        room = KEPT_LOGITS.get(hidden.device.type, 0) if any(ctx.needs_input_grad) else 0
        for columns, tiles in _tiles(hidden, weight):
            for rows in tiles:
                logits = logit_map.apply_(_logits(hidden[rows], weight[columns], bias, columns))
                is_inside, column = _targets_in(targets[rows], columns)
                target_logit[rows] += logits.gather(1, column)[:, 0].where(is_inside, 0.0)
                lse[rows] = torch.logaddexp(lse[rows], logits.logsumexp(dim=1))
                if lse_twice is not None:
                    lse_twice[rows] = torch.logaddexp(lse_twice[rows], (2 * logits).logsumexp(dim=1))
                if logits.numel() <= room:
                    room -= logits.numel()
                    kept[rows.start, columns.start] = logits
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.logit_map, ctx.kept = logit_map, kept
        if lse_twice is None:
            return target_logit - lse
        # log Σ p² = log Σ e^2u - 2 log Σ e^u
        log_squares = lse_twice - 2 * lse
        ctx.mark_non_differentiable(log_squares)
        return target_logit - lse, log_squares

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *of_squares: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        logit_map: LogitMap = ctx.logit_map
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        # Both gradients are sums over tiles. They add up in float32 at least, and are rounded once.
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if to_hidden else None
        d_weight = torch.zeros_like(weight) if to_weight else None
        d_bias = torch.zeros_like(bias) if to_bias else None
        for columns, tiles in _tiles(hidden, weight):
            d_columns = None if d_weight is None else d_weight[columns]
            if d_columns is not None and d_columns.dtype != lse.dtype and len(tiles) > 1:
                d_columns = torch.zeros_like(d_columns, dtype=lse.dtype)
            for rows in tiles:
                # A kept tile is removed, because it is changed in place. A second backward pass computes it again.
                u = ctx.kept.pop((rows.start, columns.start), None)
                if u is None:
                    u = logit_map.apply_(_logits(hidden[rows], weight[columns], bias, columns))
                d_logits = _logit_gradient(u, grad[rows], lse[rows], targets[rows], columns, logit_map)
                if d_bias is not None:
                    d_bias[columns] += d_logits.sum(0).to(d_bias.dtype)
                d_logits = d_logits.to(hidden.dtype)
                if d_hidden is not None:
                    _add_product(d_hidden[rows], d_logits, weight[columns])
                if d_columns is not None:
                    _add_product(d_columns, d_logits.T, hidden[rows])
            if d_weight is not None and d_columns is not None and d_columns.dtype != d_weight.dtype:
                d_weight[columns] = d_columns
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias, None, None, None


def _logit_gradient(
    u: Tensor, grad: Tensor, lse: Tensor, targets: Tensor, columns: slice, logit_map: LogitMap
) -> Tensor:
    """Returns ∂L/∂z of a tile, in the memory of u: ∂L/∂u = g (onehot(y) − softmax(u)), times ∂u/∂z."""
    slope = None if logit_map.softcap is None else 1 - (u / logit_map.softcap).square_()
    is_inside, column = _targets_in(targets, columns)
    g = grad[:, None]
    d_logits = u.sub_(lse[:, None]).exp_().mul_(-g)
    # There is one target per row, so nothing adds up in an order that could change.
    d_logits.scatter_add_(1, column, g.where(is_inside[:, None], 0.0))
    if slope is not None:
        d_logits.mul_(slope)
    if logit_map.scale != 1.0:
        d_logits.mul_(logit_map.scale)
    return d_logits


def _tiles(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Yields blocks of columns (vocabulary), each with the rows (scored tokens) of its tiles of logits.

    A block has all rows in one tile where they fit, so that its part of the weight's gradient is one product.
    """
    vocabulary, device = len(weight), hidden.device.type
    room = TILE_LOGITS.get(device, DEFAULT_TILE_LOGITS)
    # A multiple of 128 is what products on a GPU are fastest with.
    fitting = max(LEAST_COLUMNS, room // max(1, len(hidden)) // 128 * 128)
    width = min(TILE_COLUMNS.get(device, fitting), vocabulary)
    height = max(1, room // width)
    rows = [slice(row, min(row + height, len(hidden))) for row in range(0, len(hidden), height)]
    for column in range(0, vocabulary, width):
        yield slice(column, min(column + width, vocabulary)), rows


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: slice) -> Tensor:
    exact = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.dtype != exact and hidden.is_cuda:
        # A GPU multiplies half precision, and sums and returns in float32. A CPU has no such product.
        logits = torch.mm(hidden, weight.T, out_dtype=exact)
    else:
        logits = hidden.to(exact) @ weight.to(exact).T
    return logits if bias is None else logits.add_(bias[columns])


def _targets_in(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Returns which targets lie in these columns, (rows,), and their column in the tile, (rows, 1).

    A target outside of the tile gets some column of the tile, which the caller masks. Selecting the targets inside
    instead would synchronise with the GPU.
    """
    column = targets - columns.start
    is_inside = (column >= 0) & (targets < columns.stop)
    return is_inside, column.clamp(0, columns.stop - columns.start - 1)[:, None]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:
        total.add_(left.to(total.dtype) @ right.to(total.dtype))


# ---- inside a model ----------------------------------------------------------------------------------------------

_MAP = "_infopo_logit_map"
"""Attribute of a model for its measured `LogitMap`. It is None if no such map describes what the model does."""


Measure: TypeAlias = Callable[[Callable[[], Any]], Any]
"""Calls a measurement, or gives the result of another process that holds the weights."""


def learn_map(model: nn.Module, measure: Measure = lambda measurement: measurement()) -> None:
    """Measures what a model does to the logits of its head, by one token for which the head returns known numbers.

    Settings have other names and other senses in each architecture (Granite divides its logits by `logits_scaling`,
    HyperCLOVA X multiplies by it, MiniCPM3 divides the hidden states), so they are believed only if they explain the
    result. Otherwise a factor and a cap are measured. If these do not explain it, the head counts as not plain, so
    that the model's own logits are taken. A model that cannot be run so keeps what its settings say.

    Args:
        model: The model.
        measure: Calls the measurement. Processes whose weights are on the meta device get the result of another one,
            because all must compute the same.
    """
    base = base_of(model)
    if hasattr(base, _MAP):
        delattr(base, _MAP)
    head = plain_head(model)
    if head is None:
        return
    measured = measure(partial(_measured, base, head))
    if measured != "unknown":
        setattr(base, _MAP, measured)


def _measured(base: Any, head: nn.Module) -> "LogitMap | str | None":
    """Returns the map of a model's logits, None if no map describes them, or `unknown` if it cannot be run so."""
    calls: list[Tensor] = []

    def known_numbers(head: nn.Module, args: tuple[Tensor], logits: Tensor) -> Tensor:
        grid = torch.linspace(-100.0, 100.0, logits.numel(), dtype=torch.float32)
        # A large number shows the cap, and a small one, on which the cap has little effect, shows the factor.
        grid[0], grid[-1] = 1.0, 1e9
        calls.append(grid.reshape(logits.shape))
        return calls[-1].to(logits.device)

    handle = head.register_forward_hook(known_numbers)
    try:
        with torch.no_grad():
            ids = torch.zeros(1, 1, dtype=torch.long, device=base.get_input_embeddings().weight.device)
            mapped = base(input_ids=ids, use_cache=False).logits.float().cpu()
    except Exception:
        # Such a model keeps what its settings say, and the self-test at start-up still checks its numbers.
        return "unknown"
    finally:
        handle.remove()
    return _explained(LogitMap.of(base), calls, mapped)


def _explained(said: LogitMap, calls: list[Tensor], mapped: Tensor) -> LogitMap | None:
    """Returns the map, said by settings or measured, that turns the head's numbers into these logits, or None."""
    if len(calls) != 1 or calls[0].shape != mapped.shape:
        return None
    first, last = float(mapped.flatten()[0]), float(mapped.flatten()[-1])
    maps = [said, LogitMap(scale=first)]
    # If there is a cap, tanh has reached 1 at the last number, so that the last logit is the cap.
    if 0 < abs(first) < last < 1e6:
        maps.append(LogitMap(last * math.atanh(first / last), last))
    fits = (m for m in maps if torch.allclose(m.apply_(calls[0].clone()), mapped, rtol=1e-5, atol=1e-5))
    return next(fits, None)


def keep_out_of_graphs(model: nn.Module) -> None:
    """Makes `torch.compile` leave a model's head and its routers to Python, where hooks on them are seen.

    A compiled graph has the hooks that were there when it was made, and is not made again for others: those of
    `logps_of` on the head, and those by which transformers reads the logits of routers. A hook which must not be
    compiled ends the graph before the module, and the module then runs as without a compiler.
    """
    head = plain_head(model)
    for module in (*(() if head is None else (head,)), *router.recorded(model)):
        if not hasattr(module, _OUT_OF_GRAPHS):
            setattr(module, _OUT_OF_GRAPHS, module.register_forward_pre_hook(_as_it_is))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _as_it_is(module: nn.Module, args: Any) -> None:
    """A hook that changes nothing. Its name is that of the function which stays with the model, so that it pickles."""


def plain_head(model: nn.Module) -> nn.Linear | None:
    """Returns the output layer if its log-probs can be computed in tiles, else None.

    It must be a linear layer without adapter, quantisation or offloading, and the model may do no more to its logits
    than a `LogitMap` does.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> plain_head(LlamaForCausalLM(LlamaConfig(vocab_size=4, **tiny)))
        Linear(in_features=8, out_features=4, bias=False)
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


def _is_gathered(modules: Sequence[nn.Module], weight: Tensor) -> bool:
    """Returns whether FSDP2, and nothing else, has sharded the weight, which is then whole while the model runs."""
    if not hasattr(weight, "device_mesh"):
        return False
    from torch.distributed.fsdp import FSDPModule

    return weight.device_mesh.ndim == 1 and any(isinstance(module, FSDPModule) for module in modules)


def logps_of(
    model: nn.Module, positions: Int[Tensor, " scored"], targets: Int[Tensor, " scored"], **inputs: Any
) -> Float[Tensor, "scored *agreement"]:
    """Calls a model whose head computes the log-probs of `targets` at `positions` instead of logits.

    The chunked head runs in two hooks around the model's own head. They are there for this one call: weights that are
    sharded are whole only then, and the model is not changed afterwards.

    Args:
        model: A model with a `plain_head`, in any wrappers.
        positions: Indices into the flattened (rows, width) positions of the inputs. Each is one before its target.
        targets: Token ids.
        inputs: Keyword arguments of the model.

    Raises:
        LogpsError: The model does not call its output layer.
    """
    head = plain_head(model)
    assert head is not None
    logit_map = LogitMap.of(base_of(model))
    results: list[Tensor] = []
    states: list[Tensor] = []

    def before(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        states.append(args[0])
        # The head itself gets no position, so that it computes no logits.
        return (args[0][:, :0],)

    def after(head: nn.Linear, args: tuple[Tensor], no_logits: Tensor) -> Tensor:
        hidden = states.pop().flatten(0, 1)[positions]
        results.append(token_logps(hidden, head.weight, head.bias, targets, logit_map))
        if (measured := spread.wanted()) is not None:
            measured.add(*token_spread(hidden.detach(), head.weight, head.bias, logit_map))
        return _log_probs(results[-1])[None, :, None]

    if hasattr(head, _OUT_OF_GRAPHS):
        before, after = torch.compiler.disable(before), torch.compiler.disable(after)
    # This hook comes first among those after the head, because a wrapper shards the weight again in one of them.
    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after, prepend=True)]
    try:
        output = model(**inputs, **router.keywords(model))
    finally:
        for handle in handles:
            handle.remove()
    if len(results) != 1:
        raise LogpsError(
            f"{type(base_of(model)).__name__} does not call its output layer once: set logps_path to 'naive'"
        )
    # The model has applied its map to what the head returned, so its output is wrong and the result of the hook counts.
    # The gradient passes through the output too, because wrappers that gather weights for the backward pass wait there.
    router.note(output, inputs["attention_mask"])
    through_output = 0.0 * output.logits.flatten()
    return results[0] + (through_output if results[0].ndim == 1 else through_output[:, None])


def _log_probs(result: Float[Tensor, "scored *agreement"]) -> Float[Tensor, " scored"]:
    return result if result.ndim == 1 else result[:, 0]
