"""Where objects live: a folder or an S3 prefix, behind one small interface.

    create   the primitive everything rests on: the whole object appears under its key, once, or not at all
    read head list download       what is there
    replace delete                exist only under `_job/`, which holds control files and no data

Both stores answer `create` with CREATED or EXISTS, or raise: `StoreUnknown` says that the request may have happened,
and whoever called looks again (`dataset.commit`). Clients are made per process: a store pickles as URL and options.
"""

from __future__ import annotations

import contextlib
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from p3d.pipeline.errors import InputError, StoreUnsafe

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

    def prove_create_once(self) -> None:
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


def control_key(key: str) -> None:
    """ValueError unless the key is of a control object."""
    if not key.startswith(CONTROL):
        raise ValueError(f"{key}: only {CONTROL} objects may be replaced or deleted")


def aside_key(key: str) -> str:
    """A new name below `_job/damaged/`; no glob of the dataset finds it, for it does not end in .parquet."""
    return f"{CONTROL}damaged/{key}.{uuid.uuid4().hex[:8]}"
