"""Is a video of a dataset below a folder or prefix that the user names? The rows of an OUT from elsewhere may name any
file of this machine and any bucket that the user's credentials can read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote_from_bytes

from p3d.pipeline.errors import InputError, Reason, VideoError
from p3d.pipeline.sources.identity import local_path
from p3d.pipeline.storage.s3.uri import refuse_almost_s3, s3_uri, split_s3_uri
from p3d.pipeline.storage.urls import CREDENTIAL


def absolute(path: str) -> str:
    """A URL as it is, or the absolute path of a folder or file, for another machine with the same disks.

    InputError for an empty text, as of an unset variable of a shell: it would be the working directory. Likewise for
    what almost is an S3 URL.
    """
    if not path:
        raise InputError("a path is an empty text; name a folder, a file or s3://bucket/prefix")
    refuse_almost_s3(path)
    return path if "://" in path else str(Path(path).absolute())


def place_of_videos(text: str) -> str:
    """A folder or prefix as a user names it -> a percent-encoded uri without a slash at the end. InputError."""
    if CREDENTIAL.match(text):
        raise InputError("the place of the videos contains a credential; use a plain path or s3://bucket/prefix")
    if text.startswith("s3://"):
        bucket, key = split_s3_uri(text)
        if not bucket:
            raise InputError(f"{text} names no bucket")
        return s3_uri(bucket, key.rstrip("/")).removesuffix("/")
    if not text or ("://" in text and not text.startswith("file:///")):
        raise InputError(f"{text!r} is neither a folder nor s3://bucket/prefix")
    raw = local_path(text) if text.startswith("file:///") else os.fsencode(Path(text).absolute())
    return "file://" + quote_from_bytes(os.path.normpath(raw)).rstrip("/")


@dataclass(frozen=True, slots=True)
class SourceRule:
    """Which source videos may be opened: those below `root`, or without a root all of them or none.

    `root` is a folder, a file or `s3://bucket/prefix`, with the links of a folder resolved when a video is asked for.
    If it is a list of videos, they are `listed`: the uris that the user has named.
    """

    root: str | None = None
    others: bool = False  # without a root: may every video be opened?
    listed: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{'in' if self.listed else 'below'} {self.root}"

    def allows(self, uri: str) -> bool:
        """May the video at this uri be opened?"""
        return self.others if self.root is None else uri in self.listed or is_below(uri, self.root)

    def check(self, uri: str) -> None:
        """VideoError, which says what to type, unless the video at this uri may be opened."""
        if self.allows(uri):
            return
        if self.root is None:
            raise VideoError(Reason.SOURCE_DENIED, "OUT is not trusted; --source ROOT allows the videos below ROOT")
        raise VideoError(Reason.SOURCE_DENIED, f"{uri} is not {self}, which --source names")


EVERY_SOURCE = SourceRule(others=True)


def is_below(uri: str, root: str) -> bool:
    """Is the video at `uri` below `root` or `root` itself? Links are resolved in both. False for a malformed uri."""
    if uri.startswith("s3://") or root.startswith("s3://"):
        return _is_below_s3(uri, root)
    path = local_path(uri)
    try:
        if not os.path.isabs(path):  # noqa: PTH117 - bytes
            return False
        real, top = os.path.realpath(path), os.path.realpath(local_path(root) if "://" in root else os.fsencode(root))
        return os.path.commonpath([real, top]) == top
    except (OSError, ValueError):  # ValueError: a NUL byte
        return False


def _is_below_s3(uri: str, root: str) -> bool:
    if not (uri.startswith("s3://") and root.startswith("s3://")):
        return False
    try:
        (bucket, key), (top_bucket, prefix) = split_s3_uri(uri), split_s3_uri(root)
    except InputError:
        return False
    if {".", ".."} & set(key.split("/")):  # a proxy or a server may resolve them
        return False
    prefix = prefix.rstrip("/")
    return bucket == top_bucket and (not prefix or key == prefix or key.startswith(f"{prefix}/"))
