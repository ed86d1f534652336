"""PreferenceExamples -> PackedBatch: which tokens stand where, and who shares what. Knows no model.

A batch is a forest of token segments (see `PackedBatch`). Each example gives one tree: its prompt is the root, and
responses part where their tokens first differ, or whether these are scored. What is scored and what is context stands
in segments of its own, one following the other.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch

from infopo.records import PackedBatch, PreferenceExample, Role, Spans, response_indices


def pack(examples: Sequence[PreferenceExample]) -> PackedBatch:
    """Lays examples out as a forest; examples without any response are left out.

    What responses of a prompt have in common from their beginning is stored once. Each keeps at least its last token
    to itself, so that each ends in a leaf of its own.

    Raises:
        ValueError: An example has an empty prompt or an empty response (its first token could not be scored).
    """
    tokens: list[int] = []
    positions: list[int] = []
    start, parent, scored = [0], list[int](), list[bool]()
    leaf, role, owner, reference = list[int](), list[int](), list[int](), list[float]()
    examples = [example for example in examples if example.response_ids]

    def add_segment(ids: Sequence[int], parent_segment: int, first_position: int, is_scored: bool) -> int:
        if len(ids) == 0:
            raise ValueError(f"{row_id}: a prompt and each of its responses need at least one token")
        tokens.extend(ids)
        positions.extend(range(first_position, first_position + len(ids)))
        start.append(len(tokens))
        parent.append(parent_segment)
        scored.append(is_scored)
        return len(parent) - 1

    for index, example in enumerate(examples):
        row_id = example.row_id
        root = add_segment(example.prompt_ids, -1, 0, is_scored=False)
        responses = [
            marked(ids, spans) for ids, spans in zip(example.response_ids, example.spans, strict=True)
        ]
        branches, leaf_of = [root], dict[int, int]()
        for above, begin, end, holders in _branches(responses):
            segment, position = branches[above], len(example.prompt_ids) + begin
            for is_scored, run in _runs(responses[holders[0]][begin:end]):
                segment = add_segment(run, segment, position, is_scored)
                position += len(run)
            branches.append(segment)
            if len(holders) == 1:
                leaf_of[holders[0]] = branches[-1]
        leaf += [leaf_of[i] for i in range(len(responses))]
        owner += [index] * len(responses)
        role += example.roles
        reference += example.reference or [float("nan")] * len(example.response_ids)

    return _build(
        tokens, positions, start, parent, scored, leaf, role, owner, reference, [e.row_id for e in examples]
    )


def marked(ids: Sequence[int], context: Spans) -> list[int]:
    """The tokens of a response, in which those that are context stand as -1 - token.

    So one number says both what it is and whether it is scored, and two responses part where either differs.

    >>> marked([7, 8, 9], [(1, 2)])
    [7, -9, 9]
    """
    tokens = list(ids)
    for begin, end in context:
        tokens[begin:end] = [-1 - token for token in tokens[begin:end]]
    return tokens


def _runs(tokens: Sequence[int]) -> list[tuple[bool, list[int]]]:
    """Runs of scored tokens and of context, as `marked` has them; one empty run if there are no tokens."""
    runs = [(scored, list(run)) for scored, run in groupby(tokens, key=lambda token: token >= 0)]
    return [(scored, run if scored else [-1 - t for t in run]) for scored, run in runs] or [(True, [])]


def _branches(responses: Sequence[list[int]]) -> Iterator[tuple[int, int, int, list[int]]]:
    """The tree of common beginnings, depth first, so that a branch's first child follows it directly.

    Yields:
        Number of the branch that it grows from (0: the prompt, 1: the first one yielded), first token and end within
        its responses, and which responses hold it: one where it is a leaf.
    """
    pending = [(0, 0, group) for group in _part(responses, range(len(responses)), 0)[::-1]]
    number = 0
    while pending:
        above, begin, holders = pending.pop()
        held = [responses[i] for i in holders]
        end = len(held[0]) if len(held) == 1 else min(_common(held), *(len(ids) - 1 for ids in held))
        number += 1
        yield above, begin, end, holders
        if len(holders) > 1:
            pending += [(number, end, group) for group in _part(responses, holders, end)[::-1]]


def _common(responses: Sequence[list[int]]) -> int:
    """Number of tokens with which all begin: first and last in lexical order differ where any two do."""
    first, last = min(responses), max(responses)
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _part(responses: Sequence[list[int]], holders: Iterable[int], at: int) -> list[list[int]]:
    """Groups with the same token at this place; a response that has no more than this token left is on its own."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i in holders:
        key = (-1, i) if len(responses[i]) <= at + 1 else (0, responses[i][at])
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def split_by_tokens(
    examples: Sequence[PreferenceExample], max_tokens: int | None, shared: bool = False
) -> list[list[PreferenceExample]]:
    """Cuts the examples, in order, into runs of at most `max_tokens` tokens; a larger example stands alone.

    At least one run is returned.

    Args:
        examples: Of a device batch.
        max_tokens: Most tokens of a run; None: no limit.
        shared: Whether a prompt counts once, or once a response as in a padded row a response.
    """
    runs: list[list[PreferenceExample]] = [[]]
    used = 0
    for example in examples:
        responses = example.response_ids
        size = len(example.prompt_ids) * (1 if shared else len(responses)) + sum(map(len, responses))
        if runs[-1] and max_tokens is not None and used + size > max_tokens:
            runs.append([])
            used = 0
        runs[-1].append(example)
        used += size
    return runs


