"""Reads YAML text and `key=value` overrides into one tree of settings that knows where each key came from.

It knows nothing of recipes. YAML is read by the 1.2 core schema, in which `no` and `on` are text (as in
`eval_strategy: no`) and `1e-6` is a number. PyYAML's own 1.1 rules would read a boolean and a text. ruamel.yaml has
rules of its own for dates, `=`, `1_000` and `0b11` in version 1.2 too, and loses line separators in text it writes.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from infopo.errors import ConfigError
from infopo.secrets import masked_argument

Tree = dict[str, Any]
"""Settings by name. Sections are trees themselves."""


class Problems:
    """Collects problems, each at a dotted path, and the lines (or overrides) that paths came from."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.places: dict[str, str] = {}
        self._found: list[tuple[str, str]] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, path: str, message: str) -> None:
        self._found.append((path, message))

    def fail(self, path: str, message: str) -> ConfigError:
        """Adds a problem, and returns the error of a recipe that cannot be read any further."""
        self.add(path, message)
        return ConfigError(self.sentences(), self.source)

    def sentences(self) -> list[str]:
        return [f"{self._located(path)}: {message}" for path, message in self._found]

    def _located(self, path: str) -> str:
        for known in (path, *_parents(path)):
            if place := self.places.get(known):
                return f"{path} ({place})"
        return path


def join_path(path: str, key: str) -> str:
    """Returns the dotted path of a key beneath `path`. The top level has the empty path.

    Example:
        >>> join_path("model", "adapter"), join_path("", "model")
        ('model.adapter', 'model')
    """
    return f"{path}.{key}" if path else key


def _parents(path: str) -> Iterator[str]:
    while path := path.rpartition("[" if path.endswith("]") else ".")[0]:
        yield path


_NULL, _BOOL, _INT, _FLOAT, _STR, _MAP, _SEQ, _MERGE = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq", "merge")
)
_CORE_TAGS = {_NULL, _BOOL, _INT, _FLOAT, _STR, _MAP, _SEQ}
_CORE_SCHEMA = (
    (_NULL, r"~|null|Null|NULL|", [*"~nN", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
    (_MERGE, "<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader under the YAML 1.2 core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own name

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes all text that YAML 1.1 or 1.2 would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML's own choice of quotes loses next-line and line-separator characters.
        return self.represent_scalar(_STR, text, style=None if text.isprintable() else '"')


for _tag, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})\Z"), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})\Z"), _first)
_Loader.add_constructor(_INT, _Loader.construct_core_int)
_Dumper.add_representer(str, _Dumper.represent_text)


def read_tree(text: str, problems: Problems) -> Tree:
    """Returns the top-level mapping. Records the line of every key, and refuses what a recipe has no use for.

    Example:
        >>> problems = Problems("recipe.yaml")
        >>> read_tree("train: {learning_rate: 1e-6, eval_strategy: no}", problems)
        {'train': {'learning_rate': 1e-06, 'eval_strategy': 'no'}}
        >>> problems.places["train.learning_rate"]
        'line 1'
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise problems.fail("recipe", "is empty; expected at least model, data and output_dir")
        if not isinstance(node, yaml.MappingNode):
            kind, line = type(node).__name__.removesuffix("Node").lower(), node.start_mark.line + 1
            raise problems.fail(
                "recipe", f"expected `key: value` lines at the top level, got a {kind} on line {line}"
            )
        _inspect(node, "", problems, open_nodes=[], seen=set())
        tree = _construct(loader, node)
    except yaml.YAMLError as error:
        raise problems.fail(*_syntax_problem(error)) from error
    except RecursionError as error:
        raise problems.fail("recipe", "is nested too deeply to read") from error
    assert isinstance(tree, dict)
    return tree


def _construct(loader: _Loader, node: yaml.Node) -> Any:
    """Returns the value of a node. A bad `!!float x` or a very long integer is a YAML error like others."""
    try:
        return loader.construct_document(node)
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise yaml.constructor.ConstructorError(
            None, None, f"a value cannot be read: {error}", node.start_mark
        ) from error


def _syntax_problem(error: Exception) -> tuple[str, str]:
    """Returns place and message of a YAML error."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return (f"line {mark.line + 1}" if mark else "recipe", f"not valid YAML: {what}")


