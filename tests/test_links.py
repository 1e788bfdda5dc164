"""The pages lead to each other, say who they are for, and the README stays short."""

from __future__ import annotations

import re

import pytest

from tests.conftest import REPO
from tests.pages import DOCS, GENERATED, LOGS, PAGES, prose


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    """Each relative link names a file of the repository and, of a page, one of its headings."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = ((REPO / page).parent / name if name else REPO / page).resolve()
            assert target.exists(), link
            assert not anchor or anchor in anchors(str(target.relative_to(REPO))), link


def test_every_page_is_linked_from_the_index() -> None:
    """The README has at most 150 lines and leads to docs/README.md, which names every other page of docs/."""
    readme, index = (REPO / "README.md").read_text(), (REPO / "docs" / "README.md").read_text()
    assert len(readme.splitlines()) <= 150 and "(docs/README.md)" in readme
    named = {page.removeprefix("docs/") for page in DOCS} - {"README.md"}
    assert not [page for page in sorted(named) if f"({page})" not in index]


@pytest.mark.parametrize("page", [page for page in DOCS if page not in LOGS])
def test_a_page_says_who_it_is_for(page: str) -> None:
    """The first line after the title begins with "For"."""
    title, reader = re.findall(r"^(?!<!--)\S.*$", (REPO / page).read_text(), re.M)[:2]
    assert title.startswith("# ") and reader.startswith("For "), reader


@pytest.mark.parametrize("page", LOGS)
def test_a_log_has_its_date(page: str) -> None:
    """The name of a log begins with the day of its measurements."""
    assert re.fullmatch(r"docs/log/\d{4}-\d{2}-\d{2}-[\w-]+\.md", page)


def test_generated_pages_are_found() -> None:
    """The pages that docs/generate.py writes as a whole are known by their first line."""
    assert {"docs/troubleshooting.md", "docs/reference/cli.md", "docs/reference/json.md"} <= set(GENERATED)
