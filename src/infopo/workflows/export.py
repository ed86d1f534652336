"""`infopo export` writes a model that transformers loads on its own: an adapter merged, nothing private beside it."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from infopo import __version__, durable, merging
from infopo.adapters import is_adapter, load_adapter
from infopo.errors import ConfigError, InfoPOError, ModelError, SaveError
from infopo.evaluation.items import Task
from infopo.evaluation.prompting import Prompts
from infopo.generate import end_token_ids
from infopo.hashing import hash_weights
from infopo.model_card import as_merged, plain_card, shown_name
from infopo.models import DTYPES, first_lines, load_policy, load_tokenizer
from infopo.output import say
from infopo.preflight import check_writable
from infopo.runs import RECIPE, read_object, to_json
from infopo.secrets import masked
from infopo.workflows.evaluate import model_in
from infopo.workflows.terminal import quiet_bars
from infopo.yaml_tree import Problems, read_tree

MARK = "infopo_export.json"
"""Tells that a folder is an export, which a later one may replace, and from what it was made."""

_LARGEST_CHANGE = 0.5
"""Nats by which merging may change a log-prob of the next token in float32, where it is rounding alone."""

_TRIED = "The quick brown fox jumps over 17 lazy dogs. What is 12 + 30?"


@dataclass(frozen=True)
class _Exported:
    """What is written, and what is said about it."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    was_adapter: bool
    notes: tuple[str, ...]


@quiet_bars()
def export(
    model: str,
    *,
    output: str | Path | None = None,
    dtype: str = "auto",
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
    """Writes a model as a folder that `AutoModelForCausalLM.from_pretrained` loads, and uploads it if asked to.

    An adapter is merged into its base, in float32, and rounded once to `dtype`. The folder has safetensors, tokenizer,
    chat template, generation settings and the model card. It is whole or not there, whenever the process is killed.

    Args:
        model: Run directory, checkpoint, adapter, folder, hub name or `lab:policy`.
        output: The folder. By default it is that of the model with `-export` behind its name.
        dtype: Type of the weights. `auto` is that of the files, of an adapter that of its base.
        push_to_hub: Name of the repository to upload to, `name` or `organisation/name`.
        private: Whether a repository that is made for that is private.

    Returns:
        The folder.

    Raises:
        ConfigError: The folder has something else in it or cannot be written to, or the hub refuses.
        ModelError: The model cannot be loaded, or its adapter cannot be merged.
        SaveError: The disk is full, or the like.
    """
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"--dtype: expected auto, {', '.join(DTYPES)}, got {dtype!r}")
    folder = Path(output) if output is not None else _default_folder(model)
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    check_writable(folder.parent, "--output")
    refuse_other_content(folder)
    path = model_in(model)
    repository = _make_repository(push_to_hub, private) if push_to_hub is not None else None
    found = _prepared(path, dtype)
    for note in found.notes:
        say(note)
    with _staged(folder) as staging:
        _write(found, staging, path, model, folder.name if output is not None else _bare(model))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    kind = str(found.model.dtype).removeprefix("torch.")
    say(
        f"{folder}: {kind}, {size / 1e6:.1f} MB; AutoModelForCausalLM.from_pretrained({str(folder)!r}) loads it"
    )
    if repository is not None:
        _upload(folder, repository)
    return folder


def _default_folder(model: str) -> Path:
    path = Path(model)
    if path.is_dir():
        path = path.resolve() if path.name in ("", "..") else path
        return path.parent / f"{path.name}-export"
    return Path(f"{_bare(model)}-export")


def _bare(model: str) -> str:
    """Returns the last part of a name, as a folder may be called."""
    last = Path(model).resolve().name if Path(model).is_dir() else model.rstrip("/").split("/")[-1]
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"


def refuse_other_content(folder: Path) -> None:
    """Refuses a folder that has anything in it but an earlier export.

    Raises:
        ConfigError: It has, or is a file.
    """
    if folder.is_file():
        raise ConfigError(f"--output: {folder} is a file; expected a folder")
    if not folder.is_dir() or not any(folder.iterdir()) or (folder / MARK).is_file():
        return
    raise ConfigError(
        f"--output: {folder} is not empty and holds no earlier export ({MARK}); name another folder, since this one "
        "would be replaced as a whole"
    )


# --- the model ---


def _prepared(path: str, dtype: str) -> _Exported:
    tokenizer = load_tokenizer(path)
    notes = []
    was_adapter = is_adapter(path)
    if was_adapter:
        adapted = load_adapter(path, dtype).eval()
        if (reason := merging.obstacle(adapted)) is not None:
            raise ModelError(
                f"{path}: the adapter cannot be merged into its base: {reason}. Publish the adapter itself, which peft "
                "loads beside its base"
            )
        before = _next_logps(adapted, tokenizer)
        merged = merging.merge(adapted)
        notes.append(_compared(path, before, _next_logps(merged, tokenizer), merged.dtype))
        if (quantization := _quantization(Path(path))) is not None:
            notes.append(
                f"warning: it was trained on a base of {quantization} weights, and is merged into the base as its "
                "files have it, whose outputs differ a little: evaluate the export"
            )
    else:
        merged = load_policy(path, dtype=dtype).eval()
        if getattr(merged, "is_quantized", False):
            raise ModelError(f"{path}: its weights are quantised; export the model that they were made from")
    if (ends := _with_end_of_turn(merged, tokenizer)) is not None:
        notes.append(ends)
    return _Exported(merged, tokenizer, was_adapter, tuple(notes))


