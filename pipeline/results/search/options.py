"""The options of a search, for the command line and the Python API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from p3d.pipeline.results.search.metrics import METRICS
from p3d.pipeline.types.options import DEVICES, check_options, option

Level = Literal["clip", "video"]
LEVELS: tuple[Level, ...] = ("clip", "video")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """What is compared with a query, and how. `where` are conditions on columns, all of which must hold."""

    level: Level = option("clip", "Use the rows of clips/ or of videos/.", choices=LEVELS)
    metric: str = option("cosine", "Rank by cosine or by L2 distance.", choices=tuple(METRICS))
    top: int = option(10, "Show K hits.", low=1, metavar="K")
    per_video: bool = option(
        True, "Show the best clip of each video, or every clip that is near enough.", off="every-clip"
    )
    with_self: bool = option(False, "Find the video of QUERY itself, too, if OUT has it.")
    where: tuple[str, ...] = ()
    distinct: float | None = option(
        None,
        "Leave out hits with this cosine or more, such as 0.99, to the query or to a better hit.",
        low=-1,
        high=1,
        metavar="COSINE",
        default_text="none",
    )
    index: bool = option(False, "Take candidates from the index of `p3d results index`.")
    device: str = option("auto", "Embed a file on this device.", choices=DEVICES)

    def __post_init__(self) -> None:
        check_options(self)
