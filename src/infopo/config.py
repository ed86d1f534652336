"""The recipe: what a run is asked to do, as typed sections read from YAML and `key=value` overrides.

A recipe is judged as a whole: unknown keys, wrong types and impossible combinations are collected and raised as one
`ConfigError`, each with its place and line. This module imports neither torch nor transformers. A table of `TrainField`
tells it what transformers accepts under `train`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from infopo.catalog import (
    DATA_SHAPES,
    ON_BAD_ROW,
    ON_TOO_LONG,
    REFERENCE_MODES,
    REFERENCE_SIDES,
    SCORE_RULES,
    suggestion,
)
from infopo.errors import ConfigError
from infopo.losses.catalog import OBJECTIVES, check_objective, complete_parameters, objective_name
from infopo.places import SYNONYMS
from infopo.secrets import learn, masked_tree
from infopo.vocabulary import check_columns
from infopo.yaml_tree import Problems, Tree, apply_override, dump_tree, join_path, read_tree, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Types that model weights are loaded in."""


QUANTIZATIONS = ("4bit", "8bit")
"""Quantizations by bitsandbytes of the frozen weights beneath an adapter. 4bit is NF4 with double quantization."""


def _one_of(*choices: str) -> dict[str, Any]:
    return {"choices": choices}


def _within(low: float, below: float | None = None) -> dict[str, Any]:
    return {"low": low, "below": below}


@dataclass(frozen=True)
class AdapterSection:
    """A LoRA adapter to train in place of the whole model (needs the `peft` extra)."""

    r: int = field(default=16, metadata=_within(1))
    """Rank of the update matrices."""
    lora_alpha: int = field(default=32, metadata=_within(1))
    """Numerator of the factor lora_alpha / r that the update is multiplied by."""
    lora_dropout: float = field(default=0.0, metadata=_within(0, below=1))
    """Probability of dropping an input of the adapter in training. A new adapter adds 0, whatever it drops."""
    target_modules: str | list[str] | None = None
    """Modules to adapt: names, a regular expression, `all-linear`, or null for peft's choice for the architecture."""


@dataclass(frozen=True)
class ModelSection:
    """The policy that training starts from."""

    name_or_path: str
    """Folder of a saved model, or a name on the hub."""
    dtype: str = field(default="auto", metadata=_one_of(*DTYPES))
    """Type of the weights. auto is float32 if all are trained, and the checkpoint's own beneath an adapter."""
    attn_implementation: str | None = None
    """Attention kernel by transformers' name, or null to let infopo choose."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    quantization: str | None = field(default=None, metadata=_one_of(*QUANTIZATIONS))
    """Bits of the frozen weights beneath an adapter (QLoRA), for which bitsandbytes and an accelerator are needed.
    null leaves them as loaded.
    """
    adapter: AdapterSection | None = None
    """LoRA adapter, or null to train all weights."""


@dataclass(frozen=True)
class DataSection:
    """The preference data and how it is turned into tokens."""

    path: str | list[str] | dict[str, float]
    """File, glob, folder, or name of a dataset. A list takes all rows of several, a mapping to weights mixes them."""
    split: str = "train"
    """Split to train on."""
    shape: str | None = field(default=None, metadata=_one_of(*DATA_SHAPES))
    """Shape of the rows, or null to recognise it from the columns."""
    columns: dict[str, str | None] | None = None
    """Columns of the data by the names that shapes know: `{prompt: question}`. A name mapped to null is left out."""
    score_rule: str = field(default=SCORE_RULES[0], metadata=_one_of(*SCORE_RULES))
    """How scored responses are split into chosen and rejected ones."""
    score_threshold: float | None = None
    """Least score of a chosen response, for `score_rule: threshold`."""
    streaming: bool = False
    """Whether rows are read when they are needed, and not all before training. This needs `train.max_steps`."""
    eval_path: str | list[str] | dict[str, float] | None = None
    """Data to evaluate on. null with `eval_split` takes that split of `path`."""
    eval_split: str | None = None
    """Split to evaluate on. null with `eval_path` takes the split named by `split`."""
    max_length: int | None = field(default=1024, metadata=_within(2))
    """Largest number of tokens of prompt and response together, or null for no limit."""
    max_prompt_length: int | None = field(default=None, metadata=_within(1))
    """Largest number of tokens of the prompt, or null to limit only prompt and response together."""
    on_too_long: str = field(default="cut", metadata=_one_of(*ON_TOO_LONG))
    """What to do with a row that has more tokens: cut it, or drop it."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Template variables for all rows. Those of a row's own take precedence."""
    as_chat: bool = False
    """Whether plain text is taken as a conversation, to which the chat template is applied."""
    on_bad_row: str = field(default="raise", metadata=_one_of(*ON_BAD_ROW))
    """What to do with a row that cannot be used."""
    num_proc: int | None = field(default=None, metadata=_within(1))
    """Number of processes that encode rows, or null to encode in this one."""
    limit: int | None = field(default=None, metadata=_within(1))
    """Number of rows to read, from the start, or null to read all."""

    @property
    def has_eval(self) -> bool:
        """Whether there is data to evaluate on."""
        return self.eval_path is not None or self.eval_split is not None