def _next_logps(model: Any, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Returns log-probs of the next token at every position of a short text, (tokens, vocabulary)."""
    known = model.get_input_embeddings().weight.shape[0]
    ids = [token for token in tokenizer(_TRIED)["input_ids"][:64] if token < known] or [0]
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)


def _compared(path: str, before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> str:
    """Returns how far merging changed what the model computes, in words.

    Raises:
        ModelError: It changed by more than rounding does.
    """
    if before.shape != after.shape or not bool(after.isfinite().all()):
        raise ModelError(f"{path}: merged into its base, the adapter gives log-probs that are not finite")
    # Where both give a token next to no chance, rounding is large and means nothing.
    likely = before > -20
    moved = float((before - after)[likely].abs().max())
    if dtype == torch.float32 and moved > _LARGEST_CHANGE:
        raise ModelError(
            f"{path}: merged into its base, the adapter changes log-probs of next tokens by {moved:.2g} nats, which is "
            "more than rounding; this kind of adapter cannot be exported"
        )
    kind = str(dtype).removeprefix("torch.")
    return f"merged: log-probs of next tokens are those of base and adapter up to {moved:.2g} nats ({kind})"


def _quantization(path: Path) -> str | None:
    """Returns what the weights of the base were quantised to in training, or None. The recipe of the run tells."""
    for folder in (path, path.parent):
        if (folder / RECIPE).is_file():
            with contextlib.suppress(InfoPOError, OSError, UnicodeDecodeError):
                tree = read_tree((folder / RECIPE).read_text(encoding="utf-8"), Problems(RECIPE))
                model = tree.get("model")
                return model.get("quantization") if isinstance(model, dict) else None
    return None


def _with_end_of_turn(model: Any, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Lets `generate` stop where training ended responses, and returns that in words if it did not before."""
    if not tokenizer.chat_template or model.generation_config is None:
        return None
    task = Task("export", lambda _: [], {}, 1)
    try:
        ends = sorted({*end_token_ids(model, tokenizer), *Prompts(tokenizer, task).end_ids})
    except InfoPOError:  # a template that cannot be rendered, or no token that ends anything
        return None
    now = model.generation_config.eos_token_id
    if set(ends) == set(now if isinstance(now, list) else [now]):
        return None
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    names = ", ".join(repr(each) for each in tokenizer.convert_ids_to_tokens(ends))
    return f"generation_config: responses end at {names}, as in training"


# --- files ---


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Provides a folder beside the final one. On exit it is fsynced and renamed, and replaces an earlier export."""
    staging = folder.parent / f".{folder.name}.staging"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / "new").mkdir(parents=True)
        yield staging / "new"
        durable.sync_tree(staging / "new")
        durable.put(staging / "new", folder, aside=staging)
        durable.sync(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_lines(error)
        raise SaveError(f"{folder}: cannot be written: {reason}; nothing is left of it") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(found: _Exported, staging: Path, path: str, given: str, name: str) -> None:
    try:
        found.model.save_pretrained(staging, safe_serialization=True)
        found.tokenizer.save_pretrained(staging)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"{given}: cannot be saved: {first_lines(error)[:300]}") from error
    _forget_places(staging)
    (staging / "README.md").write_text(_card(found, Path(path), given, name), encoding="utf-8")
    about = {
        "schema_version": 1,
        "made_from": shown_name(given),
        "merged_adapter": found.was_adapter,
        "weights": hash_weights(found.model).whole,
        "dtype": str(found.model.dtype).removeprefix("torch."),
        "infopo": __version__,
    }
    (staging / MARK).write_text(f"{to_json(about, indent=2)}\n", encoding="utf-8")


def _forget_places(staging: Path) -> None:
    """Removes from the configurations where this machine has the model."""
    for file in staging.glob("*.json"):
        if file.name.endswith(".index.json") or file.name == "tokenizer.json":
            continue
        tree = read_object(file)
        if tree and (gone := [key for key in ("_name_or_path", "name_or_path") if key in tree]):
            file.write_text(
                to_json({k: v for k, v in tree.items() if k not in gone}, indent=2) + "\n", encoding="utf-8"
            )


def _card(found: _Exported, path: Path, given: str, name: str) -> str:
    for folder in (path, path.parent):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if (text := as_merged((folder / "README.md").read_text(encoding="utf-8"), name)) is not None:
                return masked(text)
    return masked(plain_card(name, given, merged=found.was_adapter))


# --- the hub ---


def _make_repository(name: str, private: bool) -> str:
    """Makes the repository if it is not there, before anything is computed, and returns its full name."""
    try:
        return str(HfApi().create_repo(name, private=private or None, exist_ok=True).repo_id)
    except Exception as error:  # of the network, of the hub's client, or of its answer
        raise ConfigError(
            f"--push-to-hub {name}: the repository cannot be made: {type(error).__name__}: {first_lines(error)[:250]}. "
            "Is HF_TOKEN set, and allowed to write?"
        ) from error


def _upload(folder: Path, repository: str) -> None:
    try:
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"Export of infopo {__version__}",
        )
    except Exception as error:
        raise ConfigError(
            f"--push-to-hub {repository}: the upload failed: {type(error).__name__}: {first_lines(error)[:250]}. "
            f"{folder} is whole; the same command with --output {folder} tries again"
        ) from error
    say(f"uploaded to {os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{repository}")
