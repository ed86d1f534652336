"""The recipes that ship with the package: a starting point for each kind of run."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infopo.catalog import suggestion
from infopo.errors import ConfigError

FOLDER = Path(__file__).with_name("recipes")
"""Where the files are."""

_TITLES = {
    "deepspeed/zero2.json": "DeepSpeed's ZeRO-2, for train.deepspeed; it leaves to the recipe what that says",
    "deepspeed/zero3.json": "DeepSpeed's ZeRO-3, which shares out the weights as well, during training",
}
"""First lines of files whose format has no comments."""


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe, or a file that recipes refer to.

    Attributes:
        name: The name by which `infopo recipes NAME` prints it, e.g. `lora` or `paper/pythia-2.8b-hh`.
        path: The file.
    """

    name: str
    path: Path

    @property
    def text(self) -> str:
        """What the file contains."""
        return self.path.read_text(encoding="utf-8")

    @property
    def title(self) -> str:
        """One line that says what the recipe is for."""
        return _TITLES.get(self.name) or self.text.partition("\n")[0].removeprefix("# ")


def shipped_recipes() -> list[ShippedRecipe]:
    """Returns all of them, those that train on the built-in lab first.

    Example:
        >>> [recipe.name for recipe in shipped_recipes()][:3]
        ['lab', 'full', 'lora']
    """
    found = [ShippedRecipe(_name(path), path) for path in _files()]
    first = ("lab", "full", "lora", "qlora")
    return sorted(found, key=lambda each: (_rank(each.name, first), each.name.count("/"), each.name))


def shipped_recipe(name: str) -> ShippedRecipe:
    """Returns the recipe of that name. A folder's name, and the ending of a recipe's, may be left out.

    Raises:
        ConfigError: There is none.

    Example:
        >>> shipped_recipe("llama3-8b-ultrafeedback").name, shipped_recipe("lora.yaml").name
        ('paper/llama3-8b-ultrafeedback', 'lora')
    """
    wanted = name.removesuffix(".yaml")
    recipes = shipped_recipes()
    for recipe in recipes:
        if wanted in (recipe.name, recipe.name.rpartition("/")[2]):
            return recipe
    names = [recipe.name for recipe in recipes]
    raise ConfigError(f"no recipe {name!r}{suggestion(wanted, names)}; there are {', '.join(names)}")


def _files() -> Iterator[Path]:
    for path in FOLDER.rglob("*"):
        if path.suffix in (".yaml", ".json"):
            yield path


def _name(path: Path) -> str:
    relative = path.relative_to(FOLDER)
    return (relative.with_suffix("") if path.suffix == ".yaml" else relative).as_posix()


def _rank(name: str, first: tuple[str, ...]) -> int:
    return first.index(name) if name in first else len(first)
