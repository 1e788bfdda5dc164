"""Find the outputs in a folder, for `p3d jobs list`; the folder may be an output itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from p3d.pipeline.errors import InputError
from p3d.pipeline.storage.store import Store, StoreOptions
from p3d.pipeline.storage.urls import open_store

JOB = "job.json"


def outputs_below(root: str, options: StoreOptions) -> Iterator[Store]:
    """The stores of `root` and of folders directly in it that hold a job, by name. InputError if it is not a folder."""
    store = open_store(root, options)
    if store.head(JOB) is not None:
        yield store
    for name in _folders(store):
        below = open_store(f"{store.url.rstrip('/')}/{name}", options)
        if below.head(JOB) is not None:
            yield below


def _folders(store: Store) -> list[str]:
    if store.url.startswith("s3://"):
        from p3d.pipeline.storage.s3.store import S3Store

        assert isinstance(store, S3Store)
        return sorted(folder.rstrip("/") for _, folders in store.pages(delimiter="/") for folder in folders)
    try:
        return sorted(entry.name for entry in Path(store.url).iterdir() if entry.is_dir())
    except OSError as error:
        raise InputError(
            f"{store.url}: {error.strerror}; `p3d jobs list` needs the folder that contains the outputs"
        ) from None
