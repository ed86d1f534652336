"""Reads a configuration file of another tool, recognises whose it is, and hands it to that tool's converter."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from infopo.elsewhere import axolotl, llama_factory, trl
from infopo.elsewhere.conversion import Conversion
from infopo.errors import ConfigError

TOOLS: Mapping[str, Callable[[Mapping[str, Any], Path], Conversion]] = {
    "llama-factory": llama_factory.conversion,
    "axolotl": axolotl.conversion,
    "trl": trl.conversion,
}
"""Tools by the names that `infopo convert-recipe --from` takes."""


class _Loader(yaml.SafeLoader):
    """Reads YAML as those tools do, by version 1.1 (`yes` is true), but `1e-5` as the number that is meant."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+\Z"), [*"-+0123456789"]
)


def convert(path: str | Path, tool: str | None = None) -> tuple[Conversion, str]:
    """Converts a file of another tool.

    Args:
        path: The file, YAML or JSON.
        tool: A name of `TOOLS`, or None to recognise it from the settings.

    Returns:
        What became of the settings, and the recipe as text.

    Raises:
        ConfigError: The file cannot be read, is of no such tool, or asks for what is no preference optimisation.
    """
    path = Path(path)
    given = _read(path)
    name = tool or tool_of(given)
    if name is None:
        raise ConfigError(
            f"{path}: the settings are of none of {', '.join(TOOLS)}; say which with --from (there are "
            f"{', '.join(list(given)[:8])})"
        )
    conversion = TOOLS[name](given, path)
    conversion.rest()
    return conversion, conversion.recipe(path.name)


def tool_of(given: Mapping[str, Any]) -> str | None:
    """Returns the tool whose settings these are, or None.

    Example:
        >>> tool_of({"base_model": "x", "rl": "dpo"}), tool_of({"model_name_or_path": "x", "stage": "dpo"})
        ('axolotl', 'llama-factory')
        >>> tool_of({"model_name_or_path": "x", "dataset_name": "y"}), tool_of({"model": "x"})
        ('trl', None)
    """
    if "base_model" in given:
        return "axolotl"
    if given.keys() & {"stage", "finetuning_type", "cutoff_len", "pref_loss", "pref_beta", "template"}:
        return "llama-factory"
    if given.keys() & {"model_name_or_path", "dataset_name", "datasets", "loss_type"}:
        return "trl"
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text; expected YAML") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got {type(tree).__name__}")
    return {str(key): value for key, value in tree.items()}
