"""May a demuxer open this path? Answered in Python, from the first and last bytes of the file.

Native demuxers follow references in a file: an `#EXTM3U` text named `.mp4` made decord decode another local file
(measured). Opening a fifo waits without end. So everything but regular, binary files is refused here.
"""

from __future__ import annotations

import errno
import os
import stat

import numpy as np

from p3d.pipeline.decode.endings import ISO_BOXES, ending
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import UINT8
from p3d.pipeline.types.policy import DecodeLimits

HEAD_BYTES = 4096

# First bytes of files that are lists of other files, web pages or metadata.
_LISTS = (
    (b"#extm3u", "an HLS playlist"),
    (b"ffconcat", "an ffconcat list"),
    (b"v=0", "an SDP session description"),
    (b"version https://git-lfs", "a Git LFS pointer and not the video itself: run `git lfs pull` in its checkout"),
    (b"<!doctype", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"\0\x05\x16\x07", "metadata that macOS keeps of another file (AppleDouble)"),
    (b"<", "HTML or XML (a web page, a DASH manifest)"),
)
ENCRYPTION_BYTES = 64 * 1024  # of a file that are searched for an encrypted track
ENCRYPTED_ENTRY = b"encv" + bytes(6)  # a sample entry: its name, then 6 reserved bytes
SCRAMBLED_PIECES = 8
SCRAMBLED_BYTES = 256 * 1024
_STILL_BRANDS = dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"mif1"), "HEIF") | {b"avif": "AVIF"}
_SEQUENCE_BRANDS = frozenset((b"avis", b"msf1", b"hevc", b"hevx", b"hevm", b"hevs"))
# Control characters that do not occur in text; every video container has one of them in its first bytes.
_NOT_IN_TEXT = bytes(b for b in range(32) if b not in b"\t\n\v\f\r\x1b")


