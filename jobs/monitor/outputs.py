"""Find the outputs in a folder, for `p3d jobs list`; the folder may be an output itself."""

from __future__ import annotations

import os
from collections.abc import Iterator

from p3d.pipeline.dataset.snapshot_record import SNAPSHOT_KEY
from p3d.pipeline.errors import InputError, StoreError
from p3d.pipeline.storage.store import Store, StoreOptions
from p3d.pipeline.storage.urls import open_store

JOB = "job.json"


def outputs_below(root: str, options: StoreOptions) -> Iterator[Store]:
    """The stores of `root` and of folders directly in it that hold a job, by name. InputError if it is not a folder.

    A store that fails is returned, too: its error then concerns this output only. If `root` is an output or a snapshot
    itself, links in it are not followed.
    """
    store = open_store(root, options)
    is_output = store.head(JOB) is not None
    if is_output:
        yield store
    for name in _folders(store, follow=not is_output and store.head(SNAPSHOT_KEY) is None):
        below = open_store(f"{store.url.rstrip('/')}/{name}", options)
        try:
            if below.head(JOB) is None:
                continue
        except StoreError:
            pass
        yield below


def _folders(store: Store, *, follow: bool) -> list[str]:
    if store.url.startswith("s3://"):
        from p3d.pipeline.storage.s3.store import S3Store

        assert isinstance(store, S3Store)
        return sorted(folder.rstrip("/") for _, folders in store.pages(delimiter="/") for folder in folders)
    try:
        with os.scandir(store.url) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=follow))
    except OSError as error:
        raise InputError(
            f"{store.url}: {error.strerror}; `p3d jobs list` needs the folder that contains the outputs"
        ) from None
