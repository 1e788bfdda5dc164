"""The harness itself: it sees what it is there for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.page.conftest import no_serious_axe

if TYPE_CHECKING:
    from playwright.sync_api import Page


def test_axe_is_heard(browser_page: Page, seen: Callable[..., Path]) -> None:
    """A page with a nameless button is refused, and taken once it has a name; its picture is kept."""
    browser_page.set_content("<html lang=en><title>t</title><main><h1>t</h1><button></button></main></html>")
    with pytest.raises(AssertionError, match="button-name"):
        no_serious_axe(browser_page)
    browser_page.evaluate("document.querySelector('button').textContent = 'go'")
    no_serious_axe(browser_page)
    assert seen(browser_page, "harness").stat().st_size > 0
