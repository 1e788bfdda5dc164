"""Thumbnails of a few videos, each made in its own child process. If a source is gone, the report says so instead."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from p3d.pipeline.decode.fetch import pinned
from p3d.pipeline.decode.thumbnail import Thumbnail, thumbnails_in_child
from p3d.pipeline.errors import StoreError, VideoError
from p3d.pipeline.results.report.facts import Sampled
from p3d.pipeline.sources.below import SourceRule
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import Failure, VideoRef

LONGEST_SIDE = 240
CHILDREN = 4  # child processes at a time
BUDGET_S = 300.0  # for all pictures; those not started by then are left out

Wanted = tuple[Sampled, float]  # a video and its second
Place = Callable[[VideoRef], VideoRef]
# (key of the video, second) -> thumbnail, or the reason of its failure
Pictures = dict[tuple[tuple[str, str], float], Thumbnail | str]


def take_pictures(
    wanted: Iterable[Wanted], options: StoreOptions, sources: Mapping[str, tuple[SourceRule, Place]]
) -> Pictures:
    """A thumbnail for each, or the reason of its failure. No error of a source or its store ends the report.

    `sources` has a rule for each output, and what gives a video of it the version that its source must have now. A
    source that the rule does not allow is not opened.
    """
    of_video: dict[tuple[str, str], tuple[Sampled, list[float]]] = {}
    for video, second in wanted:
        seconds = of_video.setdefault(video.key, (video, []))[1]
        if second not in seconds:
            seconds.append(second)
    ends = time.monotonic() + BUDGET_S
    with tempfile.TemporaryDirectory(prefix="p3d-report-") as scratch, ThreadPoolExecutor(CHILDREN) as pool:

        def made(one: tuple[Sampled, list[float]]) -> list[Thumbnail | str]:
            if time.monotonic() > ends:
                return [f"not tried: the pictures before it took {BUDGET_S:.0f} s"] * len(one[1])
            return _of_one(one[0], one[1], options, *sources[one[0].out], Path(scratch))

        found: Pictures = {}
        for (video, seconds), pictures in zip(of_video.values(), pool.map(made, of_video.values()), strict=True):
            found.update(((video.key, at), picture) for at, picture in zip(seconds, pictures, strict=True))
    return found


def _of_one(
    video: Sampled, seconds: list[float], options: StoreOptions, rule: SourceRule, place: Place, scratch: Path
) -> list[Thumbnail | str]:
    ref = VideoRef(video.video_id, video.path, video.uri, video.version, size_bytes=0)
    try:
        rule.check(video.uri)
        ref = pinned(place(ref), options)
        made = thumbnails_in_child(ref, seconds, store_options=options, scratch=scratch, longest_side=LONGEST_SIDE)
    except VideoError as error:
        return [f"{error.reason}: {error.detail}"] * len(seconds)
    except (StoreError, OSError, RuntimeError) as error:  # an outage, a full disk, no child process could start
        return [f"not made: {error}"] * len(seconds)
    return [f"{one.reason}: {one.detail}" if isinstance(one, Failure) else one for one in made]
