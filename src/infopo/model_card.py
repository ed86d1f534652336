"""The model card: a README.md beside every model and adapter that is saved, which says how it was made."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from infopo import durable
from infopo.citations import entry, paper_of
from infopo.data.counts import DataCounts
from infopo.data.examples import ExampleDataset
from infopo.errors import InfoPOError, printable
from infopo.evaluation.results import TaskFigure, folder_of_run, task_figures
from infopo.losses.catalog import row_of
from infopo.models import is_peft_model
from infopo.output import counted
from infopo.ranks import autocast_in_words
from infopo.report.closing import Change, changes
from infopo.report.reading import read_runs
from infopo.runs import EVALUATION, read_object
from infopo.secrets import masked
from infopo.verdicts import in_words, verdicts_in

PACKAGES = ("infopo", "transformers", "torch", "datasets", "tokenizers", "peft")

_SOFTWARE = """@software{infopo,
  title = {infopo: preference optimisation by mutual-information bounds},
  note = {Python package},
  version = {VERSION}
}"""

BEGIN, END = "<!-- infopo: results -->", "<!-- infopo: end of results -->"
"""What stands between them is replaced if the model is evaluated later. The rest of a card belongs to its author."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
        name: Of the model.
        base: Name or path of the model that training started from.
        base_hash: Hash of its weights, or None.
        mixture: The objectives, each as (name, parameters, weight).
        reference: Where reference log-probs came from, in words.
        datasets: Names of the data, which are empty if they are not known.
        rows: Number of rows trained on, or None for a stream.
        accounts: What happened to the rows of each dataset, by its role, `train` or `eval`.
        data_hash: SHA-256 of the tokens that were trained on, or None.
        settings: What else a reader wants to know of the run: learning rate, steps, ...
        is_adapter: Whether an adapter is saved and not a whole model.
        tags: Further tags.
        results: Lines of Markdown about what training did (`results_of`).
        index: Results of tasks, as the hub's `model-index` has them.
    """

    name: str
    base: str | None
    mixture: Sequence[tuple[str, Mapping[str, Any], float]]
    reference: str
    base_hash: str | None = None
    datasets: Sequence[str] = ()
    rows: int | None = None
    accounts: Mapping[str, DataCounts] = field(default_factory=dict)
    data_hash: str | None = None
    settings: Mapping[str, Any] | None = None
    is_adapter: bool = False
    tags: Sequence[str] = ()
    results: Sequence[str] = ()
    index: Sequence[Mapping[str, Any]] = ()


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
    if card.index:
        header["model-index"] = [{"name": _plain(card.name), "results": list(card.index)}]
    return f"{_front(header)}\n{chr(10).join(_body(card))}\n"


def _front(header: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text.strip()}\n---\n"


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
            f"| loss | {_cell(row_of(name).formula, 600)} |",
            f"| published in | {_cell(row_of(name).source or 'not said', 600)} |",
        ]
        if digest := row_of(name).digest:
            lines.append(f"| source of the loss | `{_cell(name)}`, SHA-256 {digest} |")
    lines.append(f"| reference | {_cell(card.reference)} |")
    if card.base_hash:
        lines.append(f"| weights of the base | hash {_cell(card.base_hash)} |")
    if names or card.rows is not None:
        rows = f" ({counted(card.rows, 'row')})" if card.rows is not None else ""
        lines.append(f"| data | {_cell(names)}{rows} |")
    lines += [
        f"| rows, {_cell(role)} | {_cell(_account(counts), 600)} |" for role, counts in card.accounts.items()
    ]
    if card.data_hash:
        lines.append(f"| tokens trained on | SHA-256 {_cell(card.data_hash)} |")
    lines += [f"| {key} | {_cell(str(value))} |" for key, value in (card.settings or {}).items()]
    versions = [f"- {package}: {version}" for package in PACKAGES if (version := _version(package))]
    lines += ["", *_section(card.results)] if card.results else []
    return [
        *lines,
        "",
        "## Versions",
        "",
        *versions,
        "",
        "## Citation",
        "",
        "```bibtex",
        *_citations(card),
        "```",
    ]


def _account(counts: DataCounts) -> str:
    """Returns what happened to the rows of a dataset, with its name."""
    name = " + ".join(_shown(part) for part in counts.source.split(" + ")) if counts.source else "unnamed"
    parts = [f"{name}: {counts.rows} read, {counts.used} used, {sum(counts.skipped.values())} skipped"]
    return "; ".join([*parts, *(f"{n} skipped: {why}" for why, n in counts.skipped.most_common())])


def _citations(card: Card) -> list[str]:
    """Returns the papers of the losses, and the library."""
    numbers = dict.fromkeys(paper_of(row_of(name).source) for name, _, _ in card.mixture)
    entries = [entry(number) for number in numbers if number is not None]
    return ["\n\n".join([*entries, _SOFTWARE.replace("VERSION", _version("infopo") or "unknown")])]


def _section(results: Sequence[str]) -> list[str]:
    return [BEGIN, "## Results", "", *results, "", END]


def _is_of_hub(name: str) -> bool:
    """Whether a name is one of the hub's, and not that of a folder which is there."""
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists() and not name.startswith(".")


