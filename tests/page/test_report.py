"""`p3d results report` in a real browser: readable at both sizes, light, dark and printed; it loads nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from p3d.jobs.planning.prepare import JobSpec
from p3d.pipeline.storage.local import LocalStore
from tests.jobs.embedded import embed_all
from tests.jobs.test_cli import in_process
from tests.page.conftest import SEEN, no_serious_axe
from tests.zoo import moving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = [
    b"<script>alert(1)<!--.mp4",
    b"\"onload='alert(2)'.mp4",
    b"a-very-long-name-" + b"x" * 200 + b".mp4",
    b"\xff.mp4",
]


A4_ROOM = 687  # pixels of 1/96 inch between margins of 14 mm


@pytest.fixture(scope="module")
def report(small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a job over a few videos with odd names, one of which is broken and one deleted since."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "films").mkdir()
    for at in range(8):
        made = moving.video(folder / "films" / f"{at}.mp4", at, 20)
        if at < len(NAMES):
            made.rename(os.fsdecode(os.fsencode(made.parent) + b"/" + NAMES[at]))
    (folder / "films" / "broken<b>.mp4").write_bytes(b"\0" * 5000)
    store = LocalStore(str(folder / "out"))
    embed_all(str(folder / "films"), store, JobSpec(None, str(small_weights)), folder)
    (folder / "films" / "7.mp4").unlink()
    code, _, err = in_process("results", "report", store.url, "-o", str(folder / "report.html"))
    assert code == 0, err
    return folder / "report.html"


def looked_at(page: Page, report: Path, seen: Callable[..., Path]) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.partition(":")[0]))
    page.goto(report.as_uri())
    no_serious_axe(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.get_by_text("source not readable").count() >= 1
    assert asked.count("file") == 1 and set(asked) <= {"file", "data"}
    seen(page, "report", full_page=True)


def test_it_is_readable_in_light_colours(browser_page: Page, report: Path, seen: Callable[..., Path]) -> None:
    """No serious axe finding, nothing wider than the window, every picture shown, nothing loaded."""
    looked_at(browser_page, report, seen)


def test_it_is_readable_in_dark_colours(dark_page: Page, report: Path, seen: Callable[..., Path]) -> None:
    """The same with a dark colour scheme."""
    looked_at(dark_page, report, seen)


# elements that do not show all of their content; names of videos are cut after three lines on purpose
CUT_OFF = """[...document.querySelectorAll('body *:not(.name)')].filter(one => {
  const style = getComputedStyle(one);
  return (style.overflowX !== 'visible' && one.scrollWidth > one.clientWidth + 1)
    || (style.overflowY !== 'visible' && one.scrollHeight > one.clientHeight + 1);
}).map(one => one.outerHTML.slice(0, 200))"""


def test_on_paper_it_is_light_and_whole(browser: Browser, report: Path) -> None:
    """Even with a dark colour scheme: black on white, no wider than A4, and nothing is cut off."""
    context = browser.new_context(viewport={"width": A4_ROOM, "height": 1000}, color_scheme="dark")
    page = context.new_page()
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    page.screenshot(path=str(SEEN / "report-print.png"), full_page=True)
    colours = page.evaluate(
        "['backgroundColor', 'color'].map(name => getComputedStyle(document.documentElement)[name])"
    )
    assert colours == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(CUT_OFF) == []
    assert page.locator("nav").is_hidden()
    context.close()


def test_it_prints_on_a4(browser: Browser, report: Path, tmp_path: Path) -> None:
    """A PDF of A4 pages, no more than its content needs."""
    page = browser.new_page()
    page.goto(report.as_uri())
    made = page.pdf(path=str(tmp_path / "report.pdf"), prefer_css_page_size=True)
    page.close()
    assert re.search(rb"/MediaBox \[0 0 59[45]", made)  # points: 210 mm
    assert 2 <= made.count(b"/Type /Page\n") <= 6
