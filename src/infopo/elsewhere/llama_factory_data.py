"""What LLaMA-Factory's file and its `dataset_info.json` say of the data."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from infopo.elsewhere.conversion import Conversion, Named, is_number, listed, number

KNOWN: Mapping[str, str] = {
    "dpo_mix_en": "llamafactory/DPO-En-Zh-20k",
    "dpo_mix_zh": "llamafactory/DPO-En-Zh-20k",
    "ultrafeedback": "llamafactory/ultrafeedback_binarized",
    "coig_p": "m-a-p/COIG-P",
    "orca_pairs": "Intel/orca_dpo_pairs",
    "nectar_rm": "AstraMindAI/RLAIF-Nectar",
    "orca_dpo_de": "mayflowergmbh/intel_orca_dpo_pairs_de",
    "kto_mix_en": "argilla/kto-mix-15k",
    "ultrafeedback_kto": "argilla/ultrafeedback-binarized-preferences-cleaned-kto",
}
"""Preference data that LLaMA-Factory's own `dataset_info.json` names -> their place on the hub."""

COLUMNS: Mapping[str, Mapping[str, str]] = {
    "alpaca": {
        "prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
        "tools": "tools", "chosen": "chosen", "rejected": "rejected", "kto_tag": "kto_tag",
    },
    "sharegpt": {
        "messages": "conversations", "system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected",
        "kto_tag": "label",
    },
}  # fmt: skip
"""`formatting` -> its keys of `columns` -> the columns that infopo's shapes know."""

ROLES = {
    "user_tag": ("human", "user"), "assistant_tag": ("gpt", "assistant", "chatgpt"),
    "observation_tag": ("observation", "tool"), "function_tag": ("function_call", "tool_call"),
    "system_tag": ("system",),
}  # fmt: skip
"""Keys of `tags` -> the roles that infopo knows without being told."""


def data(made: Conversion, path: Path) -> None:
    """Sets the recipe's section on data."""
    folder = str(made.get("dataset_dir", "data"))
    found, described = _descriptions(folder, path)
    made.need_not(
        "dataset_dir", f"its files were looked up in {found}" if found else "no dataset_info.json is there"
    )
    for key, target in (("dataset", "data.path"), ("eval_dataset", "data.eval_path")):
        names = [str(name) for name in listed(made.get(key))]
        if not names:
            continue
        sources = [_source(made, name, described, found, is_main=key == "dataset") for name in names]
        made.put(target, sources[0] if len(sources) == 1 else sources, key)
        made.take(key)
    _mixture(made)
    made.put("data.max_length", made.take("cutoff_len", 2048), "cutoff_len")
    made.move("max_samples", "data.limit")
    made.move("preprocessing_num_workers", "data.num_proc")
    made.move("streaming", "data.streaming")
    if made["model.name_or_path"]:
        made.differences.append(
            "Plain instructions get the tokenizer's chat template, as there; rows with a `prompt` of plain text do "
            "only under data.as_chat: true."
        )


def _descriptions(folder: str, path: Path) -> tuple[Path | None, dict[str, Any]]:
    """Returns the folder that holds `dataset_info.json`, and what it says. The file's own folder is a start, too."""
    for start in (Path(), *path.absolute().parents[:4]):
        file = start / folder / "dataset_info.json"
        try:
            described = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(described, dict):
            return start / folder, described
    return None, {}


def _source(
    made: Conversion, name: str, described: Mapping[str, Any], folder: Path | None, *, is_main: bool
) -> str:
    """Returns where a dataset is, and sets the columns and the split of the one that is trained on."""
    about = described.get(name)
    if not isinstance(about, dict):
        if name in KNOWN:
            return KNOWN[name]
        made.lost.append(
            Named(f"dataset {name}", None, "no dataset_info.json describes it: name its file in data.path")
        )
        return name
    about = dict(about)
    kind = about.pop("formatting", "alpaca")
    source = _place(made, name, about, folder)
    columns = dict(_columns(kind, about.pop("columns", None)))
    for key, mapped in (("split", "data.split"), ("num_samples", "data.limit")):
        if is_main and key in about:
            made.put(mapped, about.pop(key), f"dataset_info.json: {name}.{key}")
    if is_main and columns and made["data.columns"] in (None, columns):
        made.put("data.columns", columns, f"dataset_info.json: {name}.columns")
    elif columns and made["data.columns"] != columns:
        made.lost.append(
            Named(f"{name}.columns", columns, "one data.columns is for all sources; rename the columns")
        )
    about.pop("ranking", None)
    for key, value in _strange_tags(about.pop("tags", None)):
        made.lost.append(
            Named(f"{name}.tags.{key}", value, "roles and keys of messages are those of ShareGPT or of TRL")
        )
    for key, value in about.items():
        made.lost.append(Named(f"{name}.{key}", value, "no counterpart; name files that have it already"))
    return source


def _place(made: Conversion, name: str, about: dict[str, Any], folder: Path | None) -> str:
    places = {key: about.pop(key) for key in ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url",
                                              "cloud_file_name", "file_name") if key in about}  # fmt: skip
    if hub := places.get("hf_hub_url"):
        return str(hub)
    if file := places.get("file_name"):
        return str((folder or Path()) / file)
    key, value = next(iter(places.items()), ("file_name", None))
    made.lost.append(
        Named(
            f"{name}.{key}",
            value,
            "data come from files or the Hugging Face hub: fetch it, and name the file",
        )
    )
    return str(value or name)


def _columns(kind: str, columns: Any) -> Iterator[tuple[str, str]]:
    """Yields infopo's columns that bear another name in the data, and that name."""
    known = COLUMNS.get(kind, COLUMNS["sharegpt"])
    for key, column in (columns if isinstance(columns, dict) else {}).items():
        target = known.get(key, key)
        if key in ("images", "videos", "audios"):
            continue
        if column and column != target and not (target == "conversations" and column == "messages"):
            yield target, column


def _strange_tags(tags: Any) -> Iterator[tuple[str, Any]]:
    for key, value in (tags if isinstance(tags, dict) else {}).items():
        known = ROLES.get(
            key, {"role_tag": ("from", "role"), "content_tag": ("value", "content")}.get(key, ())
        )
        if value not in known:
            yield key, value


def _mixture(made: Conversion) -> None:
    strategy, shares = (
        made.get("mix_strategy", "concat"),
        [number(str(share)) for share in listed(made.get("interleave_probs"))],
    )
    sources = made["data.path"]
    if strategy == "concat":
        made.need_not("mix_strategy", "all rows of a list of sources are taken")
        return
    if isinstance(sources, list) and len(shares) == len(sources) and all(map(is_number, shares)):
        made.put("data.path", dict(zip(sources, shares, strict=True)), "dataset; interleave_probs")
        made.take("interleave_probs")
        made.differences.append(
            "mix_strategy: a mixture ends here where a source runs out, and no row is repeated."
        )
    made.lose("mix_strategy", "a mixture ends where a source runs out")
    made.lose("interleave_probs", "expected a share for each source")
