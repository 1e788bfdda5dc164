"""The report of a training run in a real browser: readable at both sizes, light, dark and printed; it loads nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from p3d.pipeline.results.report.training import MATRIX_CLASSES, render_training
from tests.page.conftest import no_serious_axe
from tests.page.test_report import A4_ROOM
from tests.pipeline.test_training_report import FAILURES, HOSTILE, TESTS, metrics, predictions, report, table

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module", params=[8, MATRIX_CLASSES, MATRIX_CLASSES + 1])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few hundred steps with odd names, with a matrix or without."""
    rng = np.random.default_rng(request.param)
    names = (HOSTILE, "a-very-long-name-" + "x" * 200, *(f"class {at}" for at in range(request.param - 2)))
    rates = np.linspace(0.2, 0.7, 5)
    html = render_training(
        report(
            class_names=names,
            metrics=metrics(600, loss=3 * np.exp(-np.arange(600) / 200) * rng.uniform(0.5, 1.5, 600)),
            tests=table(
                TESTS, step=np.arange(1, 6) * 120, clip_hit1=rates - 0.1, video_hit1=rates, video_hit5=rates + 0.2
            ),
            predictions=predictions(*map(tuple, rng.integers(0, request.param, (900, 2)).tolist())),
            failures=table(FAILURES, path=[HOSTILE], reason=["truncated"], detail=["frame 12: end of file"]),
        )
    )
    made = tmp_path_factory.mktemp("training") / f"training-{request.param}.html"
    made.write_text(html)
    return made


def looked_at(page: Page, path: Path, seen: Callable[..., Path]) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.locator("summary").click()
    no_serious_axe(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert asked == [path.as_uri()]
    seen(page, path.stem, full_page=True)


def test_it_is_readable_in_light_colours(browser_page: Page, path: Path, seen: Callable[..., Path]) -> None:
    """No serious axe finding, nothing wider than the window, nothing loaded."""
    looked_at(browser_page, path, seen)


def test_it_is_readable_in_dark_colours(dark_page: Page, path: Path, seen: Callable[..., Path]) -> None:
    """The same with a dark colour scheme."""
    looked_at(dark_page, path, seen)


def test_on_paper_it_is_no_wider_than_a4(browser: Browser, path: Path) -> None:
    """Black on white, and even the widest matrix fits between the margins."""
    page = browser.new_page(viewport={"width": A4_ROOM, "height": 1000}, color_scheme="dark")
    page.goto(path.as_uri())
    page.emulate_media(media="print")
    page.screenshot(path=str(path.with_suffix(".png")), full_page=True)
    colours = page.evaluate(
        "['backgroundColor', 'color'].map(name => getComputedStyle(document.documentElement)[name])"
    )
    assert colours == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()
