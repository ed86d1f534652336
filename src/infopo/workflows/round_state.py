"""What a folder of rounds says of itself: its recipe, and for each round which parts are finished.

A part is finished if the file is there that is written last: `pairs.provenance.json` of the pairs, `round.json` of the
training, `evaluation/eval.json` of the evaluation. Whatever else a killed process has left is done again, or continued.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from infopo.config import Recipe, parse_recipe, to_yaml
from infopo.errors import ConfigError
from infopo.evaluation.results import FOLDER
from infopo.evaluation.samples import SAMPLES
from infopo.runs import EVALUATION, Record, read_object, write_json_atomic, write_text_atomic

ROUNDS = "rounds.yaml"
"""The resolved recipe, in the folder of all rounds."""

START = "start"
"""Folder of the evaluation of the model that the first round begins with."""

MARKER = "round.json"
PAIRS = "pairs.jsonl"
MERGED = "merged"
"""Folder of a round's policy as a whole model, if an adapter was trained."""

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        number: From 1.
        folder: Its run directory.
        policy: Name of the model that it begins with.
        is_adapter: Whether an adapter is trained.
    """

    number: int
    folder: Path
    policy: str
    is_adapter: bool

    @property
    def pairs(self) -> Path:
        """The file of its pairs."""
        return self.folder / PAIRS

    @property
    def samples(self) -> Path:
        """The file of its samples."""
        return self.pairs.with_suffix(".samples") / SAMPLES

    @property
    def trained(self) -> str:
        """Name of the model that the next round begins with."""
        return str(self.folder / MERGED if self.is_adapter else self.folder)

    @property
    def is_sampled(self) -> bool:
        """Whether its pairs are written."""
        record = read_object(self.pairs.with_suffix(".provenance.json")) or {}
        return bool((record.get("counts") or {}).get("rows")) and self.pairs.is_file()

    @property
    def is_trained(self) -> bool:
        """Whether its policy is written."""
        return (self.folder / MARKER).is_file()

    @property
    def is_evaluated(self) -> bool:
        """Whether its policy was evaluated."""
        return is_evaluated(self.folder / FOLDER)

    def note_trained(self) -> None:
        """Writes down that training is over."""
        about = {"round": self.number, "begins_with": self.policy, "policy": self.trained}
        write_json_atomic(self.folder / MARKER, {"schema_version": SCHEMA_VERSION, **about})

    def next(self) -> "Round":
        """Returns the round after it."""
        return replace(
            self,
            number=self.number + 1,
            policy=self.trained,
            folder=self.folder.with_name(f"round-{self.number + 1}"),
        )


def first_round(recipe: Recipe) -> Round:
    """Returns the first round of a recipe."""
    folder = Path(recipe.output_dir) / "round-1"
    return Round(1, folder, recipe.model.name_or_path, recipe.model.adapter is not None)


def is_evaluated(folder: Path) -> bool:
    """Returns whether a folder has an evaluation."""
    return (folder / EVALUATION).is_file()


def refuse_fewer(recipe: Recipe) -> None:
    """Refuses fewer rounds than are trained, which `rounds.json`, comparison and report would then leave out.

    Raises:
        ConfigError: There are more.
    """
    assert recipe.rounds is not None
    this, trained = first_round(recipe), 0
    while this.is_trained:
        this, trained = this.next(), trained + 1
    if recipe.rounds.number < trained:
        raise ConfigError(
            f"rounds.number: {recipe.rounds.number}, but {trained} rounds are trained in {recipe.output_dir}, and the "
            f"record would leave out the last; ask for at least {trained}, or name another output_dir"
        )


def settle_recipe(recipe: Recipe, prompts_sha256: str) -> None:
    """Writes the recipe down, or refuses one that is not that of the rounds which are there.

    More rounds may be asked for than before, and rounds may be stopped by another rule. Until the first round has
    pairs, all settings of rounds may change, because nothing was made with them.

    Raises:
        ConfigError: A setting is another than before, or the prompts are others.
    """
    assert recipe.rounds is not None
    path = Path(recipe.output_dir) / ROUNDS
    now = f"# prompts: {prompts_sha256}\n{to_yaml(recipe)}"
    if path.is_file():
        before, current = path.read_text(encoding="utf-8"), now
        if not first_round(recipe).is_sampled:
            before, current = _without_rounds(before, path), _without_rounds(now, path)
        if changed := _changes(before.splitlines(), current.splitlines()):
            raise ConfigError(
                f"{path}: rounds were begun with other settings: {'; '.join(changed[:4])}. Go on with the same recipe, "
                "or name another output_dir (rounds.number and rounds.stop_after may change)"
            )
    write_text_atomic(path, now)


def _without_rounds(text: str, path: Path) -> str:
    return to_yaml(replace(parse_recipe(text, source=str(path)), rounds=None))


_FREE = ("number:", "stop_after:")


def _changes(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """Returns the lines that differ, as `key: old -> new`."""
    lines = [line for line in difflib.ndiff(before, now) if line[:2] in ("- ", "+ ")]
    old = {line[2:].partition(":")[0]: line[2:].strip() for line in lines if line[0] == "-"}
    new = {line[2:].partition(":")[0]: line[2:].strip() for line in lines if line[0] == "+"}
    found = []
    for key in dict.fromkeys([*old, *new]):
        was, is_now = old.get(key, "nothing"), new.get(key, "nothing")
        if not is_now.startswith(_FREE):
            found.append(f"{was:.60} was there, now {is_now:.60}")
    return found


def record_of(rounds: Sequence[Round], best: str) -> Record:
    """Returns what came of the rounds, for `rounds.json`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "best": best,
        "rounds": [
            {
                "round": each.number,
                "folder": each.folder.name,
                "begins_with": each.policy,
                "counts": (read_object(each.pairs.with_suffix(".provenance.json")) or {}).get("counts"),
            }
            for each in rounds
        ],
    }
