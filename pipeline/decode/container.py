"""Opening a file with FFmpeg, and its packets in stored order.

Errors of FFmpeg are sorted here: they concern the file's content, the file itself, or the machine.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import av
from av.container import InputContainer
from av.stream import Stream
from av.video.stream import VideoStream

from p3d.pipeline.decode.endings import ending, is_padding
from p3d.pipeline.decode.sniff import damaged_container
from p3d.pipeline.errors import Reason, VideoError

# The demuxers that may read a file. A closed list: FFmpeg has 300, some of which open other files or URLs (hls,
# concat, dash, image2), and only video containers are wanted.
DEMUXERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,gif,ogg,mxf,rm,h264,hevc,m4v,vc1,obu,ivf,dv,nut,wtv,yuv4mpegpipe,"
    "mjpeg"
)
FRAMES_ONLY = frozenset(("dv", "yuv4mpegpipe"))  # containers that consist of frames of equal size
FAIL_AT_PADDING = FRAMES_ONLY | {"mpegts", "ogg", "ivf"}  # containers whose demuxers fail at padding after the end
READ_BYTES = 1024**2
LOOK_S = 60.0  # for reading a file again after an error
NEAR_PADDING_BYTES = 4 * 1024**2  # an error of a demuxer this near to the padding of a file is due to the padding
SEARCH_BYTES = 32 * 1024  # in padding, a demuxer gives up searching after at least so many bytes


@contextlib.contextmanager
def open_container(path: str, *, ignore_index: bool = False) -> Iterator[InputContainer]:
    """Open an absolute path with PyAV: local files only, known demuxers only, whatever the file refers to.

    With `ignore_index` FFmpeg reads the file from front to back and cannot load its index.

    Metadata text that is not UTF-8 is replaced; otherwise a Latin-1 title would make a good video unreadable. Raises
    VideoError for a file that cannot be opened, as mapped below; other errors (I/O, memory) propagate.
    """
    limits = {"protocol_whitelist": "file", "format_whitelist": DEMUXERS}
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(contextlib.closing(_Forward(path))) if ignore_index else path
        try:
            container = av.open(source, mode="r", container_options=limits, metadata_errors="replace")
        except av.error.InvalidDataError as error:
            raise damaged_container(path) from error
        except av.error.ArgumentError as error:  # FFmpeg raises this for a demuxer that is not on the list
            raise VideoError(Reason.NOT_A_VIDEO, "not one of the video containers that are read here") from error
        except (av.error.PatchWelcomeError, av.error.DecoderNotFoundError, av.error.DemuxerNotFoundError) as error:
            raise VideoError(Reason.UNSUPPORTED, f"FFmpeg cannot read this kind of file: {error.strerror}") from error
        except av.error.FFmpegError as error:
            raise_unless_damage(error, path)
            raise damaged_container(path) from error
        yield stack.enter_context(container)


class _Forward:
    """A file as PyAV reads it, without a `seek`."""

    def __init__(self, path: str) -> None:
        self.name, self._file = path, open(path, "rb")  # noqa: PTH123, SIM115 - surrogates; the caller closes it

    def read(self, n_bytes: int) -> bytes:
        return self._file.read(n_bytes)

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True, slots=True)
class Source:
    """An open file, and the stream of it that is read."""

    container: InputContainer
    stream: VideoStream

    @property
    def tick_s(self) -> float:
        """Seconds per tick of the stream's time base."""
        return float(self.stream.time_base or 0)


def raise_unless_damage(error: av.error.FFmpegError, path: str) -> None:
    """Raise if the cause is not the file's content: `error` itself if memory is exhausted or bytes cannot be read,
    VideoError if the file was deleted or cannot be opened.

    FFmpeg reports "input/output error", "try again" or "operation not permitted" for damaged data too. So the file is
    read here to find out, as much of it as can be read within LOOK_S.
    """
    if isinstance(error, MemoryError):
        raise error
    until = time.monotonic() + LOOK_S
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - surrogates
            while file.read(READ_BYTES) and time.monotonic() < until:
                pass
    except FileNotFoundError:
        raise VideoError(Reason.SOURCE_MISSING, "the file was deleted while it was read") from error
    except PermissionError:
        raise VideoError(Reason.SOURCE_DENIED, "the file cannot be read: permission denied") from error
    except OSError:
        raise error from None


def packets(container: InputContainer, *streams: VideoStream) -> Iterator[av.Packet[Stream]]:
    """The packets of these streams (default: all) in stored order, then one empty packet each to flush the decoder.

    Padding at the end of a file, at which some demuxers fail, ends it like the end of the file. The last frame of a cut
    DV file is left out: FFmpeg fills it up with what it has read before.

    PyAV (18.1) fails on a stream that first appears in mid-file, which occurs in broadcasts. It raises IndexError after
    the last packet, when every stream that was there from the start has been flushed.
    """
    if container.format.name not in FAIL_AT_PADDING:
        with contextlib.suppress(IndexError):
            yield from container.demux(*streams)
        return
    is_dv = container.format.name == "dv"
    last: av.Packet[Stream] | None = None
    in_padding: av.error.FFmpegError | None = None
    n_errors = n_after = n_most = 0
    while True:
        try:
            for packet in container.demux(*streams):
                if is_dv and packet.size and not _is_whole(container, packet):
                    continue
                last = packet
                if in_padding is not None:
                    n_after += packet.size > 0
                    if n_after > len(container.streams):
                        raise in_padding  # more than what the parsers still held: the file goes on
                yield packet
            return
        except IndexError:
            return
        except av.error.FFmpegError as error:
            if in_padding is None:
                n_padding = _padding_after(container, (last.pos or 0) + last.size if last else 0)
                if not n_padding:
                    raise
                in_padding, n_most = error, 4 + n_padding // SEARCH_BYTES
            elif error is in_padding:
                raise
            n_errors += 1
            if n_errors > n_most:
                break
    for stream in streams or container.streams:
        flush: av.Packet[Stream] = av.Packet()
        flush.stream = stream
        yield flush


def _is_whole(container: InputContainer, packet: av.Packet[Stream]) -> bool:
    """Is this packet of a DV file a frame that is all there, or sound? False for a cut frame and for padding."""
    start = packet.pos or 0
    if packet.stream.type != "video":
        return True
    is_cut = start + packet.size > os.path.getsize(container.name)  # noqa: PTH202 - names that are not UTF-8
    return not is_cut and not (memoryview(packet)[0] in (0, 255) and is_padding(container.name, start))


def _padding_after(container: InputContainer, position: int) -> int:
    """How many bytes of padding the file has, if they follow near `position`; else 0."""
    padding = ending(container.name).padding
    if padding is None and container.format.name in FRAMES_ONLY and is_padding(container.name, position):
        padding = position
    if padding is None or position < padding - NEAR_PADDING_BYTES:
        return 0
    return os.path.getsize(container.name) - padding  # noqa: PTH202 - names that are not UTF-8
