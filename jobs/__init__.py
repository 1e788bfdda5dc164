"""The control plane: plans jobs, runs them on Ray, watches them, is the command line. Knows `p3d` and `pipeline`.

From Python, `jobs.embed_file(path, weights)` embeds one video here and now, and `jobs.search(out, query)` finds what is
like one. They are loaded when they are first asked for: importing this package costs neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.embedding import EmbeddedVideo, embed, embed_file
    from jobs.searching import search

__all__ = ["EmbeddedVideo", "embed", "embed_file", "search"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'jobs' has no attribute {name!r}")
    return getattr(import_module("jobs.searching" if name == "search" else "jobs.embedding"), name)