def _inspect(
    node: yaml.Node, path: str, problems: Problems, open_nodes: list[yaml.Node], seen: set[yaml.Node]
) -> None:
    """Records lines, and finds duplicate keys, keys that are not text, foreign tags, NaN, and self-reference."""
    if node in open_nodes:
        raise problems.fail(path, "refers to itself")
    if node in seen:
        return
    seen.add(node)
    if node.tag not in _CORE_TAGS:
        problems.add(path or "recipe", f"tag {node.tag} has no meaning in a recipe; remove it")
    elif node.tag == _FLOAT and node.value.lower().lstrip(".") == "nan":
        problems.add(path, "NaN is no setting")
    open_nodes.append(node)
    if isinstance(node, yaml.MappingNode):
        _drop_odd_keys(node, path, problems)
        _find_duplicates(node, path, problems)
        for key, value in node.value:
            child = join_path(path, key.value)
            problems.places.setdefault(child, f"line {key.start_mark.line + 1}")
            _inspect(value, child, problems, open_nodes, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _inspect(item, f"{path}[{index}]", problems, open_nodes, seen)
    open_nodes.pop()


def _drop_odd_keys(node: yaml.MappingNode, path: str, problems: Problems) -> None:
    """Records and removes keys that are not text, so that no later check sees one."""
    sound = [(key, value) for key, value in node.value if key.tag in (_STR, _MERGE)]
    for key, _ in node.value:
        if key.tag not in (_STR, _MERGE):
            name = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            line = key.start_mark.line + 1
            problems.add(
                path or "recipe", f"{name!r} on line {line} is no text, but keys are; put it in quotes"
            )
    node.value = sound


def _find_duplicates(node: yaml.MappingNode, path: str, problems: Problems) -> None:
    first: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in first:
            problems.add(
                join_path(path, key.value), f"given twice, on lines {first[key.value]} and {line}; keep one"
            )
        first.setdefault(key.value, line)


def key_parts(path: str) -> list[str]:
    """Returns the parts of a dotted key. An item of a list is `a[0]`, or `a.0`, which shells leave alone.

    Example:
        >>> key_parts("objective[1].weight") == key_parts("objective.1.weight")
        True
    """
    return re.sub(r"\[(\d+)\]", r".\1", path).split(".")


def apply_override(tree: Tree, override: str, problems: Problems) -> None:
    """Sets one dotted key in `tree`. Records what is wrong with `key=value` itself.

    Example:
        >>> tree = {"train": {"max_steps": 10}}
        >>> apply_override(tree, "train.max_steps=20", Problems("recipe.yaml"))
        >>> tree
        {'train': {'max_steps': 20}}
    """
    place = f"override {masked_argument(override)!r}"
    path, equals, text = override.partition("=")
    names = key_parts(path.strip())
    if not equals:
        return problems.add(place, "expected key=value, e.g. train.learning_rate=1e-6")
    if not all(names):
        return problems.add(place, "expected a key before `=`, its parts separated by single dots")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = None
        if node is not None:
            _inspect(node, path.strip(), problems, open_nodes=[], seen=set())
            value = _construct(loader, node)
    except (yaml.YAMLError, RecursionError) as error:
        return problems.add(place, f"the value is {_syntax_problem(error)[1]}")
    path, blocker = _assign(tree, names, value)
    if blocker:
        return problems.add(place, blocker)
    beneath = (f"{path}.", f"{path}[")
    for stale in [known for known in problems.places if known == path or known.startswith(beneath)]:
        del problems.places[stale]
    problems.places[path] = "override"


def _assign(tree: Tree, names: list[str], value: Any) -> tuple[str, str | None]:
    """Sets `tree[a][b][c] = value`, with new sections for absent or null ones.

    Returns:
        The path as messages write it, and what prevents the assignment, or None.
    """
    node: Any = tree
    path = ""
    for depth, name in enumerate(names):
        key: str | int
        if isinstance(node, dict):
            key, path = name, join_path(path, name)
        elif not isinstance(node, list):
            return path, f"{path} is {in_yaml(node)}, which has no key {name!r}"
        elif name in map(str, range(len(node))):
            key, path = int(name), f"{path}[{name}]"
        else:
            return path, (
                f"{path} is a list of {len(node)}, which has no item {shorten(repr(name))}; items count from 0"
            )
        if depth == len(names) - 1:
            node[key] = value
            break
        child = node.get(key) if isinstance(node, dict) else node[int(key)]
        # What is opened is copied, because a YAML anchor may share it, and only this use of it changes.
        node[key] = {} if child is None else child.copy() if isinstance(child, dict | list) else child
        node = node[key]
    return path, None


def in_yaml(value: Any) -> str:
    """Returns a value for a message, as YAML users know it, cut to a line.

    Example:
        >>> in_yaml(None), in_yaml("text")
        ('null', "'text'")
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shorten(repr(value))


def shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def dump_tree(tree: Tree) -> str:
    """Returns YAML that `read_tree`, and YAML 1.1 readers too, read back as an equal tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def as_override(value: Any) -> str:
    """Returns a value, whole, as YAML on one line, which `apply_override` reads back as an equal one.

    Example:
        >>> as_override({"name": "dpo", "cap": None}), as_override(1e-7)
        ('{name: dpo, cap: null}', '1.0e-07')
    """
    text = yaml.dump(
        [value],
        Dumper=_Dumper,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=float("inf"),
    )
    return text.strip()[1:-1]
