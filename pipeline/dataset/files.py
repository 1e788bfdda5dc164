"""Helpers for reading: an object as a local file, its digest, and errors that name the damaged object."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from p3d.pipeline.errors import MALFORMED, DamagedJob, StoreMissing
from p3d.pipeline.storage.local import LocalStore, is_utf8, scratch_folder
from p3d.pipeline.storage.store import Store

FOLDERS = ("clips", "videos", "failures")
UNREADABLE = (pa.ArrowException, OSError, *MALFORMED)


@contextlib.contextmanager
def local_path(store: Store, key: str) -> Iterator[Path]:
    """The object as a local file: the stored file itself, or a temporary copy. StoreError if it cannot be read.

    A file below a folder whose name is not UTF-8 gets a temporary link, since safetensors cannot open it by its name.
    """
    if isinstance(store, LocalStore):
        store.open(key).close()  # raises the store's own error if the file cannot be read
        if is_utf8(store.root):
            yield store.root / key
            return
    with scratch_folder("p3d-") as folder:
        path = folder / Path(key).name  # weights are recognised by their suffix
        if isinstance(store, LocalStore):
            path.symlink_to(store.root / key)
        else:
            store.download(key, path)
        yield path


def sha256_of(path: Path) -> str:
    """sha256 hex of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def reading(store: Store, key: str, remedy: str) -> Iterator[None]:
    """Turn any error of reading the object into a DamagedJob that names it and says what to do."""
    try:
        yield
    except StoreMissing as error:
        raise DamagedJob(f"{error}, but it should be there. {remedy}") from None
    except UNREADABLE as error:
        raise DamagedJob(f"{store.url}/{key} is damaged: {error}. {remedy}") from None


def check(holds: bool, otherwise: str) -> None:
    """Raise ValueError with the message `otherwise` unless the condition holds."""
    if not holds:
        raise ValueError(otherwise)
