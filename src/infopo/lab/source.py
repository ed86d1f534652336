"""Provides the lab's preference data under names that a recipe's `data.path` takes: `lab:verified` and `lab:graded`.

The rows are sampled from the shipped policy when they are asked for, and are the same each time. The splits contain
responses to different problems.
"""

from functools import cache
from typing import Any

import datasets

from infopo.errors import DataError
from infopo.lab import policy_path
from infopo.lab.evaluation import one_thread
from infopo.lab.preferences import make_pairs
from infopo.models import load_policy, load_tokenizer

LABELS = {"lab:verified": "verified", "lab:graded": "graded"}
SPLITS = {"train": range(600), "test": range(600, 800)}
SEED = 1


def is_lab_source(path: str) -> bool:
    """Returns whether a data path names the lab's own data.

    Example:
        >>> is_lab_source("lab:graded"), is_lab_source("graded.jsonl")
        (True, False)
    """
    return path.startswith("lab:")


def lab_dataset(path: str, split: str) -> datasets.Dataset:
    """Returns the lab's preference rows, 600 to train on (`train`) or 200 held out (`test`).

    Raises:
        DataError: There is no such data or split.
    """
    if path not in LABELS:
        raise DataError(f"no such data; the lab has {' and '.join(LABELS)}", path)
    if split not in SPLITS:
        raise DataError(f"no split {split!r}; there are {' and '.join(SPLITS)}", path)
    rows = _rows(LABELS[path])
    return datasets.Dataset.from_list([rows[i] for i in SPLITS[split]])


@cache
def _rows(labels: str) -> list[dict[str, Any]]:
    """Samples the rows of all splits from one sequence of problems, so that no problem is in two splits."""
    policy, tokenizer = load_policy(str(policy_path())), load_tokenizer(str(policy_path()))
    n = max(rows.stop for rows in SPLITS.values())
    with one_thread():
        return make_pairs(policy, tokenizer, labels=labels, n=n, seed=SEED).rows
