"""One small interface to objects in a folder or below an S3 prefix.

    create                     the basic operation: the whole object appears under its key, once, or not at all
    read, head, list, download read existing objects
    replace, delete            allowed only under `_job/`, which holds control files and no data

In both stores, `create` returns CREATED or EXISTS, or raises. `StoreUnknown` means that the request may have happened,
so the caller must check (`dataset.commit`). Clients are made per process: a store pickles as its URL and options.
"""

from __future__ import annotations

import contextlib
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

from p3d.pipeline.errors import InputError, StoreUnsafe, shell_words
from p3d.pipeline.types.options import check_options, flag_of, option, options_in

Created = Literal["created", "exists"]
CREATED: Created = "created"
EXISTS: Created = "exists"
CONTROL = "_job/"
ADDRESSING = ("auto", "path", "virtual")
CHECKSUMS = ("when_supported", "when_required")
RECORD_BYTES = 64 * 1024**2  # a record of a million shards has less
DATA_BYTES = 4 * 1024**3  # of a data file or of weights; some readers have all of it in memory
OBJECT_BYTES = 64 * 1024**3  # of anything else, such as a video
SSE = ("AES256", "aws:kms", "aws:kms:dsse")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a listing. `etag` is None on a local disk. On S3, `mtime_ns` is the time of the last write."""

    key: str
    size_bytes: int
    mtime_ns: int
    etag: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class StoreOptions:
    """How to reach S3. It holds no credentials: they come from botocore's own chain, on every machine.

    `checksums`: "when_required" is for servers that do not support S3's newer checksums or whose ETags are not MD5
    digests. `sse` and `sse_kms_key_id` set the encryption of written objects; None leaves it to the bucket.
    """

    endpoint_url: str | None = option(None, "Use this S3 server, such as http://127.0.0.1:9000.", default_text="AWS")
    region: str | None = option(None, "Use this S3 region.", default_text="from the AWS configuration")
    profile: str | None = option(None, "Use this AWS profile.", default_text="botocore's credential chain")
    addressing: str = option(
        "auto", "Put the bucket into the path or host of URLs.", choices=ADDRESSING, flag="addressing-style"
    )
    checksums: str = option(
        "when_supported",
        "Choose when_required for servers without S3's newer checksums, or whose ETags are not MD5.",
        choices=CHECKSUMS,
    )
    requester_pays: bool = option(False, "Pay for reading from a requester-pays bucket.")
    sse: str | None = option(
        None, "Encrypt what is written to S3.", choices=SSE, default_text="the bucket's encryption"
    )
    sse_kms_key_id: str | None = option(
        None, "Encrypt with this KMS key; needs --sse aws:kms.", default_text="the account's key for S3"
    )

    def __post_init__(self) -> None:
        if self.endpoint_url is not None:
            scheme, _, rest = self.endpoint_url.partition("://")
            if "@" in rest.partition("/")[0] or "?" in rest:
                raise InputError(
                    "--endpoint-url contains a user name or a query; credentials come from botocore's chain"
                )
            if scheme not in ("http", "https") or not rest.strip("/"):
                raise InputError(f"--endpoint-url {self.endpoint_url} is not of the form http://host:port")
        check_options(self)
        if self.sse_kms_key_id is not None and not (self.sse or "").startswith("aws:kms"):
            raise InputError("--sse-kms-key-id needs --sse aws:kms or aws:kms:dsse")

    def __repr__(self) -> str:
        held = ((field, getattr(self, field.name)) for field, _ in options_in(StoreOptions))
        return f"StoreOptions({', '.join(f'{one.name}={value!r}' for one, value in held if value != one.default)})"

    def or_those_of(self, last: StoreOptions) -> StoreOptions:
        """These options, with those of an earlier run where this one has the default. InputError if they conflict."""
        defaults = [name for name in self.__slots__ if getattr(self, name) == getattr(DEFAULTS, name)]
        return replace(self, **{name: getattr(last, name) for name in defaults})

    def words(self) -> list[str]:
        """These options as words of the command line, without those that have the default."""
        found: list[str] = []
        for field, _ in options_in(StoreOptions):
            if (value := getattr(self, field.name)) != field.default:
                found += [flag_of(field), *([] if value is True else [str(value)])]
        return found


DEFAULTS = StoreOptions()


class Store(ABC):
    """Objects under one root. Keys are relative, with `/` between their parts."""

    url: str

    @abstractmethod
    def create(self, key: str, source: bytes | Path) -> Created:
        """Create the object if it does not exist: atomic and durable. `source` is its content or a `temp_file`."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The content of the object. StoreMissing if it does not exist, StoreUnsafe if it is huge or not a file."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """The object as a seekable file, for reading a part of it (a footer). StoreMissing if it does not exist."""

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """Size, time and ETag of the object, without reading it; None if it does not exist."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key starts with `prefix`, in the order of their keys."""

    @abstractmethod
    def download(
        self, key: str, path: Path, *, etag: str | None = None, received: Callable[[int], object] | None = None
    ) -> None:
        """Copy an object into a local file. With `etag`, StoreChanged if the object is no longer that one.

        `received` is called with the number of bytes whenever some have arrived, also those of repeated attempts.
        """

    @abstractmethod
    def replace(self, key: str, content: bytes) -> None:
        """Write a control object, replacing an older one. Readers see the complete old one or the complete new one."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove a control object. Does nothing if it does not exist."""

    @abstractmethod
    def set_aside(self, key: str) -> str:
        """Move a damaged object out of the dataset, to `_job/damaged/`. Returns its new key. Only for repairs."""

    @abstractmethod
    def temp_file(self) -> contextlib.AbstractContextManager[Path]:
        """A private local path to build an object in. A file at this path is removed afterwards."""

    def hold_to(self, key: str) -> None:
        """From now on write only while this object is the same file (StoreGone), as it shows that OUT is still there.

        Only a folder can be exchanged: for other stores this does nothing. StoreMissing if the object does not exist.
        """
        return

    def words(self, out: str = "") -> str:
        """What a user types after a verb of `p3d` to reach this store: OUT, as typed if given, and the S3 options.

        Every message that names a command uses it, since without the endpoint or profile the command would not work.
        """
        return shell_words(out or self.url)

    def prove_create_once(self) -> None:
        """Check that `create` never replaces an object, by creating one key twice. StoreUnsafe if it does."""
        key = f"{CONTROL}probe/{uuid.uuid4().hex}"
        first, second = self.create(key, b"1"), self.create(key, b"2")
        content = self.read(key)
        self.delete(key)
        if (first, second, content) != (CREATED, EXISTS, b"1"):
            raise StoreUnsafe(
                f"{self.url} lets a second writer replace an object ({first}, {second}): results could be lost there. "
                "Use a local disk, or an S3 server that honours If-None-Match"
            )


def most_bytes(key: str) -> int:
    """The most bytes that an object with this key may have: no record of ours comes near it."""
    if key.endswith((".parquet", ".safetensors")):
        return DATA_BYTES
    return RECORD_BYTES if key.endswith((".json", ".log")) else OBJECT_BYTES


def refuse_huge(place: str, key: str, size_bytes: int) -> None:
    """StoreUnsafe if the object at `place` has more bytes than one with its key may have."""
    if size_bytes > most_bytes(key):
        raise StoreUnsafe(
            f"{place} has {size_bytes} bytes, more than any file of that kind that p3d writes; remove it or restore it"
        )


def control_key(key: str) -> None:
    """ValueError unless the key is that of a control object."""
    if not key.startswith(CONTROL):
        raise ValueError(f"{key}: only {CONTROL} objects may be replaced or deleted")


def aside_key(key: str) -> str:
    """A new key below `_job/damaged/`. It does not end in .parquet, so no glob of the dataset matches it."""
    return f"{CONTROL}damaged/{key}.{uuid.uuid4().hex[:8]}"
