"""Decode a file into frames; the entry point is `open_frames`.

    path ──sniff──> regular, binary file ──probe──> what is in it ──route──> decord | pyav | nvdec
                                                                          ──> VideoInfo, FrameBlock..., VideoEnd

Whatever is wrong with a file is raised as a `VideoError` with a reason and a message. A GPU that fails is raised as a
`NodeFault`. Any other exception is a defect of this program or of the machine, and propagates. A native decoder may
still hang or crash on a file that was never seen before, so the caller runs this in a child process with a deadline.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import replace

import numpy as np

from p3d.pipeline.clips.rules import Sampling, laid_over
from p3d.pipeline.decode.container import Source
from p3d.pipeline.decode.deadlines import Progress
from p3d.pipeline.decode.gop_chunks import Share, can_be_shared, chunked, chunks_of
from p3d.pipeline.decode.probe import Probe, probe, probed
from p3d.pipeline.decode.routes.choice import RouteName, exact_seek, route
from p3d.pipeline.decode.routes.decord import DecordGaveUp, open_decord, read_decord
from p3d.pipeline.decode.routes.nvdec import chip_here, read_nvdec
from p3d.pipeline.decode.routes.pyav import read_pyav, seek_pyav
from p3d.pipeline.decode.seek import SelectiveDecodeError, leaves_out
from p3d.pipeline.decode.wanted_frames import NONE, Wanted, check_gap, wanted_by
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import ChunkEnd, FrameBlock, FrameSpec, VideoEnd, VideoInfo, VideoShareable
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy

__all__ = ["DecodeLimits", "DecodePolicy", "Probe", "Share", "open_frames", "probe", "route"]

_DEFAULT_LIMITS = DecodeLimits()
MOST_RESIZED_PIXELS = 16 * 1024 * 1024


def open_frames(
    path: str,
    spec: FrameSpec,
    sampling: Sampling,
    *,
    policy: DecodePolicy,
    limits: DecodeLimits = _DEFAULT_LIMITS,
    share: Share | None = None,
    progress: Progress | None = None,
) -> Generator[VideoInfo | VideoShareable | FrameBlock | ChunkEnd | VideoEnd, None, None]:
    """One VideoInfo, FrameBlocks of at most 64 frames in order, one VideoEnd with the true number of frames.

    Only frames that the clips need are sent (`decode.wanted_frames`). Numbers and times are the video's own, also with
    `sampling.fps`. VideoEnd.duration_s is the end of the last frame, in seconds from the start of the first. A
    VideoShareable after a VideoInfo says that several decodes may share the video.

    A **second VideoInfo** means: discard the blocks so far and start again. It comes at most once, in two cases. Either
    the frame count or duration that the clips were laid out on was wrong; it then carries the true values. Or decord,
    or a decode of selected GOPs (`seek_pyav`), failed partway.

    Where seeking is proved exact (`exact_seek`) and enough frames need not be decoded (`seek.leaves_out`), those are
    skipped, and damage in them goes unnoticed. Under `auto` PyAV then reads the video, and the VideoInfo says so.

    With a `share`, only its frames come, and a ChunkEnd after each of its GOP chunks; VideoInfo and VideoEnd are those
    of the whole video. A VideoError then only means that the video must be decoded whole.

    `progress` counts the packets that are read before the first message. decord cannot be counted while it indexes the
    file, which takes about as long as the probe did; up to twice that counts as progress.

    Raises VideoError for anything wrong with the file, before or between messages. Memory: one GOP chunk of at most 256
    cropped frames (decord) or one block of 64 (PyAV), however slowly the messages are taken.
    """
    takes_all = sampling.needs_every_frame and sampling.fps is None
    progress, began = progress or Progress(), time.monotonic()
    with probed(path, limits, not takes_all, progress) as (found, source):
        progress.uncounted_until = 3 * time.monotonic() - 2 * began
        name = route_of(found, spec, sampling, policy, limits)
        if sampling.fps and found.start_s_N is not None and found.end_s_N is not None:
            check_gap(sampling, float((found.end_s_N - found.start_s_N).max()))
        if share is not None:
            yield from _share(found, source, name, spec, sampling, limits, share)
            return
        if name == "pyav":
            yield from _pyav(found, source, spec, sampling, policy, limits)
            return
    if name == "nvdec":
        promised = VideoEnd(found.n_frames, found.duration_s)
        yield _info(found, "nvdec", promised, sampling)
        yield from read_nvdec(found, spec, _wanted(sampling, promised))
        yield _end(promised, sampling)
        return
    may_restart = True
    if name == "decord":
        try:
            reader = open_decord(found, spec)
            may_restart = False
            promised = VideoEnd(found.n_frames, found.duration_s)
            yield _info(found, "decord", promised, sampling)
            if can_be_shared(found, name, _wanted(sampling, promised)):
                yield VideoShareable()
            yield from read_decord(reader, found, spec, _wanted(sampling, promised))
            yield _end(promised, sampling)
            return
        except DecordGaveUp as gave_up:
            if policy.decoder == "decord":
                raise VideoError(gave_up.reason, f"decord: {gave_up}") from gave_up
        reader = None  # frees decord's frames before PyAV begins
    yield from _pyav(found, None, spec, sampling, policy, limits, may_restart=may_restart)


def route_of(
    found: Probe, spec: FrameSpec, sampling: Sampling, policy: DecodePolicy, limits: DecodeLimits
) -> RouteName:
    """The route that reads the file; VideoError if no route may."""
    if found.encrypted:
        raise VideoError(Reason.UNSUPPORTED, "the video is encrypted")
    if found.truncated and policy.partial == "fail":
        raise VideoError(Reason.TRUNCATED, found.truncated)
    if not found.n_frames:
        shown = (
            f"none of the {found.n_packets} packets of stream {found.stream_index} ({found.codec}) has a frame to show"
        )
        raise VideoError(Reason.NO_FRAMES, shown)
    if not (found.coded_height and found.coded_width):
        if found.size_refused:
            raise VideoError(Reason.TOO_LARGE, f"its pictures are larger than {limits.max_pixels} pixels (max_pixels)")
        raise VideoError(Reason.NO_FRAMES, "the stream gives no picture size, and no picture can be decoded")
    _check_resized(found, spec)
    name = route(found, policy, spec, chip_here() if policy.decoder == "nvdec" else None)[0]
    if name == "decord" and policy.decoder == "auto" and _leaves_out(found, sampling):
        name = "pyav"  # it can leave frames out inside a GOP, so it decodes less
    return name


def _share(
    found: Probe,
    source: Source,
    name: RouteName,
    spec: FrameSpec,
    sampling: Sampling,
    limits: DecodeLimits,
    share: Share,
) -> Iterator[VideoInfo | FrameBlock | ChunkEnd | VideoEnd]:
    """The messages of one decode that shares a video with others."""
    promised = VideoEnd(found.n_frames, found.duration_s)
    wanted = _wanted(sampling, promised)
    if not can_be_shared(found, name, wanted):
        raise VideoError(Reason.SOURCE_CHANGED, "can no longer be shared by several decodes")
    chunks = chunks_of(found, wanted, share)
    mine = Wanted(None, None, np.concatenate(chunks))
    yield _info(found, name, promised, sampling)
    try:
        if name == "decord":
            yield from chunked(read_decord(open_decord(found, spec), found, spec, mine), chunks)
        else:
            yield from chunked(seek_pyav(found, spec, mine, limits, source), chunks)
    except (DecordGaveUp, SelectiveDecodeError) as error:
        raise VideoError(Reason.CORRUPT_FRAMES, str(error)) from error
    yield _end(promised, sampling)


def _pyav(
    found: Probe,
    source: Source | None,
    spec: FrameSpec,
    sampling: Sampling,
    policy: DecodePolicy,
    limits: DecodeLimits,
    *,
    may_restart: bool = True,
) -> Iterator[VideoInfo | VideoShareable | FrameBlock | VideoEnd]:
    """Decode a video with PyAV. If no restart is allowed and the clips need the true frame count, count first.

    If frames can be left out, only the others are decoded. If that fails, the video is decoded from front to back. The
    `source` that the probe opened is read once. After decord has begun it is missing, and the video is not shared.
    """
    may_share = source is not None
    promised = VideoEnd(found.n_frames, found.duration_s)
    if may_restart and _leaves_out(found, sampling):
        may_restart = False
        yield _info(found, "pyav", promised, sampling)
        if may_share and can_be_shared(found, "pyav", _wanted(sampling, promised)):
            yield VideoShareable()
        may_share = False
        try:
            yield from seek_pyav(found, spec, _wanted(sampling, promised), limits, source)
            yield _end(promised, sampling)
            return
        except SelectiveDecodeError:
            source = None
    if not may_restart and not sampling.needs_every_frame:
        for message in read_pyav(found, spec, NONE, policy, limits):
            if isinstance(message, VideoEnd):
                promised = message
            else:
                yield message  # an empty block, which shows that the decode is alive
    for _ in range(2):
        yield _info(found, "pyav", promised, sampling)
        if may_share and can_be_shared(found, "pyav", _wanted(sampling, promised)):
            yield VideoShareable()
        for message in read_pyav(found, spec, _wanted(sampling, promised), policy, limits, source):
            if not isinstance(message, VideoEnd):
                yield message
            elif sampling.needs_every_frame or _laid_over(sampling, message) == _laid_over(sampling, promised):
                yield _end(message, sampling)
                return
            else:
                promised = message
        if not may_restart:
            break
        may_share, source = False, None
    detail = f"the file had another number of frames when read again: {promised.n_frames}"
    raise VideoError(Reason.SOURCE_CHANGED, detail)


def _leaves_out(found: Probe, sampling: Sampling) -> bool:
    """Can this video be decoded without enough of its frames to be worth it?"""
    return exact_seek(found) and leaves_out(found, _wanted(sampling, VideoEnd(found.n_frames, found.duration_s)))


def _check_resized(found: Probe, spec: FrameSpec) -> None:
    """VideoError for too large a result: a picture of one row, resized by its short side, gets millions of columns."""
    height, width = spec.target_hw(*found.display_hw)
    if height * width > MOST_RESIZED_PIXELS:
        raise VideoError(
            Reason.TOO_LARGE,
            f"{found.coded_width}x{found.coded_height} pixels would be {width}x{height} after the resize; the limit is "
            f"{MOST_RESIZED_PIXELS} pixels, which no option changes",
        )


def _laid_over(sampling: Sampling, end: VideoEnd) -> int:
    return laid_over(sampling, end.n_frames, end.duration_s)


def _wanted(sampling: Sampling, promised: VideoEnd) -> Wanted:
    return wanted_by(sampling, _laid_over(sampling, promised))


def _end(end: VideoEnd, sampling: Sampling) -> VideoEnd:
    return end if sampling.fps is None else replace(end, resampled_frames=_laid_over(sampling, end))


def _info(found: Probe, name: RouteName, promised: VideoEnd, sampling: Sampling) -> VideoInfo:
    height, width = found.shown_hw
    return VideoInfo(
        n_frames=promised.n_frames,
        width=width,
        height=height,
        rotation=found.turn.degrees,
        fps=found.fps,
        duration_s=promised.duration_s,
        container=found.container,
        codec=found.codec,
        stream_index=found.stream_index,
        route=name,
        resampled_fps=sampling.fps,
        fps_estimated=found.fps_estimated,
        stream_why=found.stream_why or None,
        claimed_frames=found.n_promised or None,
    )
