"""The page of `p3d results serve` in a real browser: its appearance, use by keyboard alone, and hostile names.

Each test runs at two window sizes; nothing may appear on the console, and every request goes to the page's server.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from p3d.jobs.planning.prepare import JobSpec
from p3d.pipeline.results.search import exact as search
from p3d.pipeline.storage.local import LocalStore
from tests.jobs.embedded import embed_all
from tests.jobs.served import Served, serving
from tests.page.conftest import EXPECTED, no_serious_axe, until
from tests.zoo import corpus

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)<\\script>\"'&.mp4"
Look = Callable[..., Path]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve films, one under a hostile name, one that no browser plays, and a file that is not a video."""
    root = corpus.archive(tmp_path_factory.mktemp("page") / "films", 2, (2, 3))
    os.link(root / "rays" / "rays-noon.mp4", root / HOSTILE)
    corpus.show(root / "old-camera.avi", corpus.clouds, 9, 40, codec="mpeg4")
    return root


@pytest.fixture(scope="module")
def served(archive: Path, small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("out")
    store = LocalStore(str(folder / "out"))
    embed_all(str(archive), store, JobSpec(None, str(small_weights)), folder, shard_videos=16)
    with serving(store) as page:
        yield page


@pytest.fixture
def page(browser_page: Page, served: Served) -> Page:
    return opened(browser_page, served)


def opened(page: Page, served: Served) -> Page:
    """The loaded page. A request to another server fails the test at its end, by a console message."""
    page.route(lambda url: not url.startswith((served.url, "blob:")), lambda route: route.abort())
    page.goto(served.url)
    page.wait_for_selector("body.ready")
    return page


def settled(page: Page) -> None:
    """Wait until every visible picture is loaded, or its reason is shown."""
    until(
        page,
        "[...document.querySelectorAll('img[data-id]')].every(one => one.classList.contains('there') || "
        "one.getBoundingClientRect().top > innerHeight || one.offsetParent === null)",
    )


def cards(page: Page) -> list[str]:
    return page.locator("#list .name").all_inner_texts()


def test_it_looks_right(page: Page, seen: Look) -> None:
    """The whole archive with its pictures and map; axe finds nothing serious."""
    assert len(cards(page)) == 15
    assert page.locator("#status").inner_text() == "15 videos, 1 of them failed"
    settled(page)
    assert page.locator("#list img.there").count() >= 4
    seen(page, "archive")
    no_serious_axe(page)


def test_it_looks_right_in_the_dark(dark_page: Page, served: Served, seen: Look) -> None:
    """The same in dark colours, with a query, a player and the filters open."""
    page = opened(dark_page, served)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.keyboard.press("s")
    page.wait_for_selector("#list .cosine")
    page.keyboard.press("f")
    settled(page)
    seen(page, "similar")
    no_serious_axe(page)


def test_keys_alone_are_enough(page: Page, seen: Look) -> None:
    """/ searches, arrows move, Enter plays, S finds similar videos, a clip plays from its start, Esc goes back."""
    page.keyboard.press("/")
    page.keyboard.type("RINGS")
    until(page, "document.querySelectorAll('#list li').length === 2")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('video')?.readyState >= 2")
    name = page.locator("#player .name").inner_text()
    assert name == cards(page)[1]
    page.keyboard.press("s")
    page.wait_for_selector("#list .cosine")
    assert name not in cards(page) and page.locator("#query .name").inner_text() == name
    page.locator("#query").get_by_role("button", name="Clips").click()
    until(page, "document.querySelector('#list .time')?.textContent.includes('–')")
    cosines = [float(text) for text in page.locator("#list .cosine").all_inner_texts()]
    assert cosines == sorted(cosines, reverse=True) and len(cosines) > 4
    page.keyboard.press("ArrowDown")
    late = page.evaluate("[...document.querySelectorAll('.card')].findIndex(one => one.item.start_s > 0.5)")
    for _ in range(late):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    start_s = page.evaluate("document.activeElement.item.start_s")
    until(page, f"document.querySelector('video')?.currentTime >= {start_s - 0.001}")
    page.keyboard.press("p")
    assert page.evaluate("document.querySelector('video').currentTime") < start_s + 1.5
    settled(page)
    seen(page, "clips")
    no_serious_axe(page)
    page.keyboard.press("c")
    until(page, "location.hash.includes('t=')")
    page.wait_for_selector("#query:has-text('Like second')")
    for _ in range(2):
        page.keyboard.press("Escape")
    until(page, "document.querySelectorAll('#list li').length === 15")
    assert page.locator("#player").is_hidden()
    page.go_back()
    page.wait_for_selector("#query:not([hidden])")


# the best hit is whole in the window, and nothing covers it
BEST_IS_SEEN = """(() => {
  const box = document.querySelector("#list li .picture").getBoundingClientRect();
  const at = (y) => document.elementFromPoint(box.left + 20, y)?.closest("#list li");
  return box.top >= 0 && box.bottom <= innerHeight && [at(box.top + 4), at(box.bottom - 4)].every(
    (one) => one === document.querySelector("#list li"));
})()"""


def test_an_answer_shows_its_best_hit(page: Page, seen: Look) -> None:
    """Asked from the end of a long list, with and without an open player; back in the list, it is where it was."""
    assert page.viewport_size
    page.set_viewport_size(
        {"width": page.viewport_size["width"], "height": 600 if page.viewport_size["width"] > 900 else 844}
    )
    last = page.locator("#list li").filter(has=page.locator(".more-like")).last
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    last.hover()
    place = page.evaluate("scrollY")
    assert place > 100
    last.locator(".more-like").click()
    page.wait_for_selector("#list .cosine")
    until(page, BEST_IS_SEEN)
    page.locator("#list .card").nth(2).click()
    page.wait_for_selector("#player .facts")
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    name = page.locator("#player .name").inner_text()
    page.get_by_role("button", name="Similar videos").click()
    page.wait_for_selector(f"#query:has-text('{name}')")
    until(page, BEST_IS_SEEN)
    seen(page, "best-hit")
    page.evaluate("scrollTo(0, 150)")
    page.locator("#query").get_by_role("button", name="Clips").click()
    page.wait_for_selector("#status:has-text('one per video')")
    assert len(set(cards(page))) == len(cards(page))
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.wait_for_selector("#status:has-text('15 videos')")
    until(page, f"Math.abs(scrollY - {place}) < 3")


def test_a_button_does_what_esc_does(page: Page) -> None:
    """It says what comes next, does it, and is gone when there is nothing left to close."""
    button = page.locator("#escape")
    assert button.is_hidden()
    page.fill("#text", "noon")
    page.wait_for_selector("#escape:has-text('Clear search')")
    page.locator(".card").first.click()
    page.locator("#filters-button").click()
    for says, gone in (("Close filters", "#filters"), ("Close player", "#player")):
        assert button.inner_text().startswith(says)
        no_serious_axe(page)
        button.click()
        assert page.locator(gone).is_hidden()
    assert button.inner_text().startswith("Clear search")
    button.click()
    until(page, "document.querySelectorAll('#list li').length === 15 && document.getElementById('text').value === ''")
    assert button.is_hidden()
    page.locator(".card").nth(1).focus()
    page.keyboard.press("s")
    page.wait_for_selector("#escape:has-text('All videos')")
    button.click()
    page.wait_for_selector("#query", state="hidden")
    assert button.is_hidden()


def test_names_are_text(page: Page, seen: Look) -> None:
    """A name that contains markup is shown as text, in the list, the player, the query, the map and a failure."""
    page.fill("#text", "onerror")
    until(page, "document.querySelectorAll('#list li').length === 1")
    assert cards(page) == [HOSTILE]
    page.locator(".card").click()
    page.wait_for_selector("#player .facts")
    page.locator("summary").click()
    page.keyboard.press("s")
    page.wait_for_selector("#query .name")
    assert page.locator("#query .name").inner_text() == HOSTILE
    seen(page, "hostile")
    assert page.evaluate("document.querySelectorAll('img[src=x], script:not([src])').length") == 0
    no_serious_axe(page)


def test_what_cannot_be_played_is_shown_as_frames(page: Page, seen: Look) -> None:
    """An old codec: twelve frames, one of them large; one can search by the chosen frame."""
    page.fill("#text", "old-camera")
    until(page, "document.querySelectorAll('#list li').length === 1")
    page.locator(".card").click()
    page.wait_for_selector(".strip")
    until(page, "document.querySelectorAll('.strip img.there').length === 12")
    assert page.locator("video").count() == 0
    page.locator(".strip button").nth(8).click()
    page.wait_for_selector(".large img.there")
    seen(page, "frames")
    no_serious_axe(page)
    page.locator("#like-second").click()
    page.wait_for_selector("#list .cosine")
    second = float(re.findall(r"t=([\d.]+)", page.url)[0])
    assert second == pytest.approx(8.5 * 40 / 24 / 12, abs=0.02)


def test_a_failed_video_says_why(page: Page, seen: Look) -> None:
    """Its reason, the meaning of the reason, and the job's own message."""
    page.get_by_role("link", name="1 of them failed").click()
    until(page, "document.querySelectorAll('#list li').length === 1")
    page.locator(".card").click()
    page.wait_for_selector(".why .detail")
    told = page.locator(".why").inner_text()
    assert "not_a_video" in told and "not a video container" in told and "What to do: Nothing, if it is not a" in told
    seen(page, "failed")
    no_serious_axe(page)


def test_a_file_is_searched_by(page: Page, archive: Path, seen: Look) -> None:
    """The page shows that it is being embedded; then it finds itself first, and plays in the player."""
    page.set_input_files("#file", archive / "squares" / "squares-noon.mp4")
    page.wait_for_selector("#list .cosine")
    assert (cards(page)[0], page.locator("#list .cosine").first.inner_text()) == ("squares-noon.mp4", "1.000")
    until(page, "document.querySelector('video')?.readyState >= 2")
    settled(page)
    seen(page, "dropped")
    no_serious_axe(page)
    page.keyboard.press("Escape")
    page.locator("#query").get_by_role("button", name="Play").click()
    until(page, "document.querySelector('video')?.readyState >= 2")


def test_a_file_is_dropped_on_the_page(page: Page, archive: Path, seen: Look) -> None:
    """Dragged in from outside the browser: the page says what a drop does, then shows what is similar to the file."""
    file, drag = archive / "rings" / "rings-noon.mp4", page.context.new_cdp_session(page)

    def dragged(kind: str) -> None:
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        drag.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 400, "data": data})

    dragged("dragEnter")
    page.wait_for_selector("#drop:not([hidden]):has-text('Drop a video')")
    seen(page, "dragged")
    dragged("dragOver")
    dragged("drop")
    page.wait_for_selector("#list .cosine")
    assert (cards(page)[0], page.locator("#list .cosine").first.inner_text()) == (file.name, "1.000")
    assert page.locator("#query .name").inner_text() == file.name and page.locator("#drop").is_hidden()


