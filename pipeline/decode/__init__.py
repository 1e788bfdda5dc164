"""From a file to its frames: one door, `open_frames`.

    path ──sniff──> regular, binary file ──probe──> what is in it ──route──> decord | pyav ──> VideoInfo,
                                                                                              FrameBlock..., VideoEnd

Whatever is wrong with a file is a `VideoError` with a reason and a sentence; anything else that is raised is a defect
of this program or of the machine, and goes through. A native decoder may still hang or crash on a file that was never
seen before: the caller runs this in a process of its own, under a deadline.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.clips import Sampling, needed_frames
from pipeline.decode.decord_route import DecordGaveUp, open_decord, read_decord
from pipeline.decode.policy import DecodeLimits, DecodePolicy
from pipeline.decode.probe import Probe, probe
from pipeline.decode.pyav_route import read_pyav
from pipeline.decode.route import RouteName, route
from pipeline.errors import Reason, VideoError
from pipeline.types import INT64, FrameBlock, FrameSpec, VideoEnd, VideoInfo

__all__ = ["DecodeLimits", "DecodePolicy", "Probe", "open_frames", "probe", "route"]

_DEFAULT_LIMITS = DecodeLimits()
_NO_FRAME = np.empty(0, np.int64)


def open_frames(
    path: str,
    spec: FrameSpec,
    sampling: Sampling,
    *,
    policy: DecodePolicy,
    limits: DecodeLimits = _DEFAULT_LIMITS,
) -> Iterator[VideoInfo | FrameBlock | VideoEnd]:
    """One VideoInfo, FrameBlocks of at most 64 frames in order, one VideoEnd with the true number of frames.

    All frames are sent where the clips leave none out (`sampling.needs_every_frame`), else only those of
    `needed_frames`. A **second VideoInfo** means: forget the blocks so far and start again. It comes at most once:
    when the count the clips were laid out on turned out wrong (it then carries the true one), or when decord gave up
    half way and PyAV takes over. VideoEnd.duration_s is the end of the last frame, in seconds from the first.

    Raises VideoError for anything wrong with the file, before or between messages. Memory: one run of at most 256
    resized frames (decord) or one block of 64 (PyAV), however slowly the messages are taken.
    """
    found = probe(path, limits)
    if found.truncated and policy.partial == "fail":
        raise VideoError(Reason.TRUNCATED, found.truncated)
    if found.encrypted:
        raise VideoError(Reason.UNSUPPORTED, "the video is encrypted (CENC)")
    if not found.n_frames:
        raise VideoError(Reason.NO_FRAMES, f"the video stream has {found.n_packets} packets and shows no frame")
    name, _ = route(found, policy, spec)
    may_restart = True
    if name == "decord":
        try:
            reader = open_decord(found, spec)
            may_restart = False
            yield _info(found, "decord", found.n_frames)
            yield from read_decord(reader, found, spec, _wanted(sampling, found.n_frames))
            yield VideoEnd(found.n_frames, found.duration_s)
            return
        except DecordGaveUp as gave_up:
            if policy.decoder == "decord":
                if gave_up.reason is None:
                    raise
                raise VideoError(gave_up.reason, f"decord: {gave_up}") from gave_up
        reader = None  # lets go of decord's frames before PyAV begins
    yield from _pyav(found, spec, sampling, policy, may_restart=may_restart)


def _pyav(
    found: Probe, spec: FrameSpec, sampling: Sampling, policy: DecodePolicy, *, may_restart: bool
) -> Iterator[VideoInfo | FrameBlock | VideoEnd]:
    """A video by PyAV. Where no restart is left and the clips need the true count, it is counted beforehand."""
    n_frames = found.n_frames
    if not may_restart and not sampling.needs_every_frame:
        for message in read_pyav(found, spec, _NO_FRAME, policy):
            if isinstance(message, VideoEnd):
                n_frames = message.n_frames
            else:
                yield message  # empty: a sign of life
    for _ in range(2):
        yield _info(found, "pyav", n_frames)
        for message in read_pyav(found, spec, _wanted(sampling, n_frames), policy):
            if not isinstance(message, VideoEnd):
                yield message
            elif sampling.needs_every_frame or message.n_frames == n_frames:
                yield message
                return
            else:
                n_frames = message.n_frames
        if not may_restart:
            break
    raise VideoError(Reason.SOURCE_CHANGED, f"the file had another number of frames when read again: {n_frames}")


def _wanted(sampling: Sampling, n_frames: int) -> INT64 | None:
    return None if sampling.needs_every_frame else needed_frames(sampling, n_frames)


def _info(found: Probe, name: RouteName, n_frames: int) -> VideoInfo:
    height, width = found.shown_hw
    return VideoInfo(
        n_frames=n_frames,
        width=width,
        height=height,
        rotation=found.turn.degrees,
        fps=found.fps,
        duration_s=found.duration_s,
        container=found.container,
        codec=found.codec,
        stream_index=found.stream_index,
        route=name,
    )
