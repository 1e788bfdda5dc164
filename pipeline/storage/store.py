"""Where objects live: a folder or an S3 prefix, behind one small interface.

    create   the primitive everything rests on: the whole object appears under its key, once, or not at all
    read head list download       what is there
    replace delete                exist only under `_job/`, which holds control files and no data

Both stores answer `create` with CREATED or EXISTS, or raise: `StoreUnknown` says that the request may have happened,
and whoever called looks again (`dataset.commit`). Clients are made per process: a store pickles as URL and options.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import quote, unquote_to_bytes

from p3d.pipeline.errors import (
    InputError,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreUnknown,
    StoreUnsafe,
)

Created = Literal["created", "exists"]
CREATED: Created = "created"
EXISTS: Created = "exists"
CONTROL = "_job/"
ADDRESSING = ("auto", "path", "virtual")
CHECKSUMS = ("when_supported", "when_required")
SSE = ("AES256", "aws:kms", "aws:kms:dsse")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a listing. `etag` is None on a local disk, `mtime_ns` on S3 is the time of the last write."""

    key: str
    size_bytes: int
    mtime_ns: int
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How to reach S3. Credentials are not here: they come from botocore's own chain, on every machine.

    `checksums`: "when_required" is for servers that do not know S3's newer checksums, or whose ETags are no MD5.
    `sse` and `sse_kms_key_id` are how what is written gets encrypted; None leaves it to the bucket.
    """

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    addressing: str = "auto"
    checksums: str = "when_supported"
    requester_pays: bool = False
    sse: str | None = None
    sse_kms_key_id: str | None = None

    def __post_init__(self) -> None:
        if self.endpoint_url is not None:
            scheme, _, rest = self.endpoint_url.partition("://")
            if "@" in rest.partition("/")[0] or "?" in rest:
                raise InputError(
                    "--endpoint-url carries a user name or a query; credentials come from botocore's chain"
                )
            if scheme not in ("http", "https") or not rest.strip("/"):
                raise InputError(f"--endpoint-url {self.endpoint_url} is not like http://host:port")
        for option, value, choices in (
            ("--addressing-style", self.addressing, ADDRESSING),
            ("--checksums", self.checksums, CHECKSUMS),
            ("--sse", self.sse, (None, *SSE)),
        ):
            if value not in choices:
                raise InputError(f"{option} {value} is none of {', '.join(filter(None, choices))}")
        if self.sse_kms_key_id is not None and not (self.sse or "").startswith("aws:kms"):
            raise InputError("--sse-kms-key-id needs --sse aws:kms or aws:kms:dsse")

    def or_those_of(self, last: dict[str, Any]) -> StoreOptions:
        """These, with what an earlier run had wherever nothing was chosen; InputError if the two do not fit."""
        chosen = {name for name in self.__slots__ if getattr(self, name) != getattr(DEFAULTS, name)}
        kept = {name: value for name, value in last.items() if name in self.__slots__ and name not in chosen}
        return replace(self, **kept)


DEFAULTS = StoreOptions()


class Store(ABC):
    """Objects under one root. Keys are relative, with `/` between their parts."""

    url: str

    @abstractmethod
    def create(self, key: str, source: bytes | Path) -> Created:
        """Make the object if there is none: atomic, durable. `source` is its content or a `temp_file` holding it."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object. StoreMissing if there is none."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """The object as a seekable file, for readers that need a part of it (a footer). StoreMissing if none."""

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """What is known of the object without reading it; None if there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key starts with `prefix`, by key."""

    @abstractmethod
    def download(self, key: str, path: Path, *, etag: str | None = None) -> None:
        """Copy an object into a local file. With `etag`, StoreChanged if the object is no longer that one."""

    @abstractmethod
    def replace(self, key: str, content: bytes) -> None:
        """Write a control object, over an older one if there is one. Readers see the old or the new, whole."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove a control object; nothing happens if there is none."""

    @abstractmethod
    def set_aside(self, key: str) -> str:
        """Move a damaged object out of the dataset, to `_job/damaged/`; its new key. Only a repair may do this."""

    @abstractmethod
    def temp_file(self) -> contextlib.AbstractContextManager[Path]:
        """A private local path to build an object in. Whatever is there afterwards is removed."""

    def probe(self) -> None:
        """Prove that `create` creates once: two creates of one key, of which the second must say so (StoreUnsafe)."""
        key = f"{CONTROL}probe/{uuid.uuid4().hex}"
        first, second = self.create(key, b"1"), self.create(key, b"2")
        content = self.read(key)
        self.delete(key)
        if (first, second, content) != (CREATED, EXISTS, b"1"):
            raise StoreUnsafe(
                f"{self.url} lets a second writer replace an object ({first}, {second}): results could be lost there. "
                "Use a local disk, or an S3 server that honours If-None-Match"
            )


