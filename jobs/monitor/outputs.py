"""Find the outputs in a folder, which may be an output itself, and those that a command names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from p3d.jobs.job import TRAIN_KEY
from p3d.pipeline.dataset.snapshot_record import SNAPSHOT_KEY
from p3d.pipeline.errors import InputError, StoreError
from p3d.pipeline.storage.store import Store, StoreOptions
from p3d.pipeline.storage.urls import open_store

JOB = "job.json"
KINDS = (JOB, TRAIN_KEY)  # what `p3d jobs list` shows


def outputs_of(outs: Sequence[str], options: StoreOptions) -> list[Store]:
    """The stores of all outputs that a user has named, each once, in this order.

    A folder or prefix that is no output itself stands for the jobs directly in it. Links in it are not followed. If it
    has none, its own store is returned, so that the caller says what is missing. Of several, so is one whose store
    fails: StoreError only if one is named.
    """
    found: dict[str, Store] = {}
    for out in outs:
        store = open_store(out, options)
        below: list[Store] = []
        with contextlib.suppress(InputError, *([] if len(outs) == 1 else [StoreError])):
            if all(store.head(key) is None for key in (JOB, SNAPSHOT_KEY, TRAIN_KEY)):
                below = list(_below(store, options, (JOB,), follow=False))
        found.update({one.url.rstrip("/"): one for one in below or [store]})
    return list(found.values())


def outputs_below(root: str, options: StoreOptions) -> Iterator[Store]:
    """The stores of `root` and of folders directly in it that hold a job or a training, by name. InputError if it is
    not a folder.

    A store that fails is returned, too: its error then concerns this output only. If `root` is an output or a snapshot
    itself, links in it are not followed.
    """
    store = open_store(root, options)
    is_output = any(store.head(key) is not None for key in KINDS)
    if is_output:
        yield store
    yield from _below(store, options, KINDS, follow=not is_output and store.head(SNAPSHOT_KEY) is None)


def _below(store: Store, options: StoreOptions, keys: tuple[str, ...], *, follow: bool) -> Iterator[Store]:
    """The folders directly in a store that hold one of the records `keys`, or whose store fails."""
    for name in _folders(store, follow=follow):
        below = open_store(f"{store.url.rstrip('/')}/{name}", options)
        try:
            if all(below.head(key) is None for key in keys):
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