@dataclass(frozen=True)
class ObjectiveSection:
    """The loss. In YAML its parameters are beside the name: `objective: {name: dpo, beta: 0.1}`, or `objective: dpo`.

    Raises:
        ConfigError: The catalog has no such objective or parameter, or refuses a value.
    """

    name: str = "infopo"
    """Name in the catalog of objectives."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Values by parameter name. The catalog's defaults are filled in, so that a written recipe is complete."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", objective_name(self.name))
        object.__setattr__(self, "parameters", complete_parameters(self.name, self.parameters))


@dataclass(frozen=True)
class ReferenceSection:
    """The source of log π_ref. In YAML `reference: live` means `reference: {source: live}`."""

    source: str = "auto"
    """`auto`, `live`, `precompute`, `adapter-off`, or the path of a reference model."""
    store: str | None = "auto"
    """Folder that precomputed values are kept in. `auto` is the user's cache, `off` or null is memory only."""
    sides: str = field(default="auto", metadata=_one_of(*REFERENCE_SIDES))
    """Responses whose reference is computed. `needed` are those that the loss needs, `both` serves all metrics, and
    `auto` is both in evaluation only.
    """

    @property
    def is_path(self) -> bool:
        """Whether `source` names a model, not a mode."""
        return self.source not in REFERENCE_MODES


@dataclass(frozen=True)
class Recipe:
    """Everything that a run is asked to do.

    `parse_recipe` checks it. The sections alone check nothing but the objective.
    """

    model: ModelSection
    data: DataSection
    output_dir: str
    """The run directory."""
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    reference: ReferenceSection = field(default_factory=ReferenceSection)
    train: dict[str, Any] = field(default_factory=dict)
    """Arguments of the trainer under transformers' names, and `resume_from_checkpoint`."""
    places: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Origin of each dotted key (`line 3`, `override`) for messages. This is not a setting."""

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

    def problem(self, value: Any) -> str | None:
        """Returns what is wrong with `value`, or None if nothing is."""
        if self.kinds and not any(_fits(value, kind) for kind in self.kinds):
            return f"expected {_in_words(*self.kinds)}, got {shown(value)}"
        if self.choices and isinstance(value, str) and value not in self.choices:
            return _not_a_choice(value, self.choices)
        return None


RESUME = TrainField("resume_from_checkpoint", (bool, str, NoneType))
"""Named as in transformers, but handled by infopo: true finds the newest checkpoint of the run directory."""


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), train_fields: Mapping[str, TrainField] | None = None
) -> Recipe:
    """Reads and checks a recipe file (see `parse_recipe`).

    Raises:
        ConfigError: The file cannot be read, or anything in it or in the overrides is wrong.
    """
    source = str(path)
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{source}: no such file; expected a YAML recipe") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{source}: is a directory; expected a YAML recipe") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x})", source
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source}: cannot be read: {error}") from error
    return parse_recipe(text, source=source, overrides=overrides, train_fields=train_fields)


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
        >>> recipe.model.name_or_path, recipe.objective.name, recipe.objective.parameters["beta"]
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
    objective = tree["objective"]
    tree["objective"] = {"name": objective["name"], **objective["parameters"]}
    return dump_tree(tree)


_SHORTHANDS = {"model": "name_or_path", "data": "path", "objective": "name", "reference": "source"}
"""Sections, and the setting that a text in place of the section means."""


def _expand_shorthands(tree: Tree) -> Tree:
    """Replaces `model: sft`, `data: pairs.jsonl`, `objective: dpo` and `reference: live` by the mappings they mean."""
    for section, key in _SHORTHANDS.items():
        value = tree.get(section)
        if isinstance(value, str) or (section == "data" and isinstance(value, list)):
            tree[section] = {key: value}
    return tree


def _build(tree: Tree, train_fields: Mapping[str, TrainField], problems: Problems) -> Recipe:
    """Builds the recipe, or raises with every problem.

    Checks across sections see the settings as they were given, right or wrong, so that one mistake does not hide
    another.
    """
    # Secrets are learned before any value can be part of a message.
    learn(tree)
    homes = _homes(train_fields)
    _refuse_unknown(tree, Recipe, "", problems, homes)
    model = _read_section(ModelSection, tree.get("model"), "model", problems, homes)
    data = _read_section(DataSection, tree.get("data"), "data", problems, homes)
    output_dir = _read_output_dir(tree.get("output_dir"), problems)
    objective = _read_objective(tree.get("objective"), problems)
    reference = _read_section(ReferenceSection, tree.get("reference"), "reference", problems, homes)
    train = _read_train(tree.get("train"), train_fields, problems, homes)
    _check_reference(model, reference, problems)
    if model["quantization"] is not None and model["adapter"] is None:
        problems.add(
            "model.quantization", "quantized weights cannot be trained; add model.adapter, or leave it out"
        )
    _check_data(data, train, problems)
    _check_precision(model, train, problems)
    if problems:
        raise ConfigError(problems.sentences(), problems.source)
    if model["adapter"] is not None:
        model["adapter"] = AdapterSection(**model["adapter"])
    return Recipe(
        ModelSection(**model),
        DataSection(**data),
        output_dir,
        ObjectiveSection(**objective),
        ReferenceSection(**reference),
        train,
        dict(problems.places),
    )


def _homes(train_fields: Mapping[str, TrainField]) -> dict[str, str]:
    """Returns the place of each setting, for those who write it elsewhere or under another tool's name."""
    sections = {
        "model": ModelSection, "model.adapter": AdapterSection, "data": DataSection, "reference": ReferenceSection,
    }  # fmt: skip
    homes = {name: f"train.{name}" for name in train_fields}
    homes |= {key: f"objective.{key}" for row in OBJECTIVES.values() for key in row.parameters}
    homes |= {f.name: f"{name}.{f.name}" for name, section in sections.items() for f in fields(section)}
    homes |= {"output_dir": "output_dir, at the top level", "beta": "objective.beta"}
    return dict(SYNONYMS) | homes | {name: SYNONYMS[name] for name in ("objective", "reference")}


