"""Edits of the bytes of small video files, for cases that no encoder or muxer writes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import av

Sample = tuple[bytes, bool]  # the bytes of a packet, and whether it is a key frame
EBML_TRACKS, EBML_TRACK, EBML_SEGMENT = bytes.fromhex("1654ae6b"), b"\xae", bytes.fromhex("18538067")


def keep(path: Path, share: float) -> None:
    """Cut a file: only this share of its bytes stays."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def keep_to(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def append(path: Path, tail: bytes) -> None:
    with path.open("ab") as file:
        file.write(tail)


def boxes(data: bytes, first: int = 0, end: int | None = None) -> list[tuple[bytes, int, int]]:
    """(name, start, end) of the boxes of an MP4 file, or of those in part of it."""
    found, at = [], first
    while at + 8 <= (len(data) if end is None else end):
        size = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], at, at + size))
        at += size
    return found


def remuxed(source: Path, path: Path, change: Callable[[list[Sample]], Sequence[Sample]], name: str = "mp4") -> None:
    """The samples of `source` after `change`, one per frame time, unchanged in all else."""
    with av.open(str(source)) as container, av.open(str(path), "w", format=name) as output:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        duration = packets[0].duration or 1
        copy = output.add_stream_from_template(stream)
        for number, (data, is_key) in enumerate(change([(bytes(p), p.is_keyframe) for p in packets])):
            packet = av.Packet(data)
            packet.pts = packet.dts = number * duration
            packet.duration, packet.is_keyframe = duration, is_key
            packet.time_base, packet.stream = stream.time_base, copy
            output.mux(packet)


def nal(kind: int, body: bytes = b"") -> bytes:
    """An H.264 NAL unit with its length, as MP4 holds it; `kind` is its first byte."""
    unit = bytes([kind]) + body
    return struct.pack(">I", len(unit)) + unit


def parameter_sets(path: Path) -> bytes:
    """The parameter sets of an MP4 file with H.264, as a sample."""
    with av.open(str(path)) as container:
        extradata = container.streams.video[0].codec_context.extradata or b""
    n_sps = int.from_bytes(extradata[6:8], "big")
    sps = extradata[8 : 8 + n_sps]
    n_pps = int.from_bytes(extradata[9 + n_sps : 11 + n_sps], "big")
    pps = extradata[11 + n_sps : 11 + n_sps + n_pps]
    return nal(sps[0], sps[1:]) + nal(pps[0], pps[1:])


def overwrite_packet(path: Path, number: int, *, share: tuple[float, float] = (0.4, 0.6), seed: int = 0) -> None:
    """Random bytes over a part of one packet of the first video stream."""
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size]
        at = path.read_bytes().index(bytes(packets[number]))  # the position that demuxers give is not always that
        first, end = (int(packets[number].size * part) for part in share)
    data = bytearray(path.read_bytes())
    data[at + first : at + end] = random.Random(seed).randbytes(end - first)
    path.write_bytes(data)


def with_app1(jpeg: bytes, payload: bytes) -> bytes:
    """A JPEG with one APP1 segment after its start."""
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


def exif(orientation: int) -> bytes:
    """The EXIF data of a picture, with one tag (TIFF 6.0, big endian)."""
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)


def ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """(value, number of bytes) of the EBML size at a position."""
    n_bytes = 9 - data[at].bit_length()
    return int.from_bytes(data[at : at + n_bytes], "big") & (1 << 7 * n_bytes) - 1, n_bytes


def ebml_child(data: bytes, parent: int, n_id: int, wanted: bytes) -> int:
    """Where the first child `wanted` of the element at `parent` starts, whose id has `n_id` bytes."""
    length, n_size = ebml_size(data, parent + n_id)
    at = parent + n_id + n_size
    end = at + length
    while at < end:
        n_child = 9 - data[at].bit_length()
        if data[at : at + n_child] == wanted:
            return at
        length, n_size = ebml_size(data, at + n_child)
        at += n_child + n_size + length
    raise LookupError(wanted)


def insert_into_track(path: Path, element: bytes, inside: bytes = b"") -> None:
    """Append an element to the first track entry of a Matroska file, or to its element `inside`; sizes follow.

    Later positions move, so the segment gets an unknown size, as in a live recording.
    """
    data = bytearray(path.read_bytes())
    tracks = ebml_child(data, data.index(EBML_SEGMENT), 4, EBML_TRACKS)
    track = ebml_child(data, tracks, 4, EBML_TRACK)
    chain = [(tracks, 4), (track, 1)]
    if inside:
        chain.append((ebml_child(data, track, 1, inside), len(inside)))
    at, n_id = chain[-1]
    size, n_size = ebml_size(data, at + n_id)
    position = at + n_id + n_size + size
    for start, n_head in chain:
        value, n_bytes = ebml_size(data, start + n_head)
        grown = value + len(element) | 1 << 7 * n_bytes
        data[start + n_head : start + n_head + n_bytes] = grown.to_bytes(n_bytes, "big")
    data[position:position] = element
    segment = data.index(EBML_SEGMENT) + 4
    data[segment : segment + 8] = b"\x01" + b"\xff" * 7
    path.write_bytes(data)


def set_matroska_duration(path: Path, ms: float) -> None:
    """Overwrite the Duration element of a Matroska file."""
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3
    data[at : at + 8] = struct.pack(">d", ms)
    path.write_bytes(data)


def scramble(path: Path, pid: int) -> None:
    """Mark the packets of a PID in an MPEG transport stream as scrambled, and change their payload."""
    data = bytearray(path.read_bytes())
    rng = random.Random(0)
    for at in range(0, len(data), 188):
        if int.from_bytes(data[at + 1 : at + 3], "big") & 0x1FFF == pid:
            data[at + 3] |= 0x80
            first = at + 4 + (1 + data[at + 4] if data[at + 3] & 0x20 else 0)
            data[first : at + 188] = rng.randbytes(max(0, at + 188 - first))
    path.write_bytes(data)
