"""A parsed report, for tests: what it holds, and that nothing in it runs, loads or hides."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Page(HTMLParser):
    """A parsed page: (tag, attributes) in order, its text, and its tables as rows of the texts of their cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def harmless(html: str) -> Page:
    """Check that nothing in the page runs, loads or hides, and that it has what screen readers need."""
    page = Page(html)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)
    assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert all(
            (attributes.get(name) or "#").startswith(("#", "data:image/jpeg;base64,")) for name in ("href", "src")
        )
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert max(ids.values()) == 1
    named = [one.get("aria-labelledby") for _, one in page.tags if "aria-labelledby" in one]
    assert set(named) <= ids.keys()
    assert all(image["alt"] for image in page.all("img"))
    assert all(drawing["role"] == "img" and drawing["aria-labelledby"] for drawing in page.all("svg"))
    assert all(page.all(tag) for tag in ("main", "header", "footer", "nav", "h1", "title"))
    assert page.all("html") == [{"lang": "en"}]
    assert {"http-equiv": "Content-Security-Policy", "content": POLICY} in page.all("meta")
    return page
