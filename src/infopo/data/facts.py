"""Facts about preference data that warn before training: lengths of the sides, near-duplicate sides, conflicting rows.

They are read from encoded rows without a model. On 61,000 pairs of 200 tokens this takes about 3 s on one core. Edit
distances are computed for an even sample of at most `MAX_COMPARED` rows.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from infopo.data.examples import ExampleDataset
from infopo.intervals import Z_95
from infopo.records import Role

SCHEMA_VERSION = 1

NEAR = 0.05
"""Two responses are near-duplicates if their edit distance is at most this share of the longer one's tokens."""

MAX_COMPARED = 20_000
"""Largest number of rows whose edit distances are computed."""

MAX_PAIRS_OF_ROW = 64
ROWS_NAMED = 10

Facts = dict[str, Any]


def facts_of(dataset: ExampleDataset) -> Facts:
    """Returns what `data.json` contains: facts about the rows that are trained on.

    Returns:
        `pairs`: number of chosen-rejected pairs. `length`: mean numbers of tokens of both sides, and Cohen's d of
        chosen against rejected with its 95 % interval, or None if a side has fewer than two responses.
        `near_duplicates`: rows whose sides are nearly the same, among `n` compared rows. `conflicts`: rows that
        contradict another row. `reference_prefers_rejected`: share of `n` pairs whose rejected response is more likely
        under the reference, by the sum over tokens and by the mean, or None if the reference of a side was not
        computed.

    Example:
        >>> from infopo.records import PreferenceExample
        >>> rows = [PreferenceExample([1], [[5, 6]], [[7]], "a:1"), PreferenceExample([1], [[7]], [[5, 6]], "a:2")]
        >>> facts = facts_of(ExampleDataset.from_examples(rows))
        >>> facts["conflicts"]
        {'count': 2, 'n': 2, 'share': 1.0, 'rows': ['a:1', 'a:2']}
    """
    rows = _Rows(dataset)
    return {
        "schema_version": SCHEMA_VERSION,
        "pairs": sum(rows.number_of_pairs(row) for row in range(len(dataset))),
        "length": _length_facts(rows),
        "near_duplicates": _near_duplicates(rows),
        "conflicts": _conflicts(rows),
        "reference_prefers_rejected": _preferred_by_reference(rows),
    }


class _Rows:
    """Responses of a dataset by row and side, as views of its arrays."""

    def __init__(self, dataset: ExampleDataset) -> None:
        arrays = dataset.arrays()
        self.names = dataset.row_ids
        self.roles = dataset.roles
        self.reference = dataset.reference
        self._prompts, self._prompt_at = arrays["prompt_tokens"], arrays["prompt_offsets"]
        self._tokens, self._at = arrays["response_tokens"], arrays["token_offsets"]
        self.lengths = np.diff(self._at)
        owner = dataset.response_offsets
        self.chosen = self._of(Role.CHOSEN, owner)
        self.rejected = self._of(Role.REJECTED, owner)

    def _of(self, role: Role, owner: npt.NDArray[np.int64]) -> list[list[int]]:
        """Returns the indices of each row's responses of a role."""
        found = np.flatnonzero(self.roles == role)
        parts = np.split(found, np.searchsorted(found, owner[1:-1]))
        return [part.tolist() for part in parts]

    def number_of_pairs(self, row: int) -> int:
        return len(self.chosen[row]) * len(self.rejected[row])

    def pairs(self, row: int) -> list[tuple[int, int]]:
        """Returns pairs of indices of a chosen and a rejected response, of which a row of many has the first."""
        every = product(self.chosen[row], self.rejected[row])
        return [pair for pair, _ in zip(every, range(MAX_PAIRS_OF_ROW), strict=False)]

    def tokens(self, response: int) -> npt.NDArray[np.int32]:
        tokens: npt.NDArray[np.int32] = self._tokens[self._at[response] : self._at[response + 1]]
        return tokens

    def prompt(self, row: int) -> npt.NDArray[np.int32]:
        tokens: npt.NDArray[np.int32] = self._prompts[self._prompt_at[row] : self._prompt_at[row + 1]]
        return tokens


