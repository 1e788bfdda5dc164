"""Does a file end where its container says that it ends? Answered from its bytes, without a demuxer.

    container    evidence that the end is missing                                           source
    MP4, MOV     a box extends past the end of the file, or the segment index lists more    ISO/IEC 14496-12
    Matroska     the segment (of a live recording: a block) extends past the end            RFC 9559
    AVI          a RIFF chunk extends past the end of the file                              OpenDML AVI, 2.0
    MXF          the footer partition is missing                                            SMPTE ST 377-1, 7
    Ogg          the last page is cut, or does not end its stream                           RFC 3533, 6
    GIF          there is no trailer                                                        GIF89a, 27
    FLV, ASF     a tag or an object extends past the end of the file                        FLV 10.1, Annex E
    IVF          a frame extends past the end of the file
    RealMedia    a chunk extends past the end of the file

MPEG-TS, MPEG-PS and raw streams do not say where they end. Frame counts are no evidence: an edit list leaves frames
out, and recorders write durations by the clock. Bytes 0x00 or 0xFF after the end of a container are padding. Other
bytes there, such as an ID3 tag, belong to no container and are no evidence either.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

ISO_BOXES = frozenset((b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"styp", b"sidx", b"pnot"))
# Other boxes that may stand before a fragment. None of them holds frames.
_BETWEEN_FRAGMENTS = ISO_BOXES | {b"emsg", b"prft", b"ssix", b"uuid", b"meta"}
_MOST_PARTS = 5_000_000  # boxes, blocks or pages that are examined in one file
_MOST_TRACKS = 100_000
_PIECE = 1024**2
_TAIL_BYTES = 64 * 1024  # a page of Ogg is at most this long; a demuxer of MPEG-TS searches as far for the next packet
_MXF_HEADER_BYTES = 64 * 1024
_MXF_PARTITION = bytes.fromhex("060e2b34020501010d01020101")
_MXF_HEADER, _MXF_FOOTER, _MXF_RANDOM_INDEX = b"\x02", b"\x04", b"\x11"
_MXF_SEARCH = 1024**2
_EBML_SEGMENT, _EBML_CLUSTER = 0x18538067, 0x1F43B675
_EBML_WITH_FRAMES = frozenset((_EBML_SEGMENT, _EBML_CLUSTER, 0xA3, 0xA0))  # also SimpleBlock and BlockGroup
# All that a file, a segment or a cluster may hold (RFC 9559, 5): other bytes are not Matroska.
_EBML_KNOWN = _EBML_WITH_FRAMES | {
    *(0x1A45DFA3, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1254C367, 0x1043A770, 0x1941A469),
    *(0xE7, 0xA7, 0xAB, 0xAF, 0x5854, 0xEC, 0xBF),
}
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_RM_INDEX = b"INDX"  # codespell:ignore indx
_RM_CHUNKS = frozenset((b".RMF", b"PROP", b"MDPR", b"CONT", b"DATA", _RM_INDEX))
_RM_EXCESS = 18  # bytes by which writers overstate the size of DATA: they count its header twice
_FILLERS = (b"\0", b"\xff")


@dataclass(frozen=True, slots=True)
class Ending:
    """How a file ends.

    `missing` says in words what is not there; it is empty for a file that ends as its container says, or whose
    container cannot say. `lost_frames` is True if the missing part holds frames, or if that cannot be excluded; if it
    is False, the frame count decides. `padding` is where the padding begins: one byte, 0x00 or 0xFF, repeated up to the
    end of the file; None for a file without padding. Where a container does not say where it ends, padding has at
    least 64 KiB.
    """

    missing: str = ""
    lost_frames: bool = False
    padding: int | None = None


def ending(path: str) -> Ending:
    """How the file at `path` ends. Reads its structure only, not its frames. OSError if it cannot be read."""
    with open(path, "rb") as file:  # noqa: PTH123 - names that are not UTF-8
        size = file.seek(0, os.SEEK_END)
        examine = _examiner(file)
        found = examine(file, size) if examine else Ending()
        if not found.missing and found.padding is None and _filler(file, max(0, size - _TAIL_BYTES)) is not None:
            return Ending(padding=_before_filler(file, size))
        return found


def is_padding(path: str, position: int) -> bool:
    """Does the file at `path` hold only padding, at least one byte, from `position` on?"""
    with open(path, "rb") as file:  # noqa: PTH123 - as above
        return _filler(file, position) is not None


def next_frame_bytes(path: str, position: int) -> int:
    """How many bytes of one more frame a file that consists of frames holds after `position`; 0 if others follow.

    A frame of YUV4MPEG begins with the word FRAME. One of DV begins as the first one does.
    """
    with open(path, "rb") as file:  # noqa: PTH123 - as above
        size = file.seek(0, os.SEEK_END)
        mark = b"FRAME" if _at(file, 0, 9) == b"YUV4MPEG2" else _at(file, 0, 3)
        begins = _at(file, position, len(mark))
        return size - position if begins and mark.startswith(begins) else 0


def _examiner(file: BinaryIO) -> Callable[[BinaryIO, int], Ending] | None:
    head = _at(file, 0, 16)
    if head[:4] == b"RIFF":
        return _riff
    if head[4:8] in ISO_BOXES:
        return _iso
    by_magic = {
        b"\x1aE\xdf\xa3": _ebml,
        b"OggS": _ogg,
        b"GIF8": _gif,
        b"FLV\x01": _flv,
        b"DKIF": _ivf,
        _ASF_HEADER[:4]: _asf,
        b".RMF": _rm,
    }
    if head[:4] in by_magic:
        return by_magic[head[:4]]
    return _mxf if _MXF_PARTITION + _MXF_HEADER in _at(file, 0, _MXF_HEADER_BYTES) else None


def _at(file: BinaryIO, position: int, n_bytes: int) -> bytes:
    file.seek(position)
    return file.read(n_bytes)


def _filler(file: BinaryIO, position: int) -> int | None:
    """`position` if the file holds nothing but one byte, 0x00 or 0xFF, from there on; None also at the file's end."""
    first = _at(file, position, 1)
    if first not in _FILLERS:
        return None
    while piece := file.read(_PIECE):
        if piece.count(first) != len(piece):
            return None
    return position


