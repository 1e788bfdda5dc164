"""S3Store: the store behind `s3://`, on boto3.

Timeouts, retries and pool size are set here and not left to defaults. Clients are made per process, when first needed.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, NoCredentialsError, ProfileNotFound

from pipeline.errors import InputError, StoreDenied, StoreMissing, StoreUnknown
from pipeline.store import (
    CREATED,
    DEFAULTS,
    EXISTS,
    Created,
    ObjectInfo,
    Store,
    StoreOptions,
    aside_key,
    control_key,
    split_s3_uri,
)

RANGE_BYTES = 1 << 17  # read at least, of an object that is opened for a part of it
CONFLICT_TRIES = 6  # of a create that the server answers with 409: another writer is at it


class S3Store(Store):
    """A prefix in a bucket, by boto3. An object is created by one PutObject with `If-None-Match: *`."""

    def __init__(self, url: str, options: StoreOptions = DEFAULTS) -> None:
        bucket, prefix = split_s3_uri(url.rstrip("/") if url.count("/") > 2 else url + "/")
        if not bucket:
            raise InputError(f"{url}: an S3 place is s3://bucket or s3://bucket/prefix")
        self.bucket = bucket
        self.prefix = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
        self.options = options
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self._made: Any = None
        self._making = threading.Lock()

    def __reduce__(self) -> tuple[type[S3Store], tuple[str, StoreOptions]]:
        return S3Store, (self.url, self.options)

    @property
    def _client(self) -> Any:
        with self._making:  # boto3 makes one client at a time; using it is thread-safe
            if self._made is None:
                self._made = self._make()
            return self._made

    def _make(self) -> Any:
        session = boto3.session.Session(profile_name=self.options.profile, region_name=self.options.region)
        return session.client(
            "s3",
            endpoint_url=self.options.endpoint_url,
            config=Config(
                connect_timeout=5,
                read_timeout=30,
                retries={"mode": "standard", "total_max_attempts": 5},
                max_pool_connections=32,
                tcp_keepalive=True,
            ),
        )

    def create(self, key: str, source: bytes | Path) -> Created:
        for attempt in range(CONFLICT_TRIES):
            code = self._put_once(key, source)
            if code in (CREATED, EXISTS):
                return code
            time.sleep(min(0.1 * 2**attempt, 2.0))
        raise StoreUnknown(f"{self.url}/{key}: other writers kept this object busy for {CONFLICT_TRIES} tries")

    def _put_once(self, key: str, source: bytes | Path) -> Created | Literal["conflict"]:
        with self._errors(key), contextlib.ExitStack() as stack:
            body = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
            try:
                self._client.put_object(
                    Bucket=self.bucket, Key=self.prefix + key, Body=body, IfNoneMatch="*", ChecksumAlgorithm="SHA256"
                )
            except ClientError as error:
                match error.response["ResponseMetadata"]["HTTPStatusCode"]:
                    case 412:
                        return EXISTS
                    case 409:
                        return "conflict"
                raise
        return CREATED

    def read(self, key: str) -> bytes:
        with self._errors(key):
            reply = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key)
            content: bytes = reply["Body"].read()
            return content

    def open(self, key: str) -> BinaryIO:
        if (info := self.head(key)) is None:
            raise StoreMissing(f"{self.url}/{key} does not exist")
        return io.BufferedReader(_Ranges(self, info), RANGE_BYTES)

    def read_range(self, info: ObjectInfo, start: int, end: int) -> bytes:
        """Bytes [start, end) of an object that is still the one of `info`."""
        with self._errors(info.key):
            reply = self._client.get_object(
                Bucket=self.bucket, Key=self.prefix + info.key, Range=f"bytes={start}-{end - 1}", IfMatch=info.etag
            )
            content: bytes = reply["Body"].read()
            return content

    def head(self, key: str) -> ObjectInfo | None:
        try:
            with self._errors(key):
                reply = self._client.head_object(Bucket=self.bucket, Key=self.prefix + key)
        except StoreMissing:
            return None
        return ObjectInfo(key, reply["ContentLength"], _ns(reply["LastModified"]), reply["ETag"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix, PaginationConfig={"PageSize": 1000}
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    key = item["Key"].removeprefix(self.prefix)
                    yield ObjectInfo(key, item["Size"], _ns(item["LastModified"]), item["ETag"])

    def download(self, key: str, path: Path, *, etag: str | None = None) -> None:
        extra = {"IfMatch": etag} if etag else {}
        with self._errors(key):
            reply = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key, **extra)
            with path.open("wb") as file:
                for piece in reply["Body"].iter_chunks(1 << 20):
                    file.write(piece)
            if path.stat().st_size != reply["ContentLength"]:
                raise StoreUnknown(f"{self.url}/{key}: the body ended early")

    def replace(self, key: str, content: bytes) -> None:
        control_key(key)
        with self._errors(key):
            self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=content)

    def delete(self, key: str) -> None:
        control_key(key)
        with self._errors(key):
            self._client.delete_object(Bucket=self.bucket, Key=self.prefix + key)

    def set_aside(self, key: str) -> str:
        aside = aside_key(key)
        with self._errors(key):
            source = {"Bucket": self.bucket, "Key": self.prefix + key}
            self._client.copy_object(Bucket=self.bucket, Key=self.prefix + aside, CopySource=source)
            self._client.delete_object(**source)
        return aside

    @contextlib.contextmanager
    def temp_file(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="p3d-") as folder:
            yield Path(folder) / "object.tmp"

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        place = f"s3://{self.bucket}/{self.prefix}{key}"
        try:
            yield
        except ClientError as error:
            _raise_client_error(error, place)
        except (NoCredentialsError, ProfileNotFound) as error:
            raise StoreDenied(f"{place}: {error}") from None
        except (HTTPClientError, BotoCoreError) as error:
            raise StoreUnknown(f"{place}: {type(error).__name__}: is the S3 server there?") from error


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


def _raise_client_error(error: Any, place: str) -> NoReturn:
    """Map an S3 error reply. The message of the reply is kept; request ids, signatures and keys are not in it."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        raise StoreMissing(f"{place}: there is no such bucket") from None
    if status in (404, 412) or code in ("NoSuchKey", "PreconditionFailed"):
        raise StoreMissing(f"{place}: no such object, or no longer the same ({code})") from None
    if status in (400, 401, 403):
        raise StoreDenied(f"{place}: access refused ({code}); check the credentials that botocore finds") from None
    raise StoreUnknown(f"{place}: the server answered {status} {code}") from None
