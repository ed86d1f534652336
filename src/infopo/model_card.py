"""The model card: a README.md beside every model and adapter that is saved, which says how it was made."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from infopo.errors import printable
from infopo.losses.catalog import row_of
from infopo.secrets import masked

PACKAGES = ("infopo", "transformers", "torch", "datasets", "tokenizers", "peft")

CITATION = """@inproceedings{xiao2025infopo,
  title = {InfoPO: On Mutual Information Maximization for Large Language Model Alignment},
  author = {Xiao, Teng and Ge, Zhen and Sanghavi, Sujay and Wang, Tian and Katz-Samuels, Julian and Versage, Marc and
            Cui, Qingjun and Chilimbi, Trishul},
  booktitle = {Proceedings of NAACL 2025 (Long Papers)},
  pages = {11699--11711},
  year = {2025},
  doi = {10.18653/v1/2025.naacl-long.585},
  url = {https://aclanthology.org/2025.naacl-long.585},
  eprint = {2505.08507},
  archivePrefix = {arXiv}
}

@software{infopo,
  title = {infopo: preference optimisation by mutual-information bounds},
  note = {Python package},
  version = {VERSION}
}"""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
        name: Of the model.
        base: Name or path of the model that training started from.
        mixture: The objectives, each as (name, parameters, weight).
        reference: Where reference log-probs came from, in words.
        datasets: Names of the data, which are empty if they are not known.
        rows: Number of rows trained on, or None for a stream.
        settings: What else a reader wants to know of the run: learning rate, steps, ...
        is_adapter: Whether an adapter is saved and not a whole model.
        tags: Further tags.
    """

    name: str
    base: str | None
    mixture: Sequence[tuple[str, Mapping[str, Any], float]]
    reference: str
    datasets: Sequence[str] = ()
    rows: int | None = None
    settings: Mapping[str, Any] | None = None
    is_adapter: bool = False
    tags: Sequence[str] = ()


def tags_of(mixture: Sequence[tuple[str, Mapping[str, Any], float]]) -> list[str]:
    """`infopo`, for this library, and the names of the objectives.

    >>> tags_of([("dpo", {}, 1.0), ("sft", {}, 0.5)])
    ['infopo', 'dpo', 'sft']
    """
    names = (name.partition("#")[0].rpartition(":")[2] for name, _, _ in mixture)
    return list(dict.fromkeys(["infopo", *names]))


def render(card: Card) -> str:
    """The text of README.md. Names are those of the hub or of the last folder: a path tells where its author lives."""
    tags = ["generated_from_trainer", "preference-optimization", *tags_of(card.mixture), *card.tags]
    data = [name for name in card.datasets if _is_of_hub(name)]
    header: dict[str, Any] = {
        "library_name": "peft" if card.is_adapter else "transformers",
        "model_name": _plain(card.name),
        "tags": list(dict.fromkeys(_plain(tag) for tag in tags)),
        "pipeline_tag": "text-generation",
    }
    if card.base and _is_of_hub(card.base):
        header["base_model"] = _plain(card.base)
    if data:
        header["datasets"] = [_plain(name) for name in data]
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000)
    return "\n".join(["---", front.strip(), "---", "", *_body(card)]) + "\n"


def _body(card: Card) -> list[str]:
    what = "An adapter of" if card.is_adapter else "A fine-tuned version of"
    losses = " + ".join(
        f"{f'{weight:g} x ' if len(card.mixture) > 1 else ''}{row_of(name).title}"
        for name, _, weight in card.mixture
    )
    names = ", ".join(f"`{_shown(name)}`" for name in card.datasets)
    lines = [
        f"# {_plain(card.name)}",
        "",
        f"{what} `{_shown(card.base) if card.base else 'a model'}`, aligned with preference data by {losses}.",
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
    ]
    for name, parameters, weight in card.mixture:
        values = ", ".join(f"{key} = {value}" for key, value in {**parameters, "weight": weight}.items())
        lines += [
            f"| objective `{name}` | {_cell(values)} |",
            f"| loss | {_cell(row_of(name).formula)} |",
            f"| published in | {_cell(row_of(name).source or 'not said')} |",
        ]
        if digest := row_of(name).digest:
            lines.append(f"| source of the loss | `{_cell(name)}`, SHA-256 {digest} |")
    lines.append(f"| reference | {_cell(card.reference)} |")
    if names or card.rows is not None:
        lines.append(f"| data | {_cell(names)}{f' ({card.rows} rows)' if card.rows is not None else ''} |")
    lines += [f"| {key} | {_cell(str(value))} |" for key, value in (card.settings or {}).items()]
    versions = [f"- {package}: {version}" for package in PACKAGES if (version := _version(package))]
    citation = CITATION.replace("VERSION", _version("infopo") or "unknown")
    return [*lines, "", "## Versions", "", *versions, "", "## Citation", "", "```bibtex", citation, "```"]


def _is_of_hub(name: str) -> bool:
    """Whether a name is one of the hub's, and not that of a folder which is there."""
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists() and not name.startswith(".")


def _shown(name: str) -> str:
    name = name if _is_of_hub(name) else masked(name).rstrip("/").split("/")[-1]
    return _plain(name).replace("`", "'")


def _plain(text: str) -> str:
    """On one line, without secrets and control characters."""
    return printable(" ".join(masked(text).split()))[:200]


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|").replace("<", "&lt;")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