def _past_end(what: str, end: int, size: int) -> str:
    return f"{what} needs {end} bytes, {size} are there"


def _iso(file: BinaryIO, size: int) -> Ending:
    """Walk the top-level boxes: 32-bit size, name, 64-bit size if the first is 1; size 0 reaches to the end."""
    names: set[bytes] = set()
    name, position, fragmented, indexed_end = b"", 0, False, 0
    for _ in range(_MOST_PARTS):
        if position >= size:
            break
        header, before = _at(file, position, 16), name
        n_bytes, name = int.from_bytes(header[:4], "big"), header[4:8]
        if not header.strip(header[:1]) and (padding := _filler(file, position)) is not None:
            return Ending(*_iso_end(names, before, fragmented, indexed_end, position), padding)
        if len(header) < 8:
            return Ending(f"{len(header)} bytes of a box header are there", fragmented)
        if fragmented and name not in _BETWEEN_FRAGMENTS:
            return Ending(*_iso_end(names, before, fragmented, indexed_end, position))
        if n_bytes == 1:
            n_bytes = int.from_bytes(header[8:16], "big")
        if n_bytes == 0:
            n_bytes = size - position
        if n_bytes < 8:
            return Ending()
        names.add(name)
        end = position + n_bytes
        if end > size:
            cut = _past_end(f"its box {name.decode('latin-1')!r}", end, size)
            return Ending(cut, name == b"moov" or (fragmented and name in (b"moof", b"mdat")))
        if name == b"moof" or (name == b"moov" and _holds_box(file, position + 8, end, b"mvex")):
            fragmented = True
        if name == b"sidx" and not indexed_end:
            indexed_end = _indexed_end(_at(file, position, min(n_bytes, _PIECE)), end)
        position = end
    return Ending(*_iso_end(names, name, fragmented, indexed_end, size))


def _iso_end(names: set[bytes], last: bytes, fragmented: bool, indexed_end: int, size: int) -> tuple[str, bool]:
    if b"moov" not in names:
        return "it has no moov box", False
    if fragmented and last == b"moof":
        return "the frames of its last fragment are not there", True
    if fragmented and indexed_end > size:
        return _past_end("what its segment index lists", indexed_end, size), True
    return "", False


def _holds_box(file: BinaryIO, position: int, end: int, wanted: bytes) -> bool:
    """Is there a box of this name among those from `position` to `end`?"""
    for _ in range(_MOST_TRACKS):
        header = _at(file, position, 8)
        n_bytes = int.from_bytes(header[:4], "big")
        if position + 8 > end or n_bytes < 8:
            return False
        if header[4:] == wanted:
            return True
        position += n_bytes
    return False


