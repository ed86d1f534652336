"""The recipe: what a run is asked to do, read from YAML and `key=value` overrides onto the settings of each subject.

A recipe is judged as a whole: unknown keys, wrong types and impossible combinations are collected and raised as one
`ConfigError`, each with its place and line. This module imports neither torch nor transformers. A table of `TrainField`
tells it what transformers accepts under `train`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any

from infopo.catalog import REFERENCE_MODES, suggestion
from infopo.durable import with_home
from infopo.errors import ConfigError
from infopo.losses import foreign
from infopo.losses.catalog import OBJECTIVES
from infopo.losses.mixture import as_written, read_terms
from infopo.places import SYNONYMS
from infopo.round_settings import RoundsSettings
from infopo.secrets import learn, masked_tree
from infopo.settings import (
    AdapterSettings,
    DataSettings,
    EvaluateSettings,
    ModelSettings,
    ObjectiveSettings,
    ReferenceSettings,
)
from infopo.shipped import shipped_recipes
from infopo.sweep_grid import flattened, grid_problems
from infopo.validation import YAML, Language, Problem, Settings, not_a_choice
from infopo.yaml_tree import Problems, Tree, apply_override, dump_tree, in_yaml, join_path, read_tree


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is asked to do. `parse_recipe` checks what does not go together across sections."""

    model: ModelSettings
    data: DataSettings
    output_dir: str
    """The run directory."""
    objective: tuple[ObjectiveSettings, ...] = (ObjectiveSettings(),)
    """The terms of the loss, which is their weighted sum. In YAML a single one need not be a list."""
    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    train: dict[str, Any] = field(default_factory=dict)
    """Arguments of the trainer under transformers' names, and `resume_from_checkpoint`."""
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    rounds: RoundsSettings | None = None
    """Settings of `infopo rounds`, or None for one training."""
    sweep: dict[str, list[Any]] | None = None
    """Values by dotted key, all combinations of which `infopo sweep` trains, or None for one training."""
    places: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Origin of each dotted key (`line 3`, `override`) for messages. This is not a setting."""

    def without_resume(self) -> "Recipe":
        """Returns the recipe without `train.resume_from_checkpoint`, which says nothing of what is trained."""
        return replace(self, train={key: value for key, value in self.train.items() if key != RESUME.name})

    def located(self, key: str) -> str:
        """Returns the key as messages name it, e.g. `model.name_or_path (line 3)`."""
        place = self.places.get(key) or self.places.get(key.rpartition(".")[0])
        return f"{key} ({place})" if place else key


@dataclass(frozen=True)
class TrainField:
    """The values that one key under `train` accepts.

    Attributes:
        name: The key.
        kinds: Accepted types (`float` takes integers too, `int` takes no booleans). If empty, anything is accepted.
        choices: Accepted texts. If empty, any is accepted. Values that are not text are judged by `kinds` alone.

    Example:
        >>> TrainField("max_steps", (int,)).problem("many")
        "expected an integer, got 'many'"
    """

    name: str
    kinds: tuple[type, ...] = ()
    choices: tuple[str, ...] = ()

    def problem(self, value: Any, language: Language = YAML) -> str | None:
        """Returns what is wrong with `value`, or None if nothing is."""
        if self.kinds and not any(_is_a(value, kind) for kind in self.kinds):
            return f"expected {language.kinds(self.kinds)}, got {language.write(value)}"
        if self.choices and isinstance(value, str) and value not in self.choices:
            return not_a_choice(value, self.choices)
        return None


def _is_a(value: Any, kind: type) -> bool:
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


RESUME = TrainField("resume_from_checkpoint", (bool, str, NoneType))
"""Named as in transformers, but handled by infopo: true finds the newest checkpoint of the run directory."""


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), train_fields: Mapping[str, TrainField] | None = None
) -> Recipe:
    """Reads and checks a recipe file (see `parse_recipe`). Losses of the user's are looked for in its folder, too.

    Raises:
        ConfigError: The file cannot be read, or anything in it or in the overrides is wrong.
    """
    source = str(path)
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{source}: no such file; expected a YAML recipe{_shipped(source)}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{source}: is a directory; expected a YAML recipe") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x})", source
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source}: cannot be read: {error}") from error
    foreign.look_in(Path(path).parent)
    return parse_recipe(text, source=source, overrides=overrides, train_fields=train_fields)


def _shipped(source: str) -> str:
    """Returns how to get a recipe that ships, if the name is that of one."""
    name = Path(source).name.removesuffix(".yaml")
    names = [each.name for each in shipped_recipes() if name in (each.name, each.name.rpartition("/")[2])]
    return f" (`infopo recipes {names[0]} > {name}.yaml` writes the one that ships)" if names else ""


def parse_recipe(
    text: str,
    *,
    source: str,
    overrides: Sequence[str] = (),
    train_fields: Mapping[str, TrainField] | None = None,
) -> Recipe:
    """Reads a recipe and checks it as a whole.

    Args:
        text: The recipe as YAML.
        source: Name of the recipe in errors, e.g. its file name.
        overrides: Settings as `section.key=value`, of which later ones win. The value is YAML, so `key=` means null. A
            whole section can be replaced (`objective=dpo`, `model.adapter=null`).
        train_fields: Keys that `train` accepts. If None or empty, it accepts any key.

    Raises:
        ConfigError: Something is wrong. The error lists every problem.

    Example:
        >>> recipe = parse_recipe("{model: sft, data: pairs.jsonl, output_dir: out}", source="example",
        ...                       overrides=["objective=dpo"])
        >>> recipe.model.name_or_path, recipe.objective[0].name, recipe.objective[0].parameters["beta"]
        ('sft', 'dpo', 0.1)
    """
    problems = Problems(source)
    tree = _expand_shorthands(read_tree(text, problems))
    for override in overrides:
        apply_override(tree, override, problems)
        _expand_shorthands(tree)
    return _build(tree, train_fields or {}, problems)


def to_yaml(recipe: Recipe) -> str:
    """Returns the recipe as YAML, with every default written out and secrets masked.

    `parse_recipe` of the text returns an equal recipe.
    """
    tree = masked_tree(asdict(replace(recipe, places={})))
    del tree["places"]
    for name in ("rounds", "sweep"):
        if tree[name] is None:
            del tree[name]
    tree["objective"] = as_written([(t["name"], t["parameters"], t["weight"]) for t in tree["objective"]])
    return dump_tree(tree)


_SHORTHANDS = {
    "model": "name_or_path", "data": "path", "objective": "name", "reference": "source", "evaluate": "tasks",
}  # fmt: skip
"""Sections, and the setting that a text in place of the section means."""


def _expand_shorthands(tree: Tree) -> Tree:
    """Replaces `model: sft`, `data: pairs.jsonl`, `evaluate: gsm8k` and their like by the mappings they mean."""
    for section, key in _SHORTHANDS.items():
        value = tree.get(section)
        if isinstance(value, str) or (section in ("data", "evaluate") and isinstance(value, list)):
            tree[section] = {key: value}
    if isinstance(terms := tree.get("objective"), list):
        tree["objective"] = [{"name": term} if isinstance(term, str) else term for term in terms]
    return tree


SECTIONS: Mapping[str, type[Settings]] = {
    "model": ModelSettings, "model.adapter": AdapterSettings, "data": DataSettings, "reference": ReferenceSettings,
    "evaluate": EvaluateSettings, "rounds": RoundsSettings,
}  # fmt: skip
"""Sections by their dotted names."""


_TOP = tuple(name for name in SECTIONS if "." not in name)

OF_ROUNDS = "rounds"
"""Value of `data.path` in a recipe with rounds, each of which makes pairs of its own."""


def _build(tree: Tree, train_fields: Mapping[str, TrainField], problems: Problems) -> Recipe:
    """Builds the recipe, or raises with every problem.

    What does not go together is looked for among the settings as they were given, right or wrong, so that one mistake
    does not hide another.
    """
    # Secrets are learned before any value can be part of a message.
    learn(tree)
    tree = _with_home(tree)
    homes = _homes(train_fields)
    _refuse_unknown(tree, [f.name for f in fields(Recipe) if f.name != "places"], "", problems, homes)
    has_rounds = tree.get("rounds") is not None
    if has_rounds:
        _note_pairs_of_rounds(tree, problems)
    present = [name for name in _TOP if name != "rounds" or has_rounds]
    sections = {name: _read_section(name, tree.get(name), problems, homes) for name in present}
    if tree.get("output_dir") is None:
        problems.add("output_dir", "is required: the folder that the run is written to")
    elif problem := TrainField("output_dir", (str,)).problem(tree["output_dir"]):
        problems.add("output_dir", problem)
    elif not tree["output_dir"]:
        problems.add("output_dir", "is empty; expected text")
    if tree.get("sweep") is not None:
        tree["sweep"] = flattened(tree["sweep"])
        for key, problem in grid_problems(tree["sweep"]):
            problems.add(key, problem)
    objective = _read_objective(tree.get("objective"), problems)
    train = _read_train(tree.get("train"), train_fields, problems, homes)
    for name, values in sections.items():
        for setting, problem in SECTIONS[name].contradictions(SimpleNamespace(**values)):
            problems.add(f"{name}.{setting}", problem)
    for setting, problem in _contradictions(sections, train):
        problems.add(setting, problem)
    if problems:
        raise ConfigError(problems.sentences(), problems.source)
    model = sections["model"]
    if model["adapter"] is not None:
        model["adapter"] = AdapterSettings(**model["adapter"])
    return Recipe(
        ModelSettings(**model),
        DataSettings(**sections["data"]),
        tree["output_dir"],
        objective,
        ReferenceSettings(**sections["reference"]),
        train,
        EvaluateSettings(**sections["evaluate"]),
        RoundsSettings(**sections["rounds"]) if has_rounds else None,
        tree.get("sweep"),
        dict(problems.places),
    )


def _with_home(value: Any) -> Any:
    """Returns a part of a recipe with the home folder in texts that begin with `~/`, which are paths.

    It is done here, since a path goes to libraries that take `~` for a folder's name, and to others that do not. Keys
    are paths where sources have weights.
    """
    if isinstance(value, dict):
        return {_with_home(key): _with_home(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_home(each) for each in value]
    return with_home(value) if isinstance(value, str) else value


def _note_pairs_of_rounds(tree: Tree, problems: Problems) -> None:
    """Fills in the source of the data, which rounds make themselves."""
    data = tree.setdefault("data", {})
    if data is None:
        data = tree["data"] = {}
    if not isinstance(data, dict):
        return  # which is told of where sections are read
    if data.get("path") not in (None, OF_ROUNDS):
        problems.add(
            "data.path", "rounds make their pairs themselves; remove it, or remove the section rounds"
        )
    data["path"] = OF_ROUNDS


def _homes(train_fields: Mapping[str, TrainField]) -> dict[str, str]:
    """Returns the place of each setting, for those who write it elsewhere or under another tool's name."""
    # Names that rounds share with another section are more often meant there.
    homes = {f.name: f"rounds.{f.name}" for f in fields(RoundsSettings)}
    homes |= {f.name: f"evaluate.{f.name}" for f in fields(EvaluateSettings)}
    homes |= {name: f"train.{name}" for name in train_fields}
    homes |= {key: f"objective.{key}" for row in OBJECTIVES.values() for key in row.parameters}
    others = {name: section for name, section in SECTIONS.items() if name not in ("evaluate", "rounds")}
    homes |= {f.name: f"{name}.{f.name}" for name, section in others.items() for f in fields(section)}
    homes |= {"output_dir": "output_dir, at the top level", "beta": "objective.beta"}
    return dict(SYNONYMS) | homes | {name: SYNONYMS[name] for name in ("objective", "reference")}


