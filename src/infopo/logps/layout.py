"""Says which tokens of a packed row attend to which, in the forms that the kernels need."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from infopo.records import to_device


@dataclass(frozen=True)
class KeyIndex:
    """Where the keys that each run sees come from, for kernels that take the keys of all runs one after the other.

    Attributes:
        ends_of_queries: Cumulative number of queries, run after run, beginning with 0.
        ends_of_keys: Likewise of keys.
        source: For each of these keys, its token.
        own: For each token, its place among the keys of its own run.
        copies: Further places of tokens, for which the gradients of all places add up. Each entry is a pair of
            tokens and their places, in which no token appears twice.
    """

    ends_of_queries: Int[Tensor, " ends"]
    ends_of_keys: Int[Tensor, " ends"]
    source: Int[Tensor, " keys"]
    own: Int[Tensor, " tokens"]
    copies: tuple[tuple[Tensor, Tensor], ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Returns all tensors in the order that `of_tensors` takes."""
        copies = (tensor for pair in self.copies for tensor in pair)
        return (self.ends_of_queries, self.ends_of_keys, self.source, self.own, *copies)

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor]) -> "KeyIndex":
        """Makes the index of these tensors."""
        copies = tuple(zip(tensors[4::2], tensors[5::2], strict=True))
        return cls(tensors[0], tensors[1], tensors[2], tensors[3], copies)


BLOCK = 128
"""Number of queries and of keys in a block of `flex_attention`'s masks."""


