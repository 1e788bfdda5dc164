"""The identity of a video: its id stands for its place in the source, its version for its content.

`video_id` is a hash of the path below the source's root, so that it stays the same if an archive is moved. `version` is
a hash of size and etag, or size and mtime_ns, so that a replaced file is detected.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

from p3d.pipeline.storage.s3.uri import s3_uri
from p3d.pipeline.storage.store import ObjectInfo
from p3d.pipeline.types import VideoRef, size_version

APPLE_DOUBLE_NAME, APPLE_DOUBLE = b"._", b"\0\x05\x16\x07"


def video_id(relative: bytes, label: str = "") -> str:
    """32 hex digits that identify a video by its path below the source's root."""
    return hashlib.sha256(label.encode() + b"\0" + relative).hexdigest()[:32]


def content_version(size_bytes: int, mark: str | int | None) -> str:
    """16 hex digits that identify a content by its size and its etag or mtime_ns (`mark`)."""
    return hashlib.sha256(f"{size_bytes}:{mark}".encode()).hexdigest()[:16]


def is_version(version: str, size_bytes: int, mark: str | int | None) -> bool:
    """Is a content of this size and mark the one that a version stands for?"""
    return version in (content_version(size_bytes, mark), size_version(size_bytes))


def local_path(uri: str) -> bytes:
    """`file:///...` -> the path's own bytes."""
    return unquote_to_bytes(os.fsencode(uri.removeprefix("file://")))


def stat_version(status: os.stat_result) -> str:
    """The version of a local file as it is now."""
    return content_version(status.st_size, status.st_mtime_ns)


def time_column(time_ns: int) -> int | None:
    """A time of a file as the column `mtime_ns` holds it: None outside of 1677 to 2262, beyond 64 bits.

    The version is made of the time itself, whatever it is.
    """
    return time_ns if -(2**63) <= time_ns < 2**63 else None


def readable(raw: bytes) -> str:
    """Bytes of a name as text for display; bytes that are not UTF-8 are shown as \\xNN."""
    return raw.decode("utf-8", "backslashreplace")


def local_row(root: Path, relative: bytes) -> VideoRef:
    """The row of a local file, which need not exist."""
    raw = os.path.join(os.fsencode(root), relative)  # noqa: PTH118 - bytes, which Path does not take
    name, uri = relative, "file://" + quote_from_bytes(os.path.normpath(raw))
    return VideoRef(video_id(name), readable(name), uri, *_content(raw))


def _content(raw: bytes) -> tuple[str, int, int | None]:
    """(version, size_bytes, mtime_ns) of the file at a path, which need not exist."""
    try:
        status = os.lstat(raw)
        if stat.S_ISLNK(status.st_mode):
            status = os.stat(raw)  # noqa: PTH116 - bytes
    except (OSError, ValueError):  # ValueError: a NUL byte, which no file name can contain
        return content_version(-1, None), -1, None
    return stat_version(status), status.st_size, time_column(status.st_mtime_ns)


def is_apple_double(raw: bytes) -> bool:
    """Is the file at a path the metadata that macOS keeps of another file, where the disk cannot hold it? (RFC 1740)

    Its name is that of the other file after `._`. Only regular files are opened.
    """
    if not os.path.basename(raw).startswith(APPLE_DOUBLE_NAME):  # noqa: PTH119 - bytes
        return False
    try:
        with open(os.open(raw, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file:  # noqa: PTH123
            return stat.S_ISREG(os.fstat(file.fileno()).st_mode) and file.read(4) == APPLE_DOUBLE
    except (OSError, ValueError):
        return False  # the row says that it cannot be read


def real_path(raw: bytes, folders: dict[bytes, bytes]) -> bytes:
    """The path of a local file without links. `folders` holds those of folders that were asked for before."""
    folder, name = os.path.split(raw)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    path = os.path.join(folders[folder], name)  # noqa: PTH118 - bytes
    return os.path.realpath(path) if os.path.islink(path) else path  # noqa: PTH114 - bytes


def local_row_again(row: VideoRef) -> VideoRef:
    """The row of the same video, with the current version, size and time of its file."""
    version, size_bytes, mtime_ns = _content(local_path(row.uri))
    return replace(row, version=version, size_bytes=size_bytes, mtime_ns=mtime_ns)


def s3_row(bucket: str, key: str, name: str, info: ObjectInfo | None) -> VideoRef:
    """The row of an S3 object, which need not exist (`info` None). `name` is its path below the source's root."""
    uri, raw = s3_uri(bucket, key), name.encode()
    if info is None:
        return VideoRef(video_id(raw), readable(raw), uri, content_version(-1, None), -1)
    version = content_version(info.size_bytes, info.etag)
    mtime_ns = time_column(info.mtime_ns)
    return VideoRef(video_id(raw), readable(raw), uri, version, info.size_bytes, mtime_ns, info.etag)
