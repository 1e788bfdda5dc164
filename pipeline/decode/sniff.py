"""May a demuxer open this path? Answered in Python, from the first and last bytes of the file.

Native demuxers follow references in a file: an `#EXTM3U` text named `.mp4` made decord decode another local file
(measured). Opening a fifo waits without end. So everything but regular, binary files is refused here.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

from p3d.pipeline.decode.policy import DecodeLimits
from p3d.pipeline.errors import Reason, VideoError

HEAD_BYTES = 4096

# First bytes of files that are lists of other files, web pages or metadata.
_LISTS = (
    (b"#extm3u", "an HLS playlist"),
    (b"ffconcat", "an ffconcat list"),
    (b"v=0", "an SDP session description"),
    (b"<!doctype", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"\0\x05\x16\x07", "metadata that macOS keeps of another file (AppleDouble)"),
    (b"<", "HTML or XML (a web page, a DASH manifest)"),
)
# Control characters that do not occur in text; every video container has one of them in its first bytes.
_NOT_IN_TEXT = bytes(b for b in range(32) if b not in b"\t\n\v\f\r\x1b")
_ISO_BOXES = frozenset((b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"styp", b"sidx", b"pnot"))
_MAX_BOXES = 100_000


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
    what = text_kind(head)
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


def damaged_container(path: str) -> VideoError:
    """Why a demuxer refused a binary file: it is cut short, damaged, or not a video container."""
    with open(path, "rb") as file:  # noqa: PTH123 - surrogates, as above
        head = file.read(16)
    if not _is_known(head):
        return VideoError(Reason.NOT_A_VIDEO, f"not a video container: it starts with the bytes {head[:8].hex(' ')}")
    past_end = ends_early(path)
    if past_end:
        return VideoError(Reason.TRUNCATED, f"the file ends before its index, after 0 frames: {past_end}")
    return VideoError(Reason.CORRUPT_FRAMES, "the container's own index is damaged, no stream can be opened")


def ends_early(path: str) -> str:
    """How far the outermost boxes (ISO) or chunk (RIFF) extend past the end of the file; empty if they do not.

    The bytes are the evidence, because a low frame count is also found in files whose edit list leaves frames out.
    """
    with open(path, "rb") as file:  # noqa: PTH123 - surrogates, as above
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(16)
        if head[:4] == b"RIFF":
            claimed = 8 + int.from_bytes(head[4:8], "little")
            live = head[4:8] in (b"\0\0\0\0", b"\xff\xff\xff\xff")  # a recorder that did not fill in the size
            return f"{size_bytes} of {claimed} bytes are there" if claimed > size_bytes and not live else ""
        return _iso_past_end(file, size_bytes) if head[4:8] in _ISO_BOXES else ""


def _iso_past_end(file: BinaryIO, size_bytes: int) -> str:
    """Walk the top-level boxes (ISO/IEC 14496-12, 4.2): 32-bit size, name, 64-bit size when the first is 1."""
    position, names = 0, set()
    for _ in range(_MAX_BOXES):
        if position + 8 > size_bytes:
            break
        file.seek(position)
        header = file.read(16)
        box_bytes, name = int.from_bytes(header[:4], "big"), header[4:8]
        if box_bytes == 1:
            box_bytes = int.from_bytes(header[8:16], "big")
        if box_bytes == 0:  # to the end of the file
            box_bytes = size_bytes - position
        if box_bytes < 8:
            return ""
        names.add(name)
        if position + box_bytes > size_bytes:
            shown = name.decode("latin-1")
            return f"its box {shown!r} needs {position + box_bytes} bytes, {size_bytes} are there"
        position += box_bytes
    return "" if b"moov" in names else "it has no moov box"


def _is_known(head: bytes) -> bool:
    return (
        head[4:8] in _ISO_BOXES
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
