"""Makes the examples of each regime, and the turns in which every variant trains on them.

A regime fixes lengths, and what responses share. Token ids are random, because no variant's time depends on them. The
same name, seed and numbers give the same examples in every process.
"""

import gzip
import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infopo.records import PreferenceExample

HARMLESS = (
    Path(__file__).resolve().parents[2] / "shared" / "data" / "hh_harmless" / "harmless-base-test.jsonl.gz"
)
LONGEST_PROMPT, LONGEST_RESPONSE = 1536, 640
# Smaller ids are those of padding, beginning and end.
FIRST_ID = 3
TOKENS_PER_PIECE = 1.3

TINY_EXAMPLE = PreferenceExample([3] * 4, [[4] * 4], [[5] * 4], "tiny")


@dataclass(frozen=True)
class Regime:
    """Lengths in tokens, which are log-normal around their means.

    Attributes:
        prompt: Mean length of a prompt.
        response: Mean length of a response.
        batch: Number of examples per optimizer step.
        sigma: Standard deviation of the logarithm of a prompt's length. That of a response is 0.5.
        rejected: Number of rejected responses per example.
        common: Length of the common beginning of both responses of a pair, as a share of the shorter one.
    """

    prompt: int
    response: int
    batch: int
    sigma: float = 0.5
    rejected: int = 1
    common: float = 0.0


REGIMES = {
    "i": Regime(prompt=512, response=128, batch=4),
    "ii": Regime(prompt=128, response=256, batch=8),
    "iii": Regime(prompt=1024, response=96, batch=4, sigma=0.3),
    # The lengths of hh come from a file.
    "hh": Regime(prompt=0, response=0, batch=8),
    "k": Regime(prompt=256, response=128, batch=1, rejected=7),
    "m": Regime(prompt=128, response=512, batch=4, common=0.5),
}


def draw(name: str, n: int, vocabulary: int, seed: int = 0) -> list[PreferenceExample]:
    """Returns `n` examples of a regime.

    Raises:
        FileNotFoundError: The regime's lengths come from a file that is not beside the checkout.
    """
    regime = REGIMES[name]
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name == "hh":
        lengths = harmless_lengths()
        order = np.concatenate([rng.permutation(len(lengths)) for _ in range(-(-n // len(lengths)))])[:n]
        sizes = [(lengths[i][0], list(lengths[i][1:])) for i in order]
    else:
        sizes = [
            (
                _length(rng, regime.prompt, regime.sigma, LONGEST_PROMPT),
                [_length(rng, regime.response, 0.5, LONGEST_RESPONSE) for _ in range(1 + regime.rejected)],
            )
            for _ in range(n)
        ]
    return [
        _example(rng, prompt, responses, vocabulary, regime.common, f"{name}:{i + 1}")
        for i, (prompt, responses) in enumerate(sizes)
    ]


def _length(rng: np.random.Generator, mean: float, sigma: float, longest: int) -> int:
    """Draws a length whose mean, before it is capped, is exp(μ + σ²/2) = mean."""
    drawn = rng.lognormal(math.log(mean) - sigma**2 / 2, sigma)
    return min(max(round(drawn), 2), longest)


def _example(
    rng: np.random.Generator,
    prompt: int,
    responses: Sequence[int],
    vocabulary: int,
    common: float,
    row_id: str,
) -> PreferenceExample:
    def ids(n: int) -> list[int]:
        return rng.integers(FIRST_ID, vocabulary, n).tolist()

    beginning = ids(int(common * min(responses)))
    chosen, *rejected = [beginning + ids(n - len(beginning)) for n in responses]
    return PreferenceExample(ids(prompt), [chosen], rejected, row_id)


def harmless_lengths(path: Path = HARMLESS) -> list[tuple[int, int, int]]:
    """Returns the (prompt, chosen, rejected) lengths of Anthropic's harmless-base test set, in tokens.

    There is no tokenizer of a real model without a network. A length is therefore 1.3 times the number of words and
    punctuation marks, rounded up, as byte-pair vocabularies of 32k to 128k tokens give on English text. Rows whose
    transcripts differ before the last turn, or with an empty last turn, are left out.
    """
    if not path.is_file():
        raise FileNotFoundError("no real data beside this checkout (expected ../shared/data/hh_harmless)")
    lengths = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            (prompt, _, chosen), (other, _, rejected) = (
                row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")
            )
            if prompt == other and prompt and chosen.strip() and rejected.strip():
                lengths.append((_tokens(prompt + "\n\nAssistant:"), _tokens(chosen), _tokens(rejected)))
    return lengths


def _tokens(text: str) -> int:
    return math.ceil(TOKENS_PER_PIECE * len(re.findall(r"\w+|[^\w\s]", text)))


def pairs_of(example: PreferenceExample) -> list[PreferenceExample]:
    """Returns every chosen-rejected pair as an example of its own, as TRL takes them."""
    return [
        PreferenceExample(example.prompt_ids, [chosen], [rejected], example.row_id)
        for chosen in example.chosen_ids
        for rejected in example.rejected_ids
    ]


def longest_row(example: PreferenceExample) -> int:
    """Returns the number of tokens of the prompt with its longest response, to which a padded batch grows."""
    return len(example.prompt_ids) + max(map(len, example.response_ids))


Step = list[PreferenceExample]
Turn = list[Step]


def plan(name: str, rounds: int, steps: int, batch: int, vocabulary: int, seed: int = 0) -> list[Turn]:
    """Returns turns of optimizer steps: one step to warm up, `rounds` turns of `steps`, and one more for memory."""
    examples = iter(draw(name, (1 + (rounds + 1) * steps) * batch, vocabulary, seed))
    return [
        [[next(examples) for _ in range(batch)] for _ in range(size)]
        for size in [1, *[steps] * rounds, steps]
    ]


def as_pairs(turns: Sequence[Turn]) -> list[Turn]:
    """Returns the same turns for a trainer that knows pairs only."""
    return [[[pair for e in step for pair in pairs_of(e)] for step in turn] for turn in turns]


def grouped(turn: Turn) -> Turn:
    """Returns the turn's examples sorted by their longest rows, in steps of the same size, as by length grouping."""
    ordered = sorted((e for step in turn for e in step), key=longest_row, reverse=True)
    size = len(turn[0])
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