def _indexed_end(box: bytes, box_end: int) -> int:
    """Where the last segment ends that a `sidx` box lists; 0 if the box is too short."""
    wide = len(box) > 8 and box[8] == 1
    at = 20 + (16 if wide else 8)  # header, version and flags, reference id, time scale; then time and first offset
    first = int.from_bytes(box[at - (8 if wide else 4) : at], "big")
    count = int.from_bytes(box[at + 2 : at + 4], "big")
    entries = box[at + 4 : at + 4 + 12 * count]
    if len(entries) != 12 * count:
        return 0
    sizes = (int.from_bytes(entries[i : i + 4], "big") & 0x7FFFFFFF for i in range(0, len(entries), 12))
    return box_end + first + sum(sizes)


def _riff(file: BinaryIO, size: int) -> Ending:
    """AVI is one chunk "RIFF", and above 1 GB one more for each further gigabyte."""
    position = 0
    for _ in range(_MOST_PARTS):
        header = _at(file, position, 8)
        if header[:4] != b"RIFF":
            break
        if header[4:] in (b"\0\0\0\0", b"\xff\xff\xff\xff"):  # a recorder that did not fill in the size
            return Ending()
        position += 8 + int.from_bytes(header[4:], "little")
        if position > size:
            return Ending(f"{size} of {position} bytes are there")
        position += position % 2
    return Ending(padding=_filler(file, position))


def _ebml(file: BinaryIO, size: int) -> Ending:
    """Walk the elements of the segment. Those of unknown size, in live recordings, are entered.

    What is missing holds no frames if the element that is cut comes after the clusters and is not one itself. Such a
    file counts as whole.
    """
    position, segment_end, clusters, kind, end = 0, 0, 0, 0, 0
    for _ in range(_MOST_PARTS):
        if position >= size:
            break
        header = _at(file, position, 12)
        kind, length, n_head = _element(header)
        if not segment_end and kind not in _EBML_KNOWN and (n_head or not _begins_known(header)):
            return Ending(padding=_filler(file, position))
        if not n_head:
            if len(header) < 12:
                end = size + 1  # the header of an element is cut
            break
        if kind == _EBML_SEGMENT:
            segment_end = position + n_head + length if length >= 0 else 0
        clusters += kind == _EBML_CLUSTER
        if kind == _EBML_SEGMENT or (kind == _EBML_CLUSTER and length < 0):
            position += n_head
            continue
        end = position + n_head + max(length, 0)
        position = end
        if segment_end and position == segment_end <= size:
            return Ending(padding=_filler(file, position))
    if max(segment_end, end) <= size:
        return Ending()
    if clusters and end > size and n_head and kind not in _EBML_WITH_FRAMES:
        return Ending()
    return Ending(_past_end("its segment" if segment_end else "its last block", max(segment_end, end), size), True)


