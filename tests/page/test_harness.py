"""Tests of the harness itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.page.conftest import no_serious_axe

if TYPE_CHECKING:
    from playwright.sync_api import Page


def test_axe_findings_fail_a_test(browser_page: Page, seen: Callable[..., Path]) -> None:
    """A page with a nameless button fails, and passes once the button has a name; a screenshot is kept."""
    browser_page.set_content("<html lang=en><title>t</title><main><h1>t</h1><button></button></main></html>")
    with pytest.raises(AssertionError, match="button-name"):
        no_serious_axe(browser_page)
    browser_page.evaluate("document.querySelector('button').textContent = 'go'")
    no_serious_axe(browser_page)
    assert seen(browser_page, "harness").stat().st_size > 0
