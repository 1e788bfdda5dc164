"""One video -> a local file, checked to be the one in the manifest.

A local source is used where it is; an S3 object is copied to scratch with `If-Match` on the planned ETag. Before and
after the decode the file must have the planned size and time, so frames of two versions are never mixed. Directories,
fifos and links that lead out of the source folder are refused before anything opens them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from p3d.pipeline.errors import Reason, StoreChanged, StoreCorrupt, StoreDenied, StoreMissing, StoreNoBucket, VideoError
from p3d.pipeline.sources.identity import is_version, local_path, stat_version
from p3d.pipeline.storage.local import scratch_folder
from p3d.pipeline.storage.s3.uri import split_s3_uri
from p3d.pipeline.storage.store import ObjectInfo, Store, StoreOptions
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import VideoRef


@contextlib.contextmanager
def local_file(
    video: VideoRef, options: StoreOptions, scratch: Path, received: Callable[[int], object] | None = None
) -> Iterator[str]:
    """An absolute path to the video's bytes; a copy in `scratch` is removed afterwards. VideoError, StoreError.

    `received` is called with the number of bytes whenever some have been fetched.
    """
    if video.size_bytes < 0:
        if not video.uri.startswith("s3://"):
            _refuse_denied(local_path(video.uri))
        raise VideoError(Reason.SOURCE_MISSING, "was not there when the job was planned")
    if video.uri.startswith("s3://"):
        owner = f"video-{platform.node()}-{os.getpid()}-"  # shows a later cleanup whether this process still runs
        with scratch_folder(owner, scratch) as folder:
            yield _download(video, options, folder, received)
        return
    path = local_path(video.uri)
    video = replace(video, version=stat_version(check_local(video, path)))  # it must stay exactly this content
    try:
        yield os.fsdecode(path)
    except VideoError:
        check_local(video, path)  # a file that was rewritten while it was read looks damaged
        raise
    check_local(video, path)


def _download(video: VideoRef, options: StoreOptions, folder: Path, received: Callable[[int], object] | None) -> str:
    if video.etag is None:  # a moved video, of which only the size was compared
        video = pinned(video, options)
    bucket, key = split_s3_uri(video.uri)
    store = open_store(f"s3://{bucket}", options)
    path = folder / f"video{Path(key).suffix[:16]}"
    try:
        store.download(key, path, etag=video.etag, received=received)
    except StoreNoBucket:
        raise  # a problem of the job: another endpoint, or the whole archive was deleted
    except StoreChanged:
        if store.head(key) is None:  # some servers give this answer for a deleted object
            raise VideoError(Reason.SOURCE_MISSING, "is not there any more") from None
        raise VideoError(Reason.SOURCE_CHANGED, "is no longer the object that was planned (other ETag)") from None
    except StoreMissing as error:
        raise VideoError(Reason.SOURCE_MISSING, str(error)) from None
    except StoreCorrupt as error:
        raise VideoError(Reason.SOURCE_CORRUPT, str(error)) from None
    except StoreDenied as error:
        if _answers(store, key):
            raise VideoError(Reason.SOURCE_DENIED, str(error)) from None
        raise
    return str(path)


def _answers(store: Store, key: str) -> bool:
    """Is only this object denied? If listing it is denied too, the job has a problem, not the video."""
    try:
        next(store.list(key), None)
    except StoreDenied:
        return False
    return True


def check_local(video: VideoRef, path: bytes) -> os.stat_result:
    """The status of the file at a path. VideoError unless it is a regular file and the planned one."""
    try:
        status = os.stat(path)  # noqa: PTH116 - bytes
    except (FileNotFoundError, NotADirectoryError):
        raise VideoError(Reason.SOURCE_MISSING, "is not there any more") from None
    except PermissionError:
        raise VideoError(Reason.SOURCE_DENIED, "no permission to reach the file") from None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise VideoError(Reason.SOURCE_MISSING, "is a link that leads to itself") from None
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(Reason.NOT_A_FILE, f"is {_kind(status.st_mode)}, not a file")
    root = _root(video, path)
    real = None if root is None else os.path.realpath(root)
    if real is not None and os.path.commonpath([os.path.realpath(path), real]) != real:
        raise VideoError(Reason.NOT_A_FILE, "is a link that leads out of the source folder")
    if not is_version(video.version, status.st_size, status.st_mtime_ns):
        raise VideoError(Reason.SOURCE_CHANGED, "is not the file that was planned (other size or time)")
    return status


def _refuse_denied(path: bytes) -> None:
    """VideoError for a file in a folder that may not be entered: no one knows whether it is there."""
    try:
        os.stat(path)  # noqa: PTH116 - bytes
    except PermissionError:
        raise VideoError(Reason.SOURCE_DENIED, "no permission to reach the file") from None
    except (OSError, ValueError):
        return


def _root(video: VideoRef, path: bytes) -> bytes | None:
    """The source folder, if the video was found in one. None for a path from a list, which may be anywhere."""
    if video.path.startswith("/") or ".." in video.path.split("/"):
        return None
    return b"/".join(path.split(b"/")[: -video.path.count("/") - 1]) or b"/"


def _kind(mode: int) -> str:
    names = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a fifo", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def pinned(video: VideoRef, options: StoreOptions) -> VideoRef:
    """The same row with size and ETag of its S3 object, which rows of videos/ lack; local files need neither."""
    if not video.uri.startswith("s3://"):
        return video
    info = head_of(video, options)
    return replace(video, size_bytes=info.size_bytes, etag=info.etag)


def head_of(video: VideoRef, options: StoreOptions) -> ObjectInfo:
    """Size and ETag of a video on S3. VideoError if it is deleted or is not what was embedded; StoreError."""
    bucket, key = split_s3_uri(video.uri)
    info = open_store(f"s3://{bucket}", options).head(key)
    if info is None:
        raise VideoError(Reason.SOURCE_MISSING, "is not there any more")
    if not is_version(video.version, info.size_bytes, info.etag):
        raise VideoError(Reason.SOURCE_CHANGED, "is no longer the object that was embedded (other size or ETag)")
    return info
