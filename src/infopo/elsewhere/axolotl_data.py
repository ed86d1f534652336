"""Axolotl's `datasets` and `test_datasets`: a mapping each, whose `type` says which columns hold what."""

from collections.abc import Mapping
from typing import Any

from infopo.elsewhere.conversion import Conversion, Named

Columns = Mapping[str, str]

PAIRED: Mapping[str, Columns] = {
    "intel": {"instruction": "question"}, "icr": {"instruction": "input"}, "prompt_pairs": {"instruction": "prompt"},
    "argilla": {"chosen": "chosen_response", "rejected": "rejected_response"}, "argilla_chat": {}, "ultra": {},
    "nectar": {},
}  # fmt: skip
"""Second half of a `type` of DPO -> columns of infopo's shapes that have another name there."""

UNPAIRED: Mapping[str, Columns] = {
    "argilla": {"output": "completion"}, "argilla_chat": {"messages": "completion"},
    "intel": {"instruction": "question", "output": "completion"},
    "prompt_pairs": {"instruction": "prompt", "output": "completion"},
    "ultra": {"instruction": "prompt", "output": "completion"},
}  # fmt: skip
"""The same for KTO."""

TEMPLATES = ("chatml", "llama3", "zephyr")
"""First halves of types that write a template of their own into the text."""