def _begins_known(header: bytes) -> bool:
    """May these bytes, up to the end of the file, be the start of an element in _EBML_KNOWN?"""
    ids = (known.to_bytes((known.bit_length() + 7) // 8, "big") for known in _EBML_KNOWN)
    return any(header.startswith(known) or known.startswith(header) for known in ids)


def _element(header: bytes) -> tuple[int, int, int]:
    """(id, size or -1 if unknown, bytes of both) at the start of an EBML element; all 0 if that is not one."""
    n_id = 9 - header[0].bit_length() if header and 0 < header[0] < 255 else 9
    if n_id > 4 or len(header) <= n_id:
        return 0, 0, 0
    first = header[n_id]
    n_size = 9 - first.bit_length()
    if n_size > 8 or len(header) < n_id + n_size:
        return 0, 0, 0
    unknown = (1 << 7 * n_size) - 1
    length = int.from_bytes(header[n_id : n_id + n_size], "big") & unknown
    return int.from_bytes(header[:n_id], "big"), -1 if length == unknown else length, n_id + n_size


def _mxf(file: BinaryIO, size: int) -> Ending:
    """The header partition names the byte where the footer begins, unless the recorder did not know it yet."""
    start = _at(file, 0, _MXF_HEADER_BYTES + 256)
    at = start.find(_MXF_PARTITION + _MXF_HEADER)
    length = start[at + 16] if at + 16 < len(start) else 0
    fields = at + 17 + (length & 127 if length & 128 else 0)
    footer = int.from_bytes(start[fields + 24 : fields + 32], "big")
    if footer:
        end = at + footer + 17
        return Ending(_past_end("its footer", end, size), True) if end > size else Ending()
    tail = _at(file, max(0, size - _MXF_SEARCH), _MXF_SEARCH)
    if _MXF_PARTITION + _MXF_FOOTER in tail or _MXF_PARTITION + _MXF_RANDOM_INDEX in tail:
        return Ending()
    return Ending("it has no footer", True)


def _ogg(file: BinaryIO, size: int) -> Ending:
    end = _before_filler(file, size)  # or within the last page, if that ends with such bytes
    first = max(0, end - 2 * _TAIL_BYTES)
    tail = _at(file, first, 4 * _TAIL_BYTES)
    at = tail.rfind(b"OggS", 0, end - first)
    page = tail[at:]
    if at < 0 or len(page) < 27 or len(page) < 27 + page[26]:
        return Ending("its last page is cut", True)
    page_end = first + at + 27 + page[26] + sum(page[27 : 27 + page[26]])
    if page_end > size:
        return Ending(_past_end("its last page", page_end, size), True)
    if not page[5] & 4:
        return Ending("its last page does not end the stream", True)
    return Ending(padding=_filler(file, page_end))


def _before_filler(file: BinaryIO, size: int) -> int:
    """Where the bytes 0x00 or 0xFF at the end of the file begin."""
    filler = _at(file, size - 1, 1)
    while size and filler in _FILLERS:
        piece = _at(file, max(0, size - _PIECE), min(size, _PIECE))
        kept = piece.rstrip(filler)
        if kept:
            return size - len(piece) + len(kept)
        size -= len(piece)
    return size


def _gif(file: BinaryIO, size: int) -> Ending:
    """Walk the blocks up to the trailer 0x3B."""
    missing = Ending("it has no trailer", True)
    head = _at(file, 0, 13)
    if len(head) < 13:
        return missing
    position = 13 + _colour_table(head[10])
    for _ in range(_MOST_PARTS):
        block = _at(file, position, 10)
        if not block:
            return missing
        if block[0] == 0x3B:
            return Ending(padding=_filler(file, position + 1))
        if block[0] == 0x21:
            position += 2
        elif block[0] == 0x2C and len(block) == 10:
            position += 11 + _colour_table(block[9])
        elif block[0] == 0:
            position += 1
            continue
        else:
            return missing if len(block) < 10 else Ending()
        file.seek(position)
        for _ in range(_MOST_PARTS):
            length = file.read(1)
            if not length:
                return missing
            position += 1 + length[0]
            if not length[0]:
                break
            file.seek(position)
    return Ending()


def _colour_table(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 128 else 0


def _flv(file: BinaryIO, size: int) -> Ending:
    """Walk the tags: 4 bytes length of the previous tag, then type, 24-bit size, time and stream, which is 0."""
    position = int.from_bytes(_at(file, 5, 4), "big")
    for _ in range(_MOST_PARTS):
        header = _at(file, position, 15)
        if len(header) == 4:
            return Ending()
        if len(header) > 4 and (header[4] & 0xDF not in (8, 9, 18) or any(header[12:])):
            return Ending(padding=_filler(file, position + 4))
        if len(header) < 15:
            return Ending(f"{len(header)} bytes of a tag header are there", True)
        position += 15 + int.from_bytes(header[5:8], "big")
        if position > size:
            return Ending(_past_end("its last tag", position, size), True)
    return Ending()


def _ivf(file: BinaryIO, size: int) -> Ending:
    position = int.from_bytes(_at(file, 6, 2), "little")
    for _ in range(_MOST_PARTS):
        header = _at(file, position, 12)
        if not header.strip(header[:1]) and header[:1] in _FILLERS:
            return Ending(padding=_filler(file, position))
        if len(header) < 12:
            return Ending(f"{len(header)} bytes of a frame header are there", True) if header else Ending()
        position += 12 + int.from_bytes(header[:4], "little")
        if position > size:
            return Ending(_past_end("its last frame", position, size), True)
    return Ending()


def _asf(file: BinaryIO, size: int) -> Ending:
    """The header and the data object: 16 bytes id, 64-bit size."""
    position = 0
    for what in ("its header", "its data"):
        header = _at(file, position, 24)
        position += int.from_bytes(header[16:24], "little")
        if len(header) < 24 or position > size:
            return Ending(_past_end(what, max(position, size + 1), size), True)
    return Ending()


def _rm(file: BinaryIO, size: int) -> Ending:
    """Walk the chunks: 4 letters, then the 32-bit size. A live recording may not state the size of its data."""
    position = 0
    for _ in range(_MOST_PARTS):
        header = _at(file, position, 8)
        name, n_bytes = header[:4], int.from_bytes(header[4:], "big")
        if name not in _RM_CHUNKS or n_bytes < 8:
            return Ending(padding=_filler(file, position))
        position += n_bytes
        if position > size + _RM_EXCESS:
            return Ending(_past_end(f"its chunk {name.decode()!r}", position, size), name != _RM_INDEX)
    return Ending()
