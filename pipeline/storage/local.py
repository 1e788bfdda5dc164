"""LocalStore: a folder as a store, and the errors of a local file system as store errors.

The root may be a link, because the user named it. Below the root nothing is followed, and only regular files are
opened: the folder may have come from somebody else. Each folder on the way to an object is opened in the one before it
(`_enter`), and the last one is where the object is used by its name. So a link that takes the place of a folder at any
moment leads nowhere. One thing goes by its whole path: a temporary file is written so, because Arrow takes no other. It
has a random name, so no existing file is overwritten, and it is used only if it then lies in the right folder.
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

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_PATH_ONLY = getattr(os, "O_PATH", os.O_RDONLY)  # needs no permission to read the folder; macOS lacks it


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
        path = self._new(key)
        with self._errors(key):
            os.close(self._enter(key.rpartition("/")[0]))
            self._held = path, _identity(path)

    def _link(self, temp: Path, final: Path) -> Created:
        with self._inside(temp.parent) as source, self._inside(final.parent, sync=True) as target:
            written = os.open(temp.name, _FILE, dir_fd=source)
            try:
                fsync(temp, written)
            finally:
                os.close(written)
            reply = CREATED
            try:
                os.link(temp.name, final.name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
            except FileExistsError:
                # A lost reply of NFS looks the same: the name already belongs to our own file.
                ours, there = _lstat(temp.name, source), _lstat(final.name, target)
                reply = CREATED if os.path.samestat(ours, there) else EXISTS
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV):
                    raise StoreUnsafe(
                        f"{self.root}: this file system has no hard links ({error.strerror}), so a result could not be "
                        "written exactly once. Write to a local disk or to S3"
                    ) from error
                raise
            fsync(final.parent, target)  # also for a link of another process, which may have died before its fsync
        return reply

    def _new(self, key: str) -> Path:
        """The path of a key whose folder `_folder` makes and checks. StoreUnsafe if its parts could lead elsewhere."""
        if "\0" in key or not {"", ".", ".."}.isdisjoint(key.split("/")):
            raise StoreUnsafe(f"{key!r} names no object in {self.url}")
        return self.root / key

    def _enter(self, folder: str, *, sync: bool = False) -> int:
        """A descriptor of a folder below the root, "" for the root itself. Each part is opened in the one before.

        It can be read and synced only with `sync`. FileNotFoundError, StoreUnsafe, StoreDenied if it is not a folder.
        """
        flags = os.O_DIRECTORY | (os.O_RDONLY if sync else _PATH_ONLY)
        if not folder:
            return os.open(self.url, flags)
        first, *others = folder.split("/")
        path = f"{self.url}/{first}"  # of this path only the last part is from outside, and it is not followed
        at = _open_folder(path, None, path, flags)
        try:
            for name in others:
                path = f"{path}/{name}"
                outer, at = at, _open_folder(name, at, path, flags)
                os.close(outer)
        except BaseException:
            os.close(at)
            raise
        return at

    @contextlib.contextmanager
    def _inside(self, folder: Path, *, sync: bool = False) -> Iterator[int]:
        """As `_enter`, of a whole path; the descriptor is closed at the end."""
        at = self._enter(str(folder)[len(self.url) :].strip("/"), sync=sync)
        try:
            yield at
        finally:
            os.close(at)

    def _folder(self, folder: Path) -> None:
        """Make a folder that survives a power loss. An existing one may be another process's and not synced yet."""
        if folder in self._durable:
            with contextlib.suppress(FileNotFoundError), self._inside(folder):
                return
        if folder == self.root:
            if self._held is None:
                make_folder(folder)
                self._held = folder, _identity(folder)
        else:
            self._folder(folder.parent)
            with self._inside(folder.parent, sync=True) as at:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder.name, dir_fd=at)
                os.close(_open_folder(folder.name, at, str(folder), os.O_DIRECTORY | _PATH_ONLY))
                fsync(folder.parent, at)
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
        path = self._new(key)
        with self._errors(key):
            folder, _, name = key.rpartition("/")
            at = self._enter(folder)
            try:
                mode = _lstat(name, at).st_mode
                if not stat.S_ISREG(mode):
                    raise _special(path, mode)
                # a file that is replaced by a link or a fifo at this moment is not followed, and nobody waits
                descriptor = os.open(name, _FILE, dir_fd=at)
            finally:
                os.close(at)
            file, status = os.fdopen(descriptor, "rb"), os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_size <= most_bytes(key):
                return file
            file.close()
            refuse_huge(f"{path}", key, status.st_size)
            raise _special(path, status.st_mode)

    def head(self, key: str) -> ObjectInfo | None:
        path = self._new(key)
        with self._errors(key):
            try:
                with self._inside(path.parent) as at:
                    status = _lstat(path.name, at)
            except FileNotFoundError:
                return None
        if not stat.S_ISREG(status.st_mode):
            raise _special(path, status.st_mode)
        return ObjectInfo(key, status.st_size, status.st_mtime_ns)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """As in `Store`. What is not a regular file or a folder is skipped, and named once (StrayFile)."""
        folder = prefix.rpartition("/")[0]
        if folder:
            self._new(folder)
        with self._errors(prefix):
            pending = [self._entries(folder, prefix)]
            while pending:
                if (found := next(pending[-1], None)) is None:
                    pending.pop()
                    continue
                key, mode, size, time_ns = found
                if stat.S_ISDIR(mode):
                    pending.append(self._entries(key, prefix))
                elif stat.S_ISREG(mode):
                    yield ObjectInfo(key, size, time_ns)
                else:
                    warnings.warn(str(_special(f"{self.url}/{key}", mode)), StrayFile, stacklevel=2)

    def _entries(self, folder: str, prefix: str) -> Iterator[tuple[str, int, int, int]]:
        """(key, mode, bytes, mtime_ns) of the entries of a folder that may matter for the prefix, in key order.

        Nothing if the folder does not exist.
        """
        before = f"{folder}/" if folder else ""
        found: list[tuple[str, int, int, int]] = []  # a status has twice the size
        try:
            with self._inside(self.root / folder, sync=True) as at, os.scandir(at) as entries:
                for entry in entries:
                    key = before + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                            found.append((key, stat.S_IFDIR, 0, 0))
                    elif key.startswith(prefix):
                        with contextlib.suppress(FileNotFoundError):
                            status = entry.stat(follow_symlinks=False)
                            found.append((key, status.st_mode, status.st_size, status.st_mtime_ns))
        except FileNotFoundError:
            return iter(())
        found.sort(key=lambda one: one[0] + "/" * stat.S_ISDIR(one[1]))
        return iter(found)

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
            with self._inside(temp.parent) as source, self._inside(path.parent) as target:
                os.replace(temp.name, path.name, src_dir_fd=source, dst_dir_fd=target)

    def delete(self, key: str) -> None:
        control_key(key)
        path = self._new(key)
        with self._errors(key), contextlib.suppress(FileNotFoundError), self._inside(path.parent) as at:
            os.unlink(path.name, dir_fd=at)

    def set_aside(self, key: str) -> str:
        aside = aside_key(key)
        path, target = self._new(key), self._new(aside)
        with self._writing(key), self._inside(path.parent, sync=True) as source:
            self._folder(target.parent)
            with self._inside(target.parent, sync=True) as at:
                os.rename(path.name, target.name, src_dir_fd=source, dst_dir_fd=at)
                fsync(target.parent, at)
            fsync(path.parent, source)
        return aside

    @contextlib.contextmanager
    def temp_file(self) -> Iterator[Path]:
        folder = self.root / CONTROL / "tmp"
        path = folder / f"{os.getpid()}-{uuid.uuid4().hex}.tmp"
        with self._writing(f"{CONTROL}tmp/{path.name}"):
            self._folder(folder)
            with self._inside(folder) as at:
                try:
                    with unless_swept(path, self._check_held):
                        yield path
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path.name, dir_fd=at)

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
            if isinstance(error.filename, str) and not error.filename.startswith("/"):
                error.filename = None  # a name in a folder that was opened
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
    errno.EACCES: "no permission to read or write it",
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


def _open_folder(name: str, at: int | None, path: str, flags: int) -> int:
    """Open the folder `name`, which is no link, in an open folder; `path` is for messages."""
    try:
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=at)
    except OSError as error:
        error.filename = path
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        mode = _lstat(name, at).st_mode
        if stat.S_ISDIR(mode):  # exchanged at this moment
            raise
        raise _special(path, mode) from None


def _lstat(name: str, at: int | None) -> os.stat_result:
    """What has this name in an open folder; a link is not followed."""
    return os.stat(name, dir_fd=at, follow_symlinks=False)


def fsync(path: Path, opened: int | None = None) -> None:
    """Make a file's content, or a folder's entries, survive a power loss. `opened` is its descriptor."""
    if opened is not None:
        return os.fsync(opened)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return None


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, each synced before the next."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync(folder.parent)


def make_private(folder: Path) -> None:
    """Create a folder and its parents, each for this user alone whatever the umask; existing ones stay as they are."""
    if folder.is_dir():
        return
    make_private(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def is_private(folder: Path) -> bool:
    """Does the folder belong to this user, and may nobody else write to it? FileNotFoundError."""
    status = folder.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022