def _shown(name: str) -> str:
    name = name if _is_of_hub(name) else masked(name).rstrip("/").split("/")[-1]
    return _plain(name).replace("`", "'")


def _plain(text: str, longest: int = 200) -> str:
    """On one line, without secrets and control characters."""
    return printable(" ".join(masked(text).split()))[:longest]


def _cell(text: str, longest: int = 200) -> str:
    return _plain(text, longest).replace("|", "\\|").replace("<", "&lt;")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# --- what a run's files say ---


def card_of(
    trainer: Any, name: str | None = None, datasets: Sequence[str] = (), tags: Sequence[str] = ()
) -> Card:
    """Returns what the card of a trainer's model says. Results are those of its files, once it has trained.

    Args:
        trainer: An `InfoPOTrainer`.
        name: Name of the model, by default that on the hub or that of the output folder.
        datasets: Names of the data, by default those that the trainer knows.
        tags: Further tags.
    """
    args = trainer.args
    hub = (args.hub_model_id or "").split("/")[-1]
    has_trained = trainer.state.global_step > 0
    figures = _figures(Path(args.output_dir)) if has_trained else []
    return Card(
        name=name or hub or Path(args.output_dir).resolve().name,
        base=trainer.base_name,
        base_hash=trainer.base_hash,
        mixture=trainer.mixture,
        reference=trainer.reference_in_words,
        datasets=datasets or trainer.dataset_names,
        rows=len(data) if isinstance(data := trainer.train_dataset, ExampleDataset) else None,
        accounts={role: counts for role, counts in trainer.data_counts.items() if counts.rows},
        data_hash=trainer.data_hash(),
        settings=_settings(trainer),
        is_adapter=is_peft_model(trainer.model),
        tags=tags,
        results=results_of(Path(args.output_dir), figures) if has_trained else (),
        index=model_index(figures),
    )


def _settings(trainer: Any) -> dict[str, Any]:
    args = trainer.args
    found = {
        "learning rate": args.learning_rate,
        "schedule": f"{getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}, warm-up {args.warmup_steps}",
        "optimizer": f"{getattr(args.optim, 'value', args.optim)}, weight decay {args.weight_decay}",
        "steps": trainer.state.global_step,
        "rows per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "limit per row": f"{args.max_length} tokens",
        "weights": str(trainer.model.dtype).removeprefix("torch.") + autocast_in_words(args),
        "seed": args.seed,
    }
    for config in getattr(trainer.model, "peft_config", {}).values():
        values = {key: getattr(config, key, None) for key in ("r", "lora_alpha", "target_modules")}
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        said = [
            f"{key} = {sorted(v) if isinstance(v, set) else v}" for key, v in values.items() if v is not None
        ]
        found["adapter"] = ", ".join([kind, *said])
    return found


def results_of(run_dir: Path, figures: Sequence[TaskFigure] | None = None) -> list[str]:
    """Returns what training did to the model as Markdown: figures of the report's headline, verdicts, tasks.

    It is empty if the files of the run cannot be read.
    """
    try:
        [run] = read_runs([run_dir])
    except (InfoPOError, OSError):
        return []
    rows = [row for row in changes(run) if row.is_measured]
    lines = (
        ["| | before | after | change [95 %] | unit |", "|---|---|---|---|---|", *map(_row, rows)]
        if rows
        else ["Training's effect has not been measured since its start."]
    )
    figures = _figures(run_dir) if figures is None else figures
    if figures:
        lines += ["", "| task | accuracy [95 %] | items | rule |", "|---|---|---|---|"]
        lines += [
            f"| {_cell(each.task)} | {each.accuracy:.3f} [{each.ci95[0]:.3f}, {each.ci95[1]:.3f}] | {each.items} | "
            f"{_cell(each.rule)} |"
            for each in figures
        ]
    if run.verdicts is not None:
        verdicts = verdicts_in(run.verdicts)
        lines += ["", f"{_plain(in_words(verdicts))}."]
        lines += [f"- {_cell(each.name)}: {_cell(each.text, 600)}" for each in verdicts if each.fired]
    return lines


