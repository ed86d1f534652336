"""What can be judged of a recipe before torch and transformers are loaded, so that a mistake costs no start-up.

Settings, files and folders that are not there, libraries that are not installed, and a run directory that is taken.
"""

import glob
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from infopo import run_state
from infopo.config import Recipe, load_recipe
from infopo.errors import ConfigError
from infopo.reference_store import check_folder, folder_of
from infopo.secrets import MASK
from infopo.train_table import quick_train_fields

_DATA_FILE = re.compile(r"\.(json|jsonl|csv)(\.gz|\.zst)?$|\.(parquet|arrow)$")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
"""A name on the hub, which a folder may have too. Anything else names a file or a folder."""

_TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",), "trackio": ("trackio",), "swanlab": ("swanlab",), "clearml": ("clearml",),
    "dvclive": ("dvclive",), "codecarbon": ("codecarbon",), "neptune": ("neptune",),
}  # fmt: skip
"""Trackers and the libraries of which they need one."""


def preflight(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    makes_a_run: bool = True,
    section: str | None = None,
) -> Recipe:
    """Reads a recipe and judges it as far as that takes no torch.

    Args:
        recipe_path: The file.
        overrides: `key=value`.
        makes_a_run: Whether `output_dir` is to be written to.
        section: Section that the command is about, `rounds` or `sweep`, or None for one training.

    Raises:
        InfoPOError: The recipe is wrong, or something that it names is missing or taken.
    """
    recipe = load_recipe(recipe_path, overrides, quick_train_fields())
    _refuse_other_command(recipe, section, str(recipe_path))
    problems = [*_library_problems(recipe), *_model_problems(recipe), *_data_problems(recipe)]
    if problems:
        raise ConfigError(
            [f"{recipe.located(key)}: {problem}" for key, problem in problems], str(recipe_path)
        )
    if (samples := recipe.reference.samples) and not Path(samples).is_file():
        raise ConfigError(
            f"{recipe.located('reference.samples')}: there is no file {samples}", str(recipe_path)
        )
    check_store(recipe)
    if makes_a_run:
        check_run_directory(recipe)
        refuse_second_run(recipe)
    return recipe


_OTHER_COMMANDS = {
    "rounds": (
        "is required: a section with at least prompts and verifier; see `infopo docs rounds`",
        "this recipe is trained in rounds: infopo rounds RECIPE. For one training remove the section, or write "
        "rounds=null, and set data.path",
    ),
    "sweep": (
        "is required: a section with keys of the recipe and a list of values for each; see `infopo docs sweeps`",
        "this recipe is for several runs: infopo sweep RECIPE, which judges each of them before it trains the first. "
        "Remove the section, or write sweep=null, for one run",
    ),
}
"""Sections of a command of their own -> what to say if they are missing, and if they are there in another command."""


def _refuse_other_command(recipe: Recipe, section: str | None, path: str) -> None:
    if recipe.rounds is not None and recipe.sweep is not None:
        raise ConfigError(
            f"{recipe.located('sweep')}: stands beside rounds, and no command takes both; remove one of them, or write "
            "rounds=null or sweep=null",
            path,
        )
    for name, (missing, other) in _OTHER_COMMANDS.items():
        is_there = getattr(recipe, name) is not None
        if name == section and not is_there:
            raise ConfigError(f"{name}: {missing}", path)
        if name != section and is_there:
            raise ConfigError(f"{recipe.located(name)}: {other}", path)


def check_run_directory(recipe: Recipe) -> None:
    """Judges the run directory and the checkpoint to resume from, and leaves everything as it was.

    Raises:
        ConfigError: The directory cannot be made or written to.
        CheckpointError: There is no such checkpoint.
    """
    resume = recipe.train.get("resume_from_checkpoint", False)
    check_writable(Path(recipe.output_dir), "output_dir")
    if isinstance(resume, str):
        run_state.look_at(Path(resume))


def check_writable(folder: Path, name: str) -> None:
    """Refuses a folder that cannot be made or written to, and leaves everything as it was.

    Args:
        folder: The folder, which need not exist.
        name: Name of the setting that names it.

    Raises:
        ConfigError: It cannot be used.
    """
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise ConfigError(f"{name}: {folder} cannot be made: {error.strerror}") from error
    if not there.is_dir():
        raise ConfigError(f"{name}: {folder} cannot be made: {there} is a file")
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".infopo-"):
            pass  # permissions alone do not tell: the file system may be read-only, or no place for files
    except OSError as error:
        reason = "no permission" if isinstance(error, PermissionError) else error.strerror or error
        raise ConfigError(f"{name}: {folder} cannot be written to: {reason}") from error


