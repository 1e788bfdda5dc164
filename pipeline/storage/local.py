"""LocalStore: a folder as a store, and the errors of a local file system as store errors.

The root may be a link, because the user named it. Below the root nothing is followed: each folder on the way to an
object is checked with `lstat`, and only regular files are opened. The folder may have come from somebody else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from p3d.pipeline.errors import (
    StoreDenied,
    StoreError,
    StoreFull,
    StoreGone,
    StoreMissing,
    StoreUnknown,
    StoreUnsafe,
    StrayFile,
)
from p3d.pipeline.storage.store import (
    CONTROL,
    CREATED,
    EXISTS,
    Created,
    ObjectInfo,
    Store,
    aside_key,
    control_key,
    most_bytes,
    refuse_huge,
)


class LocalStore(Store):
    """A folder. An object is created by a hard link to a synced temporary file; the link fails if the name is taken.

    Temporary files are in `_job/tmp`, on the same file system, and never end in .parquet (a glob may match dot files).

    The first write makes the root if it is absent. From then on, every write requires that it is still the same folder
    (StoreGone): a disk that was unmounted or removed is never replaced by a new folder at its place.
    """

    def __init__(self, url: str) -> None:
        self.root = Path(os.path.abspath(url.removeprefix("file://")))  # noqa: PTH100 - resolve() would follow links
        self.url = str(self.root)
        self._durable: set[Path] = set()  # folders that this process has synced
        self._held: tuple[Path, tuple[int, ...]] | None = None  # what must not change, and its identity

    def __reduce__(self) -> tuple[type[LocalStore], tuple[str]]:
        return type(self), (self.url,)

    def create(self, key: str, source: bytes | Path) -> Created:
        final = self._new(key)
        if isinstance(source, Path):
            with self._writing(key):
                self._folder(final.parent)
                return self._link(source, final)
        with self.temp_file() as temp, self._errors(key):
            self._folder(final.parent)
            temp.write_bytes(source)
            return self._link(temp, final)

    def hold_to(self, key: str) -> None:
        with self._errors(key):
            self._held = self._path(key), _identity(self._path(key))

    def _link(self, temp: Path, final: Path) -> Created:
        fsync(temp)
        reply = CREATED
        try:
            os.link(temp, final)
        except FileExistsError:
            # A lost reply of NFS looks the same: the name already belongs to our own file.
            reply = CREATED if os.path.samestat(os.lstat(temp), os.lstat(final)) else EXISTS
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV):
                raise StoreUnsafe(
                    f"{self.root}: this file system has no hard links ({error.strerror}), so a result could not be "
                    "written exactly once. Write to a local disk or to S3"
                ) from error
            raise
        fsync(final.parent)  # also for a link of another process, which may have died before its fsync
        return reply

    def _new(self, key: str) -> Path:
        """The path of a key whose folder `_folder` makes and checks. StoreUnsafe if its parts could lead elsewhere."""
        if "\0" in key or not {"", ".", ".."}.isdisjoint(key.split("/")):
            raise StoreUnsafe(f"{key!r} names no object in {self.url}")
        return self.root / key

    def _path(self, key: str) -> Path:
        """The path of a key. StoreUnsafe if it could lead out of the root, by its parts or by a link on the way."""
        path, folder = self._new(key), self.url
        for part in key.split("/")[:-1]:
            folder = f"{folder}/{part}"
            try:
                mode = os.lstat(folder).st_mode
            except OSError:  # the caller gets the error when it uses the path
                break
            if not stat.S_ISDIR(mode):
                raise _special(folder, mode)
        return path

    def _folder(self, folder: Path) -> None:
        """Make a folder that survives a power loss. An existing one may be another process's and not synced yet."""
        if folder in self._durable and is_folder(folder):
            return
        if folder == self.root:
            if self._held is None:
                make_folder(folder)
                self._held = folder, _identity(folder)
        else:
            self._folder(folder.parent)
            folder.mkdir(exist_ok=True)
            if not is_folder(folder):
                raise _special(folder, os.lstat(folder).st_mode)
            fsync(folder.parent)
        self._durable.add(folder)

    def _check_held(self) -> None:
        """StoreGone if the root, or the object of `hold_to`, is not what it was."""
        if self._held is None:
            return
        path, identity = self._held
        try:
            same = _identity(path) == identity
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same:
            raise StoreGone(
                f"{path} is gone, or another file or folder is in its place: was the disk unmounted, or the output "
                "moved or removed? Nothing more is written there. Bring it back, then resume"
            )

    def read(self, key: str) -> bytes:
        with self.open(key) as file, self._errors(key):
            return file.read()

    def open(self, key: str) -> BinaryIO:
        path = self._path(key)
        with self._errors(key):
            mode = os.lstat(path).st_mode
            if not stat.S_ISREG(mode):
                raise _special(path, mode)
            # a file that is replaced by a link or a fifo at this moment is not followed either, and nobody waits
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            file, status = os.fdopen(descriptor, "rb"), os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_size <= most_bytes(key):
                return file
            file.close()
            refuse_huge(f"{path}", key, status.st_size)
            raise _special(path, status.st_mode)

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        with self._errors(key):
            try:
                status = os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
        if not stat.S_ISREG(status.st_mode):
            raise _special(path, status.st_mode)
        return ObjectInfo(key, status.st_size, status.st_mtime_ns)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """As in `Store`. What is not a regular file or a folder is skipped, and named once (StrayFile)."""
        folder = prefix.rpartition("/")[0]
        if folder:
            self._path(f"{folder}/*")
        with self._errors(prefix):
            pending = [self._entries(folder)]
            while pending:
                if (entry := next(pending[-1], None)) is None:
                    pending.pop()
                    continue
                key = entry.path[len(self.url) :].lstrip("/")
                if entry.is_dir(follow_symlinks=False):
                    if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                        pending.append(self._entries(key))
                elif key.startswith(prefix):
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if stat.S_ISREG(status.st_mode):
                        yield ObjectInfo(key, status.st_size, status.st_mtime_ns)
                    else:
                        warnings.warn(str(_special(entry.path, status.st_mode)), StrayFile, stacklevel=2)

    def _entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        """The entries of a folder in the order of their keys; none if it does not exist."""
        try:
            with os.scandir(f"{self.url}/{folder}" if folder else self.url) as found:
                return iter(sorted(found, key=lambda entry: entry.name + "/" * entry.is_dir(follow_symlinks=False)))
        except (FileNotFoundError, NotADirectoryError):
            return iter(())

    def download(
        self, key: str, path: Path, *, etag: str | None = None, received: Callable[[int], object] | None = None
    ) -> None:
        with self.open(key) as file, writing(path), path.open("wb") as copy:
            shutil.copyfileobj(file, copy)
            if received is not None:
                received(copy.tell())

    def replace(self, key: str, content: bytes) -> None:
        control_key(key)
        path = self._new(key)
        with self.temp_file() as temp, self._errors(key):
            temp.write_bytes(content)
            self._folder(path.parent)
            temp.replace(path)

    def delete(self, key: str) -> None:
        control_key(key)
        path = self._path(key)
        with self._errors(key):
            path.unlink(missing_ok=True)

    def set_aside(self, key: str) -> str:
        aside = aside_key(key)
        path, target = self._path(key), self._new(aside)
        with self._writing(key):
            self._folder(target.parent)
            path.rename(target)
            fsync(target.parent)
            fsync(path.parent)
        return aside

    @contextlib.contextmanager
    def temp_file(self) -> Iterator[Path]:
        folder = self.root / CONTROL / "tmp"
        path = folder / f"{os.getpid()}-{uuid.uuid4().hex}.tmp"
        with self._writing(f"{CONTROL}tmp/{path.name}"):
            self._folder(folder)
            try:
                with unless_swept(path, self._check_held):
                    yield path
            finally:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        """Before and, if something is missing, after: is the root still the one that this store began with?"""
        with self._errors(key):
            self._check_held()
            try:
                yield
            except FileNotFoundError:
                self._check_held()
                raise

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
def scratch_folder(prefix: str, inside: Path | None = None) -> Iterator[Path]:
    """A temporary folder, in TMPDIR or `inside`, that is removed afterwards. StoreError, naming it, if it is full."""
    where = inside or Path(tempfile.gettempdir())
    with contextlib.ExitStack() as stack:
        with writing(where):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=where))
        yield Path(folder)


