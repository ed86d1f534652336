"""`infopo doctor`: what is here, what works and why the rest does not, in one page to send with a question.

Each part is found out on its own: one that fails says so, and the others are still there. Nothing is written, nothing
is downloaded, and secrets are masked.
"""

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from infopo import __version__
from infopo.caches import default_folder
from infopo.machine import accelerators
from infopo.output import counted, say
from infopo.provenance import own_git_state
from infopo.runs import to_json
from infopo.secrets import is_secret, masked_tree

LIBRARIES = (
    "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy", "peft", "trl",
    "bitsandbytes", "flash-attn", "flash-attn-3", "flash-attn-4", "triton", "deepspeed", "vllm", "lm-eval", "openai",
    "bokeh", "matplotlib", "tensorboard", "wandb",
)  # fmt: skip
"""Distributions whose versions matter. Those that are absent are left out."""

_VARIABLES = re.compile(
    r"^(INFOPO|HF|TRANSFORMERS|HUGGING_FACE|CUDA|NCCL|GLOO|TORCH|PYTORCH|OMP|MKL|WANDB|ACCELERATE|TOKENIZERS)_|"
    r"^(WORLD_SIZE|RANK|LOCAL_RANK|XDG_CACHE_HOME|TMPDIR)$"
)

_FEATURES = {
    "plain": {}, "sliding window": {"has_window": True}, "soft cap": {"has_softcap": True},
    "sinks": {"has_sinks": True},
}  # fmt: skip
"""What a model's attention may have, which decides on the kernel."""


_GROUPED = ("attention kernels", "extras")
"""Parts whose names are of one kind, so that several may share an answer."""


def doctor(*, as_json: bool = False) -> None:
    """Prints what `findings` returns, as text or as one JSON object."""
    found = findings()
    if as_json:
        say(to_json(found, indent=2))
        return
    for name, part in found.items():
        say(f"{name}:", *(f"  {line}" for line in _lines(part, grouped=name in _GROUPED)))


def findings() -> dict[str, Any]:
    """Returns every part by name. A part that could not be found out is `{"failed": why}`."""
    parts: Mapping[str, Callable[[], Any]] = {
        "versions": _versions,
        "devices": _devices,
        "attention kernels": _kernels,
        "extras": _extras,
        "code execution": _isolation,
        "stores": _stores,
        "hub": _hub,
        "environment": _environment,
    }
    return {name: masked_tree(_found(part)) for name, part in parts.items()}


def _found(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except (
        Exception
    ) as error:  # a broken library raises what it likes, and is what somebody asks this command for
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def _versions() -> dict[str, str]:
    found = {"infopo": __version__, "python": platform.python_version(), "platform": platform.platform()}
    if state := own_git_state():
        found["infopo"] += f" (commit {state['commit']}{', with changes' if state['dirty'] else ''})"
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _devices() -> dict[str, Any]:
    import torch

    here = accelerators()
    devices = [
        name if size is None else f"{name}, {size / 2**30:.0f} GiB"
        for name, size in zip(here.names, here.memory, strict=True)
    ]
    return {
        "accelerators": devices or "none",
        "cuda of torch": torch.version.cuda or "none",
        "bfloat16": here.bf16 if here.count else "on the CPU only, slowly",
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    }


def _kernels() -> dict[str, Any]:
    """Which kernel computes shared-prefix attention, per type and feature, and why the ones before it do not."""
    import torch

    from infopo.logps.calls import Call
    from infopo.logps.kernels import KERNELS, failure

    kind = accelerators().kind
    device = torch.device(kind, 0) if kind != "cpu" else torch.device("cpu")
    capability = torch.cuda.get_device_capability(device) if kind == "cuda" else None
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for feature, has in _FEATURES.items():
            call = Call(device, capability, dtype, heads=4, kv_heads=2, width=64, value_width=64, **has)
            reasons = []
            for kernel in KERNELS:
                reason = kernel.obstacle(call) or (failure(kernel, call) if kernel.is_tried else None)
                if reason is None:
                    break
                reasons.append(f"not {kernel.name}: {reason}")
            name = f"{str(dtype).removeprefix('torch.')}, {feature}"
            found[name] = {"runs": kernel.name, "because": reasons}
    return found


def _extras() -> dict[str, Any]:
    """Which extras are whole, and the line that installs the missing parts of the others."""
    from packaging.requirements import Requirement

    metadata = importlib.metadata.metadata("infopo")
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    found: dict[str, Any] = {}
    for extra in metadata.get_all("Provides-Extra") or []:
        wanted = [each for each in required if each.marker is not None and each.marker.evaluate({"extra": extra})
                  and not each.marker.evaluate({"extra": ""})]  # fmt: skip
        missing = [f"{each.name}{each.specifier}" for each in wanted if not _satisfies(each)]
        found[extra] = (
            f"missing {', '.join(missing)}: pip install 'infopo[{extra}]'" if missing else "installed"
        )
    return found


def _satisfies(requirement: Any) -> bool:
    if requirement.name == "infopo":  # an extra that consists of others
        return True
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return bool(requirement.specifier.contains(version, prereleases=True))


def _isolation() -> dict[str, Any]:
    """How isolated code that a model wrote would run here. A sandbox is started to find out."""
    from infopo.evaluation.sandbox import allow

    found = allow("none")
    return {"level": str(found), "stronger ones that failed": list(found.refused) or "none"}


def _stores() -> dict[str, str]:
    from infopo.workflows.store import shelves

    references = shelves(None)
    folder, rows = default_folder("reference"), default_folder("examples")
    sizes = [path.stat().st_size for path in rows.rglob("*") if path.is_file()] if rows.is_dir() else []
    return {
        "reference log-probs": f"{folder}: {counted(len(references), 'reference')}, "
        f"{sum(shelf.size for shelf in references) / 2**20:.1f} MiB{_writable(folder)}",
        "encoded rows": f"{rows}: {counted(len(sizes), 'file')}, {sum(sizes) / 2**20:.1f} MiB{_writable(rows)}",
    }


def _writable(folder: Path) -> str:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return "" if os.access(there, os.W_OK) else ", which cannot be written to"


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    models, data = (len(list(cache.glob(f"{kind}--*"))) for kind in ("models", "datasets"))
    return {
        "offline mode (HF_HUB_OFFLINE)": bool(constants.HF_HUB_OFFLINE),
        "endpoint": constants.ENDPOINT,
        "cache": f"{cache}: {counted(models, 'model')}, {counted(data, 'data set')}",
        "signed in": get_token() is not None,
    }


def _environment() -> dict[str, str]:
    found = {name: "***" if is_secret(name) else value for name, value in sorted(os.environ.items())
             if _VARIABLES.search(name)}  # fmt: skip
    return found | {"executable": sys.executable, "folder": str(Path.cwd())}


def _lines(part: Any, *, grouped: bool) -> Iterator[str]:
    """Yields a part as lines. If it is grouped, names with the same answer share one."""
    if not isinstance(part, dict):
        yield str(part)
        return
    groups: dict[str, list[str]] = {}
    for name, value in part.items():
        text = _text(value)
        groups.setdefault(text if grouped else f"{name}: {text}", []).append(name)
    for text, names in groups.items():
        yield f"{'; '.join(names)}: {text}" if grouped else text


def _text(value: Any) -> str:
    if isinstance(value, dict):
        reasons = f" ({'; '.join(value['because'])})" if value.get("because") else ""
        return f"{value.get('runs')}{reasons}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
