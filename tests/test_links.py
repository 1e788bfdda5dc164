"""The pages lead to each other, and the README stays short."""

from __future__ import annotations

import re

import pytest

from tests.conftest import REPO

DOCS = sorted([*(REPO / "docs").glob("*.md"), *(REPO / "docs" / "how-to").glob("*.md")])
PAGES = ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(REPO)) for path in DOCS)]


def prose(page: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", (REPO / page).read_text(), flags=re.S | re.M)


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


def test_every_page_is_linked_from_the_readme() -> None:
    """The README has at most 150 lines, and names every page of docs/."""
    text = (REPO / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert not [page for page in PAGES if page.startswith("docs/") and f"({page})" not in text]
