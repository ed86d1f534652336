"""Says which tokens of a packed row attend to which, in the forms that the kernels need."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention import flex_attention as flex


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
        self._ends: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, int, int | None, torch.device], Bool[Tensor, "queries keys"]] = {}

    def keys_of(self, run: int) -> int:
        """Returns how many tokens the last token of a run sees, itself included."""
        return self.sizes[run] + sum(tokens for _, tokens in self.context[run])

    def ends(self, device: torch.device) -> tuple[Int[Tensor, " ends"], Int[Tensor, " ends"]]:
        """Returns the cumulative numbers of queries and of keys, run after run, beginning with 0 (int32).

        These are `cu_seq_q` and `cu_seq_k` of `varlen_attn`.
        """
        if device not in self._ends:
            runs = range(len(self.sizes))
            sizes = (self.sizes, [self.keys_of(run) for run in runs])
            queries, keys = (
                torch.tensor([0, *accumulate(s)], dtype=torch.int32, device=device) for s in sizes
            )
            self._ends[device] = queries, keys
        return self._ends[device]

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

        Args:
            window: Sliding window in tokens (distance < window), or None.
            device: Device of the mask.
        """
        if (window, device) not in self._block_masks:
            indices = self._subtree_indices()
            position, first, end = (torch.tensor(values, device=device) for values in indices)
            size = len(position)
            reach = size if window is None else window
            # The window enters as a tensor, because flex_attention would be compiled again for each Python number.
            too_old = position - reach
            # A query sees a key if its segment lies in the subtree of the key's segment and its position is no earlier.
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
