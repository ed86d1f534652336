"""Encoded rows in memory, as the dataset that samplers and loaders index.

Tokens are in flat arrays with offsets, because a Python object per token list would take several times the memory.
"""

import copy
import hashlib
import operator
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from infopo.errors import DataError
from infopo.records import EMPTY_EXAMPLE, PreferenceExample, Role, Spans, cut_response


class ExampleDataset(Dataset[PreferenceExample]):
    """Preference examples, stored as flat token arrays with offsets.

    An index of `len(self)` or more returns `EMPTY_EXAMPLE`. A rank that runs short of rows takes one of those. Without
    them, a sampler would have to repeat examples to even out the ranks, and would give these examples twice the weight.

    Attributes:
        response_offsets: (examples + 1,) first response of each example, and the number of responses at the end.
        roles: (responses,) `Role` of each response. Within an example, chosen come first and mismatched last.
        row_ids: Name of each example's row.
        reference: (responses,) float64 log π_ref of each response (nats), NaN if it was not computed. None if none was.
        context: (spans, 3) index of a response, and begin and end within it, of each span that is not scored, in order.
            None if all tokens of all responses are scored.

    Example:
        >>> pair = PreferenceExample(prompt_ids=[5, 6], chosen_ids=[[7, 8]], rejected_ids=[[9]], row_id="a.jsonl:1")
        >>> dataset = ExampleDataset.from_examples([pair])
        >>> len(dataset), dataset.num_responses, dataset.lengths.tolist()
        (1, 2, [5])
        >>> dataset[0].chosen_ids, dataset[1] == EMPTY_EXAMPLE
        ([[7, 8]], True)
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
        context: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Takes finished arrays, which `from_examples` makes.

        Args:
            prompt_tokens: Tokens of all prompts, one prompt after the other.
            prompt_offsets: (examples + 1,) index at which each prompt begins in `prompt_tokens`, and its length.
            response_tokens: Tokens of all responses, one response after the other.
            token_offsets: (responses + 1,) index at which each response begins in `response_tokens`, and its length.
            response_offsets: See the class.
            roles: See the class.
            row_ids: See the class.
            reference: See the class.
            context: See the class.
        """
        self._prompt_tokens = prompt_tokens
        self._prompt_offsets = prompt_offsets
        self._response_tokens = response_tokens
        self._token_offsets = token_offsets
        self.response_offsets = response_offsets
        self.roles = roles
        self.row_ids = row_ids
        self.reference = reference
        self.context = context

    @classmethod
    def from_examples(cls, examples: Iterable[PreferenceExample]) -> "ExampleDataset":
        """Collects examples, in their order. No more than one of them exists at a time beside the arrays."""
        prompt_tokens, response_tokens = array("i"), array("i")
        prompt_offsets, token_offsets, response_offsets = array("q", [0]), array("q", [0]), array("q", [0])
        roles, row_ids, reference, context = array("b"), list[str](), array("d"), array("q")
        has_reference = False
        for example in examples:
            prompt_tokens.extend(example.prompt_ids)
            prompt_offsets.append(len(prompt_tokens))
            for ids, spans in zip(example.response_ids, example.spans, strict=True):
                for begin, end in spans:
                    context.extend((len(token_offsets) - 1, begin, end))
                response_tokens.extend(ids)
                token_offsets.append(len(response_tokens))
            roles.extend(example.roles)
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
            np.array(context, dtype=np.int64).reshape(-1, 3) if context else None,
        )

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Returns all that the examples consist of, without reference log-probs, as arrays by name."""
        names = [row_id.encode("utf-8", "surrogatepass") for row_id in self.row_ids]
        arrays: dict[str, npt.NDArray[Any]] = {
            "prompt_tokens": self._prompt_tokens,
            "prompt_offsets": self._prompt_offsets,
            "response_tokens": self._response_tokens,
            "token_offsets": self._token_offsets,
            "response_offsets": self.response_offsets,
            "roles": self.roles,
            "names": np.frombuffer(b"".join(names), dtype=np.uint8),
            "name_offsets": np.cumsum([0, *map(len, names)], dtype=np.int64),
        }
        return arrays if self.context is None else {**arrays, "context": self.context}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "ExampleDataset":
        """Returns the examples that `arrays` describes, which are not copied.

        Raises:
            KeyError: An array is missing.
        """
        names, offsets = arrays["names"].tobytes(), arrays["name_offsets"].tolist()
        return cls(
            arrays["prompt_tokens"],
            arrays["prompt_offsets"],
            arrays["response_tokens"],
            arrays["token_offsets"],
            arrays["response_offsets"],
            arrays["roles"],
            [names[begin:end].decode("utf-8", "surrogatepass") for begin, end in pairwise(offsets)],
            context=arrays.get("context"),
        )

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: SupportsIndex) -> PreferenceExample:
        """Returns the example at `index`, or `EMPTY_EXAMPLE` from `len(self)` on.

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
        num_chosen, num_rejected = (
            int(np.count_nonzero(self.roles[first:end] == role)) for role in (Role.CHOSEN, Role.REJECTED)
        )
        return PreferenceExample(
            prompt_ids=self._prompt_tokens[self._prompt_offsets[i] : self._prompt_offsets[i + 1]].tolist(),
            chosen_ids=responses[:num_chosen],
            rejected_ids=responses[num_chosen : num_chosen + num_rejected],
            row_id=self.row_ids[i],
            reference=None if self.reference is None else self.reference[first:end].tolist(),
            kl_ids=tuple(responses[num_chosen + num_rejected :]),
            context=self._context(first, end),
        )

    def __iter__(self) -> Iterator[PreferenceExample]:
        # Without this method Python iterates until an IndexError, which `__getitem__` never raises at the end.
        return (self[i] for i in range(len(self)))

    def _response(self, index: int) -> list[int]:
        ids: list[int] = self._response_tokens[
            self._token_offsets[index] : self._token_offsets[index + 1]
        ].tolist()
        return ids

    def _context(self, first: int, end: int) -> tuple[Spans, ...]:
        """Context of these responses; empty if there is none in any."""
        if self.context is None:
            return ()
        begin, stop = np.searchsorted(self.context[:, 0], [first, end])
        spans: list[list[tuple[int, int]]] = [[] for _ in range(first, end)]
        for response, a, b in self.context[begin:stop].tolist():
            spans[response - first].append((a, b))
        return tuple(map(tuple, spans)) if any(spans) else ()

    @property
    def num_responses(self) -> int:
        """Number of responses of all examples."""
        return len(self.roles)

    def has(self, role: Role) -> npt.NDArray[np.bool_]:
        """(examples,) whether each example has a response of this role."""
        owner = np.repeat(np.arange(len(self)), np.diff(self.response_offsets))
        return np.asarray(np.bincount(owner[self.roles == role], minlength=len(self)) > 0)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each example, (examples,): its prompt, counted once, and all its responses."""
        ends = self._token_offsets[self.response_offsets]
        return np.asarray(np.diff(self._prompt_offsets) + np.diff(ends), dtype=np.int64)

    @property
    def response_lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each response, (responses,)."""
        return np.asarray(np.diff(self._token_offsets), dtype=np.int64)

    @cached_property
    def longest_row(self) -> int:
        """Largest number of tokens of a prompt together with one of its responses."""
        prompts = np.repeat(np.diff(self._prompt_offsets), np.diff(self.response_offsets))
        return int((prompts + np.diff(self._token_offsets)).max(initial=0))

    @property
    def longest_response(self) -> tuple[PreferenceExample, list[int]]:
        """The response that is longest with its prompt, and its example."""
        prompts = np.repeat(np.diff(self._prompt_offsets), np.diff(self.response_offsets))
        index = int((prompts + np.diff(self._token_offsets)).argmax())
        return self[int(np.searchsorted(self.response_offsets, index, side="right")) - 1], self._response(
            index
        )

    @cached_property
    def largest_token_id(self) -> int:
        """Largest token id of all prompts and responses."""
        return int(max(self._prompt_tokens.max(initial=0), self._response_tokens.max(initial=0)))

    def with_reference(self, values: npt.NDArray[np.float64]) -> "ExampleDataset":
        """Returns the same examples with reference log-probs. The tokens are shared, not copied.

        Args:
            values: (responses,) float64 log π_ref of each response (nats), in the order of `roles`. NaN stands for a
                value that was not computed.

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

    def mismatched(self, max_length: int | None) -> "ExampleDataset":
        """Returns the same examples, each with the responses of another example in the role `KL`.

        KTO estimates a KL term with them. The other example is the nearest one before this one that has another prompt,
        where the last example comes before the first. This is decided once, here, so that it depends neither on batch
        size nor on the order of training nor on ranks. A dataset that has such responses is returned as it is. The
        result has no reference log-probs.

        Args:
            max_length: Largest number of tokens of a prompt together with such a response, whose end is cut off. None
                for no limit.

        Raises:
            DataError: All examples have the same prompt.
        """
        if (self.roles == Role.KL).any():
            return self
        donors = self._donors()

        def complete(index: int) -> PreferenceExample:
            example = self[index]
            room = None if max_length is None else max(1, max_length - len(example.prompt_ids))
            donor = self[donors[index]]
            cut = [
                cut_response(ids, spans, room)
                for ids, spans in zip(donor.response_ids, donor.spans, strict=True)
            ]
            context = [*example.spans, *(spans for _, spans in cut)]
            return replace(
                example,
                kl_ids=[ids for ids, _ in cut],
                reference=None,
                context=context if any(context) else (),
            )

        return ExampleDataset.from_examples(complete(i) for i in range(len(self)))

    def _donors(self) -> list[int]:
        """Returns for each example the index of the nearest one before it, in a circle, that has another prompt."""
        number = len(self)
        prompts = [self._prompt_tokens[a:b].tobytes() for a, b in pairwise(self._prompt_offsets.tolist())]
        first = next((i for i in range(number) if prompts[i] != prompts[i - 1]), None)
        if first is None:
            raise DataError(
                "all rows have the prompt of this one, so KTO's responses to other prompts cannot be drawn: expected "
                "two prompts or more",
                self.row_ids[0],
            )
        donors = [-1] * number
        # The circle starts at an example whose predecessor has another prompt. Each later one either has such a
        # predecessor too, or shares the prompt of its predecessor and so the donor.
        for i in (*range(first, number), *range(first)):
            donors[i] = donors[i - 1] if prompts[i] == prompts[i - 1] else (i - 1) % number
        return donors

    def content_hash(self) -> str:
        """Returns the SHA-256 of tokens and roles, which tells whether two datasets are the same to a model.

        Names of rows and reference values do not enter it. It is the same on every machine.
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
            # The length comes before each array, because otherwise tokens could move from one array to the next
            # without a change of the hash.
            digest.update(len(values).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).data)
        if self.context is not None:
            digest.update(self.context.astype("<i8").tobytes())
        return digest.hexdigest()