def open_store(url: str, options: StoreOptions = DEFAULTS) -> Store:
    """`s3://bucket/prefix` or a folder (which need not exist yet)."""
    if url.startswith("s3://"):
        from p3d.pipeline.storage.s3.store import S3Store  # botocore takes half a second to import

        return S3Store(url, options)
    if "://" in url and not url.startswith("file://"):
        raise InputError(f"{url}: only folders and s3:// are supported")
    return LocalStore(url)


def s3_uri(bucket: str, key: str) -> str:
    """`s3://bucket/key`, percent-encoded so that any key survives."""
    return f"s3://{bucket}/{quote(key)}"


def split_s3_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/key` -> (bucket, key), percent-decoded. InputError if that is not UTF-8, as every S3 key is."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    raw = unquote_to_bytes(os.fsencode(key))
    try:
        return bucket, raw.decode()
    except UnicodeDecodeError:
        shown = raw.decode("utf-8", "backslashreplace")
        raise InputError(f"s3://{bucket}/{shown} is not UTF-8, and every S3 key is") from None


def control_key(key: str) -> None:
    """ValueError unless the key is of a control object."""
    if not key.startswith(CONTROL):
        raise ValueError(f"{key}: only {CONTROL} objects may be replaced or deleted")


def aside_key(key: str) -> str:
    """A new name below `_job/damaged/`; no glob of the dataset finds it, for it does not end in .parquet."""
    return f"{CONTROL}damaged/{key}.{uuid.uuid4().hex[:8]}"


class LocalStore(Store):
    """A folder. An object is created by hard link from a synced temporary file: link fails if the name is taken.

    Temporary files live in `_job/tmp`, on the same file system, and never end in .parquet (a glob opens dot files too).
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
            # A lost reply of NFS looks like this too: our own file already carries the name.
            reply = CREATED if os.path.samefile(temp, final) else EXISTS  # noqa: PTH121 - two paths, not one
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV):
                raise StoreUnsafe(
                    f"{self.root}: this file system has no hard links ({error.strerror}), so a result could not be "
                    "written exactly once. Write to a local disk or to S3"
                ) from error
            raise
        fsync(final.parent)  # also another's link: who made it may have died before this
        return reply

    def _folder(self, folder: Path) -> None:
        """Have a folder that survives a power loss. One that is there may be another process's, and not synced yet."""
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
    """What the local disk says while a file is written, by any library, as a store error."""
    try:
        yield
    except OSError as error:
        raise local_error(error, path) from error


@contextlib.contextmanager
def unless_swept(temp: Path) -> Iterator[None]:
    """StoreUnknown if a temporary file vanished while it was in use: another run of the output sweeps what it finds."""
    try:
        yield
    except (FileNotFoundError, StoreMissing) as error:
        if temp.exists():
            raise
        raise StoreUnknown(f"{temp} was removed while in use; another run of this output has taken over") from error


def local_error(error: OSError, path: Path) -> StoreError:
    """What a local file system says, as a store error."""
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
    errno.EEXIST: StoreDenied,  # of a folder that is to be made
}
_LOCAL_WORDS = {
    errno.ENOSPC: "the disk is full; free some space and resume",
    errno.EACCES: "no permission to write here",
    errno.EROFS: "this file system is read-only",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EEXIST: "a file stands where a folder is needed",
}


def fsync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, each one durable before the next."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync(folder.parent)