def test_what_is_sent_of_a_file_is_shown(page: Page, tmp_path: Path, seen: Look) -> None:
    """Over a slow connection: bytes and share grow, and a button ends it without an error."""
    (tmp_path / "long.mp4").write_bytes(os.urandom(3_000_000))
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 300_000}
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", slow)
    page.set_input_files("#file", tmp_path / "long.mp4")
    shares = []
    for low in (0.0, 0.1):
        until(page, f"document.querySelector('#sent').value > {low}")
        told = page.locator("#drop p").inner_text()
        found = re.fullmatch(r"Sending long\.mp4: ([\d.]+) of 3\.0 MB, (\d+)%", told)
        assert found and abs(float(found[1]) / 3 - int(found[2]) / 100) < 0.05, told
        shares.append(int(found[2]))
    assert 0 <= shares[0] <= shares[1] < 100
    seen(page, "sending")
    no_serious_axe(page)
    page.locator("#cancel").click()
    page.wait_for_selector("#drop", state="hidden")
    assert page.locator("#status").inner_text().startswith("15 videos")


def test_a_file_that_is_not_a_video_is_refused_with_a_reason(page: Page, tmp_path: Path) -> None:
    """The reason is shown in place of the hits."""
    EXPECTED[page] = "status of 404"
    (tmp_path / "notes.mp4").write_text("no video")
    page.set_input_files("#file", tmp_path / "notes.mp4")
    page.wait_for_selector("#status.wrong")
    assert page.locator("#status").inner_text().startswith("notes.mp4: text, a playlist")