class ForestLayout:
    """Divides a packed row into runs, and lists for each run what its tokens see before it.

    Kernels want few and long calls. A segment that directly follows its parent in the row therefore extends the
    parent's run, and any other segment begins a new one. A token attends to the context of its run and to the tokens of
    the run up to and including itself. If the context is empty, this is plain causal attention.

    Attributes:
        sizes: Number of tokens of each run, in the order of the row.
        context: For each run, the parts of other runs that come before it on its path, oldest first. An entry
            (run, tokens) means the first `tokens` tokens of that run.

    Example:
        A prompt of three tokens has two responses of two tokens each. The first response extends the prompt's run. The
        second one is a run of its own, whose context is the prompt.

        >>> layout = ForestLayout(segment_start=[0, 3, 5, 7], segment_parent=[-1, 0, 0])
        >>> layout.sizes, layout.context
        ([5, 2], [[], [(0, 3)]])
        >>> layout.keys_of(1)
        5
    """

    def __init__(self, segment_start: Sequence[int], segment_parent: Sequence[int]) -> None:
        """Takes the fields of a `PackedBatch` that describe its segments.

        Args:
            segment_start: First token of each segment, and the number of tokens at the end.
            segment_parent: Parent of each segment, -1 for a root. A parent comes before its children.
        """
        # For each segment: the run that contains it, and the tokens of that run up to the segment's end.
        run_of, end_in_run = list[int](), list[int]()
        self.sizes: list[int] = []
        self.context: list[list[tuple[int, int]]] = []
        for segment, parent in enumerate(segment_parent):
            size = segment_start[segment + 1] - segment_start[segment]
            if parent >= 0 and parent == segment - 1:
                # The parent is the segment just before, so it ends its run, and this segment can extend that run.
                run_of.append(run_of[parent])
                self.sizes[-1] += size
            else:
                # The parent's run may go on past the parent (with its first child), which this segment must not see.
                above = run_of[parent] if parent >= 0 else None
                self.context.append(
                    [] if above is None else [*self.context[above], (above, end_in_run[parent])]
                )
                run_of.append(len(self.sizes))
                self.sizes.append(size)
            end_in_run.append(self.sizes[-1])
        self._segments = (segment_start, segment_parent)
        # Every layer asks for the same tensors, so each is made once.
        self._block_masks: dict[tuple[int | None, torch.device], Any] = {}
        self._key_index: dict[torch.device, KeyIndex] = {}
        self._masks: dict[tuple[int, int, int | None, torch.device], Bool[Tensor, "queries keys"]] = {}

    def keys_of(self, run: int) -> int:
        """Returns how many tokens the last token of a run sees, itself included."""
        return self.sizes[run] + sum(tokens for _, tokens in self.context[run])

    def key_index(self, device: torch.device | str = "cpu") -> KeyIndex:
        """Returns which keys each run sees. It is made once per device, unless `place` has brought it."""
        device = torch.device(device)
        if device not in self._key_index:
            host = self._list_keys() if device.type == "cpu" else self.key_index()
            self._key_index[device] = KeyIndex.of_tensors(to_device(host.tensors, device))
        return self._key_index[device]

    def place(self, index: KeyIndex) -> None:
        """Keeps an index that is on its device already."""
        self._key_index[index.source.device] = index

    def _list_keys(self) -> KeyIndex:
        starts = [0, *accumulate(self.sizes)]
        keys = [self.keys_of(run) for run in range(len(self.sizes))]
        source, own = list[np.ndarray](), list[np.ndarray]()
        used = [0] * len(self.sizes)
        copies: list[tuple[list[np.ndarray], list[np.ndarray]]] = []
        place = 0
        for run, size in enumerate(self.sizes):
            for other, tokens in self.context[run]:
                piece = np.arange(starts[other], starts[other] + tokens)
                # The n-th run that sees another run goes to the n-th entry, so that no entry has a token twice.
                if used[other] == len(copies):
                    copies.append(([], []))
                copies[used[other]][0].append(piece)
                copies[used[other]][1].append(np.arange(place, place + tokens))
                used[other] += 1
                source.append(piece)
                place += tokens
            source.append(np.arange(starts[run], starts[run] + size))
            own.append(np.arange(place, place + size))
            place += size
        return KeyIndex(
            torch.tensor([0, *accumulate(self.sizes)]),
            torch.tensor([0, *accumulate(keys)]),
            _joined(source),
            _joined(own),
            tuple((_joined(tokens), _joined(places)) for tokens, places in copies),
        )

    def mask(self, run: int, window: int | None, device: torch.device) -> Bool[Tensor, "queries keys"] | None:
        """Returns which keys each query of a run sees, or None if that is plain causal attention.

        Args:
            run: Index of the run.
            window: Sliding window in tokens (distance < window), or None.
            device: Device of the mask.
        """
        queries = self.sizes[run]
        keys = self.keys_of(run)
        if queries == keys and (window is None or window >= keys):
            return None
        key = (queries, keys, window, device)
        if key not in self._masks:
            position = torch.arange(keys, device=device)
            distance = position[keys - queries :, None] - position
            seen = distance >= 0
            self._masks[key] = seen if window is None else seen & (distance < window)
        return self._masks[key]

    def block_mask(self, window: int | None, device: torch.device) -> Any:
        """Returns which token of the whole row sees which, as a `BlockMask` for `flex_attention`.

        Blocks are listed from the runs. Comparing each pair of tokens, as `create_block_mask` does, would take memory
        that grows with the square of the row.

        Args:
            window: Sliding window in tokens (distance < window), or None.
            device: Device of the mask.
        """
        if (window, device) not in self._block_masks:
            position, first, end = (torch.tensor(values) for values in self._subtree_indices())
            partial, full = self.blocks(window)
            counts = [torch.from_numpy(each.sum(1).astype(np.int64)) for each in (partial, full)]
            # The blocks that are seen come first, in order, as the kernel reads them.
            order = [torch.from_numpy(np.argsort(~each, axis=1, kind="stable")) for each in (partial, full)]
            moved = to_device([position, first, end, *counts, *order], device)
            position, first, end = moved[:3]
            tables = [t.to(torch.int32)[None, None] for t in moved[3:]]
            size = len(position)
            reach = size if window is None else window
            # The window enters as a tensor, because flex_attention would be compiled again for each Python number.
            too_old = position - reach
            # A query sees a key if its segment lies in the subtree of the key's segment and its position is no earlier.
            self._block_masks[window, device] = flex.BlockMask.from_kv_blocks(
                tables[0], tables[2], tables[1], tables[3], BLOCK,
                lambda batch, head, query, key: (
                    (first[key] <= first[query])
                    & (first[query] < end[key])
                    & (position[key] <= position[query])
                    & (position[key] > too_old[query])
                ),
                (size, size),
            )  # fmt: skip
        return self._block_masks[window, device]

    def blocks(self, window: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Returns which blocks of keys the queries of each block see in part, and which they see as a whole.

        Both are (blocks, blocks) bool, queries by keys, with `BLOCK` tokens a block. A block that is listed as seen in
        part may be seen as a whole: the kernel then asks for each pair of tokens.
        """
        starts = [0, *accumulate(self.sizes)]
        count = -(-starts[-1] // BLOCK)
        some, whole = (np.zeros((count, count), dtype=bool) for _ in range(2))
        for run, size in enumerate(self.sizes):
            before = self.keys_of(run) - size
            pieces = [*self.context[run], (run, size)]
            for block in range(starts[run] // BLOCK, -(-(starts[run] + size) // BLOCK)):
                # Queries of the block that are in this run, and the first and last of their positions.
                begin, end = max(block * BLOCK, starts[run]), min((block + 1) * BLOCK, starts[run] + size)
                lowest, highest = before + begin - starts[run], before + end - 1 - starts[run]
                is_all = end - begin == BLOCK
                place = 0
                for other, tokens in pieces:
                    # Positions of the keys of this piece that the queries see some of, and see all of.
                    since = 0 if window is None else max(0, lowest - window + 1)
                    _mark(
                        some[block],
                        starts[other] - place,
                        max(place, since),
                        min(place + tokens, highest + 1),
                    )
                    if is_all:
                        since = 0 if window is None else max(0, highest - window + 1)
                        _mark(
                            whole[block], starts[other] - place, max(place, since),
                            min(place + tokens, lowest + 1), whole=True,
                        )  # fmt: skip
                    place += tokens
        return some & ~whole, whole

    def _subtree_indices(self) -> tuple[list[int], list[int], list[int]]:
        """Returns three lists, one entry per token, with which one comparison tells whether a segment is an ancestor.

        They are the token's position within its path, the pre-order index of its segment, and the end (exclusive) of
        the range of indices that the segment's subtree has.
        """
        start, parents = self._segments
        sizes = [end - begin for begin, end in pairwise(start)]
        # One more entry stands for a common root above all trees. A parent of -1 finds it, because it is the last.
        root = len(parents)
        subtree_size, next_index, path_length = [1] * (root + 1), [0] * (root + 1), [0] * (root + 1)
        for segment in reversed(range(root)):
            subtree_size[parents[segment]] += subtree_size[segment]
        positions, firsts, ends = list[int](), list[int](), list[int]()
        for segment, parent in enumerate(parents):
            # Each child takes the next free range of its parent's indices, as long as its own subtree.
            first = next_index[parent]
            next_index[parent] += subtree_size[segment]
            next_index[segment] = first + 1
            path_length[segment] = path_length[parent] + sizes[segment]
            positions += range(path_length[parent], path_length[segment])
            firsts += [first] * sizes[segment]
            ends += [first + subtree_size[segment]] * sizes[segment]
        return positions, firsts, ends


def _joined(pieces: Sequence[np.ndarray]) -> Tensor:
    # A rank that ran short of rows has no tokens, and no pieces.
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *pieces]).astype(np.int64))


def _mark(row: np.ndarray, shift: int, begin: int, end: int, *, whole: bool = False) -> None:
    """Marks the blocks with keys of these positions; only those that lie within, if `whole`. Keys are shifted ones."""
    begin, end = begin + shift, end + shift
    if begin < end:
        first, last = (-(-begin // BLOCK), end // BLOCK) if whole else (begin // BLOCK, -(-end // BLOCK))
        row[first : max(first, last)] = True