def _row(row: Change) -> str:
    before, after, change = (
        "–" if value is None else value.text(signed)
        for value, signed in ((row.before, False), (row.after, False), (row.change, row.signed))
    )
    return f"| {row.title} | {before} | {after} | {change} | {row.unit} |"


def _figures(run_dir: Path) -> list[TaskFigure]:
    try:
        return task_figures(read_object(folder_of_run(run_dir) / EVALUATION))
    except (InfoPOError, OSError):
        return []


def model_index(figures: Sequence[TaskFigure]) -> list[dict[str, Any]]:
    """Returns results of tasks in the form that the hub shows on a model's page."""
    found = []
    for each in figures:
        name = f"{each.rule}, 95 % interval {each.ci95[0]:.3f} to {each.ci95[1]:.3f}, {each.items} items"
        source = each.source if each.source and _is_of_hub(each.source) else each.task
        found.append(
            {
                "task": {"type": "text-generation", "name": "Text Generation"},
                "dataset": {"name": _plain(each.task), "type": _plain(source)},
                "metrics": [{"type": "accuracy", "value": round(each.accuracy, 4), "name": _plain(name)}],
            }
        )
    return found


def refresh(run_dir: Path) -> bool:
    """Writes the results of a run's files into its card anew, and returns whether it has a card of this library.

    All that stands outside of the marks is left as its author wrote it.
    """
    path = run_dir / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    figures = _figures(run_dir)
    new = with_results(text, results_of(run_dir, figures), model_index(figures))
    if new is None:
        return False
    durable.write(path, [masked(new).encode()])
    return True


def with_results(text: str, results: Sequence[str], index: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns a card with other results, or None if it is none of this library."""
    parts = _split(text)
    if parts is None or BEGIN not in parts[1] or END not in parts[1]:
        return None
    header, body = parts
    header.pop("model-index", None)
    if index:
        header["model-index"] = [{"name": header.get("model_name") or "model", "results": list(index)}]
    before, _, rest = body.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{_front(header)}{before}{chr(10).join(_section(results))}{after}"


def as_merged(text: str, name: str) -> str | None:
    """Returns the card of a model that an adapter was merged into, made from the adapter's. None if it is not ours."""
    parts = _split(text)
    if parts is None or "preference-optimization" not in (parts[0].get("tags") or []):
        return None
    header, body = parts
    if header.get("library_name") != "peft":
        return text
    header = {**header, "library_name": "transformers"}
    header["tags"] = [tag for tag in header["tags"] if tag not in ("lora", "peft", "adapter")]
    for index in header.get("model-index") or []:
        index["name"] = _plain(name)
    body = body.replace(f"\n# {header.get('model_name')}\n", f"\n# {_plain(name)}\n", 1)
    return _front({**header, "model_name": _plain(name)}) + body.replace(
        "\nAn adapter of `", "\nAn adapter, merged into its base `", 1
    )


def _split(text: str) -> tuple[dict[str, Any], str] | None:
    """Returns the metadata of a card and the rest, or None if it has none."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if match is None:
        return None
    try:
        header = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return None
    return (header, text[match.end() :]) if isinstance(header, dict) else None


def shown_name(name: str) -> str:
    """Returns a model's name as it may be published: that of the hub, or the last folder of a path."""
    return _shown(name)


def plain_card(name: str, made_from: str, *, merged: bool) -> str:
    """Returns the card of an export of a model about whose training nothing is known here."""
    header: dict[str, Any] = {
        "library_name": "transformers",
        "model_name": _plain(name),
        "tags": ["infopo"],
        "pipeline_tag": "text-generation",
    }
    if _is_of_hub(made_from):
        header["base_model"] = _plain(made_from)
    what = "An adapter that was merged into its base" if merged else "A copy"
    lines = [f"# {_plain(name)}", "", f"{what}, made from `{_shown(made_from)}` by `infopo export`."]
    return f"{_front(header)}\n{chr(10).join(lines)}\n"
