"""Computes the reference log-probs of a dataset once, through `reference_store.py` or in memory.

Batches depend on the data alone, so that values have the same bits after a kill and on any number of ranks.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from infopo.data.examples import ExampleDataset
from infopo.data.packing import pack
from infopo.errors import LogpsError, ReferenceMismatchError
from infopo.lockstep import Lockstep
from infopo.logps.forward import response_lengths, token_logps
from infopo.logps.rounding import moved_by_rounding
from infopo.output import get_logger
from infopo.records import PreferenceExample, Role, Spans, sum_dtype
from infopo.reference import ROLE_OF, tolerance
from infopo.reference_store import ReferenceStore, Tokens, response_key, summed

logger = get_logger(__name__)

SECONDS_PER_SHARD = 30.0
"""Seconds of work per shard, which is about what a killed process loses at most."""

SPOT_CHECKS = 4
"""Number of stored responses that are computed again before any is used."""


def precompute(
    dataset: ExampleDataset,
    model: nn.Module,
    sides: frozenset[str],
    *,
    batch_size: int,
    device: torch.device,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    store: ReferenceStore | None = None,
    known: "Values | None" = None,
    rank: int = 0,
    world_size: int = 1,
    is_sharded: bool = False,
    add_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
    progress: Callable[[Iterable[list[int]]], Iterable[list[int]]] = lambda batches: batches,
) -> ExampleDataset:
    """Returns the dataset with log π_ref of `sides`, for which each distinct response is computed once.

    Examples run in order of length, so that little padding is computed. Batches depend on the dataset alone, neither on
    ranks nor on what an interrupted computation has left, so that the values do not depend on these either.

    Args:
        dataset: Examples to complete.
        model: The reference, in the precision in which it will be compared with the policy.
        sides: Sides to compute. The others stay NaN.
        batch_size: Number of examples per forward pass.
        device: Device of `model`.
        context: Context of each forward pass, e.g. autocast.
        store: Store in which values are looked up and kept, for all ranks and processes. None for memory only.
        known: (responses,) values that need not be computed, NaN for all others. None if there are none.
        rank: Index of this process.
        world_size: Number of processes.
        is_sharded: Whether each process holds a part of the model, so that all take part in each forward pass. The
            first then decides what is computed and uses the store for all.
        add_over_ranks: Sums a (responses,) tensor over the processes. Called for a model that each process holds as a
            whole, without a store.
        progress: Wraps the list of batches.

    Raises:
        ReferenceMismatchError: A stored value is not what the model gives now.
        ReferenceStoreError: The store cannot be read or written.
        LogpsError: A value is not finite, and would be stored.
    """
    is_known = np.zeros(dataset.num_responses, dtype=bool) if known is None else np.isfinite(known)
    work = _plan(dataset, _wanted(dataset, sides) & ~is_known, batch_size)
    passes = Lockstep(partial(_token_logps, dataset, model, device=device), rank, world_size)
    width = world_size if is_sharded else 1

    def values(score: Score) -> Values:
        """Returns log π_ref of each response, 0 if it is not wanted or another rank computes it."""
        if store is not None:
            _through_store(work, score, progress, store, dataset, width, model)
            return work.values({key: response.logp for key, response in store.found.items()})
        batches = work.batches if is_sharded else work.batches[rank::world_size]
        return work.values(_in_memory(work, batches, score, progress, width))

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), context():
            found = passes.lead(values) if is_sharded else values(passes.alone)
    finally:
        # In a notebook, the model is used further after an interruption.
        model.train(was_training)
    if store is None and world_size > 1 and not is_sharded:
        found = add_over_ranks(torch.from_numpy(found).to(device, sum_dtype(device))).double().cpu().numpy()
    if (broken := work.is_wanted & ~np.isfinite(found)).any():
        raise LogpsError(_not_finite(dataset, int(broken.argmax())))
    found = np.where(work.is_wanted, found, np.nan)
    return dataset.with_reference(found if known is None else np.where(is_known, known, found))


Values: TypeAlias = npt.NDArray[np.float64]
"""Log-probs, (responses,), in the order of a dataset's responses (nats)."""