def _refuse_unknown(
    tree: Tree,
    section: "type[DataclassInstance]",
    path: str,
    problems: Problems,
    homes: Mapping[str, str] | None = None,
) -> None:
    """Records keys that the section does not have. `homes` says where a setting of that name belongs."""
    known = [f.name for f in fields(section) if f.name != "places"]
    there_are = ", ".join(known)
    for key in tree:
        if key not in known:
            home = (homes or {}).get(key)
            meant = f" (did you mean {home}?)" if home else suggestion(key, known)
            problems.add(join_path(path, key), f"no such setting{meant}; there are {there_are}")


def _read_section(
    section: "type[DataclassInstance]",
    value: Any,
    path: str,
    problems: Problems,
    homes: Mapping[str, str] | None = None,
) -> Tree:
    """Returns all settings of one section, with defaults filled in. Wrong ones are recorded and kept as they are."""
    is_section = isinstance(value, dict | None)
    if not is_section:
        problems.add(path, f"expected a section with settings beneath it, got {shown(value)}")
    given = value if is_section and value else {}
    _refuse_unknown(given, section, path, problems, homes)
    kinds, settings = get_type_hints(section), {}
    for spec in fields(section):
        place, kind = f"{path}.{spec.name}", kinds[spec.name]
        setting = given.get(spec.name, None if spec.default is MISSING else spec.default)
        nested = next((k for k in get_args(kind) if is_dataclass(k)), None)
        if spec.name not in given:
            if spec.default is MISSING and is_section:
                problems.add(place, "is required")
        elif isinstance(nested, type) and setting is not None:
            setting = _read_section(nested, setting, place, problems, homes)
        elif problem := _value_problem(setting, kind, spec.metadata):
            problems.add(place, problem)
        settings[spec.name] = setting
    return settings


def _read_output_dir(value: Any, problems: Problems) -> Any:
    if value is None:
        problems.add("output_dir", "is required: the folder that the run is written to")
    elif problem := _value_problem(value, str, {}):
        problems.add("output_dir", problem)
    return value


def _read_objective(value: Any, problems: Problems) -> Tree:
    """Returns name and parameters, and checks them against the catalog."""
    if not isinstance(value, dict | None):
        problems.add(
            "objective", f"expected a name, or a section with name and parameters, got {shown(value)}"
        )
        return {}
    parameters = dict(value or {})
    name = parameters.pop("name", ObjectiveSection.name)
    if not isinstance(name, str):
        problems.add("objective.name", f"expected text, got {shown(name)}")
        return {}
    name = objective_name(name)
    for sentence in check_objective(name, parameters):
        path, _, message = sentence.partition(": ")
        problems.add(path, message)
    return {"name": name, "parameters": parameters}


def _read_train(
    value: Any, train_fields: Mapping[str, TrainField], problems: Problems, homes: Mapping[str, str]
) -> Tree:
    if not isinstance(value, dict | None):
        problems.add("train", f"expected a section with settings beneath it, got {shown(value)}")
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


