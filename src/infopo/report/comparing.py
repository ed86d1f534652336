"""Settings and environment of several runs side by side, with what differs, and how to run each again."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infopo.errors import ConfigError
from infopo.losses.catalog import OBJECTIVES
from infopo.report.reading import ReportRun, is_number
from infopo.runs import RECIPE, RunDirectoryError
from infopo.secrets import masked_tree
from infopo.yaml_tree import Problems, read_tree

ABSENT = "–"
_SYMBOLS = {"beta": "β", "alpha": "α", "gamma": "γ", "lambda": "λ", "nll_weight": "NLL"}


@dataclass(frozen=True)
class Comparison:
    """A table with a row per key and a column per run.

    Attributes:
        keys: Dotted names.
        values: Texts, one row per key and one column per run; `ABSENT` if a run lacks the key.
        differs: Whether the values of a row are not all the same.
    """

    keys: list[str]
    values: list[list[str]]
    differs: list[bool]


def compare(trees: Sequence[Mapping[str, str]]) -> Comparison:
    """Returns the table of several flat trees. Keys are in the order in which they first appear.

    Example:
        >>> compare([{"beta": "1", "lr": "0.1"}, {"beta": "2", "lr": "0.1"}]).differs
        [True, False]
    """
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    values = [[tree.get(key, ABSENT) for tree in trees] for key in keys]
    return Comparison(keys, values, [len(set(row)) > 1 for row in values])


def settings_of(run: ReportRun) -> dict[str, str]:
    """Returns the settings of a run as `{"train.learning_rate": "1e-05", ...}`; empty if they are not known.

    Raises:
        RunDirectoryError: The recipe is not valid YAML.
    """
    tree = recipe_tree(run)
    if isinstance(terms := tree.get("objective"), list):
        # A row per setting of a term shows what differs between two sums.
        del tree["objective"]
        tree = {f"objective[{i}]": term for i, term in enumerate(terms)} | tree
    return flat(tree)


def recipe_tree(run: ReportRun) -> dict[str, Any]:
    """Returns the resolved recipe of a run as a tree, with secrets masked, or the settings of a script's run.

    It is empty if neither was written.
    """
    if run.run.recipe is None:
        settings = (run.run.environment or {}).get("settings")
        return masked_tree(settings) if isinstance(settings, dict) else {}
    try:
        return masked_tree(read_tree(run.run.recipe, Problems(RECIPE)))
    except ConfigError as error:
        raise RunDirectoryError("; ".join(error.problems), str(run.run.directory / RECIPE)) from error


def environment_of(run: ReportRun) -> dict[str, str]:
    """Returns versions, hardware and the like of a run; empty if they were not recorded."""
    record = masked_tree(run.run.environment or {})
    left_out = ("schema_version", "command_line", "resumed", "settings")
    tree = flat({key: value for key, value in record.items() if key not in left_out})
    resumed = record.get("resumed")
    for part in resumed if isinstance(resumed, list) else []:
        if isinstance(part, dict):
            tree |= {f"from step {part.get('from_step')}: {key}": value for key, value in flat(part).items()}
    return tree


def flat(tree: Any, path: str = "") -> dict[str, str]:
    """Returns a tree of settings as texts by dotted names.

    Example:
        >>> flat({"train": {"seed": 0, "hub": None}, "paths": ["a", "b"]})
        {'train.seed': '0', 'train.hub': 'null', 'paths': '["a", "b"]'}
    """
    if isinstance(tree, Mapping):
        parts = (flat(value, f"{path}.{key}" if path else str(key)) for key, value in tree.items())
        return {key: value for part in parts for key, value in part.items()}
    return {path: tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False, default=str)}


def method_of(run: ReportRun) -> str:
    """Returns what a run trained with, e.g. `InfoPO (β 1) + 0.2 x SFT on chosen`, or "" if there is no recipe."""
    objective = recipe_tree(run).get("objective")
    terms = objective if isinstance(objective, list) else [objective]
    return " + ".join(_term(term) for term in terms if isinstance(term, Mapping | str))


def _term(term: Mapping[str, Any] | str) -> str:
    if isinstance(term, str):
        return OBJECTIVES[term].title if term in OBJECTIVES else term
    name = str(term.get("name", "?"))
    title = OBJECTIVES[name].title if name in OBJECTIVES else name.rpartition(":")[2]
    shown = [
        f"{symbol} {value:g}"
        for key, symbol in _SYMBOLS.items()
        if is_number(value := term.get(key)) and value
    ]
    if term.get("length_normalized") is True:
        shown.append("per token")
    weight = term.get("weight", 1)
    factor = f"{weight:g} x " if is_number(weight) and weight != 1 else ""
    return f"{factor}{title} ({', '.join(shown)})" if shown else f"{factor}{title}"


def model_of(run: ReportRun) -> str:
    """Returns the name of the model that training started from, or ""."""
    return flat(recipe_tree(run)).get("model.name_or_path") or flat(run.run.environment or {}).get(
        "model.name_or_path", ""
    )


def data_of(run: ReportRun) -> str:
    """Returns source and number of rows of the training data, or ""."""
    path = flat(recipe_tree(run)).get("data.path") or flat(run.run.environment or {}).get("data.path", "")
    rows = (run.run.environment or {}).get("rows")
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    path = path if path not in ("", "null") else str(first.get("source") or "")
    return f"{path}, {first['used']} rows" if path and is_number(first.get("used")) else path


def reproduce(run: ReportRun) -> list[str]:
    """Returns commands that run a run again, as its files tell them; empty if they do not."""
    record = masked_tree(run.run.environment or {})
    lines = []
    git = record.get("infopo_git") or record.get("git")
    if isinstance(git, dict) and git.get("commit"):
        dirty = "  # with changes that were not committed" if git.get("dirty") else ""
        lines.append(f"git checkout {shlex.quote(str(git['commit']))}{dirty}")
    packages = record.get("packages")
    if isinstance(packages, dict):
        pinned = [
            f"{name}=={str(version).partition('+')[0]}" for name, version in packages.items() if version
        ]
        lines.append(f"pip install {' '.join(map(shlex.quote, pinned))}")
    if run.run.recipe is not None:
        recipe = shlex.quote(str(run.run.directory / RECIPE))
        lines.append(f"infopo train {recipe} output_dir={shlex.quote(f'{run.run.directory}-again')}")
    command = record.get("command_line")
    if isinstance(command, list) and command:
        lines.append(f"# it was started by: {shlex.join(map(str, command))}".replace("\n", " "))
    return lines


def row_counts(run: ReportRun) -> list[tuple[str, str]]:
    """Returns what happened to the rows of each source, e.g. `("pairs.jsonl", "600 of 610 rows used; ...")`."""
    sources = (run.run.environment or {}).get("rows")
    counts = []
    for entry in sources if isinstance(sources, list) else []:
        if not isinstance(entry, dict):
            continue
        parts = [f"{entry.get('used', '?')} of {entry.get('rows', '?')} rows used"]
        for key, verb in (("skipped", "skipped"), ("notes", "noted")):
            found = entry.get(key)
            parts += (
                [f"{n} {verb}: {reason}" for reason, n in found.items()] if isinstance(found, dict) else []
            )
        counts.append((str(entry.get("source", "?")), "; ".join(parts)))
    return counts
