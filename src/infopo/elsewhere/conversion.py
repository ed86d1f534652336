"""What a converter fills in: the recipe's settings, each with its origin, and what becomes of all other settings."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from infopo.config import parse_recipe
from infopo.errors import ConfigError, printable
from infopo.secrets import is_secret, masked, masked_tree
from infopo.train_table import quick_train_fields
from infopo.trl_names import NOT_HONOURED
from infopo.yaml_tree import dump_tree

SECTIONS = ("model", "data", "objective", "reference", "train")


@dataclass(frozen=True)
class Named:
    """A setting of the other tool that the recipe does not have.

    Attributes:
        key: Its name there.
        value: Its value there.
        why: What happens in its place.
    """

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        return masked(f"{self.key}: {_flow(masked_tree({self.key: self.value})[self.key])} ({self.why})")


class Conversion:
    """A file of another tool on its way to a recipe.

    A converter takes each setting once, and says what becomes of it. What nobody took is `lost` in the end, so that no
    setting disappears.

    Attributes:
        tool: Name of the tool, for people.
        lost: Settings without a counterpart.
        needless: Settings that need none: they change nothing here, or are always so.
        differences: Sentences about what is computed differently although every setting was converted.
    """

    def __init__(self, tool: str, given: Mapping[str, Any]) -> None:
        self.tool = tool
        self._given = dict(given)
        self._settings: dict[str, Any] = {}
        self._origins: dict[str, str] = {}
        self._unset = [key for key, value in given.items() if value is None]
        self.lost: list[Named] = []
        self.needless: list[Named] = []
        self.differences: list[str] = []

    def has(self, key: str) -> bool:
        """Whether the file sets this, and nobody took it yet."""
        return self._given.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value, and leaves it there. null counts as not set."""
        value = self._given.get(key)
        return default if value is None else value

    def take(self, key: str, default: Any = None) -> Any:
        """Returns the value, which is then no longer there. null counts as not set."""
        value = self._given.pop(key, None)
        return default if value is None else value

    def put(self, path: str, value: Any, origin: str) -> None:
        """Sets a key of the recipe. `origin` is its comment: the name there, or whose default it is."""
        self._settings[path] = value
        self._origins[path] = origin

    @property
    def written(self) -> int:
        """How many settings the recipe has."""
        return len(self._settings)

    def __getitem__(self, path: str) -> Any:
        return self._settings.get(path)

    def move(self, key: str, path: str) -> None:
        """Sets a key of the recipe to the value of a setting, if the file has it."""
        if self.has(key):
            self.put(path, self.take(key), key)

    def lose(self, key: str, why: str) -> None:
        """Names a setting as one without a counterpart, if the file has it."""
        if self.has(key):
            self.lost.append(Named(key, self.take(key), why))

    def need_not(self, key: str, why: str) -> None:
        """Names a setting as one that changes nothing here, if the file has it."""
        if self.has(key):
            self.needless.append(Named(key, self.take(key), why))

    def account(self, lost: Mapping[str, str], needless: Mapping[str, str]) -> None:
        """Names what nobody took and the tool's tables know: what has no counterpart, and what needs none."""
        for key, why in lost.items():
            self.lose(key, why)
        for key, why in needless.items():
            self.need_not(key, why)

    def quantization(self) -> None:
        """Sets the bits of the base's weights from `load_in_4bit` and `load_in_8bit`."""
        for bits in ("4bit", "8bit"):
            if self.get(f"load_in_{bits}"):
                self.take(f"load_in_{bits}")
                self.put("model.quantization", bits, f"load_in_{bits}")

    def without_adapter(self, keys: Sequence[str], why: str) -> None:
        """Names the settings of an adapter, and of the weights beneath it, as lost where there is none."""
        for key in keys:
            self.lose(key, why)
        for key in ("load_in_4bit", "load_in_8bit"):
            if self.get(key):
                self.lose(key, "quantized weights are trained beneath an adapter only")

    def checkpointing(self) -> None:
        """Switches checkpointing of activations off if the file does. It is on by default, here and there."""
        if self.get("gradient_checkpointing") is False:
            self.take("gradient_checkpointing")
            self.put("train.activation_checkpointing", False, "gradient_checkpointing")

    def train(self, name: str, key: str) -> None:
        """Sets an argument of training to the value of a setting, if the file has it and transformers takes it."""
        if not self.has(key):
            return
        value = self.take(key)
        setting = quick_train_fields().get(name)
        if setting is None and quick_train_fields():
            self.lost.append(Named(key, value, "no such training argument"))
            return
        if setting and float in setting.kinds and isinstance(value, str):
            value = number(value)
        neutral, why = NOT_HONOURED.get(name, ((value,), ""))
        if value not in neutral:
            self.lost.append(Named(key, value, why))
        elif name in NOT_HONOURED:
            self.needless.append(Named(key, value, "this is always so here"))
        elif setting and (problem := setting.problem(value)):
            self.lost.append(Named(key, value, problem))
        else:
            self.put(f"train.{name}", value, key)

    def drop(self, path: str) -> None:
        """Leaves a key of the recipe at its default."""
        self._settings.pop(path, None)
        self._origins.pop(path, None)

    def mention(self, key: str, value: Any) -> None:
        """Names a setting that was read as one that changes nothing, if no comment names it."""
        if not any(re.search(rf"\b{re.escape(key)}\b", origin) for origin in self._origins.values()):
            self.needless.append(Named(key, value, "the loss does not read it"))

    def evaluation(self) -> None:
        """Names the settings of evaluation as lost if the recipe has no data to evaluate on."""
        if self["data.eval_path"] is None and self["data.eval_split"] is None:
            for key in OF_EVALUATION:
                if self.get(key) in (0, False, "no"):
                    self.need_not(key, "there is no evaluation")
                self.lose(key, "there is no data to evaluate on; set data.eval_path or data.eval_split")

    def rest(self) -> None:
        """Passes on what nobody took: arguments of transformers' trainer as they are, and the others as lost."""
        for key in [key for key, value in self._given.items() if value is not None]:
            if is_secret(key):
                self.lose(key, "a secret is read from where its library looks for it, such as HF_TOKEN")
            elif key in quick_train_fields():
                self.train(key, key)
            else:
                self.lose(key, "no counterpart")

    def recipe(self, source: str) -> str:
        """Returns the recipe as YAML with comments. Settings that it could not have are named instead.

        Raises:
            ConfigError: The recipe lacks what it needs, such as a model.
        """
        while True:
            text = self._text(source)
            try:
                parse_recipe(text, source=source, train_fields=quick_train_fields())
            except ConfigError as error:
                if not self._give_up(error.problems):
                    raise ConfigError([self._there(each) for each in error.problems], source) from error
            else:
                return text

    def _there(self, problem: str) -> str:
        """Returns a problem of the recipe in words of the file: its setting, and no line, which is the recipe's."""
        problem = re.sub(r" \(line \d+\)", "", problem, count=1)
        path = problem.partition(": ")[0].partition("[")[0]
        if path in self._origins:
            return f"{self._origins[path]} ({path}){problem.removeprefix(path)}"
        read = "".join(
            f"; not understood: {each}" for each in self.lost if "data" in path and "data" in each.key
        )
        return f"{problem}{read}"

    def _give_up(self, problems: Sequence[str]) -> bool:
        """Names settings that the recipe cannot have. Returns whether there was one."""
        found = False
        for problem in problems:
            path, _, why = re.sub(r" \([^)]*\):", ":", problem, count=1).partition(": ")
            if path in self._settings and path not in REQUIRED:
                value = self._settings.pop(path)
                self.lost.append(Named(self._origins.pop(path), value, f"{path}: {why}"))
                found = True
        return found

    def _text(self, source: str) -> str:
        lines = [f"# Converted by `infopo convert-recipe` from {self.tool}'s {masked(source)}."]
        lines += [f"# {line}" for line in self.differences]
        for title, group in (
            ("Settings without a counterpart", self.lost),
            ("Settings that need none", self.needless),
        ):
            if group:
                lines += [f"# {title} ({len(group)}):", *(f"#   {_one_line(str(each))}" for each in group)]
        if self._unset:
            lines.append(f"# Not set there (null): {', '.join(self._unset)}")
        for section in SECTIONS:
            lines += self._section(section)
        lines += ["", *self._line("output_dir", "output_dir", 0)] if "output_dir" in self._settings else []
        return "\n".join([*lines, ""])

    def _section(self, section: str) -> list[str]:
        if section in self._settings:
            return ["", *self._line(section, section, 0)]
        paths = [path for path in self._settings if path.startswith(f"{section}.")]
        lines = ["", f"{section}:"] if paths else []
        opened = ""
        # Keys of a section of their own (model.adapter) come last, together.
        for path in sorted(paths, key=lambda path: path.count(".")):
            *folder, key = path.removeprefix(f"{section}.").split(".")
            if folder and folder[0] != opened:
                opened = folder[0]
                lines.append(f"  {opened}:")
            lines += self._line(path, key, 2 + 2 * len(folder))
        return lines

    def _line(self, path: str, key: str, indent: int) -> list[str]:
        text = f"{' ' * indent}{key}: {_flow(self._settings[path])}"
        origin = _one_line(self._origins[path])
        return [text if origin == key else f"{text}  # {origin}"]


