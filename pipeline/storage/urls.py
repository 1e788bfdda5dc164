"""Open the store at a URL. Only this module knows which kinds of store exist."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from p3d.pipeline.errors import InputError
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.s3.uri import refuse_almost_s3
from p3d.pipeline.storage.store import DEFAULTS, Store, StoreOptions

CREDENTIAL = re.compile(r"[a-z][a-z0-9+.-]*://[^/]*@|.*[?&]X-Amz-", re.IGNORECASE)  # a password, a presigned link
_SLASHES = "; a path after file:// begins with a slash"


def open_store(url: str, options: StoreOptions = DEFAULTS) -> Store:
    """The store at `s3://bucket/prefix` or in a folder, which need not exist yet. InputError for any other URL."""
    if not isinstance(options, StoreOptions):
        raise InputError(f"s3 must be p3d.StoreOptions(...), not {options!r}")
    if "://" in url and CREDENTIAL.match(url):  # which is not repeated
        raise InputError("a URL contains a credential; use a plain path or s3:// and botocore's credential chain")
    refuse_almost_s3(url)
    if url.startswith("s3://"):
        from p3d.pipeline.storage.s3.store import S3Store  # botocore takes half a second to import

        return S3Store(url, options)
    if not url:
        raise InputError("the name of a folder or s3://bucket/prefix is expected, not an empty text")
    if "://" in url and not url.startswith("file:///"):
        raise InputError(f"{url}: only folders and s3:// are supported" + (_SLASHES if url.startswith("file:") else ""))
    store = LocalStore(url)
    if store.root.is_file():
        raise InputError(f"{store.url} is a file; name a folder for an output")
    return store


def place_of(store: Store) -> tuple[str, str]:
    """(path or URL, endpoint) of a store. Links are resolved. The endpoint is empty for a folder and for AWS."""
    if not store.url.startswith("s3://"):
        return os.path.realpath(store.url), ""
    from p3d.pipeline.storage.s3.store import S3Store

    return store.url, store.endpoint if isinstance(store, S3Store) else ""


def short_names(urls: Sequence[str]) -> dict[str, str]:
    """A name for each output in a table: the last part of its URL, or all of it if that is not enough to tell them."""
    last = {url: url.rstrip("/").rpartition("/")[2] for url in urls}
    return last if len(set(last.values())) == len(last) else {url: url for url in urls}
