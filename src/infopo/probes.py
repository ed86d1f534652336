"""Examples and samples that stay the same for a whole run, on which training is measured: probe set and anchor set.

Both are written to `probe.json` in the run directory, which every checkpoint has a copy of. A resumed run reads that of
its checkpoint.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from infopo.data.examples import ExampleDataset
from infopo.data.streaming import ExampleStream
from infopo.diagnostics import Indices, ProbeValues, Values
from infopo.errors import CheckpointError
from infopo.records import PreferenceExample, Role, response_indices
from infopo.runs import PROBE, write_json_atomic

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class AnchorSet:
    """Responses that the starting policy wrote.

    Attributes:
        prompts: Token ids of each prompt.
        responses: Token ids of the response to each prompt, with the token that ended it.
        finished: Whether the policy ended each response itself.
        row_ids: Names of the rows that the prompts are from.
        start: log π of each response before the first update (nats).
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    finished: list[bool]
    row_ids: list[str]
    start: list[float] = field(default_factory=list)

    @property
    def examples(self) -> list[PreferenceExample]:
        """The responses as examples, each with one chosen response."""
        rows = zip(self.prompts, self.responses, self.row_ids, strict=True)
        return [PreferenceExample(prompt, [response], [], row) for prompt, response, row in rows]

    @property
    def mean_length(self) -> float:
        """Mean number of tokens of a response."""
        return float(np.mean([len(response) for response in self.responses]))


@dataclass(frozen=True)
class ProbeSet:
    """Preference examples with their log-probs at the start.

    Attributes:
        examples: The examples, without mismatched responses.
        source: Where they are from, in words.
        start: log π of each response before the first update (nats), chosen responses of an example first.
        reference: log π_ref of each response (nats), NaN where it is not known.
        first_step: Number of updates before `start` was measured, which is 0 except in a run that was resumed from a
            checkpoint without a probe set.
    """

    examples: list[PreferenceExample]
    source: str
    start: Values
    reference: Values
    first_step: int = 0

    @property
    def roles(self) -> list[Role]:
        """Role of each response."""
        return [role for example in self.examples for role in example.roles]

    @property
    def row_ids(self) -> list[str]:
        """Name of each example's row."""
        return [example.row_id for example in self.examples]

    def lengths(self) -> Indices:
        """Returns the number of scored tokens of each response."""
        return np.array(
            [
                len(ids) - sum(end - begin for begin, end in spans)
                for example in self.examples
                for ids, spans in zip(example.response_ids, example.spans, strict=True)
            ]
        )

    def values(self, now: Values) -> ProbeValues:
        """Returns the log-probs `now` (nats, one per response) beside those of the start."""
        owners = [i for i, example in enumerate(self.examples) for _ in example.response_ids]
        chosen, rejected, pairs = (t.numpy() for t in response_indices(self.roles, owners))
        return ProbeValues(now, self.start, self.reference, self.lengths(), chosen, rejected, pairs)


def choose(dataset: ExampleDataset | ExampleStream, size: int, seed: int) -> list[PreferenceExample]:
    """Returns examples for a probe set, in the order of the data: a random choice, or the first of a stream.

    They are without mismatched responses, whose number depends on the objective. Examples without a response are left
    out.

    Example:
        >>> rows = [PreferenceExample([5], [[6]], [[7]], f"pairs.jsonl:{line}") for line in range(1, 9)]
        >>> [each.row_id for each in choose(ExampleDataset.from_examples(rows), size=2, seed=0)]
        ['pairs.jsonl:3', 'pairs.jsonl:5']
    """
    if isinstance(dataset, ExampleDataset):
        n = len(dataset)
        order = np.random.default_rng(seed).permutation(n)[:size] if n > size else np.arange(n)
        picked: Iterable[PreferenceExample] = (dataset[int(i)] for i in sorted(order))
    else:
        picked = dataset.head(size)
    return [_without_mismatched(example) for example in picked if example.chosen_ids or example.rejected_ids]


def _without_mismatched(example: PreferenceExample) -> PreferenceExample:
    kept = len(example.chosen_ids) + len(example.rejected_ids)
    reference = None if example.reference is None else list(example.reference)[:kept]
    return replace(example, kl_ids=(), context=list(example.context)[:kept], reference=reference)


# ---- on disk -----------------------------------------------------------------------------------------------------


def write(directory: Path, probe: ProbeSet | None, anchors: AnchorSet | None) -> None:
    """Writes both sets to `probe.json`, or null for one that there is not."""
    record: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "probe": None, "anchors": None}
    if probe is not None:
        record["probe"] = {
            "rows": probe.row_ids,
            "source": probe.source,
            "first_step": probe.first_step,
            "start": probe.start,
            "reference": probe.reference,
            "examples": [
                {
                    "prompt_ids": list(e.prompt_ids),
                    "chosen_ids": [list(ids) for ids in e.chosen_ids],
                    "rejected_ids": [list(ids) for ids in e.rejected_ids],
                    "context": [[list(span) for span in spans] for spans in e.context],
                    "reference": None if e.reference is None else list(e.reference),
                }
                for e in probe.examples
            ],
        }
        for name in ("start", "reference"):
            record["probe"][name] = record["probe"][name].tolist()
    if anchors is not None:
        record["anchors"] = asdict(anchors)
    write_json_atomic(directory / PROBE, record)


def read(directory: Path) -> tuple[ProbeSet | None, AnchorSet | None] | None:
    """Returns the sets of a run directory or a checkpoint, or None if it has no `probe.json`.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = directory / PROBE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the probe set cannot be read: {error}; {_REMEDY}") from error
    try:
        if record["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {record['schema_version']!r}, expected {SCHEMA_VERSION}")
        return _probe_of(record["probe"]), _anchors_of(record["anchors"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is not what a run writes ({error}); {_REMEDY}") from error


_REMEDY = "remove the file to start a probe set anew"


def _probe_of(record: dict[str, Any] | None) -> ProbeSet | None:
    if record is None:
        return None
    examples = [
        PreferenceExample(
            each["prompt_ids"], each["chosen_ids"], each["rejected_ids"], row, context=each["context"],
            reference=_numbers(each["reference"]) if each["reference"] is not None else None,
        )
        for each, row in zip(record["examples"], record["rows"], strict=True)
    ]  # fmt: skip
    probe = ProbeSet(
        examples, record["source"], _array(record["start"]), _array(record["reference"]), record["first_step"]
    )
    if not len(probe.start) == len(probe.reference) == len(probe.roles):
        raise ValueError(f"{len(probe.start)} values of {len(probe.roles)} responses")
    return probe


def _anchors_of(record: dict[str, Any] | None) -> AnchorSet | None:
    if record is None:
        return None
    anchors = AnchorSet(**record)
    if not len(anchors.start) == len(anchors.responses) == len(anchors.prompts):
        raise ValueError(f"{len(anchors.start)} values of {len(anchors.responses)} responses")
    return anchors


def _numbers(values: Sequence[float | str]) -> list[float]:
    """Returns numbers, of which JSON has NaN and infinities as texts."""
    return [float(value) for value in values]


def _array(values: Sequence[float | str]) -> Values:
    return np.array(_numbers(values), dtype=np.float64)
