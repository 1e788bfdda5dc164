"""Reading only the packets that the wanted frames need, for videos where `choice.exact_seek` holds.

    wanted frames ──wanted_gops──> [first, end) of whole GOPs ──gop_packets──> their packets ──cut──> a file of them
                                                                                     └──needed_packets──> still fewer

The demuxer's seek is not trusted: it may land anywhere before the key frame. Packets are skipped until the one with the
key frame's own time stamp comes. If it does not, `SelectiveDecodeError` is raised, and the caller reads the file from
front to back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import av
import numpy as np
from av.stream import Stream
from av.video.stream import VideoStream

from p3d.pipeline.decode.container import Source, open_container, packets
from p3d.pipeline.decode.probe import Probe
from p3d.pipeline.decode.wanted_frames import Wanted
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import INT64

# Least share of a video's frames that must be spared. With less to gain, the video is decoded from front to back, which
# finds damage anywhere in it.
LEAST_SPARED = 1 / 16


class SelectiveDecodeError(Exception):
    """A decode of selected GOPs failed: the file is damaged, or is not as the probe found it. `str()` is one line.

    The caller decodes from front to back instead, which shows what the file holds.
    """


def wanted_gops(found: Probe, numbers_M: INT64) -> list[tuple[int, int]]:
    """[first, end) frames of the GOPs that hold any of the sorted `numbers_M`, in order, one pair per GOP.

    key frames 0 10 20 30, 40 frames, wanted 3 4 25      [0, 10) [20, 30)
    """
    at_M = np.unique(np.searchsorted(found.key_frames, numbers_M, side="right") - 1)
    end_K = np.append(found.key_frames[1:], found.n_frames)
    return [(int(found.key_frames[at]), int(end_K[at])) for at in at_M]


def spared_frames(found: Probe, numbers_M: INT64) -> int:
    """How many frames need not be decoded for the sorted `numbers_M`.

    They are the frames of other GOPs, those after the last wanted one of their GOP, and skippable frames. The number is
    slightly too high where reordering stores later frames before the last wanted one.

    wanted 3 and 4 of a GOP of 8, 1 and 5 skippable       0 1 2 [3] [4] 5 6 7      1, 5, 6, 7
    """
    frames_N = np.arange(found.n_frames)
    at_N = np.searchsorted(numbers_M, frames_N)
    next_N = np.append(numbers_M, found.n_frames)[at_N]  # the first wanted frame at or after each frame
    end_N = np.append(found.key_frames, found.n_frames)[np.searchsorted(found.key_frames, frames_N, side="right")]
    spared_N = next_N >= end_N
    if found.skippable_N is not None:
        spared_N |= found.skippable_N & (next_N != frames_N)
    return int(spared_N.sum())


def leaves_out(found: Probe, wanted: Wanted) -> bool:
    """Are there enough frames that need not be decoded? Every frame of the video must have a time."""
    assert found.start_s_N is not None and found.end_s_N is not None  # exact_seek
    return spared_frames(found, wanted.of(found.start_s_N, found.end_s_N)) >= LEAST_SPARED * found.n_frames


def joined(gops: list[tuple[int, int]], most_frames: int | None = None) -> list[tuple[int, int]]:
    """The same frames in fewer ranges: adjacent ones are joined, to at most `most_frames` frames each."""
    ranges: list[tuple[int, int]] = []
    for first, end in gops:
        if ranges and ranges[-1][1] == first and (most_frames is None or end - ranges[-1][0] <= most_frames):
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((first, end))
    return ranges


@contextlib.contextmanager
def opened(found: Probe) -> Iterator[Source]:
    """Open the probed file and stream again; VideoError if it has changed."""
    with open_container(found.path, ignore_index=found.ignore_index) as container:
        stream = container.streams[found.stream_index]
        if not isinstance(stream, VideoStream):
            raise VideoError(Reason.SOURCE_CHANGED, f"stream {found.stream_index} is no longer a video stream")
        yield Source(container, stream)


def gop_packets(source: Source, found: Probe, first: int, end: int) -> Iterator[av.Packet[Stream]]:
    """The packets of the frames [first, end). Both must be key frames, or `end` the end of the video.

    SelectiveDecodeError if key frame `first` is not found. The seek flushes the decoder of the source's stream.
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
        raise SelectiveDecodeError(f"key frame {first} was not found at its time")


def needed_packets(
    source: Source, found: Probe, numbers_M: INT64, first: int, end: int
) -> Iterator[tuple[int, av.Packet[Stream]]]:
    """(frame number, packet) of what must be decoded for the sorted `numbers_M`, which lie in the GOPs [first, end).

    From each GOP come the packets up to its last wanted one, without skippable frames that are not wanted. The choice
    depends only on the GOP and its wanted frames, so a decode of more GOPs decodes the same packets of each.
    SelectiveDecodeError for a packet at a time that no frame has, or a frame without a packet.
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
    raise SelectiveDecodeError(f"{missing} frames of [{first}, {end}) have no packet")


def number_at(found: Probe, source: Source, pts: int | None) -> int:
    """The number of the frame shown at exactly this time stamp; SelectiveDecodeError if no frame is."""
    assert found.start_s_N is not None  # exact_seek
    if pts is not None:
        start_s = (pts - found.first_pts) * source.tick_s
        number = int(np.searchsorted(found.start_s_N, start_s))
        if number < found.n_frames and found.start_s_N[number] == start_s:
            return number
    raise SelectiveDecodeError(f"no frame is shown at the time stamp {pts}")


@contextlib.contextmanager
def cut(source: Source, found: Probe, gops: list[tuple[int, int]]) -> Iterator[str]:
    """The path of an in-memory file that holds the unchanged packets of these GOPs and nothing else (Linux).

    It has the container format of the original, so that it describes codec, colours and rotation in the same way. The
    exception is MJPEG in Matroska, where decord cannot find the length of a file with few frames. SelectiveDecodeError
    if the packets are not found or the format cannot hold them.
    """
    name = "matroska" if "matroska" in found.container.split(",") and found.codec != "mjpeg" else "mov"
    if name == "mov" and found.codec == "vp9":  # QuickTime has no VP9
        name = "mp4"
    if not hasattr(os, "memfd_create"):
        raise SelectiveDecodeError("this system has no in-memory files (memfd_create)")
    handle = os.memfd_create("gops")
    path = f"/proc/self/fd/{handle}"
    try:
        with av.open(path, "w", format=name, options={"fflags": "+bitexact"}) as output:  # no dates, no random numbers
            copy = output.add_stream_from_template(source.stream)
            for first, end in gops:
                for packet in gop_packets(source, found, first, end):
                    packet.stream = copy
                    output.mux(packet)
        yield path
    except av.error.MemoryError:
        raise
    except (av.error.FFmpegError, ValueError) as error:
        raise SelectiveDecodeError(f"the GOPs cannot be copied: {error}") from error
    finally:
        os.close(handle)