def _check_reference(model: Tree, reference: Tree, problems: Problems) -> None:
    source = reference["source"]
    if source == "adapter-off" and model["adapter"] is None:
        problems.add(
            "reference.source",
            "adapter-off takes the model without its adapter as reference, but model.adapter is not set; "
            "add an adapter, or use auto, live or precompute",
        )
    elif (
        _fits(source, str)
        and source not in REFERENCE_MODES
        and (meant := suggestion(source, REFERENCE_MODES))
    ):
        modes = ", ".join(REFERENCE_MODES)
        problems.add(
            "reference.source",
            f"{source!r} is none of {modes}{meant}; write ./{source} for a folder of that name",
        )


def _check_data(data: Tree, train: Tree, problems: Problems) -> None:
    longest, prompt = data["max_length"], data["max_prompt_length"]
    if _fits(longest, int) and _fits(prompt, int) and prompt >= longest:
        problems.add(
            "data.max_prompt_length",
            f"{prompt} leaves no room for a response within max_length ({longest} tokens)",
        )
    if _fits(data["columns"], dict[str, str | None]):
        for problem in check_columns(data["columns"]):
            target, _, sentence = problem.partition(": ")
            problems.add(f"data.columns.{target}", sentence)
    for key in ("path", "eval_path"):
        value = data[key]
        if value in ([], {}):
            problems.add(f"data.{key}", "is empty; expected at least one source")
        elif _fits(value, dict[str, float]):
            for source, weight in value.items():
                if not 0 < weight < math.inf:
                    problems.add(f"data.{key}", f"{source}: expected a weight > 0, got {weight}")
    if (data["score_rule"] == "threshold") != (data["score_threshold"] is not None):
        problems.add(
            "data.score_threshold",
            "goes with score_rule: threshold, and the rule needs it; set both or neither",
        )
    if data["streaming"] is True and not (_fits(train.get("max_steps"), int) and train["max_steps"] > 0):
        problems.add(
            "data.streaming",
            "needs train.max_steps: how many rows there are, and so when an epoch ends and how the learning rate "
            "falls, is not known before the stream ends",
        )
    if data["eval_path"] is not None or data["eval_split"] is not None:
        return
    asks_for_eval = {
        "eval_strategy": train.get("eval_strategy", "no") not in ("no", None),
        "eval_on_start": train.get("eval_on_start") is True,
        "load_best_model_at_end": train.get("load_best_model_at_end") is True,
    }
    for key, asked in asks_for_eval.items():
        if asked:
            problems.add(
                f"train.{key}", "there is no data to evaluate on; set data.eval_path or data.eval_split"
            )


def _check_precision(model: Tree, train: Tree, problems: Problems) -> None:
    if train.get("fp16") is not True:
        return
    if train.get("bf16") is True:
        problems.add("train.fp16", "bf16 is on too; keep one of them")
    elif model["dtype"] in ("float16", "bfloat16") and model["adapter"] is None:
        problems.add(
            "train.fp16",
            f"mixed precision scales gradients of float32 weights, but model.dtype is {model['dtype']}; "
            "set model.dtype to float32, or turn fp16 off",
        )


def _value_problem(value: Any, kind: Any, limits: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with a value of the sections above, or None if nothing is."""
    if not _fits(value, kind):
        members = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        return f"expected {_in_words(*members)}, got {shown(value)}"
    if value == "":
        return "is empty; expected text"
    if value is not None and (choices := limits.get("choices")) and value not in choices:
        return _not_a_choice(value, choices)
    if value is None or "low" not in limits:
        return None
    low, below = limits["low"], limits["below"]
    if value < low or (below is not None and value >= below):
        return f"expected a value {f'>= {low}' if below is None else f'in [{low}, {below})'}, got {value}"
    return None


def _fits(value: Any, kind: Any) -> bool:
    """Returns whether `value` is of `kind`, which is a type, a union, or a list or dict of types."""
    if isinstance(kind, UnionType):
        return any(_fits(value, member) for member in get_args(kind))
    if kind is Any:
        return True
    if get_origin(kind) is dict:
        keys, values = get_args(kind)
        return isinstance(value, dict) and all(_fits(k, keys) and _fits(v, values) for k, v in value.items())
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


_WORDS = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
    list: "a list",
    list[str]: "a list of texts",
    dict[str, float]: "a mapping to numbers",
    dict[str, str | None]: "a mapping of a shape's columns to those of the data",
    dict[str, Any]: "a mapping",
    dict: "a mapping",
}


def _in_words(*kinds: Any) -> str:
    return " or ".join(_WORDS.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)


def _not_a_choice(value: str, choices: Sequence[str]) -> str:
    return f"expected one of {', '.join(choices)}, got {value!r}{suggestion(value, list(choices))}"