def _refuse_unknown(
    tree: Tree, known: list[str], path: str, problems: Problems, homes: Mapping[str, str]
) -> None:
    """Records keys that are not known. `homes` says where a setting of that name belongs."""
    for key in tree:
        if key not in known:
            meant = f" (did you mean {homes[key]}?)" if key in homes else suggestion(key, known)
            problems.add(join_path(path, key), f"no such setting{meant}; there are {', '.join(known)}")


def _read_section(path: str, value: Any, problems: Problems, homes: Mapping[str, str]) -> Tree:
    """Returns all settings of one section, with defaults filled in. Wrong ones are recorded and kept as they are."""
    section = SECTIONS[path]
    settings = section.defaults()
    if not isinstance(value, dict | None):
        problems.add(path, f"expected a section with settings beneath it, got {in_yaml(value)}")
        return settings
    given = value or {}
    _refuse_unknown(given, list(settings), path, problems, homes)
    nested = {key for key in given if f"{path}.{key}" in SECTIONS and given[key] is not None}
    flat = {key: given[key] for key in given.keys() & settings.keys() - nested}
    for name, problem in section.wrong_values(flat, YAML):
        problems.add(f"{path}.{name}", problem)
    return (
        settings | flat | {key: _read_section(f"{path}.{key}", given[key], problems, homes) for key in nested}
    )


