"""S3Store: the store behind `s3://`, on boto3.

Requests are retried for a limited time, with credentials read again if they were refused (`storage.s3.retry`). A body
that is cut off is continued (`storage.s3.body`). Any other error becomes a store error with a message
(`storage.s3.errors`). Clients are shared within a process (`storage.s3.client`).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from p3d.pipeline.errors import (
    InputError,
    StoreChanged,
    StoreDenied,
    StoreMissing,
    StoreUnknown,
    StoreUnsafe,
    shell_words,
)
from p3d.pipeline.storage.local import writing
from p3d.pipeline.storage.s3.body import Body
from p3d.pipeline.storage.s3.client import client_for
from p3d.pipeline.storage.s3.retry import ask
from p3d.pipeline.storage.s3.uri import s3_uri, split_s3_uri
from p3d.pipeline.storage.store import (
    CREATED,
    DEFAULTS,
    EXISTS,
    Created,
    ObjectInfo,
    Store,
    StoreOptions,
    aside_key,
    control_key,
    refuse_huge,
)

RANGE_BYTES = 1 << 17  # least bytes per read of an object that is opened as a file
PAGE_KEYS = 1000  # most keys per page of a listing; servers return no more

Page = tuple[list[ObjectInfo], list[str]]  # one page of a listing: objects, and the common prefixes of a delimiter


class S3Store(Store):
    """A prefix in a bucket, with boto3. An object is created by one PutObject with `If-None-Match: *`."""

    def __init__(self, url: str, options: StoreOptions = DEFAULTS) -> None:
        bucket, prefix = split_s3_uri(url.rstrip("/") if url.count("/") > 2 else url + "/")
        if not bucket:
            raise InputError(f"{url}: an S3 URL must be s3://bucket or s3://bucket/prefix")
        self.bucket = bucket
        self.prefix = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
        self.options = options
        self.url = s3_uri(bucket, self.prefix).rstrip("/")
        self._always = {"Bucket": bucket} | ({"RequestPayer": "requester"} if options.requester_pays else {})
        self._written = {"ServerSideEncryption": options.sse, "SSEKMSKeyId": options.sse_kms_key_id}

    def __reduce__(self) -> tuple[type[S3Store], tuple[str, StoreOptions]]:
        return S3Store, (self.url, self.options)

    @property
    def endpoint(self) -> str:
        """The URL of the server that botocore chooses, from the options or the AWS configuration; empty for AWS."""
        url: str = client_for(self.options).meta.endpoint_url
        host = urlsplit(url).hostname or ""
        return "" if host.endswith((".amazonaws.com", ".amazonaws.com.cn")) else url

    def create(self, key: str, source: bytes | Path) -> Created:
        checksum = {"ChecksumAlgorithm": "SHA256"}
        if self.options.checksums == "when_required":
            checksum = {"ContentMD5": _md5(source)}  # supported by every server
        try:
            self._put(key, source, IfNoneMatch="*", **checksum)
        except StoreChanged:  # 412: another writer was first, or our own attempt whose reply was lost
            return EXISTS
        return CREATED

    def read(self, key: str) -> bytes:
        content = _Bounded(self._url_of(key), key)
        self._body(key, content).fetch()
        return content.getvalue()

    def open(self, key: str) -> BinaryIO:
        if (info := self.head(key)) is None:
            raise StoreMissing(f"{self._url_of(key)} does not exist")
        return io.BufferedReader(_Ranges(self, info), RANGE_BYTES)

    def read_range(self, info: ObjectInfo, start: int, end: int) -> bytes:
        """Bytes [start, end) of the object of `info`. StoreChanged if it has another ETag now."""
        content = io.BytesIO()
        self._body(info.key, content, etag=info.etag, start=start, end=end).fetch()
        return content.getvalue()

    def head(self, key: str) -> ObjectInfo | None:
        try:
            reply = self._head(key)
        except StoreMissing:
            return None
        return self._info(key, reply, "ContentLength")

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for objects, _ in self.pages(prefix):
            yield from objects

    def pages(
        self, prefix: str = "", *, delimiter: str = "", patience_s: float = 0.0, after: str = ""
    ) -> Iterator[Page]:
        """Pages of at most PAGE_KEYS: (objects, common prefixes up to `delimiter`). `after` is a key to begin behind.

        A page that fails is retried for at least `patience_s` seconds, and the listing continues from there.
        """
        asked = {"Prefix": self.prefix + prefix, "MaxKeys": PAGE_KEYS} | ({"Delimiter": delimiter} if delimiter else {})
        asked |= {"StartAfter": self.prefix + after} if after else {}
        while True:
            page = self._ask("list_objects_v2", prefix, patience_s, **asked)
            yield (
                [
                    self._info(str(item.get("Key", "")).removeprefix(self.prefix), item, "Size")
                    for item in page.get("Contents", ())
                ],
                [item["Prefix"].removeprefix(self.prefix) for item in page.get("CommonPrefixes", ())],
            )
            if not page.get("IsTruncated"):
                return
            token = page["NextContinuationToken"]
            if asked.get("ContinuationToken") == token:
                raise StoreUnsafe(f"{self._url_of(prefix)}: the listing of the server repeats and never ends")
            asked["ContinuationToken"] = token

    def _info(self, key: str, found: dict[str, Any], size: str) -> ObjectInfo:
        """An object as a reply describes it. StoreUnknown if the reply lacks something."""
        try:
            return ObjectInfo(key, found[size], _ns(found["LastModified"]), found["ETag"])
        except KeyError as missing:
            raise StoreUnknown(
                f"{self._url_of(key)}: the reply has no {missing.args[0]}; is this an S3 server, and not the login "
                "page of a network?"
            ) from None

    def download(
        self, key: str, path: Path, *, etag: str | None = None, received: Callable[[int], object] | None = None
    ) -> None:
        with writing(path), path.open("wb") as file:  # botocore's errors are not OSErrors
            body = self._body(key, file, etag=etag)
            body.received, body.patient = received, True
            body.fetch()

    def replace(self, key: str, content: bytes) -> None:
        control_key(key)
        self._put(key, content)

    def delete(self, key: str) -> None:
        control_key(key)
        self._ask("delete_object", key, Key=self.prefix + key)

    def set_aside(self, key: str) -> str:
        aside = aside_key(key)
        encrypted: dict[str, Any] = {name: value for name, value in self._written.items() if value is not None}
        source = {"Bucket": self.bucket, "Key": self.prefix + key}
        self._ask("copy_object", key, Key=self.prefix + aside, CopySource=source, **encrypted)
        self._ask("delete_object", key, Key=self.prefix + key)
        return aside

    def words(self, out: str = "") -> str:
        return shell_words(out or self.url, *self.options.words())

    @contextlib.contextmanager
    def temp_file(self) -> Iterator[Path]:
        with writing(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(prefix="p3d-") as folder:
            yield Path(folder) / "object.tmp"

    def _head(self, key: str) -> Any:
        try:
            return self._ask("head_object", key, Key=self.prefix + key)
        except StoreDenied:  # a reply to HEAD has no text; one to GET shows whether the credentials have expired
            with contextlib.suppress(StoreMissing):
                self._ask("get_object", key, Key=self.prefix + key, Range="bytes=0-0")["Body"].close()
            return self._ask("head_object", key, Key=self.prefix + key)

    def _url_of(self, key: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}"

    def _put(self, key: str, source: bytes | Path, **how: Any) -> None:
        how |= {name: value for name, value in self._written.items() if value is not None}
        with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as body:
            self._ask("put_object", key, Key=self.prefix + key, Body=body, **how)

    def _body(
        self, key: str, sink: BinaryIO, *, etag: str | None = None, start: int = 0, end: int | None = None
    ) -> Body:
        get = functools.partial(self._ask, "get_object", key, Key=self.prefix + key)
        return Body(get, sink, self._url_of(key), etag, self.options.checksums == "when_supported", start, end)

    def _ask(self, operation: str, key: str, least_patience_s: float = 0.0, **params: Any) -> Any:
        """The reply to one request about `key`, with retries. StoreError or InputError if it fails."""
        return ask(self.options, operation, self._url_of(key), least_patience_s, **self._always, **params)


class _Bounded(io.BytesIO):
    """The content of an object in memory. StoreUnsafe as soon as it is larger than an object of its key may be."""

    def __init__(self, place: str, key: str) -> None:
        super().__init__()
        self.place, self.key = place, key

    def write(self, piece: Any) -> int:
        written = super().write(piece)
        refuse_huge(self.place, self.key, self.tell())
        return written


class _Ranges(io.RawIOBase):
    """An S3 object as a raw seekable file: every read is one ranged GET."""

    def __init__(self, store: S3Store, info: ObjectInfo) -> None:
        self.store, self.info, self.at = store, info, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.info.size_bytes}[whence]
        self.at = base + offset
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        end = min(self.at + len(buffer), self.info.size_bytes)
        if end <= self.at:
            return 0
        content = self.store.read_range(self.info, self.at, end)
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)


def _ns(when: Any) -> int:
    return int(when.timestamp() * 1e9)


def _md5(source: bytes | Path) -> str:
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    return base64.b64encode(digest.digest()).decode()
