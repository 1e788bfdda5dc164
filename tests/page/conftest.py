"""A real browser to test pages in: Chromium by Playwright, axe-core for accessibility, screenshots of each page.

Only `make test-page` runs these tests: they need a browser and npm, which `make test` does not. Screenshots are kept as
PNG files in tests/page/seen/, which git ignores.

    def test_it(browser_page, seen): ...
        browser_page.goto(url); no_serious_axe(browser_page); seen("name")
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HERE = Path(__file__).resolve().parent
SEEN = HERE / "seen"
AXE = os.environ.get("P3D_AXE")  # axe.min.js; `make test-page` sets it
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}
SERIOUS = ("serious", "critical")
EXPECTED: dict[Any, str] = {}  # console messages that a test expects, such as "status of 404"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests unless `make test-page` runs them."""
    if AXE is None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs a browser: `make test-page`"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    program = os.environ.get("P3D_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert program, "no browser: apt-get install chromium, or name one in P3D_CHROMIUM"
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(params=list(SIZES))
def browser_page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page at each of two window sizes, light and with reduced motion; any console message fails the test."""
    yield from _new_page(browser, request.param, "light")


@pytest.fixture(params=list(SIZES))
def dark_page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The same with a dark colour scheme."""
    yield from _new_page(browser, request.param, "dark")


def _new_page(browser: Browser, size: str, scheme: Any) -> Iterator[Page]:
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
    )
    page, trouble = context.new_page(), []
    page.set_default_timeout(20_000)
    page.on("console", lambda said: trouble.append(f"{said.type}: {said.text}"))
    page.on("pageerror", lambda error: trouble.append(f"uncaught: {error}"))
    page.on("dialog", lambda dialog: trouble.append(f"dialog: {dialog.message}"))
    yield page
    context.close()
    expected = EXPECTED.pop(page, "nothing at all")
    assert not [one for one in trouble if expected not in one], trouble


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Callable[..., Path]:
    """`seen(page, "name")` saves a screenshot, named by `name`, window size and colour scheme."""

    def keep(page: Page, name: str, **how: Any) -> Path:
        SEEN.mkdir(exist_ok=True)
        width = page.viewport_size["width"] if page.viewport_size else 0
        size = next(name for name, hw in SIZES.items() if hw[0] == width)
        scheme = "-dark" if page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") else ""
        path = SEEN / f"{name}-{size}{scheme}.png"
        page.screenshot(path=str(path), **how)
        return path

    return keep


def until(page: Page, expression: str, timeout_s: float = 20.0) -> None:
    """Wait until an expression of JavaScript holds. Playwright's own way needs eval, which a page's policy forbids."""
    end = time.monotonic() + timeout_s
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {expression}"
        page.wait_for_timeout(50)


def no_serious_axe(page: Page) -> None:
    """axe-core finds nothing serious or critical on the page as it is now; the message says what and where."""
    assert AXE is not None
    # by evaluate, because the page's Content Security Policy would refuse a script element
    page.evaluate(Path(AXE).read_text() + ";0")
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']}).then(found => found.violations)")
    serious = [
        {"rule": one["id"], "help": one["help"], "where": [node["html"][:200] for node in one["nodes"][:5]]}
        for one in found
        if one["impact"] in SERIOUS
    ]
    assert not serious, json.dumps(serious, indent=2)