def test_filters_and_the_map(page: Page, seen: Look) -> None:
    """A condition filters list and map, a wrong one shows an error; keys move on the map; a cluster opens a list."""
    EXPECTED[page] = "status of 400"
    page.keyboard.press("f")
    page.select_option("#column", "n_frames")
    page.fill("#value", "60")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chips li:has-text('n_frames>=60')")
    until(page, "document.querySelectorAll('#list li').length === 7")
    page.fill("#value", "many")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status.wrong:has-text('many')")
    page.locator("#chips button").last.click()
    until(page, "document.querySelectorAll('#list li').length === 7")
    page.locator("#canvas").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    page.wait_for_selector("#tip img.there")
    seen(page, "map")
    no_serious_axe(page)
    page.keyboard.press("Enter")
    page.wait_for_selector("#player:not([hidden])")
    assert page.locator("#player .name").inner_text() == page.locator("#tip .name").inner_text()
    page.locator("#legend button").first.click()
    page.wait_for_selector("#chips li:has-text('cluster 1')")
    shown = int(page.locator("#legend button span").first.inner_text())
    until(page, f"document.querySelectorAll('#list li').length === {shown}")


def test_the_map_lights_all_that_the_list_shows(browser_page: Page, served: Served) -> None:
    """Also after "Show more", which these videos need twice with six videos per page."""

    def fewer(route: Route) -> None:
        reply = route.fetch()
        route.fulfill(response=reply, body=reply.text().replace("const PAGE = 60;", "const PAGE = 6;"))

    EXPECTED[browser_page] = "getImageData are faster"
    browser_page.route(lambda url: url.endswith("/main.js"), fewer)
    page = opened(browser_page, served)
    page.fill("#text", ".")
    page.wait_for_selector("#status:has-text('15 videos found')")
    dim = []
    for listed in (6, 12, 15):
        until(page, f"document.querySelectorAll('#list li').length === {listed}")
        dim.append(page.evaluate(DIM))
        if listed < 15:
            page.locator("#more").click()
    assert dim[0] > dim[1] > dim[2] and dim[2] < 0.2 * dim[0], dim
    assert page.locator("#more").is_hidden()