def refuse_second_run(recipe: Recipe) -> None:
    """Refuses a directory with a run in it that is not to be continued.

    Raises:
        ConfigError: It holds a checkpoint, a model or an evaluation.
    """
    run_dir = Path(recipe.output_dir)
    if run_state.holds_run(run_dir) and not recipe.train.get("resume_from_checkpoint"):
        raise ConfigError(
            f"output_dir: {run_dir} already holds a run. Continue it with train.resume_from_checkpoint=true, "
            "name another output_dir, or remove the folder"
        )


def check_store(recipe: Recipe) -> None:
    """Judges the folder of the reference store if the recipe names one, and makes nothing.

    Raises:
        ConfigError: It cannot be made or written to.
    """
    folder = folder_of(recipe.reference.store)
    if folder and recipe.reference.store != "auto" and (problem := check_folder(folder)):
        raise ConfigError(f"reference.store: {problem}")


def is_installed(*modules: str) -> bool:
    """Returns whether one of these modules can be imported, without importing it."""
    return any(map(_is_there, modules))


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    # Of a package around it, or of a module that somebody put there by hand.
    except (ImportError, ValueError):
        return False


_OF_DEMO = {"matplotlib": "matplotlib", "Bokeh": "bokeh"}
"""Libraries that draw the demo's pictures and its report -> their modules."""


def check_demo(output: str | Path, seed: int) -> None:
    """Judges the arguments of `infopo demo`, and makes its folder.

    Raises:
        ConfigError: The folder or the seed cannot be used, or the pictures or the report cannot be drawn.
    """
    problems, folder = [], Path(output)
    if not 0 <= seed < 2**32:
        problems.append(f"--seed: expected a number in [0, 2**32), got {seed}")
    missing = [name for name, module in _OF_DEMO.items() if not is_installed(module)]
    if missing:
        problems.append(f"the demo needs {' and '.join(missing)}: pip install 'infopo[demo]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problems.append(f"--output: {folder} cannot be made: {error.strerror}")
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        problems.append(f"--output: {folder} cannot be written to: no permission")
    if problems:
        raise ConfigError(problems)


Problem = tuple[str, str]
"""A dotted key of the recipe, and what is wrong there."""


def _library_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.model.adapter is not None and not is_installed("peft"):
        yield "model.adapter", "an adapter needs the peft library: pip install 'infopo[peft]'"
    if recipe.model.quantization is not None and not is_installed("bitsandbytes"):
        yield "model.quantization", "bitsandbytes is not installed; pip install bitsandbytes"
    trackers = recipe.train.get("report_to") or []
    for name in [trackers] if isinstance(trackers, str) else trackers:
        if (modules := _TRACKERS.get(name)) and not is_installed(*modules):
            yield "train.report_to", f"{name!r} is not installed; pip install {modules[0]}"


def _model_problems(recipe: Recipe) -> Iterator[Problem]:
    named = [("model.name_or_path", recipe.model.name_or_path)]
    if recipe.reference.is_path:
        named.append(("reference.source", recipe.reference.source))
    for key, name in named:
        if problem := model_problem(name):
            yield key, problem


def model_problem(name: str) -> str | None:
    """Returns what is wrong with the name or folder of a model, as far as can be told without asking the hub."""
    if name.startswith("lab:"):
        return None if name == "lab:policy" else f"{name!r}: the lab has only lab:policy"
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return None
        if path.exists():
            return f"{name} is a file; expected the folder of a saved model, or a name on the hub"
    except (OSError, RuntimeError) as error:
        return f"{name} cannot be read: {getattr(error, 'strerror', None) or error}"
    if not _HUB_NAME.fullmatch(name):
        return f"there is no folder {name} here (looked in {Path.cwd()})"
    if _hub_is_off() and not _is_cached(name):
        return f"there is no folder {name} here, and the hub is switched off (HF_HUB_OFFLINE) with no copy in its cache"
    return None


def _hub_is_off() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _is_cached(name: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir()


def _data_problems(recipe: Recipe) -> Iterator[Problem]:
    for key, path in (("data.path", recipe.data.path), ("data.eval_path", recipe.data.eval_path)):
        for name in [path] if isinstance(path, str) else path or []:
            if problem := _data_problem(name):
                yield key, problem


def _data_problem(name: str) -> str | None:
    """What is wrong with the name of a source, if it can only be that of a file or a folder."""
    if name.startswith("lab:"):
        return None
    try:
        path = Path(name).expanduser()
        if path.exists():
            return None
    except (OSError, RuntimeError) as error:
        return f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}"
    if glob.has_magic(name):
        found = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        return (
            None if any(map(os.path.isfile, found)) else f"{name}: no file matches (looked in {Path.cwd()})"
        )
    if MASK in name:
        return f"{name}: a secret was masked when this recipe was written; give the path anew"
    if _DATA_FILE.search(name) or not _HUB_NAME.fullmatch(name):
        return f"{name}: no such file (looked in {Path.cwd()})"
    return None