@dataclass(frozen=True)
class _Work:
    """The responses to compute.

    Attributes:
        keys: Key of each response's content, or None if its side is not asked for.
        first: First response with each content.
        batches: Responses to run together, each content once.
    """

    keys: list[bytes | None]
    first: dict[bytes, int]
    batches: list[list[int]]

    @property
    def is_wanted(self) -> npt.NDArray[np.bool_]:
        """(responses,) whether a value is asked for."""
        return np.array([key is not None for key in self.keys], dtype=bool)

    def values(self, known: Mapping[bytes, float]) -> Values:
        """Returns the value of each response by its content, 0 if it is not known."""
        return np.array([0.0 if key is None else known.get(key, 0.0) for key in self.keys], dtype=np.float64)


Score = Callable[[Sequence[Sequence[int]]], list[list[Tokens]]]
"""Batches of responses -> log-probs of the tokens of each response of each batch."""


def _plan(dataset: ExampleDataset, is_wanted: npt.NDArray[np.bool_], batch_size: int) -> _Work:
    offsets = dataset.response_offsets
    keys: list[bytes | None] = [None] * dataset.num_responses
    first, batches, examples = dict[bytes, int](), list[list[int]](), batch_size
    for i in np.argsort(-dataset.lengths, kind="stable").tolist():
        new, example = list[int](), dataset[i]
        for response, ids in enumerate(example.response_ids, start=int(offsets[i])):
            if is_wanted[response]:
                spans = example.spans[response - int(offsets[i])]
                keys[response] = key = response_key(example.prompt_ids, ids, spans)
                if first.setdefault(key, response) == response:
                    new.append(response)
        if new and examples == batch_size:
            batches.append([])
            examples = 0
        if new:
            batches[-1] += new
            examples += 1
    return _Work(keys, first, batches)


def _wanted(dataset: ExampleDataset, sides: frozenset[str]) -> npt.NDArray[np.bool_]:
    """Returns which responses of the dataset belong to these sides, (responses,) bool."""
    return np.asarray(np.isin(dataset.roles, [int(ROLE_OF[side]) for side in sides]))


def _token_logps(
    dataset: ExampleDataset, model: nn.Module, responses: Sequence[int], *, device: torch.device
) -> list[Tokens]:
    """Returns log π_ref of each token of these responses of the dataset (nats), in their order.

    Args:
        dataset: Examples.
        model: The reference.
        responses: Indices of responses. Those of one example are next to each other, in its order.
        device: Device of `model`.
    """
    owner = np.searchsorted(dataset.response_offsets, responses, side="right") - 1
    parts = list[PreferenceExample]()
    for i in dict.fromkeys(owner.tolist()):
        example, start = dataset[i], int(dataset.response_offsets[i])
        sides: dict[Role, list[Sequence[int]]] = {role: [] for role in Role}
        context = list[Spans]()
        for response, example_index in zip(responses, owner.tolist(), strict=True):
            if example_index == i:
                sides[Role(dataset.roles[response])].append(example.response_ids[response - start])
                context.append(example.spans[response - start])
        chosen, rejected, kl = sides.values()
        parts.append(
            PreferenceExample(
                example.prompt_ids, chosen, rejected, example.row_id, kl_ids=kl, context=context
            )
        )
    batch = pack(parts).to(device)
    tokens = token_logps(model, batch).cpu()
    return [part.numpy() for part in tokens.split(response_lengths(batch))]


def _in_memory(
    work: _Work,
    batches: Sequence[list[int]],
    score: Score,
    progress: Callable[[Iterable[list[int]]], Iterable[list[int]]],
    width: int,
) -> dict[bytes, float]:
    """Returns log π_ref by content, of these batches, of which `width` are computed at once."""
    values: dict[bytes, float] = {}
    bar = iter(progress(batches))
    while group := list(islice(bar, width)):
        for responses, logps in zip(group, score(group), strict=True):
            for response, tokens in zip(responses, logps, strict=True):
                key = work.keys[response]
                assert key is not None
                values[key] = summed(tokens)
    return values


