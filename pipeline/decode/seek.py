"""Only what the wanted frames need, of a video where `route.exact_seek` holds.

    wanted frames ──wanted_gops──> [first, end) of whole GOPs ──gop_packets──> their packets ──cut──> a file of them
                                                                                     └──needed_packets──> fewer still

The demuxer's seek is not trusted: it may land anywhere before the key frame, and packets are passed over until the one
with the key frame's own time stamp comes. Whatever else comes is `Astray`, and the file is read from front to back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import av
import numpy as np
from av.stream import Stream
from av.video.stream import VideoStream

from p3d.pipeline.decode.probe import Probe, Source, open_container, packets
from p3d.pipeline.decode.wanted import Wanted
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import INT64

LEAST_SPARED = 1 / 16  # of a video's frames: with less to gain it is decoded from front to back, and all of it judged


class Astray(Exception):
    """The file is not as it was proved to be, or damaged: only a decode from front to back can say what it holds."""


def wanted_gops(found: Probe, numbers_M: INT64) -> list[tuple[int, int]]:
    """[first, end) frames of the GOPs that hold any of the sorted `numbers_M`, in order, a pair for each GOP.

    key frames 0 10 20 30, 40 frames, wanted 3 4 25      [0, 10) [20, 30)
    """
    at_M = np.unique(np.searchsorted(found.key_frames, numbers_M, side="right") - 1)
    end_K = np.append(found.key_frames[1:], found.n_frames)
    return [(int(found.key_frames[at]), int(end_K[at])) for at in at_M]


def spared_frames(found: Probe, numbers_M: INT64) -> int:
    """How many frames need not be decoded for the sorted `numbers_M`: those of other GOPs, those after the last wanted
    one of their GOP, and those that no other refers to. All of them but a few that reordering stores before it.

    wanted 3 and 4 of a GOP of 8, 1 and 5 disposable      0 1 2 [3] [4] 5 6 7      1, 5, 6, 7
    """
    frames_N = np.arange(found.n_frames)
    at_N = np.searchsorted(numbers_M, frames_N)
    next_N = np.append(numbers_M, found.n_frames)[at_N]  # the first wanted one that is not before it
    end_N = np.append(found.key_frames, found.n_frames)[np.searchsorted(found.key_frames, frames_N, side="right")]
    spared_N = next_N >= end_N
    if found.skippable_N is not None:
        spared_N |= found.skippable_N & (next_N != frames_N)
    return int(spared_N.sum())


def leaves_out(found: Probe, wanted: Wanted) -> bool:
    """Are there enough frames that need not be decoded? Asked where every frame has its time."""
    assert found.start_s_N is not None and found.end_s_N is not None  # exact_seek
    return spared_frames(found, wanted.of(found.start_s_N, found.end_s_N)) >= LEAST_SPARED * found.n_frames


def joined(gops: list[tuple[int, int]], most_frames: int | None = None) -> list[tuple[int, int]]:
    """The same frames in as few runs as there are, those that meet made one, as far as one has `most_frames`."""
    runs: list[tuple[int, int]] = []
    for first, end in gops:
        if runs and runs[-1][1] == first and (most_frames is None or end - runs[-1][0] <= most_frames):
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((first, end))
    return runs


@contextlib.contextmanager
def opened(found: Probe) -> Iterator[Source]:
    """What was probed, open; VideoError if it is something else by now."""
    with open_container(found.path) as container:
        stream = container.streams[found.stream_index]
        if not isinstance(stream, VideoStream):
            raise VideoError(Reason.SOURCE_CHANGED, f"stream {found.stream_index} is no video any more")
        yield Source(container, stream)


def gop_packets(source: Source, found: Probe, first: int, end: int) -> Iterator[av.Packet[Stream]]:
    """The packets of the frames [first, end), which begins and ends at key frames (or at the end of the video).

    Astray if its key frame does not come. The decoder of `stream` is flushed by the seek.
    """
    at = int(np.searchsorted(found.key_frames, first))
    last = int(np.searchsorted(found.key_frames, end))
    start_pts = int(found.key_pts_K[at])
    end_pts = int(found.key_pts_K[last]) if last < len(found.key_pts_K) else None
    source.container.seek(int(found.key_dts_K[at]), stream=source.stream, backward=True, any_frame=False)
    begun = False
    for packet in packets(source.container, source.stream):
        if not packet.size:
            continue
        if packet.is_keyframe:
            if packet.pts == end_pts and begun:
                return
            begun = begun or packet.pts == start_pts
        if begun:
            yield packet
        elif packet.dts is not None and packet.dts > found.key_dts_K[at]:
            break
    if not begun:
        raise Astray(f"no key frame {first} at its time")


def needed_packets(
    source: Source, found: Probe, numbers_M: INT64, first: int, end: int
) -> Iterator[tuple[int, av.Packet[Stream]]]:
    """(frame number, packet) of what must be decoded in the GOPs [first, end) for the sorted `numbers_M`, all of them
    frames there: of each GOP what comes before its last wanted packet, but for disposable frames that are not wanted.

    It depends on the GOP and its wanted frames alone, so that a decode of more GOPs looks at the same packets of each.
    Astray for a packet at a time that no frame has, or a frame without one.
    """
    gops = {
        gop: numbers_M[slice(*np.searchsorted(numbers_M, (gop, after)))] for gop, after in wanted_gops(found, numbers_M)
    }
    missing, in_gop = len(numbers_M), set[int]()
    for packet in gop_packets(source, found, first, end):
        number = number_at(found, source, packet.pts)
        if number in gops:
            in_gop = set(gops[number].tolist())
        if number in in_gop:
            in_gop.remove(number)
            missing -= 1
        elif not in_gop or (found.skippable_N is not None and found.skippable_N[number]):
            continue
        yield number, packet
        if not missing:
            return
    raise Astray(f"{missing} frames of [{first}, {end}) have no packet")


def number_at(found: Probe, source: Source, pts: int | None) -> int:
    """The number of the frame that is shown at this very time stamp; Astray if there is none."""
    assert found.start_s_N is not None  # exact_seek
    if pts is not None:
        start_s = (pts - found.first_pts) * source.tick_s
        number = int(np.searchsorted(found.start_s_N, start_s))
        if number < found.n_frames and found.start_s_N[number] == start_s:
            return number
    raise Astray(f"no frame is shown at the time stamp {pts}")


@contextlib.contextmanager
def cut(source: Source, found: Probe, gops: list[tuple[int, int]]) -> Iterator[str]:
    """The path of a file in memory that holds the packets of these GOPs, as they are, and nothing else (Linux).

    Of the kind of the original, so that the decoder is told of codec, colours and rotation in the same words; but of
    MJPEG in Matroska decord cannot tell the length where there are few frames. Astray where the packets are not found,
    or no file of that kind can hold them.
    """
    name = "matroska" if "matroska" in found.container.split(",") and found.codec != "mjpeg" else "mov"
    if name == "mov" and found.codec == "vp9":  # which QuickTime does not know
        name = "mp4"
    if not hasattr(os, "memfd_create"):
        raise Astray("this system has no files in memory")
    handle = os.memfd_create("gops")
    path = f"/proc/self/fd/{handle}"
    try:
        with av.open(path, "w", format=name, options={"fflags": "+bitexact"}) as output:  # no dates, nothing drawn
            copy = output.add_stream_from_template(source.stream)
            for first, end in gops:
                for packet in gop_packets(source, found, first, end):
                    packet.stream = copy
                    output.mux(packet)
        yield path
    except av.error.MemoryError:
        raise
    except (av.error.FFmpegError, ValueError) as error:
        raise Astray(f"the GOPs cannot be copied: {error}") from error
    finally:
        os.close(handle)