def select(batch: PackedBatch, responses: Sequence[int]) -> PackedBatch:
    """The same batch with these responses only: segments that no remaining path holds are dropped.

    Examples keep their numbers and names. Waits for the device.
    """
    kept = sorted({segment for response in responses for segment in batch.path(response)})
    number = {segment: new for new, segment in enumerate(kept)}
    token_index = [t for s in kept for t in range(batch.segment_start[s], batch.segment_start[s + 1])]
    start = [0]
    for s in kept:
        start.append(start[-1] + batch.segment_start[s + 1] - batch.segment_start[s])
    role, example, reference = batch.role.tolist(), batch.example.tolist(), batch.reference.tolist()
    return _build(
        batch.input_ids[token_index].tolist(),
        batch.position_ids[token_index].tolist(),
        start,
        [number.get(batch.segment_parent[s], -1) for s in kept],
        [batch.segment_scored[s] for s in kept],
        [number[batch.leaf[r]] for r in responses],
        [role[r] for r in responses],
        [example[r] for r in responses],
        [reference[r] for r in responses],
        batch.row_ids,
    ).to(batch.input_ids.device)


class PreferenceCollator:
    """Packs the examples of a device batch; picklable, so that data-loader workers can run it.

    Args:
        max_tokens: Upper bound on the tokens that go through the model at once; a larger device batch is run in
            several pieces, with the same loss and gradient. None: one piece.
        shared: Whether responses share their prompt in the model; see `split_by_tokens`.
    """

    def __init__(self, max_tokens: int | None = None, shared: bool = False) -> None:
        self.max_tokens = max_tokens
        self.shared = shared

    def __call__(self, examples: Sequence[PreferenceExample]) -> list[PackedBatch]:
        return [pack(run) for run in split_by_tokens(examples, self.max_tokens, self.shared)]


def _build(
    tokens: list[int],
    positions: list[int],
    start: list[int],
    parent: list[int],
    scored: list[bool],
    leaf: list[int],
    role: list[int],
    example: list[int],
    reference: Sequence[float],
    row_ids: Sequence[str],
) -> PackedBatch:
    own = [
        end - begin if is_scored else 0
        for begin, end, is_scored in zip(start, start[1:], scored, strict=False)
    ]
    length_to = list[int]()
    for segment, above in enumerate(parent):
        length_to.append(own[segment] + (length_to[above] if above >= 0 else 0))
    chosen, rejected, pairs = response_indices(role, example)
    chosen_tokens = sum(length_to[segment] for segment, r in zip(leaf, role, strict=True) if r == Role.CHOSEN)
    return PackedBatch(
        input_ids=torch.tensor(tokens, dtype=torch.int64),
        position_ids=torch.tensor(positions, dtype=torch.int64),
        segment_start=start,
        segment_parent=parent,
        segment_scored=scored,
        leaf=leaf,
        role=torch.tensor(role, dtype=torch.int64),
        example=torch.tensor(example, dtype=torch.int64),
        length=torch.tensor([length_to[segment] for segment in leaf], dtype=torch.int64),
        chosen=chosen,
        rejected=rejected,
        pairs=pairs,
        counts=torch.tensor(
            [len(pairs), len(chosen), len(rejected), chosen_tokens, len(chosen) + len(rejected)],
            dtype=torch.int64,
        ),
        reference=torch.tensor(list(reference), dtype=torch.float64),
        row_ids=tuple(row_ids),
    )