def _through_store(
    work: _Work,
    score: Score,
    progress: Callable[[Iterable[list[int]]], Iterable[list[int]]],
    store: ReferenceStore,
    dataset: ExampleDataset,
    width: int,
    model: nn.Module,
) -> None:
    """Fills `store.found` with what is stored, what this process computes, and what others compute meanwhile.

    Values are written in shards of about `SECONDS_PER_SHARD`, beginning with one batch. `queue` contains the batches
    that are not known to be stored. It shrinks by what this process claims and by what others have stored, and keeps
    what others have claimed, so that the values of a process that dies are computed by another. At least `width`
    batches are claimed at a time, which is how many `score` computes at once.
    """
    store.want(work.first)
    _spot_check(work, score, store, dataset, model)
    contents = [
        [key for response in batch if (key := work.keys[response]) is not None] for batch in work.batches
    ]
    queue = deque(keys for keys in contents if not all(key in store.found for key in keys))
    bar = iter(progress(work.batches))
    size, waited = width, 0.0
    while queue:
        before = len(queue)
        with store.claim(queue, size) as claimed:
            begin = time.perf_counter()
            values = dict[bytes, Tokens]()
            batches = [[work.first[key] for key in keys] for keys in claimed]
            for keys, logps in zip(claimed, score(batches), strict=True):
                values |= zip(keys, logps, strict=True)
            if values:
                _refuse_non_finite(values, work, dataset)
                store.add(values)
                waited, seconds = 0.0, max(time.perf_counter() - begin, 1e-3)
                size = max(width, min(2 * size, int(size * SECONDS_PER_SHARD / seconds)))
        for _ in range(before - len(queue)):
            next(bar, None)
        if queue and not claimed:
            # All that is left is being computed by others.
            if waited == 0.0:
                logger.warning(
                    "reference store: %d batches that this run needs are being computed by another run (%s); waiting "
                    "for its results", len(queue), store.claimants(),
                )  # fmt: skip
            waited += _pause(waited)
    for _ in bar:
        pass
    store.note_use()


def _pause(waited: float) -> float:
    """Sleeps for a moment, longer after a longer wait, and returns the seconds."""
    seconds = min(2.0, 0.1 + waited / 10)
    time.sleep(seconds)
    return seconds


def _refuse_non_finite(values: dict[bytes, Tokens], work: _Work, dataset: ExampleDataset) -> None:
    for key, tokens in values.items():
        if not np.isfinite(tokens).all():
            raise LogpsError(_not_finite(dataset, work.first[key]))


def _not_finite(dataset: ExampleDataset, response: int) -> str:
    return (
        f"{_row(dataset, response)}: log π_ref is not finite, and is not stored: the reference's weights hold NaN or "
        "inf, or its precision is too low"
    )


def _row(dataset: ExampleDataset, response: int) -> str:
    example = int(np.searchsorted(dataset.response_offsets, response, side="right")) - 1
    side = next(side for side, role in ROLE_OF.items() if role == dataset.roles[response])
    return f"{dataset.row_ids[example]} ({side})"


def _sums(score: Score, responses: list[int]) -> Tensor:
    return torch.tensor([summed(tokens) for tokens in score([responses])[0]], dtype=torch.float64)


def _spot_check(
    work: _Work, score: Score, store: ReferenceStore, dataset: ExampleDataset, model: nn.Module
) -> None:
    """Computes a few stored responses again, because stored values must be those that this model gives here and now.

    They are chosen at random, so that in time all are checked. The global random generators are not used.
    """
    stored = list(store.found)
    chosen = random.Random(time.time_ns()).sample(stored, min(SPOT_CHECKS, len(stored)))
    for key, (tokens,) in zip(chosen, score([[work.first[key]] for key in chosen]), strict=True):
        there, here = store.found[key], summed(tokens)
        allowed = tolerance(len(tokens), is_exact=store.identity.is_exact)
        if not abs(there.logp - here) <= allowed:
            # No run is refused for what rounding does to this very response.
            again = partial(_sums, score, [work.first[key]])
            allowed = max(allowed, float(moved_by_rounding(model, again)))
        if not abs(there.logp - here) <= allowed:
            raise ReferenceMismatchError(
                f"{_row(dataset, work.first[key])}: {store.folder / there.shard} holds log π_ref = {there.logp:.6g}, "
                f"but the reference now gives {here:.6g} nats; expected a difference of at most {allowed:.2g}. The "
                "same weights compute another function here: other versions of torch or transformers, or a faulty "
                "device (provenance.json beside the shard says where it came from). Remove the values with `infopo "
                f"reference --prune {store.identity.digest[:8]}`, or set reference.store to another folder or to off"
            )