def _read_objective(value: Any, problems: Problems) -> tuple[ObjectiveSettings, ...]:
    """Returns the terms of the loss, and checks them against the catalog."""
    if isinstance(value, dict | None):
        found, sentences = read_terms([{"name": ObjectiveSettings.name, **(value or {})}])
        if "weight" in (value or {}):
            sentences.append("objective[0].weight: belongs to a list of objectives, which are added up")
        # A single one is no list in YAML.
        sentences = [sentence.replace("objective[0]", "objective", 1) for sentence in sentences]
    elif isinstance(value, list):
        found, sentences = read_terms(value)
    else:
        expected = "expected a name, a section with name and parameters, or a list"
        found, sentences = [], [f"objective: {expected}, got {in_yaml(value)}"]
    for sentence in sentences:
        path, _, message = sentence.partition(": ")
        problems.add(path, message)
    return () if sentences else tuple(ObjectiveSettings(*term) for term in found)


def _read_train(
    value: Any, train_fields: Mapping[str, TrainField], problems: Problems, homes: Mapping[str, str]
) -> Tree:
    if not isinstance(value, dict | None):
        problems.add("train", f"expected a section with settings beneath it, got {in_yaml(value)}")
        return {}
    train = value or {}
    known = {**train_fields, RESUME.name: RESUME}
    for key, setting in train.items():
        if key == "output_dir":
            problems.add(
                "train.output_dir", "the run directory is set by output_dir at the top level; remove this one"
            )
        elif key in known:
            if problem := known[key].problem(setting):
                problems.add(f"train.{key}", problem)
        elif train_fields:
            home = homes.get(str(key))
            meant = f"; it is {home}" if home else suggestion(str(key), known)
            problems.add(f"train.{key}", f"no such training argument{meant}")
    return train


