"""The control plane: plans jobs, runs them on Ray, monitors them, and is the command line. Imports `p3d.pipeline`.

From Python, `p3d.jobs.embed_file(path, weights)` embeds one video without a job. `p3d.jobs.search(out, query)` finds
the most similar rows. Both are loaded on first use: importing this package loads neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "p3d.jobs":
    raise ImportError(f"import p3d.jobs, not {__name__}: the folder jobs/ is part of the package p3d")

if TYPE_CHECKING:
    from p3d.jobs.api.embed import EmbeddedVideo, embed, embed_file
    from p3d.jobs.api.search import search

__all__ = ["EmbeddedVideo", "embed", "embed_file", "search"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'p3d.jobs' has no attribute {name!r}")
    return getattr(import_module("p3d.jobs.api.search" if name == "search" else "p3d.jobs.api.embed"), name)
