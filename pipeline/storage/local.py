"""LocalStore: a folder as a store, and the errors of a local file system as store errors."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from p3d.pipeline.errors import StoreDenied, StoreError, StoreFull, StoreMissing, StoreUnknown, StoreUnsafe
from p3d.pipeline.storage.store import CONTROL, CREATED, EXISTS, Created, ObjectInfo, Store, aside_key, control_key


class LocalStore(Store):
    """A folder. An object is created by a hard link to a synced temporary file; the link fails if the name is taken.

    Temporary files are in `_job/tmp`, on the same file system, and never end in .parquet (a glob may match dot files).
    """

    def __init__(self, url: str) -> None:
        self.root = Path(os.path.abspath(url.removeprefix("file://")))  # noqa: PTH100 - resolve() would follow links
        self.url = str(self.root)
        self._durable: set[Path] = set()  # folders that this process has synced

    def create(self, key: str, source: bytes | Path) -> Created:
        final = self.root / key
        with self._errors(key):
            self._folder(final.parent)
            if isinstance(source, Path):
                return self._link(source, final)
            with self.temp_file() as temp:
                temp.write_bytes(source)
                return self._link(temp, final)

    def _link(self, temp: Path, final: Path) -> Created:
        fsync(temp)
        reply = CREATED
        try:
            os.link(temp, final)
        except FileExistsError:
            # A lost reply of NFS looks the same: the name already belongs to our own file.
            reply = CREATED if os.path.samefile(temp, final) else EXISTS  # noqa: PTH121 - two paths, not one
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV):
                raise StoreUnsafe(
                    f"{self.root}: this file system has no hard links ({error.strerror}), so a result could not be "
                    "written exactly once. Write to a local disk or to S3"
                ) from error
            raise
        fsync(final.parent)  # also for a link of another process, which may have died before its fsync
        return reply

    def _folder(self, folder: Path) -> None:
        """Make a folder that survives a power loss. An existing one may be another process's and not synced yet."""
        if folder in self._durable and folder.is_dir():
            return
        if folder == self.root:
            make_folder(folder)
        else:
            self._folder(folder.parent)
            folder.mkdir(exist_ok=True)
            fsync(folder.parent)
        self._durable.add(folder)

    def read(self, key: str) -> bytes:
        with self._errors(key):
            return (self.root / key).read_bytes()

    def open(self, key: str) -> BinaryIO:
        with self._errors(key):
            return (self.root / key).open("rb")

    def head(self, key: str) -> ObjectInfo | None:
        with self._errors(key):
            try:
                stat = (self.root / key).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return ObjectInfo(key, stat.st_size, stat.st_mtime_ns)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._errors(prefix):
            folder = prefix.rpartition("/")[0]
            for directory, folders, names in os.walk(self.root / folder):
                folders.sort()
                relative = Path(directory).relative_to(self.root)
                for name in sorted(names):
                    key = str(relative / name)
                    if key.startswith(prefix) and (info := self.head(key)) is not None:
                        yield info

    def download(self, key: str, path: Path, *, etag: str | None = None) -> None:
        path.write_bytes(self.read(key))

    def replace(self, key: str, content: bytes) -> None:
        control_key(key)
        with self._errors(key), self.temp_file() as temp:
            temp.write_bytes(content)
            self._folder((self.root / key).parent)
            temp.replace(self.root / key)

    def delete(self, key: str) -> None:
        control_key(key)
        with self._errors(key):
            (self.root / key).unlink(missing_ok=True)

    def set_aside(self, key: str) -> str:
        aside = aside_key(key)
        with self._errors(key):
            self._folder((self.root / aside).parent)
            (self.root / key).rename(self.root / aside)
            fsync((self.root / aside).parent)
            fsync((self.root / key).parent)
        return aside

    @contextlib.contextmanager
    def temp_file(self) -> Iterator[Path]:
        folder = self.root / CONTROL / "tmp"
        with self._errors(str(folder)):
            self._folder(folder)
        path = folder / f"{os.getpid()}-{uuid.uuid4().hex}.tmp"
        with self._errors(str(path)):
            try:
                with unless_swept(path):
                    yield path
            finally:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise StoreMissing(f"{self.root / key} does not exist") from error
        except OSError as error:
            raise local_error(error, self.root / key) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of a library that writes a local file into a store error."""
    try:
        yield
    except OSError as error:
        raise local_error(error, path) from error


@contextlib.contextmanager
def unless_swept(temp: Path) -> Iterator[None]:
    """StoreUnknown if a temporary file vanished while in use: another run of this output deletes the files it finds."""
    try:
        yield
    except (FileNotFoundError, StoreMissing) as error:
        if temp.exists():
            raise
        raise StoreUnknown(f"{temp} was removed while in use; another run of this output has taken over") from error


def local_error(error: OSError, path: Path) -> StoreError:
    """The store error for an error of the local file system."""
    number = error.errno or 0
    words = _LOCAL_WORDS.get(number, error.strerror)
    return _LOCAL_ERRORS.get(number, StoreUnknown)(f"{error.filename or path}: {words}")


_LOCAL_ERRORS: dict[int, type[StoreError]] = {
    errno.ENOSPC: StoreFull,
    errno.EDQUOT: StoreFull,
    errno.EFBIG: StoreFull,
    errno.EACCES: StoreDenied,
    errno.EPERM: StoreDenied,
    errno.EROFS: StoreDenied,
    errno.ENOTDIR: StoreDenied,
    errno.EISDIR: StoreDenied,
    errno.EEXIST: StoreDenied,  # when creating a folder
}
_LOCAL_WORDS = {
    errno.ENOSPC: "the disk is full; free some space and resume",
    errno.EACCES: "no permission to write here",
    errno.EROFS: "this file system is read-only",
    errno.ENOTDIR: "a file exists where a folder is needed",
    errno.EEXIST: "a file exists where a folder is needed",
}


def fsync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, each synced before the next."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync(folder.parent)
