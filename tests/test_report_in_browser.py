"""The report in a real browser: no error, the policy holds, switches work, and tables have the run's numbers."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from browser import Browser, find_browser
from infopo.report.numbers import number
from infopo.workflows.report import report
from run_files import FALLING, PROMPTS, write_run

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_browser() is None, reason="there is no Chromium, and none could be installed"),
]

NAMES = ["infopo", "dpo", "<img src=x onerror=alert(1)>"]
FIGURE = "Bokeh.documents[0].roots().find((each) => each.name === 'change')"
LINES = f"{FIGURE}.renderers.filter((each) => each.glyph.type === 'Line')"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(folder / NAMES[0], verdicts=(FALLING,)),
        write_run(folder / NAMES[1], objective="dpo", fall=1.0, seed=1),
        write_run(folder / NAMES[2], objective="sft", seed=2, finished=False),
    ]
    report(runs, folder / "report.html")
    return folder / "report.html"


def in_browser(steps: Callable[[Browser], Awaitable[Any]]) -> list[str]:
    """Runs steps in a fresh browser and returns its complaints."""

    async def whole() -> list[str]:
        browser = Browser(find_browser() or "")
        try:
            await browser.start()
            await steps(browser)
            return browser.complaints()
        finally:
            browser.close()

    return asyncio.run(whole())


def test_the_page_opens_without_an_error_and_everything_on_it_works(page: Path):
    async def steps(browser: Browser) -> None:
        await browser.open(page)
        await check_curves_and_tables(browser, page)
        await check_toggles(browser)
        await check_scale_and_zoom(browser)
        await check_search(browser)
        await check_sorting(browser)
        await check_keyboard(browser)
        await check_themes(browser)

    assert in_browser(steps) == []


async def check_curves_and_tables(browser: Browser, page: Path) -> None:
    assert await browser.run("Bokeh.documents[0].roots().length") == await browser.run(
        "document.querySelectorAll('.panel').length"
    )
    assert await browser.run(
        "[...document.querySelectorAll('.plot')].every((each) => each.firstElementChild)"
    )
    records = [json.loads(line) for line in (page.parent / "dpo" / "metrics.jsonl").read_text().splitlines()]
    values = [record["probe/change/chosen"] for record in records if "probe/change/chosen" in record]
    drawn = await browser.run(f"[...{LINES}.find((each) => each.name === 'dpo, chosen').data_source.data.y]")
    assert drawn == pytest.approx(values, rel=1e-6)
    cells = "(row) => [...row.cells].map((cell) => cell.textContent)"
    rows = f"[...document.querySelectorAll('[data-key=change] tbody tr')].map({cells})"
    row = next(row for row in await browser.run(rows) if row[:2] == ["dpo", "probe/change/chosen"])
    assert row[2:] == [
        number(values[0]),
        number(values[-1]),
        "60",
        number(min(values)),
        number(max(values)),
        "61",
    ]
    titles = await browser.run(
        "[...document.querySelectorAll('#headline tbody th')].map((each) => each.textContent)"
    )
    assert titles == NAMES


async def check_toggles(browser: Browser) -> None:
    visible = f"{LINES}.map((each) => each.visible)"
    assert await browser.run(visible) == [True] * 6
    await browser.run("document.querySelectorAll('.toggle')[1].click()")
    assert await browser.run(visible) == [True, True, False, False, True, True]
    assert await browser.run("document.querySelectorAll('[data-run=\"1\"]:not([hidden])').length") == 0
    await browser.run("document.querySelector('#none').click()")
    assert await browser.run(visible) == [False] * 6
    await browser.run("document.querySelector('#all').click()")
    assert await browser.run(visible) == [True] * 6


async def check_scale_and_zoom(browser: Browser) -> None:
    scale = "Bokeh.documents[0].roots().find((each) => each.name === 'gradients').y_scale.type"
    assert await browser.run(scale) == "LogScale"
    await browser.run("document.querySelector('[data-key=gradients] .logscale').click()")
    assert await browser.run(scale) == "LinearScale"
    assert await browser.run("document.querySelector('[data-key=change] .logscale').disabled")
    await browser.run(
        "const f = document.querySelector('#from'); f.value = 20; f.dispatchEvent(new Event('change'))"
    )
    ends = "Bokeh.documents[0].roots().map((each) => each.x_range.start)"
    assert set(await browser.run(ends)) == {20}
    await browser.run("document.querySelector('#whole').click()")
    assert max(await browser.run(ends)) < 0


async def check_search(browser: Browser) -> None:
    shown = (
        "[...document.querySelectorAll('.prompt:not([hidden]) .question')].map((each) => each.textContent)"
    )
    assert await browser.run(shown) == list(PROMPTS)
    await browser.run(
        "const s = document.querySelector('#search'); s.value = '<B>ada'; s.dispatchEvent(new Event('input'))"
    )
    assert await browser.run(shown) == [PROMPTS[1]]
    assert await browser.run("document.querySelector('#count').textContent") == f"1 of {len(PROMPTS)}"
    await browser.run("s.value = ''; s.dispatchEvent(new Event('input'))")
    assert await browser.run("document.querySelectorAll('mark').length") > 0


async def check_themes(browser: Browser) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    label = f"{FIGURE}.left[0].major_label_text_color"
    light = (await browser.run(colour), await browser.run(label))
    await browser.run("document.querySelector('#theme').click()")
    dark = (await browser.run(colour), await browser.run(label))
    assert light != dark
    assert dark == ("rgb(20, 24, 28)", "#e6e9ec")
    for width in (360, 900, 1440):
        await browser.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=True
        )
        assert await browser.run("document.documentElement.scrollWidth <= innerWidth"), (
            f"it is wider than {width}"
        )


async def check_sorting(browser: Browser) -> None:
    """A click on a heading sorts the runs by its column, the next one the other way round."""
    column = (
        "[...document.querySelectorAll('#headline th')].findIndex((th) => th.innerText.startsWith('Chosen'))"
    )
    values = f"""[...document.querySelectorAll('#headline tbody tr')]
        .map((row) => row.cells[{column}].dataset.value).filter((text) => text !== undefined).map(Number)"""
    button = f"document.querySelectorAll('#headline th')[{column}].querySelector('button')"
    for sign in (-1, 1):
        await browser.run(f"{button}.click()")
        found = await browser.run(values)
        assert len(found) >= 2
        assert found == sorted(found, key=lambda value: sign * value)
    assert await browser.run(f"{button}.closest('th').getAttribute('aria-sort')") == "ascending"


async def check_keyboard(browser: Browser) -> None:
    """Tab comes to every control, with a frame around it, and keys do what a pointer does: real key events."""
    await browser.run("document.activeElement.blur(), scrollTo(0, 0), getSelection().removeAllRanges()")
    controls = "a[href], button, input, select, summary, [tabindex='0']"
    wanted = f'[...document.querySelectorAll("{controls}")].filter((each) => !each.disabled && each.checkVisibility())'
    await browser.run(f"window.reached = new Set(), window.bare = [], window.wanted = {wanted}")
    look = "reached.add(document.activeElement), getComputedStyle(document.activeElement).outlineStyle"
    for _ in range(await browser.run("wanted.length")):
        await browser.press("Tab")
        assert await browser.run(look) != "none", await browser.run("document.activeElement.outerHTML")
    assert await browser.run("wanted.filter((each) => !reached.has(each)).length") == 0

    await browser.run("document.querySelectorAll('.toggle')[1].focus()")
    for shown in (4, 6):
        await browser.press(" ")
        assert sum(await browser.run(f"{LINES}.map((each) => each.visible)")) == shown
    await browser.run("document.querySelector('#headline .sort').focus()")
    await browser.press("Enter")
    assert await browser.run("document.activeElement.closest('th').getAttribute('aria-sort')") is not None
    await browser.run("document.querySelector('[data-key=change] summary').focus()")
    await browser.press("Enter")
    assert await browser.run("document.activeElement.parentElement.open")
    await check_keys_of_plots(browser)


async def check_keys_of_plots(browser: Browser) -> None:
    """Arrows read the values of a plot, point by point, and other keys zoom."""
    panel = "document.querySelector('[data-key=change]')"
    await browser.run(f"{panel}.querySelector('.plot').focus()")
    read = f"{panel}.querySelector('.at').textContent"
    points = await browser.run(
        f"{LINES}.map((each) => [each.name, [...each.data_source.data.x], [...each.data_source.data.y]])"
    )
    for keys, place in ((["Home"], 0), (["ArrowRight"], 1), (["End"], -1)):
        for key in keys:
            await browser.press(key)
        text = await browser.run(read)
        name, steps, values = points[0]
        assert text.startswith(f"Step {steps[place]}: ")
        value = float(text.partition(f"{name} ")[2].split(";")[0].split(" ")[0])
        assert value == pytest.approx(values[place], rel=1e-3)
    ends = f"[{FIGURE}.x_range.start, {FIGURE}.x_range.end]"
    low, high = await browser.run(ends)
    await browser.press("+")
    near, end = await browser.run(ends)
    assert low < near < end <= high
    await browser.press("0")
    assert await browser.run(ends) == [low, high]
    await browser.press("Escape")
    assert await browser.run(read) == ""


def test_a_script_that_slipped_through_would_not_run_and_could_not_call_out(page: Path, tmp_path: Path):
    """The policy is the second defence, so the first is taken away: hostile elements are written into the file."""
    text = page.read_text(encoding="utf-8")
    hostile = (
        "<script>window.slipped = 1</script><img src='http://127.0.0.1:9/x' onerror='window.slipped = 2'>"
        "<iframe src='http://127.0.0.1:9/y'></iframe><link rel='stylesheet' href='http://127.0.0.1:9/z'>"
    )
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("<main>", f"<main>{hostile}"), encoding="utf-8")

    async def steps(browser: Browser) -> None:
        await browser.open(broken)
        assert await browser.run("window.slipped") is None

    complaints = in_browser(steps)
    assert len([each for each in complaints if "Content Security Policy" in each]) >= 4
