"""What the templates of the reports have in common: the environment that fills them in, and texts for people.

File names are untrusted. Before Jinja2 escapes a value, `shown` makes control characters, characters that change the
direction of text, and invalid text visible. The Content-Security-Policy of layout.html forbids scripts and network
access.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import jinja2
from markupsafe import Markup

from p3d.pipeline.errors import escape, meaning_of

LONGEST_TEXT = 300  # characters of a name or a detail


def page_environment() -> jinja2.Environment:
    """The Jinja2 environment of the templates in this folder. It escapes every value, and knows no missing one."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("p3d.pipeline.results.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_final,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(clock=clock, lasting=human_time)
    environment.globals.update(meaning_of=meaning_of)
    return environment


def shown(text: str) -> str:
    """Text escaped as on a terminal, cut at LONGEST_TEXT characters."""
    return escape(text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "\N{HORIZONTAL ELLIPSIS}")


def _final(value: Any) -> Any:
    """Apply `shown` to each value before Jinja2 escapes it."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return shown(value)
    return value


def human_time(seconds: float) -> str:
    """`1.5 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def clock(at_s: float) -> str:
    """A time in seconds since 1970 as a date and time in UTC."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
