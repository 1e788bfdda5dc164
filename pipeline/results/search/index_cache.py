"""Where indexes are kept: in this user's cache, never in the output that they are of.

    P3D_CACHE/index/<32 hex>/                      one folder for each place: a resolved path, or a URL and its endpoint
        clip-cosine-<16 hex>.json                  the record, replaced last, so readers see the old index or the new
        clip-cosine-<16 hex>-<8 hex>.faiss         the vectors, as FAISS writes them
        clip-cosine-<16 hex>-<8 hex>.parquet       the rows of the vectors, in order: video_id, plan_seq [, clip_index]
        lock                                       held while an index is built

The 16 digits are the digest of the recipe and of the job's id, so another job at the same place never gets this index.

FAISS trusts what it reads: a crafted file makes it write to any path, or crash. So it opens only a file that is the one
in our own record. An output may come from somebody else, and nothing of an index is read from it.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from p3d.pipeline.dataset.files import sha256_of
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import AlreadyRunning, InputError, StrayFile
from p3d.pipeline.recipe import digest
from p3d.pipeline.storage.cache import CACHE, cache_folder
from p3d.pipeline.storage.local import fsync, is_private, is_utf8, make_private, writing
from p3d.pipeline.storage.store import Store
from p3d.pipeline.storage.urls import place_of

OLD_FOLDER = "_job/index/"  # of an output, where earlier versions kept indexes
LOCK_S = 3600.0  # how long a build waits for another one of the same output
LOCK_POLL_S = 0.2
SMALL_BYTES = 16 * 1024**2  # a file up to this size is always hashed before it is used


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A file of an index. `mark` is its inode and its change time in ns, as they were when it was written."""

    name: str
    size_bytes: int
    sha256: str
    mark: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> CachedFile:
        sha256, status = sha256_of(path), path.stat()
        return cls(path.name, status.st_size, sha256, (status.st_ino, status.st_ctime_ns))

    def check(self, folder: Path) -> Path:
        """The path of the file. ValueError if it is not the one that was written, FileNotFoundError if it is gone.

        A large file with the same size, inode and change time is not hashed again: that would take longer than a
        search.
        """
        path = folder / self.name
        status = path.lstat()
        same = (status.st_size, (status.st_ino, status.st_ctime_ns)) == (self.size_bytes, self.mark)
        if not (same and self.size_bytes > SMALL_BYTES) and sha256_of(path) != self.sha256:
            raise ValueError(f"{path} is not the file that was written: its sha256 differs")
        return path


@dataclass(frozen=True, slots=True)
class IndexFolder:
    """The folder in the cache for the indexes of one place, and the stem of the names of one index."""

    path: Path
    stem: str

    @classmethod
    def of(cls, source: NewestRows | SnapshotRows, level: str, metric: str) -> IndexFolder:
        """InputError if the user has no home and P3D_CACHE is not set."""
        made_from = source.record.to_json().decode() if isinstance(source, SnapshotRows) else source.job.job_id
        stem = f"{level}-{metric}-{digest([source.job.recipe.digest, made_from])[:16]}"
        return cls(cache_folder() / "index" / digest([*place_of(source.store)])[:32], stem)

    @property
    def record(self) -> Path:
        return self.path / f"{self.stem}.json"

    def refuse_shared(self) -> None:
        """InputError if another user could have put files here. FileNotFoundError if the folder does not exist."""
        if not is_private(self.path):
            raise InputError(
                f"{self.path} belongs to another user, or others may write to it, so no index is read from it; set "
                f"{CACHE} to a folder of your own"
            )

    def is_ours(self, name: str, suffix: str) -> bool:
        return re.fullmatch(rf"{re.escape(self.stem)}-[0-9a-f]{{8}}\.{suffix}", name) is not None

    @contextlib.contextmanager
    def building(self, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
        """Hold the lock of this folder, which ends with the process. AlreadyRunning if another build has it too long.

        The folder is made, readable for this user alone. StoreDenied, StoreFull.
        """
        with contextlib.ExitStack() as stack:
            with writing(self.path):
                make_private(self.path)
                self.refuse_shared()
                lock = stack.enter_context((self.path / "lock").open("a"))
                until, told = time.monotonic() + LOCK_S, False
                while not _locked(lock.fileno()):
                    if not told:
                        say("another process is building an index of this output; waiting for it ...")
                    told = True
                    if time.monotonic() > until:
                        raise AlreadyRunning(f"another process has held {lock.name} for {LOCK_S:.0f} s; end it")
                    time.sleep(LOCK_POLL_S)
            yield

    def new_file(self, suffix: str, write: Callable[[Path], object]) -> CachedFile:
        """A file with a new name: written under a temporary name, then renamed."""
        path = self.path / f"{self.stem}-{uuid.uuid4().hex[:8]}.{suffix}"
        _write(path, write)
        return CachedFile.of(path)

    def keep(self, record: bytes, names: set[str]) -> None:
        """Replace the record. Remove other files of this level and metric, also those of earlier jobs at this place."""
        _write(self.record, lambda part: part.write_bytes(record))
        kept, group = {*names, self.record.name}, self.stem.rpartition("-")[0]
        for path in sorted(self.path.iterdir()):
            if path.name.removeprefix(".").startswith(f"{group}-") and path.name not in kept:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def for_faiss(path: Path) -> Iterator[str]:
    """The path as FAISS takes it, which is UTF-8: through an open folder if a folder on the way has another name."""
    if is_utf8(path):
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def name_old_index(store: Store) -> None:
    """Name, once, an index that an earlier version left in the output: it is not used."""
    if next(iter(store.list(OLD_FOLDER)), None) is not None:
        warnings.warn(
            f"{store.url}/{OLD_FOLDER} holds an index of an earlier version, which is not used: indexes are now in "
            f"your cache ({cache_folder()}). The folder may be removed",
            StrayFile,
            stacklevel=2,
        )


def _locked(descriptor: int) -> bool:
    import fcntl  # Windows lacks it, and can search without an index

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}")
    with writing(path):
        try:
            write(part)
            fsync(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
