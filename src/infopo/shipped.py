"""The recipes and the pages of documentation that ship with the package, so that both are there without a network."""

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
class ShippedFile:
    """A file that ships.

    Attributes:
        name: The name by which a command prints it, e.g. `lora` or `paper/pythia-2.8b-hh` of `infopo recipes`.
        path: The file.
    """

    name: str
    path: Path

    @property
    def text(self) -> str:
        """What the file contains."""
        return self.path.read_text(encoding="utf-8")


class ShippedRecipe(ShippedFile):
    """A recipe, or a file that recipes refer to."""

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


# ---- documentation -----------------------------------------------------------------------------------------------

_PAGES = Path(__file__).with_name("docs")
"""Where a wheel has them. In a checkout they are where people look for them."""
_ONLY_AS_A_SITE = ("index", "api")
"""Pages that are no text: the home, which is pictures and links, and a list of what a tool fills in from docstrings."""


class Page(ShippedFile):
    """A page of documentation, in Markdown."""

    @property
    def title(self) -> str:
        """Its first heading."""
        return self.text.partition("\n")[0].removeprefix("# ")


def pages() -> list[Page]:
    """Returns all pages, in the order of their names.

    Raises:
        ConfigError: They are neither in the package nor in a checkout around it.

    Example:
        >>> [page.name for page in pages()][:3]
        ['after-training', 'compare', 'data']
    """
    folder = _PAGES if _PAGES.is_dir() else Path(__file__).parents[2] / "docs"
    found = [Page(path.stem, path) for path in sorted(folder.glob("*.md"))]
    if not found:
        raise ConfigError(f"{folder}: the documentation is not there; install infopo again")
    return [page for page in found if page.name not in _ONLY_AS_A_SITE]


def page(name: str) -> Page:
    """Returns the page of that name. The ending of a file, and the folder's name, may stand with it.

    Raises:
        ConfigError: There is none.

    Example:
        >>> page("docs/data.md").title
        'Data'
    """
    wanted = name.removeprefix("docs/").removesuffix(".md")
    found = {each.name: each for each in pages()}
    if wanted not in found:
        raise ConfigError(f"no page {name!r}{suggestion(wanted, list(found))}; there are {', '.join(found)}")
    return found[wanted]
