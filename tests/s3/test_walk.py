"""Parallel listings of a prefix: every object once, whatever the shape of the tree and whatever fails."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import boto3
import pytest

from p3d.pipeline.errors import InputError, StoreUnknown
from p3d.pipeline.sources import listing_buffer
from p3d.pipeline.sources.listing import find
from p3d.pipeline.sources.listing_buffer import ListingBuffer
from p3d.pipeline.storage.s3 import store as s3
from p3d.pipeline.storage.s3 import walk as s3_walk
from p3d.pipeline.storage.s3.store import S3Store
from p3d.pipeline.storage.s3.walk import walk
from p3d.pipeline.storage.store import ObjectInfo, StoreOptions
from p3d.pipeline.types import VideoRef
from tests.s3.proxy import Fault, Proxy

ODD = [
    "a.mp4",
    "a/x.mp4",
    "a//y.mp4",
    "/z.mp4",
    "//",
    "a b/ü.mp4",
    "a%2Fb.mp4",
    "deep/er/and/er/and/er/z.mp4",
    "-",
    "~/~/~",
]


def keys_of_a_tree(seed: int) -> list[str]:
    """About 150 keys: flat folders, deep ones, names that sort around the slash."""
    rng = random.Random(seed)
    folders = ["", "a/", "a.b/", "many/", *(f"year/{n}/" for n in range(5)), *(f"tiny/{n}/" for n in range(25))]
    made = {f"{rng.choice(folders)}{rng.choice('abc./-')}{rng.randrange(10_000)}.mp4" for _ in range(140)}
    return sorted(made | set(ODD))


def walked(store: S3Store, root: str = "") -> Counter[str]:
    found: list[ObjectInfo] = []
    walk(store, root, lambda _, page: found.extend(page or ()))
    return Counter(info.key for info in found)


@pytest.fixture(params=["real_bucket", "bucket"])
def tree(request: pytest.FixtureRequest) -> tuple[str, list[str]]:
    """A bucket on each server, and its keys. SeaweedFS stores files, so its folders need a name."""
    bucket = request.getfixturevalue(request.param)
    keys = [key for key in keys_of_a_tree(1) if request.param == "bucket" or "//" not in f"/{key}"]
    client = boto3.session.Session().client("s3")
    for key in keys:
        client.put_object(Bucket=bucket, Key=key, Body=key.encode())
    return bucket, keys


@pytest.mark.fault(35)
def test_every_object_is_found_once(tree: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """For any page size, any number of parallel listings, any limit for splitting folders, and any root."""
    bucket, keys = tree
    store = S3Store(f"s3://{bucket}")
    plain = Counter(info.key for info in store.list())
    assert plain == dict.fromkeys(keys, 1)
    for page, listers, pages, levels in ((1000, 16, 10, 4), (3, 4, 1, 2), (2, 64, 100, 9), (7, 2, 2, 0), (1, 3, 5, 1)):
        monkeypatch.setattr(s3, "PAGE_KEYS", page)
        monkeypatch.setattr(s3_walk, "LISTERS", listers)
        monkeypatch.setattr(s3_walk, "OPENED_PAGES", pages)
        monkeypatch.setattr(s3_walk, "LEVELS", levels)
        assert walked(store) == plain, (page, listers, pages, levels)
        below = {key: 1 for key in plain if key.startswith("tiny/")}
        assert walked(store, "tiny/") == below, (page, listers, pages, levels)


@pytest.mark.fault(35)
def test_a_plan_has_the_same_rows_in_the_same_order_every_time(
    tree: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads may finish in any order; the rows of two listings are equal."""
    bucket, _ = tree
    monkeypatch.setattr(s3, "PAGE_KEYS", 5)
    first = find(f"s3://{bucket}", StoreOptions())
    assert first.videos.num_rows > 100
    for _ in range(3):
        again = find(f"s3://{bucket}", StoreOptions())
        assert again.videos.equals(first.videos) and again.skipped == first.skipped
    assert first.n_skipped == len(first.skipped) > 0


