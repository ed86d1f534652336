"""Packs PreferenceExamples into a PackedBatch, in which responses share their common beginnings. Knows no model.

A batch is a forest of token segments (see `PackedBatch`). Each example is one tree. Its prompt is the root, and
responses branch where their tokens first differ, or where one is scored and the other is not. Scored tokens and context
are in segments of their own, one after the other.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, groupby

import torch

from infopo.records import PackedBatch, Plan, PreferenceExample, Role, Spans, response_indices, to_device


def pack(examples: Sequence[PreferenceExample]) -> PackedBatch:
    """Lays examples out as a forest. Examples without any response are left out.

    The common beginning of a prompt's responses is stored once. Each response keeps at least its last token to itself,
    so that each ends in a leaf of its own.

    Raises:
        ValueError: An example has an empty prompt or an empty response (its first token could not be scored).

    Example:
        >>> batch = pack([PreferenceExample([5, 6], [[7, 8, 9]], [[7, 8, 4]], "pairs.jsonl:1")])
        >>> batch.input_ids.tolist()  # the prompt, the common beginning, and the rest of each response
        [5, 6, 7, 8, 9, 4]
        >>> batch.segment_parent, batch.leaf
        ([-1, 0, 1, 1], [2, 3])
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
        for above, begin, end, sharing in _branches(responses):
            segment, position = branches[above], len(example.prompt_ids) + begin
            for is_scored, run in _runs(responses[sharing[0]][begin:end]):
                segment = add_segment(run, segment, position, is_scored)
                position += len(run)
            branches.append(segment)
            if len(sharing) == 1:
                leaf_of[sharing[0]] = branches[-1]
        leaf += [leaf_of[i] for i in range(len(responses))]
        owner += [index] * len(responses)
        role += example.roles
        reference += example.reference or [float("nan")] * len(example.response_ids)

    return _build(
        tokens, positions, start, parent, scored, leaf, role, owner, reference, [e.row_id for e in examples]
    )


def marked(ids: Sequence[int], context: Spans) -> list[int]:
    """Returns the tokens of a response, in which those that are context are replaced by -1 - token.

    One number then says both which token it is and whether it is scored, and responses branch where either differs.

    Example:
        >>> marked([7, 8, 9], [(1, 2)])
        [7, -9, 9]
    """
    tokens = list(ids)
    for begin, end in context:
        tokens[begin:end] = [-1 - token for token in tokens[begin:end]]
    return tokens


def _runs(tokens: Sequence[int]) -> list[tuple[bool, list[int]]]:
    """Returns the runs of scored tokens and of context in the result of `marked`, or one empty run without tokens."""
    runs = [(scored, list(run)) for scored, run in groupby(tokens, key=lambda token: token >= 0)]
    return [(scored, run if scored else [-1 - t for t in run]) for scored, run in runs] or [(True, [])]


def _branches(responses: Sequence[list[int]]) -> Iterator[tuple[int, int, int, list[int]]]:
    """Yields the tree of common beginnings, depth first, so that a branch's first child directly follows it.

    That order matters for speed: a segment that directly follows its parent extends the parent's run (`ForestLayout`).

    Yields:
        Number of the parent branch (0 is the prompt, 1 the first branch yielded), first token and end (exclusive)
        within the responses, and the indices of the responses that share the branch. A leaf has one.
    """
    # The stack takes groups in reverse, so that they are popped in order.
    pending = [(0, 0, group) for group in _groups(responses, range(len(responses)), 0)[::-1]]
    number = 0
    while pending:
        above, begin, sharing = pending.pop()
        tokens = [responses[i] for i in sharing]
        # Each response keeps its last token for a leaf of its own.
        end = len(tokens[0]) if len(tokens) == 1 else min(_common(tokens), *(len(ids) - 1 for ids in tokens))
        number += 1
        yield above, begin, end, sharing
        if len(sharing) > 1:
            pending += [(number, end, group) for group in _groups(responses, sharing, end)[::-1]]


def _common(responses: Sequence[list[int]]) -> int:
    """Returns the number of tokens with which all begin.

    The first and the last in lexical order differ where any two differ, so comparing these two is enough.
    """
    first, last = min(responses), max(responses)
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _groups(responses: Sequence[list[int]], indices: Iterable[int], at: int) -> list[list[int]]:
    """Groups responses by their token at this position. A response that ends with this token is a group of its own."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i in indices:
        key = (-1, i) if len(responses[i]) <= at + 1 else (0, responses[i][at])
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def split_by_tokens(
    examples: Sequence[PreferenceExample], max_tokens: int | None, shared: bool = False
) -> list[list[PreferenceExample]]:
    """Splits the examples, in order, into pieces of at most `max_tokens` tokens. A larger example is a piece alone.

    At least one piece is returned.

    Args:
        examples: Examples of a device batch.
        max_tokens: Largest number of tokens of a piece, or None for no limit.
        shared: Whether a prompt counts once. Otherwise it counts once per response, as in padded rows.

    Example:
        >>> pair = PreferenceExample([5, 6], [[7, 8]], [[9]], "pairs.jsonl:1")
        >>> [len(piece) for piece in split_by_tokens([pair] * 3, max_tokens=10, shared=True)]
        [2, 1]
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
    """Returns the same batch with these responses only, without segments that are in no remaining path.

    Examples keep their indices and names. It does not synchronise with a GPU.
    """
    kept = sorted({segment for response in responses for segment in batch.path(response)})
    number = {segment: new for new, segment in enumerate(kept)}
    spans = [(batch.segment_start[s], batch.segment_start[s + 1]) for s in kept]
    tokens = [place for span in spans for place in range(*span)]
    device = batch.input_ids.device
    places, chosen = to_device(
        [torch.tensor(tokens, dtype=torch.int64), torch.tensor(list(responses), dtype=torch.int64)], device
    )
    part = _build(
        tokens,
        tokens,
        [0, *accumulate(end - begin for begin, end in spans)],
        [number.get(batch.segment_parent[s], -1) for s in kept],
        [batch.segment_scored[s] for s in kept],
        [number[batch.leaf[r]] for r in responses],
        [batch.roles[r] for r in responses],
        [batch.owners[r] for r in responses],
        [float("nan")] * len(responses),
        batch.row_ids,
    ).to(device)
    return replace(
        part,
        input_ids=batch.input_ids[places],
        position_ids=batch.position_ids[places],
        reference=batch.reference[chosen],
    )


class PreferenceCollator:
    """Packs the examples of a device batch. It can be pickled, so that data-loader workers can run it.

    Args:
        max_tokens: Largest number of tokens that go through the model at once. A larger device batch is run in several
            pieces, with the same loss and gradient. None for one piece.
        shared: Whether responses share their prompt in the model (see `split_by_tokens`).
        plan: Makes the `plan` of a batch, so that the host makes it ahead of the step.
    """

    def __init__(
        self,
        max_tokens: int | None = None,
        shared: bool = False,
        plan: Callable[[PackedBatch], Plan] | None = None,
    ) -> None:
        self.max_tokens = max_tokens
        self.shared = shared
        self.plan = plan

    def __call__(self, examples: Sequence[PreferenceExample]) -> list[PackedBatch]:
        pieces = [pack(run) for run in split_by_tokens(examples, self.max_tokens, self.shared)]
        return pieces if self.plan is None else [replace(b, plan=self.plan(b)) for b in pieces]


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
        roles=[int(r) for r in role],
        owners=example,
    )
