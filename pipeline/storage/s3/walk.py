"""All objects below an S3 prefix, by many listings at once.

One listing gives 1000 keys a request, one request after the other. So the folders of the first levels are listed each
on its own, at the same time; every object is below exactly one of them, or directly in a folder that was opened up.
Nothing rests on the order in which a server lists.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from p3d.pipeline.storage.s3.store import S3Store
from p3d.pipeline.storage.store import ObjectInfo

LISTERS = 16  # listings at a time
LEVELS = 4  # of folders that are opened up at most
OPENED_PAGES = 10  # of a folder; one with more entries than these hold is listed whole
PATIENCE_S = 600.0  # with a server that fails in the middle of a listing

Take = Callable[[list[ObjectInfo]], None]


def walk(store: S3Store, root: str, take: Take) -> None:
    """Give every object below `root` to `take`, once, in pages of at most 1000, from several threads."""
    folders, whole = [root], list[str]()
    pool = ThreadPoolExecutor(LISTERS)
    try:
        for _ in range(LEVELS):
            if not folders or len(folders) >= LISTERS:
                break
            opened = list(pool.map(lambda folder: _open(store, folder), folders))
            whole += [folder for folder, found in zip(folders, opened, strict=True) if found is None]
            folders = []
            for found in opened:
                if found is not None:
                    for page in found[0]:
                        take(page)
                    folders += found[1]
        list(pool.map(lambda folder: _list(store, folder, take), whole + folders))
    finally:
        pool.shutdown(cancel_futures=True)


def _open(store: S3Store, folder: str) -> tuple[list[list[ObjectInfo]], list[str]] | None:
    """The objects directly in a folder, and the folders in it; None if there are too many."""
    objects, folders = list[list[ObjectInfo]](), list[str]()
    for number, (page, prefixes) in enumerate(store.pages(folder, delimiter="/", patience_s=PATIENCE_S)):
        if number == OPENED_PAGES:
            return None
        objects.append(page)
        folders += prefixes
    return objects, folders


def _list(store: S3Store, folder: str, take: Take) -> None:
    for page, _ in store.pages(folder, patience_s=PATIENCE_S):
        take(page)
