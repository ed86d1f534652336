"""The documentation site: links that lead nowhere are found, and those that leave `docs/` are right in both places."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from infopo.report.document import read_report
from infopo.report.page import to_html
from run_files import write_run

pytest.importorskip("mkdocs")
from site_hooks import dead_links, with_links_of_site

ROOT = Path(__file__).resolve().parents[1]

REPORT = ROOT / "docs" / "demo" / "report.html"
PAGES = {"data.md", "studies/01_estimators/README.md", "studies/01_estimators/plot.png"}


def test_a_link_that_leads_nowhere_is_found_whatever_it_is_of(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "a picture.png").touch()
    (tmp_path / "index.html").write_text('<h1 id="top">x</h1><a name="old">', encoding="utf-8")
    good = [
        '<a href="..">', '<a href="../#top">', '<a href="../index.html#old">', '<img src="../a%20picture.png">',
        '<a href="https://example.org/no">', '<a href="mailto:a@b.c">', '<a href="#here" id="here">', "<a>",
        '<img src="data:,x">',
    ]  # fmt: skip
    dead = {
        "../no/": '<a href="../no/">', "../#no": '<a href="../#no">', "../no.png": '<img src="../no.png">',
        "/page/": '<a href="/page/">', "../../studies/x/README.md": '<a href="../../studies/x/README.md">',
        "no.html": '<iframe src="no.html">', "no.js": '<script src="no.js"></script>',
    }  # fmt: skip
    (tmp_path / "page" / "index.html").write_text("".join([*good, *dead.values()]), encoding="utf-8")
    assert list(dead_links(tmp_path)) == [f"page/index.html: {link}" for link in dead]


@pytest.mark.parametrize(
    ("page", "link", "on_site"),
    [
        ("rounds.md", "[a](../studies/01_estimators/README.md#answer)", "[a](studies/01_estimators/README.md#answer)"),
        ("studies/01_estimators/README.md", "[`a`](../../docs/data.md)", "[`a`](../../data.md)"),
        ("studies/01_estimators/README.md", "![a [b]](plot.png)", "![a [b]](plot.png)"),
        ("data.md", "[a](data.md)", "[a](data.md)"),
        ("data.md", "[a](no.md) [b](../no.md)", "[a](no.md) [b](../no.md)"),
        ("data.md", "[`run`](../studies/01_estimators/run.py)", "`run`"),
        ("data.md", "[a](https://x.org/../b) [b](#c)", "[a](https://x.org/../b) [b](#c)"),
        ("data.md", "`[a](../LICENSE)`\n```\n[a](../LICENSE)\n```", "`[a](../LICENSE)`\n```\n[a](../LICENSE)\n```"),
    ],
)  # fmt: skip
def test_links_of_the_repository_become_those_of_the_site(page: str, link: str, on_site: str) -> None:
    assert with_links_of_site(link, page, PAGES) == on_site


def test_other_files_are_linked_if_the_repository_has_an_address() -> None:
    linked = with_links_of_site("[a](../LICENSE)", "data.md", PAGES, "https://example.org/infopo")
    assert linked == "[a](https://example.org/infopo/blob/HEAD/LICENSE)"


class Parts(HTMLParser):
    """What a page is made of: what it loads, and its sections with their headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.sections: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "section":
            self.sections.append(str(given["id"]))
        elif tag != "a":
            self.loads += [value for name in ("src", "href") if (value := given.get(name))]


def test_the_report_on_the_home_page_is_whole_in_itself_and_of_this_version(tmp_path: Path) -> None:
    text = REPORT.read_text(encoding="utf-8")
    kept = Parts(text)
    assert not [link for link in kept.loads if not link.startswith("data:")]
    assert "default-src &#39;none&#39;" in text
    assert len(text) < 1.7e6
    now = to_html(read_report([write_run(tmp_path / "run")]))
    assert set(kept.sections) >= set(Parts(now).sections)
    # Columns of the table on top, all of which a run that is measured in full has.
    of_now, of_kept = (re.findall(r'class="sort">([^<]+)<', each) for each in (now, text))
    assert set(of_kept) >= {"Chosen", "Rejected", "Margin"}
    assert set(of_now) & {"Chosen", "Rejected", "Margin"} <= set(of_kept)


def test_the_home_page_shows_the_report_and_the_command_that_writes_it() -> None:
    home = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    text = REPORT.read_text(encoding="utf-8")
    assert '<iframe src="demo/report.html"' in home
    names = re.findall(r"infopo-demo/runs/verified_seed0/([\w.]+_lr5\.6e-05)", text)
    assert len(set(names)) == 5
    version = re.search(r"by infopo ([\d.]+\d)\.", text)
    assert version is not None
    assert f"of version {version[1]}\n" in home