def _contradictions(sections: Mapping[str, Tree], train: Tree) -> Iterator[Problem]:
    """Yields what does not go together across sections."""
    model, data = sections["model"], sections["data"]
    if sections["reference"]["source"] == "adapter-off" and model["adapter"] is None:
        yield (
            "reference.source",
            "adapter-off takes the model without its adapter as reference, but model.adapter is not set; "
            "add an adapter, or use auto, live or precompute",
        )
    steps = train.get("max_steps")
    if data["streaming"] is True and not (isinstance(steps, int) and steps > 0):
        yield (
            "data.streaming",
            "needs train.max_steps: how many rows there are, and so when an epoch ends and how the learning rate "
            "falls, is not known before the stream ends",
        )
    if data["eval_path"] is None and data["eval_split"] is None:
        asks_for_eval = {
            "eval_strategy": train.get("eval_strategy", "no") not in ("no", None),
            "eval_on_start": train.get("eval_on_start") is True,
            "load_best_model_at_end": train.get("load_best_model_at_end") is True,
        }
        for key in (key for key, asks in asks_for_eval.items() if asks):
            yield f"train.{key}", "there is no data to evaluate on; set data.eval_path or data.eval_split"
    if "rounds" in sections:
        yield from _round_contradictions(sections, train)
    elif sections["evaluate"]["tasks"] and train.get("eval_strategy", "no") in ("no", None):
        yield (
            "evaluate.tasks",
            "tasks are asked at each evaluation; set train.eval_strategy, e.g. to epoch or steps",
        )
    if train.get("fp16") is True and train.get("bf16") is True:
        yield "train.fp16", "bf16 is on too; keep one of them"
    elif train.get("fp16") is True and model["dtype"] in ("float16", "bfloat16") and model["adapter"] is None:
        yield (
            "train.fp16",
            f"mixed precision scales gradients of float32 weights, but model.dtype is {model['dtype']}; "
            "set model.dtype to float32, or turn fp16 off",
        )


def _round_contradictions(sections: Mapping[str, Tree], train: Tree) -> Iterator[Problem]:
    """Yields what does not go with rounds."""
    source = sections["reference"]["source"]
    if isinstance(source, str) and source not in REFERENCE_MODES:
        yield "reference.source", "rounds.reference says which policy is the reference; remove this one"
    elif sections["rounds"]["reference"] == "first" and source not in ("auto", "precompute"):
        yield (
            "reference.source",
            f"{source} takes the policy that a round begins with, but rounds.reference is first; remove one of them",
        )
    if sections["reference"]["samples"] is not None:
        yield "reference.samples", "rounds take the samples that they draw; remove it"
    if sections["data"]["streaming"] is True:
        yield "data.streaming", "the pairs of a round are a file that is read whole; remove it"
    if isinstance(train.get("resume_from_checkpoint"), str):
        yield "train.resume_from_checkpoint", "rounds go on by themselves where they stood; remove it"
    elif sections["data"]["limit"] is not None:
        yield "data.limit", "rounds.limit and rounds.prompts_per_round say what a round is made of; remove it"