@contextlib.contextmanager
def unless_swept(temp: Path, check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """StoreUnknown if a temporary file vanished while in use: another run of this output deletes the files it finds.

    `check` may first find a better explanation, and raise it.
    """
    try:
        yield
    except (FileNotFoundError, StoreMissing) as error:
        if temp.exists():
            raise
        check()
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
    errno.ELOOP: StoreUnsafe,
}
_LOCAL_WORDS = {
    errno.ENOSPC: "the disk is full; free some space and resume",
    errno.EACCES: "no permission to write here",
    errno.EROFS: "this file system is read-only",
    errno.ENOTDIR: "a file exists where a folder is needed",
    errno.EEXIST: "a file exists where a folder is needed",
    errno.ELOOP: "a link, which is not followed in an output",
}
_SPECIAL = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a fifo", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}


def _special(path: str | Path, mode: int) -> StoreError:
    """The error for what cannot be an object, or a folder, of an output."""
    if stat.S_ISREG(mode):
        return StoreDenied(f"{path}: {_LOCAL_WORDS[errno.ENOTDIR]}")
    what = _SPECIAL.get(stat.S_IFMT(mode), "a device")
    return StoreUnsafe(f"{path} is {what}, which is not opened or followed in an output; remove it")


def _identity(path: Path) -> tuple[int, ...]:
    """What tells a file or folder from another one that took its place. Of a file, its size and time are part of it."""
    status = os.stat(path)  # noqa: PTH116 - of this module's `os`; the root may be a link
    changes = () if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns)
    return status.st_dev, status.st_ino, *changes


def is_utf8(path: Path) -> bool:
    """Whether the path is text for libraries that take no other: names on a disk may be any bytes."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_folder(path: Path) -> bool:
    """Whether a folder, not a link to one, is at the path."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


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
