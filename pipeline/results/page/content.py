"""Byte ranges of one video of a dataset, verified to be the content that was embedded.

`version` in a row of videos/ identifies the content, by size and time, or by size and ETag. A local file is checked by
its descriptor when it is opened and before each range. An S3 object is checked by one HEAD, and each ranged GET has
`If-Match`. Only rows of the dataset name what is opened.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from io import FileIO
from typing import Protocol

from p3d.pipeline.decode.fetch import check_local, head_of
from p3d.pipeline.errors import Reason, StoreChanged, StoreMissing, VideoError
from p3d.pipeline.sources.identity import is_version, local_path, stat_version
from p3d.pipeline.storage.s3.uri import split_s3_uri
from p3d.pipeline.storage.store import ObjectInfo, StoreOptions
from p3d.pipeline.types import VideoRef

ANOTHER = "is not the file that was embedded (other size or time)"


class Content(Protocol):
    """The content of one video. `read` returns its bytes [start, end), or raises VideoError or StoreError."""

    @property
    def size_bytes(self) -> int: ...

    def read(self, start: int, end: int) -> bytes: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class LocalContent:
    """An open file, closed by `close` or with its last reference. `version` is what its content must remain."""

    file: FileIO
    version: str
    size_bytes: int

    def read(self, start: int, end: int) -> bytes:
        if stat_version(os.fstat(self.file.fileno())) != self.version:
            raise VideoError(Reason.SOURCE_CHANGED, ANOTHER)
        return os.pread(self.file.fileno(), end - start, start)

    def close(self) -> None:
        self.file.close()


@dataclass(slots=True)
class S3Content:
    """An object as it was at HEAD. If its key holds another object, reading raises SOURCE_CHANGED."""

    bucket: str
    info: ObjectInfo
    options: StoreOptions

    @property
    def size_bytes(self) -> int:
        return self.info.size_bytes

    def read(self, start: int, end: int) -> bytes:
        from p3d.pipeline.storage.s3.store import S3Store

        try:
            return S3Store(f"s3://{self.bucket}", self.options).read_range(self.info, start, end)
        except StoreChanged:
            raise VideoError(Reason.SOURCE_CHANGED, "is no longer the object that was embedded (other ETag)") from None
        except StoreMissing:
            raise VideoError(Reason.SOURCE_MISSING, "is no longer there") from None

    def close(self) -> None:
        pass


def open_content(video: VideoRef, options: StoreOptions) -> Content:
    """The content of a video. VideoError if it is not what was embedded, or not a file; StoreError."""
    if video.uri.startswith("s3://"):
        return S3Content(split_s3_uri(video.uri)[0], head_of(video, options), options)
    path = local_path(video.uri)
    checked = check_local(video, path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise VideoError(Reason.SOURCE_DENIED, f"cannot be opened: {error.strerror}") from None
    file = FileIO(descriptor)
    status = os.fstat(descriptor)
    same = stat.S_ISREG(status.st_mode) and os.path.samestat(status, checked)
    if not same or not is_version(video.version, status.st_size, status.st_mtime_ns):
        file.close()
        raise VideoError(Reason.SOURCE_CHANGED, ANOTHER)
    return LocalContent(file, stat_version(status), status.st_size)