_MESSAGE = {"role": ("role", "from"), "content": ("content", "value")}
_ROLES = {
    "system": ("system",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt"),
    "tool": ("tool",),
}


def data(made: Conversion, method: str) -> None:
    """Sets the recipe's section on data."""
    for key, target in (("datasets", "data.path"), ("test_datasets", "data.eval_path")):
        entries = made.get(key)
        if (
            not isinstance(entries, list)
            or not all(isinstance(entry, dict) for entry in entries)
            or not entries
        ):
            made.lose(key, "expected a list of mappings with a path each")
            continue
        sources = [_source(made, entry, f"{key}[{index}]", method) for index, entry in enumerate(entries)]
        made.put(target, sources[0] if len(sources) == 1 else sources, f"{key}: path")
        made.take(key)
    made.put("data.max_length", made.take("sequence_len", 512), "sequence_len")
    made.move("max_prompt_len", "data.max_prompt_length")
    made.move("chat_template_kwargs", "data.chat_template_kwargs")
    made.move("streaming", "data.streaming")
    for key in ("dataset_num_proc", "dataset_processes"):
        made.move(key, "data.num_proc")
    too_long = made.take("excess_length_strategy", "drop")
    made.put(
        "data.on_too_long",
        "cut" if too_long == "truncate" else "drop",
        "excess_length_strategy; drop by default",
    )
    if too_long == "raise":
        made.lost.append(Named("excess_length_strategy", "raise", "long rows are dropped and counted"))
    for path in ("data.columns", "data.as_chat"):
        if made[path] is False or made[path] == {}:
            made.drop(path)


def _source(made: Conversion, entry: Mapping[str, Any], place: str, method: str) -> Any:
    """Returns where a dataset is, and sets what its type says of its rows."""
    given = {key: value for key, value in entry.items() if value is not None}
    path, files = given.pop("path", None), given.pop("data_files", None)
    if files is not None:
        made.differences.append(f"{place}.data_files: {files} is read in place of {path}.")
        path = files[0] if isinstance(files, list) and len(files) == 1 else files
    if "ds_type" in given:
        made.needless.append(Named(f"{place}.ds_type", given.pop("ds_type"), "the ending of a file tells"))
    split = given.pop("split", None)
    if split is not None:
        _of_all(
            made, "data.split" if place.startswith("datasets") else "data.eval_split", split, f"{place}.split"
        )
    kind = given.pop("type", None)
    before = set(given)
    columns, is_text = _columns(made, kind, given, place, method)
    read = [f"{place}.type", *sorted(before - set(given)), *(kind if isinstance(kind, dict) else ())]
    for key in ("roles", "message_property_mappings"):
        _messages(made, given.pop(key, None), f"{place}.{key}", _ROLES if key == "roles" else _MESSAGE)
    _of_all(made, "data.columns", columns, "; ".join(read))
    _of_all(made, "data.as_chat", is_text, "; ".join(read))
    if kind is not None and not columns and not is_text:
        made.needless.append(Named(f"{place}.type", kind, "the shape of rows is recognised"))
    for key, value in given.items():
        why = (
            "the tokenizer's own chat template is applied"
            if key.startswith("chat_template")
            else "no counterpart"
        )
        made.lost.append(Named(f"{place}.{key}", value, why))
    if isinstance(path, list):
        made.lost.append(
            Named(f"{place}.data_files", path, "several files of one entry: list them in data.path")
        )
        return str(path[0]) if path else ""
    return str(path)


def _of_all(made: Conversion, path: str, value: Any, origin: str) -> None:
    """Sets a setting that is one for all sources. A second source that differs is told."""
    if made[path] is None:
        made.put(path, value, origin)
    elif made[path] != value:
        made.lost.append(Named(origin, value, f"{path} is one for all sources; rewrite the rows of this one"))


def _columns(
    made: Conversion, kind: Any, given: dict[str, Any], place: str, method: str
) -> tuple[dict[str, str], bool]:
    """Returns infopo's columns by their names in the data, and whether plain text gets the chat template."""
    if isinstance(kind, dict):
        return _user_defined(made, kind, place, method)
    family, _, name = str(kind or "").partition(".")
    known = UNPAIRED if method == "kto" else PAIRED
    if family in TEMPLATES:
        made.differences.append(
            f"{place}.type: {kind} writes the text of that template; here the tokenizer's own chat template is applied."
        )
        if name == "nectar":
            made.differences.append(
                f"{place}.type: of Nectar's ranks, Axolotl takes the two largest; here the best answer is chosen and "
                "the worst rejected."
            )
        if name in known:
            return {to: column for to, column in known[name].items() if to != column}, False
        if not name or name == "default":
            return ({"instruction": "prompt"} if method != "kto" else dict(UNPAIRED["ultra"])), False
    if family == "chat_template" and name in ("", "default"):
        prompt = given.pop("field_messages", "messages")
        fields = {"prompt": prompt, "chosen": given.pop("field_chosen", "chosen"),
                  "rejected": given.pop("field_rejected", "rejected")}  # fmt: skip
        return {to: column for to, column in fields.items() if to != column}, False
    if family == "chat_template" and name in ("argilla", "argilla_chat"):
        fields = {
            "chosen": given.pop("field_chosen", "chosen"),
            "rejected": given.pop("field_rejected", "rejected"),
        }
        return {to: column for to, column in fields.items() if to != column}, False
    if kind is not None and family not in ("passthrough", "user_defined"):
        made.lost.append(Named(f"{place}.type", kind, "unknown here; name the columns in data.columns"))
    return {}, False


def _user_defined(
    made: Conversion, kind: Mapping[str, Any], place: str, method: str
) -> tuple[dict[str, str], bool]:
    fields = (
        ("prompt", "system", "completion", "label")
        if method == "kto"
        else ("prompt", "system", "chosen", "rejected")
    )
    columns = {}
    for key, value in kind.items():
        if value is None:
            continue
        if key.startswith("field_") and key.removeprefix("field_") in fields:
            target = key.removeprefix("field_")
            if target != value:
                columns[target] = str(value)
        elif key.endswith("_format") and value == f"{{{key.removesuffix('_format')}}}":
            made.needless.append(Named(f"{place}.type.{key}", value, "the column as it is"))
        else:
            made.lost.append(
                Named(
                    f"{place}.type.{key}",
                    value,
                    "text is not written by a format; data.as_chat applies the chat template",
                )
            )
    return columns, any(str(key).endswith("_format") for key in kind)


def _messages(made: Conversion, names: Any, place: str, known: Mapping[str, tuple[str, ...]]) -> None:
    """Names keys and roles of messages that infopo would not recognise."""
    for key, value in (names if isinstance(names, dict) else {}).items():
        values = value if isinstance(value, list) else [value]
        strange = [each for each in values if each not in known.get(key, ())]
        if strange:
            made.lost.append(
                Named(f"{place}.{key}", value, "keys and roles of messages are those of TRL and ShareGPT")
            )
        else:
            made.needless.append(Named(f"{place}.{key}", value, "it is known without being told"))