# number of map pixels in the colour of a point that is not highlighted
DIM = """(() => {
  const canvas = document.getElementById("canvas");
  const bytes = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return bytes.filter((byte, at) => at % 4 === 3 && byte >= 62 && byte <= 66).length;
})()"""


def test_errors_of_map_facts_and_name_are_shown(browser_page: Page, served: Served, seen: Look) -> None:
    """If map, details and name of a video cannot be read, each shows a message in its place; the page still works."""
    EXPECTED[browser_page] = "status of 500"

    def fail(route: Route) -> None:
        told = {"error": f"the disk of {urlsplit(route.request.url).path.rpartition('/')[2]} is gone"}
        route.fulfill(status=500, content_type="application/json", body=json.dumps(told))

    browser_page.route(lambda url: urlsplit(url).path.endswith(("api/map", "api/video")), fail)
    page = opened(browser_page, served)
    page.wait_for_selector("#map-note:has-text('There is no map: the disk of map is gone')")
    assert page.locator("#map-note").get_attribute("role") == "status" and page.locator("#canvas").is_hidden()
    page.locator(".card").nth(2).click()
    page.wait_for_selector("#player [role=alert]:has-text('cannot be shown: the disk of video is gone')")
    page.keyboard.press("s")
    page.wait_for_selector("#query [role=alert]:has-text('name cannot be shown: the disk of video is gone')")
    page.wait_for_selector("#list .cosine")
    settled(page)
    seen(page, "cannot")
    no_serious_axe(page)


def test_hits_that_near_copies_cut_short_are_said_to_be(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the best rows are copies of each other and no more were searched, the page says that there may be more."""
    for pool, more in ((1000, False), (1, True)):
        monkeypatch.setattr(search, "POOL", pool)
        how = f"level=clip&own=yes&every=yes&distinct=0.99&t=0.1&pool={pool}"
        page.evaluate(f"location.hash = 'like={page.evaluate(FIRST)}&{how}'")
        page.wait_for_selector("#status:has-text('most similar to it')")
        until(
            page, f"document.getElementById('status').textContent.includes('there may be more') === {str(more).lower()}"
        )


FIRST = "document.querySelector('.card').item.video_id"


def test_the_keys_are_told(page: Page, seen: Look) -> None:
    """? opens a dialog, Esc closes it alone."""
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    seen(page, "keys")
    no_serious_axe(page)
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog:not([open])", state="attached")
