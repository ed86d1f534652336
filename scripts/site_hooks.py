"""What building the documentation does beside mkdocs: studies become pages, and a link that leads nowhere is an error.

Pages link to files of the repository as GitHub shows them, relative to where the page is. The site has the pages of
`docs/` and the studies only. A link to any other file leads to the repository if `repo_url` in `mkdocs.yml` names it,
and is plain text otherwise.
"""

import os
import posixpath
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
STUDIES = "studies"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINKED = {"a": "href", "img": "src", "iframe": "src", "script": "src", "link": "href", "source": "src"}


def on_config(config: Any) -> Any:
    """Adds the studies to the navigation."""
    pages = [(folder / "README.md").relative_to(ROOT).as_posix() for folder in _studies()]
    config.nav = [*config.nav, {"Studies": pages}]
    return config


def _studies() -> list[Path]:
    return [folder for folder in sorted((ROOT / STUDIES).iterdir()) if (folder / "README.md").is_file()]


def on_files(files: Files, config: Any) -> Files:
    """Adds the answers of the studies, with their pictures, to the files of the site."""
    for folder in _studies():
        for path in (folder / "README.md", *folder.glob("*.png")):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Makes links of a page those of the site."""
    return with_links_of_site(
        markdown, page.file.src_uri, {file.src_uri for file in files}, (config.repo_url or "").rstrip("/")
    )


def with_links_of_site(markdown: str, page: str, pages: set[str], repository: str = "") -> str:
    """Returns a page whose links to files of the repository are right on the site.

    Args:
        markdown: The page.
        page: Its path in the site's source, e.g. `data.md`, or `studies/01_estimators/README.md`.
        pages: Paths of all files of the site's source.
        repository: Address of the repository, or "" if it has none.

    Example:
        >>> with_links_of_site("[a](../studies/x/README.md), [b](../LICENSE)", "data.md", {"studies/x/README.md"})
        '[a](studies/x/README.md), b'
    """
    kept = [match.span() for match in _CODE.finditer(markdown)]
    here = page if page.startswith(f"{STUDIES}/") else f"docs/{page}"

    def of_site(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        path, hash_, fragment = target.partition("#")
        is_code = any(start <= match.start() and match.end() <= end for start, end in kept)
        if is_code or not path or urlsplit(path).scheme or path.startswith("/"):
            return match[0]
        in_repository = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        in_site = in_repository.removeprefix("docs/")
        if in_site in pages:
            relative = posixpath.relpath(in_site, posixpath.dirname(page) or ".")
            return f"{mark}[{text}]({relative}{hash_}{fragment})"
        if in_repository.startswith("docs/") or not (ROOT / in_repository).exists():
            return match[0]  # dead, which mkdocs says with the place
        return f"{mark}[{text}]({repository}/blob/HEAD/{in_repository})" if repository else text

    return _LINK.sub(of_site, markdown)


def on_post_build(config: Any) -> None:
    """Refuses a site with dead links."""
    if dead := list(dead_links(Path(config.site_dir))):
        raise PluginError("links of the site that lead nowhere:\n" + "\n".join(dead[:20]))


def dead_links(site: Path) -> Iterator[str]:
    """Yields the links of a built site whose files or places in them are not there, as `PAGE: LINK`.

    A link that begins with `/` is dead, too, for a site may be served beneath any folder.
    """
    pages = {path.resolve(): _Page(path) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        if path.name == "404.html":  # which servers show under any address
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else Path(os.path.normpath(path.parent / unquote(parts.path)))
            if target.is_dir():
                target /= "index.html"
            places = pages[target].places if target in pages else None
            is_there = target.is_file() and not parts.path.startswith("/")
            if not is_there or (
                parts.fragment and places is not None and unquote(parts.fragment) not in places
            ):
                yield f"{path.relative_to(site.resolve())}: {link}"


class _Page(HTMLParser):
    """The links of a page, and the places that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = {"", "__skip"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places |= {value for name in ("id", "name") if (value := given.get(name))}
        if (link := given.get(_LINKED.get(tag, ""))) is not None:
            self.links.append(link)
