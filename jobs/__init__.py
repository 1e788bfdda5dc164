"""The control plane: plans jobs, runs them on Ray, watches them, is the command line. Knows `p3d` and `pipeline`.

From Python, `jobs.embed_file(path, weights)` embeds one video here and now. It is loaded when it is first asked for:
importing this package costs neither torch nor Ray.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.embedding import EmbeddedVideo, embed, embed_file

__all__ = ["EmbeddedVideo", "embed", "embed_file"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'jobs' has no attribute {name!r}")
    from jobs import embedding

    return getattr(embedding, name)