def _named_rows(rows: _Rows, found: Sequence[int], n: int) -> Facts:
    names = [rows.names[row] for row in found[:ROWS_NAMED]]
    return {"count": len(found), "n": n, "share": len(found) / n if n else 0.0, "rows": names}


# --- lengths ---


def _length_facts(rows: _Rows) -> Facts:
    chosen, rejected = (rows.lengths[rows.roles == role] for role in (Role.CHOSEN, Role.REJECTED))
    d = cohens_d(chosen, rejected)
    return {
        "chosen_mean": float(chosen.mean()) if len(chosen) else None,
        "rejected_mean": float(rejected.mean()) if len(rejected) else None,
        "cohens_d": None if d is None else d[0],
        "cohens_d_ci95": None if d is None else [d[0] - d[1], d[0] + d[1]],
    }


def cohens_d(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[float, float] | None:
    """Returns Cohen's d, the difference of two means over their pooled standard deviation, and its 95 % half-width.

    The standard error is sqrt((n + m) / nm + d² / 2(n + m)) (Hedges and Olkin, 1985). The pooled deviation is taken as
    at least half a token, because lengths that are all the same would give an infinite d.

    Args:
        first: (n,) lengths of chosen responses.
        second: (m,) lengths of rejected responses.

    Returns:
        d and half the width of its interval, or None if a side has fewer than two responses.

    Example:
        >>> [round(value, 2) for value in cohens_d([4, 6, 8], [2, 4, 6])]
        [1.0, 1.7]
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    n, m = len(a), len(b)
    if min(n, m) < 2:
        return None
    pooled = ((n - 1) * a.var(ddof=1) + (m - 1) * b.var(ddof=1)) / (n + m - 2)
    d = float((a.mean() - b.mean()) / max(pooled**0.5, 0.5))
    return d, float(Z_95 * ((n + m) / (n * m) + d * d / (2 * (n + m))) ** 0.5)


# --- near-duplicate sides ---


def _near_duplicates(rows: _Rows) -> Facts:
    with_pairs = [row for row in range(len(rows.names)) if rows.number_of_pairs(row)]
    number = min(len(with_pairs), MAX_COMPARED)
    sample = [with_pairs[i * len(with_pairs) // number] for i in range(number)]
    found = [
        row
        for row in sample
        if any(
            is_near_duplicate(rows.tokens(chosen), rows.tokens(rejected))
            for chosen, rejected in rows.pairs(row)
        )
    ]
    return _named_rows(rows, found, number)


def is_near_duplicate(first: npt.NDArray[np.int32], second: npt.NDArray[np.int32]) -> bool:
    """Returns whether the edit distance of two responses is at most `NEAR` of the longer one's tokens.

    One token of fewer than 20 is more than that, so that short answers such as "yes" and "no" are no near-duplicates.
    Bounds that cost little decide nearly all pairs: the difference of lengths and of token counts from below, and the
    part between common beginning and end from above.

    Example:
        >>> tokens = np.arange(40, dtype=np.int32)
        >>> is_near_duplicate(tokens, np.delete(tokens, [3, 30]))
        True
        >>> is_near_duplicate(tokens[:4], tokens[1:5])
        False
    """
    limit = int(NEAR * max(len(first), len(second)))
    if abs(len(first) - len(second)) > limit:
        return False
    a, b = _middles(first, second)
    if max(len(a), len(b)) <= limit:
        return True
    count_a, count_b = Counter(a), Counter(b)
    if max((count_a - count_b).total(), (count_b - count_a).total()) > limit:
        return False
    return _edits_within(a, b, limit)


def _middles(first: npt.NDArray[np.int32], second: npt.NDArray[np.int32]) -> tuple[list[int], list[int]]:
    """Returns both sequences without their common beginning and end."""
    shorter = min(len(first), len(second))
    differs = np.flatnonzero(first[:shorter] != second[:shorter])
    begin = int(differs[0]) if len(differs) else shorter
    rest = shorter - begin
    differs = np.flatnonzero(first[::-1][:rest] != second[::-1][:rest])
    end = int(differs[0]) if len(differs) else rest
    return first[begin : len(first) - end].tolist(), second[begin : len(second) - end].tolist()


def _edits_within(a: Sequence[int], b: Sequence[int], limit: int) -> bool:
    """Returns whether at most `limit` insertions, deletions and substitutions turn `a` into `b`.

    For each number of edits and each diagonal (index in `b` minus index in `a`), the furthest index in `a` is kept
    (Ukkonen, 1985), which takes limit² + limit · length steps at most.
    """
    furthest = {0: _slide(a, b, 0, 0)}
    goal = len(b) - len(a)
    for _ in range(limit):
        if furthest.get(goal, -1) >= len(a):
            return True
        reached: dict[int, int] = {}
        for diagonal, i in furthest.items():
            for shift, step in ((0, 1), (-1, 1), (1, 0)):
                reached[diagonal + shift] = max(reached.get(diagonal + shift, -1), i + step)
        furthest = {
            diagonal: _slide(a, b, min(i, len(a), len(b) - diagonal), diagonal)
            for diagonal, i in reached.items()
            if -len(a) <= diagonal <= len(b)
        }
    return furthest.get(goal, -1) >= len(a)


def _slide(a: Sequence[int], b: Sequence[int], i: int, diagonal: int) -> int:
    while i < len(a) and i + diagonal < len(b) and a[i] == b[i + diagonal]:
        i += 1
    return i


# --- rows that contradict each other ---


def _conflicts(rows: _Rows) -> Facts:
    """Finds rows whose preference another row reverses.

    These are pairs of the same prompt and responses the other way round, and rows with one side only whose response
    another such row has on the other side. A response that is chosen in one pair and rejected in another is no
    conflict: a ranking of three responses, written as pairs, has such a response in its middle.
    """
    claims = [set(_claims(rows, row)) for row in range(len(rows.names))]
    every = set[tuple[bytes, ...]]().union(*claims)
    found = [
        row
        for row, own in enumerate(claims)
        if any((prompt, rejected, chosen) in every for prompt, chosen, rejected in own)
    ]
    return _named_rows(rows, found, len(rows.names))


def _claims(rows: _Rows, row: int) -> Iterable[tuple[bytes, bytes, bytes]]:
    """Yields digests of (prompt, better, worse), in which nothing stands for the absent side of a row with one side."""
    prompt = _digest(rows.prompt(row))
    if rows.number_of_pairs(row):
        for chosen, rejected in rows.pairs(row):
            yield prompt, _digest(rows.tokens(chosen)), _digest(rows.tokens(rejected))
        return
    for chosen in rows.chosen[row]:
        yield prompt, _digest(rows.tokens(chosen)), b""
    for rejected in rows.rejected[row]:
        yield prompt, b"", _digest(rows.tokens(rejected))


def _digest(tokens: npt.NDArray[np.int32]) -> bytes:
    """Stands for tokens that are compared for equality, so that all rows of a large dataset fit in memory."""
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


# --- the reference ---


def _preferred_by_reference(rows: _Rows) -> Facts | None:
    """Returns how often the reference finds the rejected response more likely, over pairs with both values."""
    if rows.reference is None:
        return None
    every = [pair for row in range(len(rows.names)) for pair in rows.pairs(row)]
    pairs = np.array(every, dtype=np.int64).reshape(-1, 2)
    pairs = pairs[np.isfinite(rows.reference[pairs]).all(axis=1)]
    if not len(pairs):
        return None
    chosen, rejected = pairs.T
    per_token = rows.reference / np.maximum(rows.lengths, 1)
    return {
        "share": float((rows.reference[rejected] > rows.reference[chosen]).mean()),
        "share_per_token": float((per_token[rejected] > per_token[chosen]).mean()),
        "n": len(pairs),
    }