def check_file(path: str, limits: DecodeLimits) -> tuple[str, int]:
    """(absolute path, size in bytes) of a regular, binary file; VideoError for everything else.

    Links are followed (`fetch` decides whether they may be); a fifo, socket or device is never opened.
    """
    absolute = os.path.abspath(path)  # noqa: PTH100 - pathlib cannot keep names that are not UTF-8, nor treat `..` as os does
    try:
        found = os.stat(absolute)  # noqa: PTH116 - as above
        if not stat.S_ISREG(found.st_mode):
            raise VideoError(Reason.NOT_A_FILE, f"{_kind(found.st_mode)}, not a file")
        if found.st_size == 0:
            raise VideoError(Reason.EMPTY_FILE, "the file has 0 bytes")
        if found.st_size > limits.max_file_bytes:
            raise VideoError(
                Reason.TOO_LARGE, f"{found.st_size} bytes; the limit is {limits.max_file_bytes} (max_file_bytes)"
            )
        # O_NONBLOCK: if a fifo has replaced the file since, this does not wait for its writer.
        with open(os.open(absolute, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise VideoError(Reason.NOT_A_FILE, "no longer a file when it was opened")
            head = file.read(HEAD_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoError(Reason.SOURCE_MISSING, f"the file is not there: {error.strerror}") from error
    except PermissionError as error:
        raise VideoError(Reason.SOURCE_DENIED, f"the file cannot be opened: {error.strerror}") from error
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
            raise
        raise VideoError(Reason.SOURCE_MISSING, f"no file can be there: {error.strerror}") from error
    what = text_kind(head) or still_kind(head)
    if what:
        raise VideoError(Reason.NOT_A_VIDEO, f"the file is {what}")
    return absolute, found.st_size


def text_kind(head: bytes) -> str:
    """What kind of text a file starts as, in words; empty for binary data.

    A known list counts as text whatever follows its first line. Anything else is text if its first 4 KiB hold no
    control character. YUV4MPEG2, with a text header before raw pictures, is the one video format that may look so.
    """
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, what in _LISTS:
        if start.startswith(magic):
            return what
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) and len(head) > 2 and 0 in head[2:4]:
        return "text (UTF-16)"
    if head.startswith(b"YUV4MPEG2 ") or head.translate(None, _NOT_IN_TEXT) != head:
        return ""
    return "text"


def still_kind(head: bytes) -> str:
    """What kind of still picture a HEIF or AVIF file is, in words; empty for sequences and other files.

    FFmpeg would read it as a video of one frame, or of several tiles (ISO/IEC 23008-12, 10).
    """
    length = int.from_bytes(head[:4], "big")
    brands = {head[at : at + 4] for at in (8, *range(16, min(length, len(head)), 4))}
    if head[4:8] != b"ftyp" or brands & _SEQUENCE_BRANDS or head[8:12] not in _STILL_BRANDS:
        return ""
    return f"a still picture ({_STILL_BRANDS[head[8:12]]})"


def is_encrypted_iso(path: str) -> bool:
    """Is there an encrypted video track in the index at the start of an MP4 file (ISO/IEC 23001-7, 4: `encv`)?

    FFmpeg marks the packets of such a track, but not of older kinds (PIFF), and cannot open some of these files.
    """
    with open(path, "rb") as file:  # noqa: PTH123 - surrogates
        head = file.read(ENCRYPTION_BYTES)
    return head[4:8] in ISO_BOXES and ENCRYPTED_ENTRY in head[: head.find(b"mdat") if b"mdat" in head else None]


def is_scrambled(path: str, pid: int) -> bool:
    """Are packets of this PID of an MPEG transport stream scrambled (ISO/IEC 13818-1, 2.4.3.3)?

    Looks at SCRAMBLED_PIECES parts of the file. True if a tenth of the packets in one of them is marked: single marks
    are damage.
    """
    with open(path, "rb") as file:  # noqa: PTH123 - surrogates
        size = file.seek(0, os.SEEK_END)
        for piece in range(SCRAMBLED_PIECES):
            file.seek(size * piece // SCRAMBLED_PIECES)
            data = np.frombuffer(file.read(SCRAMBLED_BYTES), np.uint8)
            for packet_bytes in (188, 192, 204):
                headers = _packet_headers(data, packet_bytes)
                if headers is None:
                    continue
                ours = headers[((headers[:, 1] & 31).astype(int) << 8 | headers[:, 2]) == pid]
                if len(ours) and (ours[:, 3] >> 6 > 1).mean() > 0.1:
                    return True
                break
    return False


def _packet_headers(data: UINT8, packet_bytes: int) -> UINT8 | None:
    """The first 4 bytes of each packet, [N, 4] uint8; None if no packets of this size are found."""
    for first in np.flatnonzero(data[:packet_bytes] == 0x47):
        packets = data[first : first + (len(data) - first) // packet_bytes * packet_bytes].reshape(-1, packet_bytes)
        if len(packets) > 4 and (packets[:, 0] == 0x47).mean() > 0.9:
            return packets[:, :4]
    return None


def damaged_container(path: str) -> VideoError:
    """Why a demuxer refused a binary file: it is cut short, damaged, or not a video container."""
    with open(path, "rb") as file:  # noqa: PTH123 - surrogates, as above
        head = file.read(16)
    if is_encrypted_iso(path):
        return VideoError(Reason.UNSUPPORTED, "the video is encrypted")
    if not _is_known(head):
        return VideoError(Reason.NOT_A_VIDEO, f"not a video container: it starts with the bytes {head[:8].hex(' ')}")
    missing = ending(path).missing
    if missing:
        return VideoError(Reason.TRUNCATED, f"the file ends before its index, after 0 frames: {missing}")
    return VideoError(Reason.CORRUPT_FRAMES, "the container's own index is damaged, no stream can be opened")


def _is_known(head: bytes) -> bool:
    return (
        head[4:8] in ISO_BOXES
        or head.startswith((b"\x1aE\xdf\xa3", b"FLV\x01", b"OggS", b"\x30\x26\xb2\x75", b"\0\0\x01\xba", b"GIF8"))
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
    )


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a fifo"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISCHR, "a character device"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), "something that is not a regular file")
