"""Which tokens of a packed row attend to which."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention import flex_attention as flex


class ForestLayout:
    """Which tokens attend to which: runs of tokens, each with the runs that come before it on its path.

    A segment that follows its parent directly goes on with the parent's run; any other begins one. A token sees the
    context of its run and the tokens of the run up to itself: plain causal attention where there is no context.

    Attributes:
        sizes: Tokens of each run, in the order of the row.
        context: For each run, the (run, tokens) before it: the first `tokens` of that run, oldest first.
    """

    def __init__(self, segment_start: Sequence[int], segment_parent: Sequence[int]) -> None:
        """As in `PackedBatch`."""
        run_of, end_in_run = list[int](), list[int]()  # of each segment
        self.sizes: list[int] = []
        self.context: list[list[tuple[int, int]]] = []
        for segment, parent in enumerate(segment_parent):
            size = segment_start[segment + 1] - segment_start[segment]
            if parent >= 0 and parent == segment - 1:  # goes on where its parent ended
                run_of.append(run_of[parent])
                self.sizes[-1] += size
            else:
                above = run_of[parent] if parent >= 0 else None
                self.context.append(
                    [] if above is None else [*self.context[above], (above, end_in_run[parent])]
                )
                run_of.append(len(self.sizes))
                self.sizes.append(size)
            end_in_run.append(self.sizes[-1])
        self._segments = (segment_start, segment_parent)
        self._block_masks: dict[tuple[int | None, torch.device], Any] = {}
        self._ends: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, int, int | None, torch.device], Bool[Tensor, "queries keys"]] = {}

    def keys_of(self, run: int) -> int:
        """Number of tokens that the last token of a run sees."""
        return self.sizes[run] + sum(tokens for _, tokens in self.context[run])

    def ends(self, device: torch.device) -> tuple[Int[Tensor, " ends"], Int[Tensor, " ends"]]:
        """Where queries and keys of each run end, one run after the other, from 0 (int32)."""
        if device not in self._ends:
            runs = range(len(self.sizes))
            sizes = (self.sizes, [self.keys_of(run) for run in runs])
            queries, keys = (
                torch.tensor([0, *accumulate(s)], dtype=torch.int32, device=device) for s in sizes
            )
            self._ends[device] = queries, keys
        return self._ends[device]

    def mask(self, run: int, window: int | None, device: torch.device) -> Bool[Tensor, "queries keys"] | None:
        """Which keys each query of a run sees; None: plain causal attention.

        Args:
            run: Number of the run.
            window: Sliding window in tokens (distance < window), or None.
            device: Where the mask is needed.
        """
        queries = self.sizes[run]
        keys = self.keys_of(run)
        if queries == keys and (window is None or window >= keys):
            return None
        key = (queries, keys, window, device)
        if key not in self._masks:  # the same for every layer
            position = torch.arange(keys, device=device)
            distance = position[keys - queries :, None] - position
            seen = distance >= 0
            self._masks[key] = seen if window is None else seen & (distance < window)
        return self._masks[key]

    def block_mask(self, window: int | None, device: torch.device) -> Any:
        """Who sees whom in the whole row, as `flex_attention` takes it.

        Args:
            window: Sliding window in tokens (distance < window), or None.
            device: Where the mask is needed.
        """
        if (window, device) not in self._block_masks:  # the same for every layer
            position, first, end = (torch.tensor(values, device=device) for values in self._places())
            size = len(position)
            reach = size if window is None else window
            too_old = position - reach  # a tensor: each number would be compiled anew
            self._block_masks[window, device] = flex.create_block_mask(
                lambda batch, head, query, key: (
                    (first[key] <= first[query])
                    & (first[query] < end[key])
                    & (position[key] <= position[query])
                    & (position[key] > too_old[query])
                ),
                None, None, size, size, device,
            )  # fmt: skip
        return self._block_masks[window, device]

    def _places(self) -> tuple[list[int], list[int], list[int]]:
        """Of each token: its position on its path; its segment's number, counted depth first; and the number after
        the last segment beneath that one. So what lies beneath a segment is a range of numbers.
        """
        start, parents = self._segments
        sizes = [end - begin for begin, end in pairwise(start)]
        root = len(parents)  # also parents' -1: it holds all trees
        beneath, free, after = [1] * (root + 1), [0] * (root + 1), [0] * (root + 1)
        for segment in reversed(range(root)):
            beneath[parents[segment]] += beneath[segment]
        positions, firsts, ends = list[int](), list[int](), list[int]()
        for segment, parent in enumerate(parents):
            first, free[parent] = free[parent], free[parent] + beneath[segment]
            free[segment], after[segment] = first + 1, after[parent] + sizes[segment]
            positions += range(after[parent], after[segment])
            firsts += [first] * sizes[segment]
            ends += [first + beneath[segment]] * sizes[segment]
        return positions, firsts, ends
