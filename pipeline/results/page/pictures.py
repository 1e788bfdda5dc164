"""Thumbnails of videos: made in child processes, kept in a folder that never holds more than KEPT_BYTES."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from p3d.pipeline.decode.fetch import pinned
from p3d.pipeline.decode.thumbnail import thumbnails_in_child
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import Failure, VideoRef

KEPT_BYTES = 256 * 1024**2
KEPT_FAILURES = 10_000
# these failures are permanent and are kept; others, such as an unreachable source or a slow disk, are tried again
OF_THE_CONTENT = {Reason.NOT_A_VIDEO, Reason.NO_VIDEO_STREAM, Reason.NO_FRAMES, Reason.UNSUPPORTED, Reason.TOO_LARGE}
FETCH_BYTES = 128 * 1024**2  # of a video on S3, which is copied whole for its pictures; larger videos get no pictures
SIDE = 480  # pixels of the longer side: sharp on screens of double pixel density


@dataclass(slots=True)
class Pictures:
    """JPEGs by video, version and second."""

    folder: Path
    options: StoreOptions
    _sizes: OrderedDict[str, int] = field(default_factory=OrderedDict)  # by name, the least recently used first
    _bytes: int = 0  # of all of them
    _failures: OrderedDict[str, Failure] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, video: VideoRef, seconds: Sequence[float]) -> list[bytes | Failure]:
        """A JPEG for each second, or its failure. All that are not kept yet are made by one child process."""
        kept = {second: self._kept(_name(video, second)) for second in seconds}
        missing = [second for second, found in kept.items() if found is None]
        if missing:
            for second, made in zip(missing, self._made(video, missing), strict=True):
                kept[second] = made
                self._keep(_name(video, second), made)
        return [found for found in (kept[second] for second in seconds) if found is not None]

    def _made(self, video: VideoRef, seconds: Sequence[float]) -> list[bytes | Failure]:
        try:
            video = pinned(video, self.options)
        except VideoError as error:
            return [Failure(error.reason, error.detail)] * len(seconds)
        found = thumbnails_in_child(
            video,
            seconds,
            store_options=self.options,
            scratch=self.folder,
            longest_side=SIDE,
            fetch_bytes=FETCH_BYTES,
        )
        return [one if isinstance(one, Failure) else one.jpeg for one in found]

    def _kept(self, name: str) -> bytes | Failure | None:
        with self._lock:
            if name in self._failures:
                return self._failures[name]
            if name not in self._sizes:
                return None
            self._sizes.move_to_end(name)
            return (self.folder / name).read_bytes()

    def _keep(self, name: str, made: bytes | Failure) -> None:
        with self._lock:
            if isinstance(made, Failure):
                if made.reason not in OF_THE_CONTENT:
                    return
                self._failures[name] = made
                if len(self._failures) > KEPT_FAILURES:
                    self._failures.popitem(last=False)
                return
            (self.folder / name).write_bytes(made)
            self._bytes += len(made) - self._sizes.pop(name, 0)
            self._sizes[name] = len(made)
            while self._bytes > KEPT_BYTES:
                oldest, size_bytes = self._sizes.popitem(last=False)
                self._bytes -= size_bytes
                (self.folder / oldest).unlink()


def _name(video: VideoRef, second: float) -> str:
    """A file name, hashed so that no video_id can point outside the folder."""
    return hashlib.sha256(f"{video.video_id}\0{video.version}\0{second:.3f}".encode()).hexdigest()[:40] + ".jpg"
