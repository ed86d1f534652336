"""Encoded rows in memory: flat arrays instead of one object a token list. What samplers and loaders index."""

import copy
import hashlib
import operator
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from infopo.records import EMPTY_EXAMPLE, PreferenceExample, Role


class ExampleDataset(Dataset[PreferenceExample]):
    """Preference examples, stored as flat token arrays with offsets.

    Indices from `len(self)` on give `EMPTY_EXAMPLE`: a rank that runs short of rows takes one of those, where a
    sampler that evens out ranks would have to repeat an example and weigh it twice.

    Attributes:
        response_offsets: (examples + 1,) first response of each example, and the number of responses at the end.
        roles: (responses,) `Role` of each response; within an example, chosen come first.
        row_ids: Name of each example's row.
        reference: (responses,) float64 log π_ref of each response (nats), NaN where not computed; None: not computed.
    """

    def __init__(
        self,
        prompt_tokens: npt.NDArray[np.int32],
        prompt_offsets: npt.NDArray[np.int64],
        response_tokens: npt.NDArray[np.int32],
        token_offsets: npt.NDArray[np.int64],
        response_offsets: npt.NDArray[np.int64],
        roles: npt.NDArray[np.int8],
        row_ids: list[str],
        reference: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """Takes finished arrays; `from_examples` makes them.

        Args:
            prompt_tokens: Tokens of all prompts, one prompt after the other.
            prompt_offsets: (examples + 1,) where each prompt begins in them, and where the last ends.
            response_tokens: Tokens of all responses.
            token_offsets: (responses + 1,) where each response begins in them, and where the last ends.
            response_offsets: See the class.
            roles: See the class.
            row_ids: See the class.
            reference: See the class.
        """
        self._prompt_tokens = prompt_tokens
        self._prompt_offsets = prompt_offsets
        self._response_tokens = response_tokens
        self._token_offsets = token_offsets
        self.response_offsets = response_offsets
        self.roles = roles
        self.row_ids = row_ids
        self.reference = reference

    @classmethod
    def from_examples(cls, examples: Iterable[PreferenceExample]) -> "ExampleDataset":
        """Collects examples, in their order, holding no more than one of them at a time."""
        prompt_tokens, response_tokens = array("i"), array("i")
        prompt_offsets, token_offsets, response_offsets = array("q", [0]), array("q", [0]), array("q", [0])
        roles, row_ids, reference = array("b"), list[str](), array("d")
        has_reference = False
        for example in examples:
            prompt_tokens.extend(example.prompt_ids)
            prompt_offsets.append(len(prompt_tokens))
            for ids in example.response_ids:
                response_tokens.extend(ids)
                token_offsets.append(len(response_tokens))
            roles.extend(
                [Role.CHOSEN] * len(example.chosen_ids) + [Role.REJECTED] * len(example.rejected_ids)
            )
            response_offsets.append(len(roles))
            row_ids.append(example.row_id)
            has_reference |= example.reference is not None
            reference.extend(example.reference or [np.nan] * len(example.response_ids))
        return cls(
            np.array(prompt_tokens, dtype=np.int32),
            np.array(prompt_offsets, dtype=np.int64),
            np.array(response_tokens, dtype=np.int32),
            np.array(token_offsets, dtype=np.int64),
            np.array(response_offsets, dtype=np.int64),
            np.array(roles, dtype=np.int8),
            row_ids,
            np.array(reference, dtype=np.float64) if has_reference else None,
        )

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: SupportsIndex) -> PreferenceExample:
        """The example at `index`, or `EMPTY_EXAMPLE` from `len(self)` on.

        Raises:
            IndexError: The index is negative.
        """
        i = operator.index(index)
        if i < 0:
            raise IndexError(f"expected an index >= 0, got {i}")
        if i >= len(self):
            return EMPTY_EXAMPLE
        first, end = self.response_offsets[i : i + 2].tolist()
        responses = [self._response(j) for j in range(first, end)]
        num_chosen = int(np.count_nonzero(self.roles[first:end] == Role.CHOSEN))
        return PreferenceExample(
            prompt_ids=self._prompt_tokens[self._prompt_offsets[i] : self._prompt_offsets[i + 1]].tolist(),
            chosen_ids=responses[:num_chosen],
            rejected_ids=responses[num_chosen:],
            row_id=self.row_ids[i],
            reference=None if self.reference is None else self.reference[first:end].tolist(),
        )

    def __iter__(self) -> Iterator[PreferenceExample]:
        # Without it Python iterates until IndexError, which `__getitem__` never raises.
        return (self[i] for i in range(len(self)))

    def _response(self, index: int) -> list[int]:
        ids: list[int] = self._response_tokens[
            self._token_offsets[index] : self._token_offsets[index + 1]
        ].tolist()
        return ids

    @property
    def num_responses(self) -> int:
        """Number of responses of all examples."""
        return len(self.roles)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(examples,) tokens of each example: its prompt once, and all its responses."""
        ends = self._token_offsets[self.response_offsets]
        return np.asarray(np.diff(self._prompt_offsets) + np.diff(ends), dtype=np.int64)

    @cached_property
    def longest_row(self) -> int:
        """Most tokens of a prompt with one of its responses."""
        prompts = np.repeat(np.diff(self._prompt_offsets), np.diff(self.response_offsets))
        return int((prompts + np.diff(self._token_offsets)).max(initial=0))

    @cached_property
    def largest_token_id(self) -> int:
        """Largest token id of all prompts and responses."""
        return int(max(self._prompt_tokens.max(initial=0), self._response_tokens.max(initial=0)))

    def with_reference(self, values: npt.NDArray[np.float64]) -> "ExampleDataset":
        """The same examples with reference log-probs; the tokens are shared, not copied.

        Args:
            values: (responses,) float64 log π_ref of each response (nats), examples in order, chosen first; NaN where
                not computed.

        Raises:
            ValueError: The array has another shape.
        """
        if values.shape != (self.num_responses,):
            raise ValueError(
                f"expected {self.num_responses} reference log-probs, got an array of shape {values.shape}"
            )
        other = copy.copy(self)
        other.reference = values.astype(np.float64)
        return other

    def content_hash(self) -> str:
        """SHA-256 of tokens and roles, which says whether two datasets are the same to a model.

        Names of rows and reference values do not count. The same on every machine.
        """
        digest = hashlib.sha256()
        for values in (
            self._prompt_offsets,
            self._prompt_tokens,
            self.response_offsets,
            self.roles,
            self._token_offsets,
            self._response_tokens,
        ):
            # Each array with its length: else tokens could move from one array to the next unseen.
            digest.update(len(values).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).data)
        return digest.hexdigest()