OF_EVALUATION = (
    "do_eval", "eval_strategy", "evaluation_strategy", "eval_steps", "evals_per_epoch", "eval_on_start", "eval_delay",
    "per_device_eval_batch_size", "eval_batch_size", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better", "early_stopping_patience", "eval_on_each_dataset",
)  # fmt: skip
"""Settings of the tools that mean something only if there is data to evaluate on."""

REQUIRED = ("model.name_or_path", "data.path", "output_dir")
"""Keys without which there is no recipe."""


def _flow(value: Any) -> str:
    """Returns a value as one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    text = dump_tree({"value": value}).removeprefix("value:").strip()
    is_plain = isinstance(value, str) and not re.search(r"[,\[\]{}\n]|^[>|]", text)
    return text if is_plain or not isinstance(value, str) else _quoted(value)


def _quoted(text: str) -> str:
    written = yaml.safe_dump([text], default_style='"', width=10**9, allow_unicode=True)
    return written.strip().removeprefix("- ")


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def number(text: str) -> Any:
    """Returns the number that a text writes, or the text.

    Example:
        >>> number("2e-4"), number("auto")
        (0.0002, 'auto')
    """
    try:
        return float(text)
    except ValueError:
        return text


def listed(value: Any) -> list[Any]:
    """Returns a list, which may be written as text with commas.

    Example:
        >>> listed("q_proj, v_proj"), listed(["q_proj"]), listed(None)
        (['q_proj', 'v_proj'], ['q_proj'], [])
    """
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def is_number(value: Any) -> bool:
    """Returns whether a value is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
