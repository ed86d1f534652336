"""The pages of documentation that ship with the package, so that what messages point at is there without a network."""

from dataclasses import dataclass
from pathlib import Path

from infopo.catalog import suggestion
from infopo.errors import ConfigError

_SHIPPED = Path(__file__).with_name("docs")
"""Where a wheel has them. In a checkout they are where people look for them."""
_ONLY_AS_A_SITE = ("index", "api")
"""Pages that are no text: the home, which is pictures and links, and a list of what a tool fills in from docstrings."""


@dataclass(frozen=True)
class Page:
    """A page of documentation.

    Attributes:
        name: The name by which `infopo docs NAME` shows it, e.g. `data`.
        path: The file, in Markdown.
    """

    name: str
    path: Path

    @property
    def text(self) -> str:
        """What the file contains."""
        return self.path.read_text(encoding="utf-8")

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
    folder = _SHIPPED if _SHIPPED.is_dir() else Path(__file__).parents[2] / "docs"
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
