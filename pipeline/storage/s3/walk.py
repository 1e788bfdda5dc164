"""List all objects below an S3 prefix, with parallel listings.

One listing returns 1000 keys per request, one request after the other. So the folders of the first levels are listed
separately, in parallel. Every object is below exactly one of them, or directly in a folder that was split into its
subfolders. The order in which a server lists does not matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from p3d.pipeline.storage.s3.store import S3Store
from p3d.pipeline.storage.store import ObjectInfo

LISTERS = 16  # parallel listings
LEVELS = 4  # most levels of folders that are split
OPENED_PAGES = 10  # most pages of a folder that is split; a folder with more entries is listed as a whole
PATIENCE_S = 600.0  # how long a server that fails in the middle of a listing is retried

# takes the objects of a page, with the part of the listing that it is of; None after the last page of a part
Take = Callable[[str, list[ObjectInfo] | None], None]
# the key behind which a part begins, since an earlier walk has taken the others; None if it has taken all
Begin = Callable[[str], str | None]


def walk(store: S3Store, root: str, take: Take) -> None:
    """Call `take` with every object below `root` once, in pages of at most 1000, from several threads."""
    list_parts(store, split(store, root, take), take)


def split(store: S3Store, root: str, take: Take) -> list[str]:
    """Take the objects in the first levels of folders, which are of no part (""). Returns the parts with all others."""
    folders, whole = [root], list[str]()
    with _pool() as pool:
        for _ in range(LEVELS):
            if not folders or len(folders) >= LISTERS:
                break
            opened = list(pool.map(lambda folder: _open(store, folder), folders))
            whole += [folder for folder, found in zip(folders, opened, strict=True) if found is None]
            folders = []
            for found in opened:
                if found is not None:
                    for page in found[0]:
                        take("", page)
                    folders += found[1]
    return whole + folders


def list_parts(store: S3Store, parts: Sequence[str], take: Take, begin: Begin = lambda _: "") -> None:
    """Take all objects of these parts, each of which begins where `begin` says."""
    with _pool() as pool:
        list(pool.map(lambda part: _list(store, part, take, begin), parts))


@contextlib.contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(LISTERS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _open(store: S3Store, folder: str) -> tuple[list[list[ObjectInfo]], list[str]] | None:
    """The objects directly in a folder, in pages, and its subfolders; None if there are too many."""
    objects, folders = list[list[ObjectInfo]](), list[str]()
    for number, (page, prefixes) in enumerate(store.pages(folder, delimiter="/", patience_s=PATIENCE_S)):
        if number == OPENED_PAGES:
            return None
        objects.append(page)
        folders += prefixes
    return objects, folders


def _list(store: S3Store, folder: str, take: Take, begin: Begin) -> None:
    after = begin(folder)
    if after is None:
        return
    for page, _ in store.pages(folder, patience_s=PATIENCE_S, after=after):
        take(folder, page)
    take(folder, None)