def fill(bucket: str, count: int) -> set[str]:
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    keys = {f"v/{n % 4}/{n}.mp4" for n in range(count)}
    for key in keys:
        client.put_object(Bucket=bucket, Key=key, Body=b"1")
    return keys


@pytest.mark.fault(27, 35)
def test_a_listing_continues_where_a_page_failed(moto_front: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """If three pages in ten fail for a while, no key is lost or listed twice, and no folder is restarted."""
    keys = fill("walk-fails", 60)
    monkeypatch.setattr(s3, "PAGE_KEYS", 2)
    moto_front.requests.clear()
    moto_front.faults = [Fault("status", method="GET", share=0.3)]
    assert walked(S3Store("s3://walk-fails")) == dict.fromkeys(keys, 1)
    refused = sum(request.fault == "status" for request in moto_front.requests)
    assert refused > 5
    # 1 for the bucket, 1 for `v/`, 2 for the four folders in it, 8 pages per folder; each answered once
    assert len(moto_front.requests) - refused == 1 + 2 + 4 * 8, Counter(r.path for r in moto_front.requests)


@pytest.mark.fault(28, 35)
def test_a_listing_that_cannot_continue_ends_in_an_error(moto_front: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not recover is StoreUnknown after a time limit; a partial listing is never accepted."""
    fill("walk-ends", 60)
    monkeypatch.setattr(s3, "PAGE_KEYS", 2)
    monkeypatch.setattr(s3_walk, "PATIENCE_S", 1.0)
    moto_front.faults = [Fault("status", method="GET", key="continuation-token", share=0.9)]
    with pytest.raises(StoreUnknown):
        walk(S3Store("s3://walk-ends"), "", lambda *_: None)


class Killed(BaseException):
    """What stands for the end of the process."""


def stop_after(n_pages: int, patch: pytest.MonkeyPatch) -> None:
    """The process ends when so many pages have been written."""
    write, left = ListingBuffer.write, count(n_pages, -1)

    def until(self: ListingBuffer, *given: Any) -> None:
        if next(left) <= 0:
            raise Killed
        write(self, *given)

    patch.setattr(ListingBuffer, "write", until)


@pytest.mark.fault(35)
def test_an_interrupted_listing_is_continued(
    tree: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an end at any page, also within a write, the next listing gives the rows of one without an interrupt."""
    monkeypatch.setattr(s3, "PAGE_KEYS", 5)
    monkeypatch.setattr(s3_walk, "OPENED_PAGES", 2)
    monkeypatch.setattr(s3_walk, "LISTERS", 4)
    source, kept, said = f"s3://{tree[0]}", tmp_path / "kept", list[str]()
    plain = find(source, StoreOptions())
    continued = 0
    for n_pages in (0, 1, 5, 12, 20, 10_000):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            stop_after(n_pages, patch)
            find(source, StoreOptions(), kept=kept)
        for path in sorted(kept.glob("*.arrows"))[:1]:  # the last batch of a file is not whole
            path.write_bytes(path.read_bytes()[:-40])
        said.clear()
        found = find(source, StoreOptions(), tell=said.append, kept=kept)
        assert found.videos.equals(plain.videos) and found.n_skipped == plain.n_skipped, n_pages
        assert found.skipped == plain.skipped
        continued += any("continued" in one for one in said)
        found.forget()
        assert not kept.exists() and found.videos.equals(plain.videos)
    assert continued >= 2


def test_an_old_listing_is_started_again(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one from before this machine started, since nothing was synced. Two processes never share a folder."""
    for n in range(40):
        boto3.client("s3").put_object(Bucket=bucket, Key=f"v/{n % 4}/{n}.mp4", Body=b"1")
    kept = tmp_path / "kept"
    monkeypatch.setattr(s3, "PAGE_KEYS", 5)
    find(f"s3://{bucket}", StoreOptions(), kept=kept)  # whole, but never planned
    for name, value in (("KEPT_S", 0.0), ("boot_id", lambda: "another")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(listing_buffer, name, value)
            assert ListingBuffer(kept).parts is None
        find(f"s3://{bucket}", StoreOptions(), kept=kept)
    first = ListingBuffer(kept)
    second = ListingBuffer(kept)
    assert (first.is_kept, second.is_kept) == (True, False) and first.parts is not None
    second.close()
    first.close()


def test_a_listing_that_was_interrupted_costs_no_request_again(moto_front: Proxy, tmp_path: Path) -> None:
    """What was listed is not asked for again: a whole listing that was not planned needs no request at all."""
    fill("walk-kept", 40)
    first = find("s3://walk-kept", StoreOptions(), kept=tmp_path / "kept")
    moto_front.requests.clear()
    again = find("s3://walk-kept", StoreOptions(), kept=tmp_path / "kept")
    assert again.videos.equals(first.videos) and moto_front.requests == []


def test_a_listing_without_videos_is_not_kept(bucket: str, tmp_path: Path) -> None:
    """After the error the user copies videos there: the same launch finds them."""
    client, source = boto3.client("s3"), f"s3://{bucket}/v"
    client.put_object(Bucket=bucket, Key="v/a/notes.txt", Body=b"1")
    with pytest.raises(InputError, match="no videos in"):
        find(source, StoreOptions(), kept=tmp_path / "kept")
    client.put_object(Bucket=bucket, Key="v/a/b.mp4", Body=b"1")
    assert find(source, StoreOptions(), kept=tmp_path / "kept").videos["path"].to_pylist() == ["a/b.mp4"]


def test_a_listing_of_many_folders_has_few_files(tmp_path: Path) -> None:
    """A process may map 65 530 files into memory, and a bucket may have more folders: each process writes one file."""
    for run in range(2):
        with ListingBuffer(tmp_path / "kept") as buffer:
            buffer.split([f"{run}-{n}/" for n in range(50)])
            for n in range(50):
                row = VideoRef(f"{run}{n:031x}", f"{n}.mp4", f"s3://b/{run}-{n}/a.mp4", "0" * 16, 1)
                buffer.write([row], f"{run}-{n}/", f"{run}-{n}/a.mp4")
                buffer.end(f"{run}-{n}/")
            assert buffer.table().num_rows == 50 * (run + 1)
        assert len(list((tmp_path / "kept").glob("*.arrows"))) == run + 1


def test_few_names_of_other_files_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an earlier listing all other files are counted, and a limited number is named, however many parts it has."""
    monkeypatch.setattr(listing_buffer, "SOME", 3)
    with ListingBuffer(tmp_path / "kept") as buffer:
        buffer.split(["a/", "b/"])
        for part in ("a/", "b/"):
            for n in range(2):
                buffer.write([], part, f"{part}{n}", [f"{part}{n}.txt", f"{part}{n}.jpg"])
    before = ListingBuffer(tmp_path / "kept").before
    assert [one.n_others for one in before.values()] == [4, 4]
    assert [name for one in before.values() for name in one.others] == ["a/0.txt", "a/0.jpg", "a/1.txt"]


def test_rows_that_cannot_be_read_back_are_not_left_out(tmp_path: Path) -> None:
    """A file of the buffer that is cut while the listing goes on ends it: no plan lacks its videos silently."""
    with ListingBuffer(tmp_path / "kept") as buffer:
        for n in range(3):
            buffer.write([VideoRef(f"{n:032x}", f"{n}.mp4", f"s3://b/{n}.mp4", "0" * 16, 1)], "part", f"{n}.mp4")
        (path,) = (tmp_path / "kept").glob("*.arrows")
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(InputError, match="of 3 listed videos can be read back"):
            buffer.table()
