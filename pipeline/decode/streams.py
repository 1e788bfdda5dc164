"""Which video stream of a file is the film?"""

from __future__ import annotations

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from p3d.pipeline.decode.container import open_container
from p3d.pipeline.decode.deadlines import Progress
from p3d.pipeline.decode.endings import ending
from p3d.pipeline.errors import Reason, VideoError

# A stream of a video file is a picture of it, and not the film, if it has less than these shares of the packets and of
# the duration of the longest stream.
FILM_PACKETS = 1 / 10
FILM_DURATION = 1 / 2


def best_stream(container: InputContainer, progress: Progress | None = None) -> tuple[VideoStream, str]:
    """The video stream that is the film, and why it was chosen (empty if there is only one).

    Cover pictures do not count, nor do streams with much fewer packets or a much shorter duration than the longest one
    (FILM_PACKETS, FILM_DURATION): a picture that is not marked as a cover. Of the others the one with the most pixels
    is taken, the first among equals. Chosen here because libraries differ: in nasa_13013.mp4, `streams.video[0]` is
    320x180 and FFmpeg's own best stream is 480x270, but of two streams in Matroska FFmpeg took the smaller one.
    `progress` counts the packets that are compared.
    """
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        if missing := ending(container.name).missing:
            raise VideoError(Reason.TRUNCATED, f"the file ends within its index, after 0 frames: {missing}")
        others = sorted({stream.type for stream in container.streams})
        raise VideoError(Reason.NO_VIDEO_STREAM, f"no video stream, only {', '.join(others) or 'no stream at all'}")
    readable = [s for s in streams if s.codec_context is not None]
    if not readable:
        raise VideoError(Reason.UNSUPPORTED, "FFmpeg has no decoder for the codec of the video stream")
    if len(streams) == 1:
        return readable[0], ""
    sizes = _extents(container.name, [stream.index for stream in readable], progress or Progress())
    most, longest = (max(size[at] for size in sizes.values()) for at in (0, 1))
    films = [
        stream
        for stream in readable
        if sizes[stream.index][0] >= most * FILM_PACKETS and sizes[stream.index][1] >= longest * FILM_DURATION
    ]
    films = films or [stream for stream in readable if sizes[stream.index][0] == most]
    best = max(films, key=lambda s: s.codec_context.width * s.codec_context.height)
    why = "most pixels" if len(films) != 1 else "the only film"
    seen = (
        f"{s.index} has {sizes[s.index][0]} packets of {s.codec_context.width}x{s.codec_context.height}"
        for s in readable
    )
    return best, f"{why} of {len(streams)} video streams: {', '.join(seen)}"


def _extents(path: str, indices: list[int], progress: Progress) -> dict[int, tuple[int, float]]:
    """(number of packets, seconds from the first to the last one) of each stream; up to the first error."""
    n_packets = dict.fromkeys(indices, 0)
    times_s: dict[int, list[float]] = {index: [] for index in indices}  # the first and the last time
    with open_container(path) as container:
        try:
            for packet in container.demux([container.streams[index] for index in indices]):
                progress.done += 1
                index, time = packet.stream.index, packet.dts if packet.pts is None else packet.pts
                if not packet.size:
                    continue
                n_packets[index] += 1
                if time is not None:
                    time_s = time * float(packet.time_base or 0)
                    first_s, last_s = times_s[index] or (time_s, time_s)
                    times_s[index] = [min(first_s, time_s), max(last_s, time_s)]
        except (av.error.FFmpegError, IndexError):
            pass  # the pass over the chosen stream reports it
    spans = {index: times_s[index][1] - times_s[index][0] if times_s[index] else 0.0 for index in indices}
    return {index: (n_packets[index], spans[index]) for index in indices}
