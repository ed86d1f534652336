"""Log-probs of stored samples as values of a reference: of the responses that the reference itself has drawn."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from infopo.data.examples import ExampleDataset
from infopo.evaluation.samples import prompt_hash, read_samples
from infopo.hashing import WeightsHash, config_hash
from infopo.models import is_peft_model
from infopo.reference import ROLE_OF

SPOT_CHECKS = 8
"""Number of examples whose log-probs are computed, too, before those of the samples are taken."""

Values = npt.NDArray[np.float64]


def subject_hash(model: nn.Module, weights: WeightsHash) -> str:
    """Returns the hash that samples of this model carry. A new adapter, which changes nothing yet, is left out."""
    base: nn.Module = model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]
    return f"{weights.base[:32]}{config_hash(base)[:16]}"


def sampled_logps(path: Path, dataset: ExampleDataset, sides: frozenset[str], weights: str) -> Values:
    """Returns log π(y|x) of the dataset's responses that are stored samples, (responses,), NaN of all others.

    A response is found by the token ids of its prompt and its own, and the sample must be of the same weights.

    Args:
        path: The file of samples.
        dataset: The examples.
        sides: Sides whose values are wanted.
        weights: Hash of the reference (`subject_hash`).

    Raises:
        DataError: The file cannot be read, or a line of it is no sample.
    """
    known: Mapping[tuple[str, tuple[int, ...]], float] = {
        (sample.prompt_sha256, tuple(sample.token_ids)): sample.logp
        for sample in read_samples(path)
        if sample.weights == weights and sample.prompt_sha256 and sample.token_ids and sample.logp is not None
    }
    roles = {int(ROLE_OF[side]) for side in sides}
    values = np.full(dataset.num_responses, np.nan)
    for index in range(len(dataset) if known else 0):
        example, first = dataset[index], int(dataset.response_offsets[index])
        prompt = prompt_hash(list(example.prompt_ids))
        for place, (ids, spans) in enumerate(zip(example.response_ids, example.spans, strict=True), first):
            if int(dataset.roles[place]) in roles and not spans:
                values[place] = known.get((prompt, tuple(ids)), np.nan)
    return values


@dataclass(frozen=True)
class SpotCheck:
    """Some examples with a value of a sample.

    Attributes:
        examples: The examples.
        places: (responses,) index in the whole dataset of each of their responses.
    """

    examples: ExampleDataset
    places: npt.NDArray[np.int64]


def spot_check(dataset: ExampleDataset, values: Values) -> SpotCheck:
    """Returns examples with a value, evenly over the dataset, always the same."""
    owner = np.repeat(np.arange(len(dataset)), np.diff(dataset.response_offsets))
    having = np.unique(owner[np.isfinite(values)])
    chosen = having[np.unique(np.linspace(0, len(having) - 1, SPOT_CHECKS).astype(int))].tolist()
    places = [
        np.arange(dataset.response_offsets[index], dataset.response_offsets[index + 1]) for index in chosen
    ]
    return SpotCheck(
        ExampleDataset.from_examples(dataset[index] for index in chosen),
        np.concatenate(places).astype(np.int64),
    )
