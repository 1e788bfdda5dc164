"""Stores: an object appears complete, once, and never changes. Both kinds of store behave alike."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p3d.pipeline.errors import (
    InputError,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreGone,
    StoreMissing,
    StoreUnknown,
    StoreUnsafe,
    StrayFile,
)
from p3d.pipeline.storage import local as store_module
from p3d.pipeline.storage.local import LocalStore, scratch_folder
from p3d.pipeline.storage.s3 import errors as s3_errors
from p3d.pipeline.storage.s3.uri import s3_uri, split_s3_uri
from p3d.pipeline.storage.store import CREATED, EXISTS, Store, StoreOptions
from p3d.pipeline.storage.urls import open_store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "out"))
    return open_store(f"s3://{request.getfixturevalue('bucket')}/some/prefix")


def test_an_object_is_created_once(store: Store) -> None:
    """The second create of a key returns EXISTS and changes nothing."""
    assert store.create("clips/a.parquet", b"first") == CREATED
    assert store.create("clips/a.parquet", b"second") == EXISTS
    assert store.read("clips/a.parquet") == b"first"


def test_a_temp_file_becomes_an_object_and_leaves_no_trace(store: Store) -> None:
    """What was built in a temporary file is created from it; the file is gone afterwards."""
    with store.temp_file() as path:
        path.write_bytes(b"built")
        assert path.suffix != ".parquet"
        assert store.create("clips/b.parquet", path) == CREATED
    assert not path.exists()
    assert store.read("clips/b.parquet") == b"built"
    assert [info.key for info in store.list("_job/tmp/")] == []


@pytest.mark.fault(36)
def test_a_disk_that_fills_up_while_an_object_is_built_is_named(store: Store) -> None:
    """An error of the disk while a temporary file is written is a store error that says what to do."""
    with pytest.raises(StoreFull, match="the disk is full"), store.temp_file():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("when", ["before it is written", "before it is read again", "before it is created"])
def test_a_swept_temp_file_is_an_outage(tmp_path: Path, when: str) -> None:
    """A run that took over may delete the temporary file of one still running: StoreUnknown, which may be retried."""
    store = LocalStore(str(tmp_path))
    with pytest.raises(StoreUnknown, match="taken over"), store.temp_file() as path:
        if when != "before it is written":
            path.write_bytes(b"rows")
            path.unlink()
        if when != "before it is created":
            path.read_bytes()
        store.create("clips/a.parquet", path)
    assert store.head("clips/a.parquet") is None


def test_listing_names_every_object_below_a_prefix_in_order(store: Store) -> None:
    """A listing is sorted, complete over several pages, and limited to its prefix."""
    keys = sorted(f"clips/{number:04d}.parquet" for number in range(7))
    for key in reversed(keys):
        store.create(key, b"x" * 3)
    store.create("clipsy/other", b"")
    assert [(info.key, info.size_bytes) for info in store.list("clips/")] == [(key, 3) for key in keys]
    assert list(store.list("nothing/")) == []


def test_missing_objects_are_distinguished_from_errors(store: Store) -> None:
    """head returns None; read, open and download raise StoreMissing."""
    assert store.head("clips/none") is None
    with pytest.raises(StoreMissing):
        store.read("clips/none")
    with pytest.raises(StoreMissing):
        store.open("clips/none")


def test_only_control_objects_can_be_replaced_or_deleted(store: Store) -> None:
    """Data can be created, never changed: replace and delete refuse anything outside _job/."""
    store.replace("_job/heartbeats/1.json", b"1")
    store.replace("_job/heartbeats/1.json", b"2")
    assert store.read("_job/heartbeats/1.json") == b"2"
    store.delete("_job/heartbeats/1.json")
    store.delete("_job/heartbeats/1.json")
    assert store.head("_job/heartbeats/1.json") is None
    with pytest.raises(ValueError, match="_job/"):
        store.replace("clips/a.parquet", b"")
    with pytest.raises(ValueError, match="_job/"):
        store.delete("clips/a.parquet")


def test_a_damaged_object_is_set_aside(store: Store) -> None:
    """It moves, unchanged, to a key below _job/damaged/ that no glob of the dataset matches."""
    store.create("clips/a.parquet", b"damaged")
    aside = store.set_aside("clips/a.parquet")
    assert store.head("clips/a.parquet") is None
    assert store.read(aside) == b"damaged"
    assert aside.startswith("_job/damaged/clips/a.parquet.")
    assert not aside.endswith(".parquet")
    assert store.create("clips/a.parquet", b"again") == "created"
    assert store.set_aside("clips/a.parquet") != aside
    with pytest.raises(StoreMissing):
        store.set_aside("clips/a.parquet")


def test_an_object_can_be_read_in_part(store: Store) -> None:
    """open returns a seekable file: the end of an object is read without the rest."""
    content = bytes(range(256)) * 4096
    store.create("clips/big", content)
    with store.open("clips/big") as file:
        file.seek(-10, os.SEEK_END)
        assert file.read() == content[-10:]
        file.seek(1000)
        assert file.read(500) == content[1000:1500]


def test_a_store_travels_to_another_process(store: Store) -> None:
    """A store pickles as its URL and options, and works after unpickling."""
    store.create("job.json", b"{}")
    assert pickle.loads(pickle.dumps(store)).read("job.json") == b"{}"


def test_probe_passes_a_store_that_creates_once(store: Store) -> None:
    """The launch probe leaves nothing behind."""
    store.prove_create_once()
    assert list(store.list("_job/probe/")) == []


@pytest.mark.fault(34)
def test_probe_refuses_a_store_that_overwrites(tmp_path: Path) -> None:
    """A store that lets a second writer win is refused with an error (fault matrix row 34)."""

    class Overwriting(LocalStore):
        def create(self, key: str, source: bytes | Path) -> str:  # type: ignore[override]
            path = self.root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source if isinstance(source, bytes) else source.read_bytes())
            return CREATED

    with pytest.raises(
        StoreUnsafe, match=r"second writer.* Use a local disk, or an S3 server that honours If-None-Match$"
    ):
        Overwriting(str(tmp_path)).prove_create_once()


@pytest.mark.fault(41)
def test_of_many_writers_at_once_one_wins(tmp_path: Path) -> None:
    """Concurrent creates of one key: exactly one returns `created`, and its bytes are the object."""
    store = LocalStore(str(tmp_path))
    for round_ in range(20):
        replies: dict[bytes, str] = {}
        barrier = threading.Barrier(6)

        def write(
            content: bytes,
            key: str = f"clips/{round_}",
            barrier: threading.Barrier = barrier,
            replies: dict[bytes, str] = replies,
        ) -> None:
            barrier.wait()
            replies[content] = store.create(key, content)

        threads = [threading.Thread(target=write, args=(b"%d" % number * 1000,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [content for content, reply in replies.items() if reply == CREATED]
        assert len(winners) == 1
        assert store.read(f"clips/{round_}") == winners[0]


@pytest.mark.fault(32)
def test_a_lost_reply_of_link_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the link was made but an error was returned (NFS), the object is ours and counts as created."""
    store, link = LocalStore(str(tmp_path)), os.link

    def link_then_fail(*given: Any, **named: Any) -> None:
        link(*given, **named)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(store_module.os, "link", link_then_fail)
    assert store.create("clips/a", b"ours") == CREATED
    monkeypatch.undo()
    assert store.head("clips/a").mtime_ns == (tmp_path / "clips/a").stat().st_mtime_ns  # type: ignore[union-attr]


NO_LINKS = r"^/.*: this file system has no hard links \(.+\), so .* Write to a local disk or to S3$"


@pytest.mark.parametrize(
    ("number", "expected", "message"),
    [
        (errno.ENOSPC, StoreFull, "the disk is full"),
        (errno.EACCES, StoreDenied, "no permission to read or write"),
        (errno.EIO, StoreUnknown, "Input/output error"),
        *[(number, StoreUnsafe, NO_LINKS) for number in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV)],
    ],
)
@pytest.mark.fault(38, 39)
def test_a_failing_link_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception], message: str
) -> None:
    """Errors of the disk are explained, and leave neither object nor temporary file (rows 38, 39)."""
    store = LocalStore(str(tmp_path))

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store_module.os, "link", fail)
    with pytest.raises(expected, match=message):
        store.create("clips/a", b"x")
    monkeypatch.undo()
    assert store.head("clips/a") is None
    assert list(store.list("_job/tmp/")) == []


@pytest.mark.fault(36)
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """Writing to a file system without space says so, with the path, and leaves nothing (row 36)."""
    script = f"""
mount -t tmpfs -o size=64k none {tmp_path} && exec {os.sys.executable} -c '
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.errors import StoreFull
try:
    LocalStore("{tmp_path}/out").create("clips/a", bytes(1 << 20))
except StoreFull as error:
    assert "full" in str(error), error
    assert not list(LocalStore("{tmp_path}/out").list("clips/"))
    raise SystemExit(77)
'"""
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if "unshare failed" in done.stderr or "not permitted" in done.stderr:
        pytest.skip(f"no private mounts here: {done.stderr.strip()}")
    assert done.returncode == 77, done.stderr


@pytest.mark.parametrize("key", ["a b", "é", "日本", "a+b%2F", "x" * 200, "tab\tname", "#hash?query"])
def test_any_key_survives_its_uri(bucket: str, key: str) -> None:
    """A key round-trips through its percent-encoded URI and through a listing (row 24)."""
    store = open_store(f"s3://{bucket}")
    store.create(key, b"1")
    assert split_s3_uri(s3_uri(bucket, key)) == (bucket, key)
    assert key in [info.key for info in store.list()]


def test_a_download_is_of_the_object_that_was_planned(bucket: str, tmp_path: Path) -> None:
    """With an ETag, an object that was replaced is not downloaded (row 25)."""
    store = open_store(f"s3://{bucket}")
    store.create("v.mp4", b"one")
    etag = store.head("v.mp4").etag  # type: ignore[union-attr] # it was just created
    store.download("v.mp4", tmp_path / "v", etag=etag)
    assert (tmp_path / "v").read_bytes() == b"one"
    with pytest.raises(StoreMissing):
        store.download("v.mp4", tmp_path / "w", etag='"0123456789abcdef0123456789abcdef"')


def test_an_s3_server_that_is_not_there_is_unknown_and_soon(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No server: StoreUnknown within the bounded retries, which are logged, without a traceback of botocore's."""
    caplog.set_level(logging.INFO, "p3d")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(s3_errors, "GONE_PATIENCE_S", 0.5)
    store = open_store("s3://nowhere", StoreOptions(endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(StoreUnknown, match="is the S3 server running"):
        store.create("a", b"")
    assert "put_object of s3://nowhere/a is tried again: " in caplog.text


def test_a_bucket_that_is_not_there_is_named(s3_server: dict[str, str]) -> None:
    """A missing bucket is reported as such, not as a missing object."""
    with pytest.raises(StoreMissing, match="no such bucket"):
        open_store("s3://no-such-bucket-here").create("a", b"")


@pytest.mark.parametrize("url", ["http://example.org/x", "gs://bucket", "s3://", "file://host/out", ""])
def test_other_places_are_refused(url: str) -> None:
    """Only folders and s3:// are stores."""
    with pytest.raises(InputError, match=re.escape(url or "not an empty text")):
        open_store(url)


def test_a_folder_may_be_written_as_a_uri(tmp_path: Path) -> None:
    """`file:///folder` is that folder."""
    assert open_store(f"file://{tmp_path}").url == open_store(str(tmp_path)).url == str(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"endpoint_url": "http://me:word@host:9000"},
            "a user name or a query; credentials come from botocore's chain",
        ),
        ({"endpoint_url": "http://host:9000/?X-Amz-Signature=1"}, "come from botocore's chain"),
        ({"endpoint_url": "host:9000"}, "is not of the form http://host:port"),
        ({"endpoint_url": "ftp://host"}, "is not of the form http://host:port"),
        ({"endpoint_url": "http:///"}, "is not of the form http://host:port"),
        ({"addressing": "odd"}, "addressing must be one of auto, path, virtual, not 'odd'"),
        ({"checksums": "odd"}, "checksums must be one of when_supported, when_required, not 'odd'"),
        ({"sse": "odd"}, "sse must be one of AES256, aws:kms, aws:kms:dsse, not 'odd'"),
        ({"sse_kms_key_id": "key"}, "--sse-kms-key-id needs --sse aws:kms or aws:kms:dsse"),
        ({"sse": "AES256", "sse_kms_key_id": "key"}, "needs --sse aws:kms or aws:kms:dsse"),
    ],
)
def test_ways_to_s3_that_cannot_be_are_refused(options: dict, words: str) -> None:
    """Each is an error that names the option; none repeats a password."""
    with pytest.raises(InputError, match=f"{re.escape(words)}$") as caught:
        StoreOptions(**options)
    assert str(caught.value).startswith(("--", *options))
    assert "word" not in str(caught.value) and "Signature" not in str(caught.value)


def test_ways_to_s3_that_can_be() -> None:
    """Valid options are kept unchanged."""
    odd = "http://X/a@b://c"  # any path after the host is allowed
    for options in (
        {"endpoint_url": "https://X/"},
        {"endpoint_url": odd},
        {"sse": "aws:kms", "sse_kms_key_id": "key"},
        {"sse": "AES256"},
    ):
        assert {name: getattr(StoreOptions(**options), name) for name in options} == options


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError("odd"), StoreUnknown, "out/key: None"),
        (OSError(errno.EIO, "Input/output error"), StoreUnknown, "out/key: Input/output error"),
        (OSError(errno.EROFS, "odd", "out/other"), StoreDenied, "out/other: this file system is read-only"),
    ],
)
def test_an_error_of_a_local_disk_names_the_file(error: OSError, kind: type[StoreError], message: str) -> None:
    """The message is the system's own unless we have a better one. An error without a number is StoreUnknown."""
    mapped = store_module.local_error(error, Path("out/key"))
    assert (type(mapped), str(mapped)) == (kind, message)


def test_a_disk_error_of_a_control_object_names_the_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object is named even if the system's error has no file name."""
    store = LocalStore(str(tmp_path))

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    store.replace("_job/beat", b"{}")
    monkeypatch.setattr(store_module.os, "unlink", fail)
    with pytest.raises(StoreUnknown, match="_job/beat: Input/output error"):
        store.delete("_job/beat")


def test_a_uri_that_is_not_text_is_refused() -> None:
    """S3 keys are UTF-8; other bytes are shown as \\xNN."""
    with pytest.raises(InputError, match=r"caf\\xe9.mp4 is not UTF-8"):
        split_s3_uri("s3://bucket/caf%E9.mp4")


def test_a_local_listing_is_of_what_is_there(tmp_path: Path) -> None:
    """The prefix may end inside a name. A broken link is not an object, and a missing folder is empty."""
    store = LocalStore(str(tmp_path))
    for key in ("clips/aa", "clips/ab", "clips/b"):
        store.create(key, b"1")
    (tmp_path / "clips" / "ac").symlink_to("nowhere")
    assert [info.key for info in store.list("clips/a")] == ["clips/aa", "clips/ab"]
    assert list(store.list("videos/")) == []


def test_a_local_object_can_be_copied(tmp_path: Path) -> None:
    """`download` copies the object's bytes, and raises StoreMissing if it does not exist."""
    store = LocalStore(str(tmp_path / "out"))
    store.create("weights/a", b"content")
    store.download("weights/a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"content"
    with pytest.raises(StoreMissing):
        store.download("weights/b", tmp_path / "copy")


def test_a_missing_object_inside_a_build_is_not_a_sweep(tmp_path: Path) -> None:
    """While the temporary file exists, StoreMissing is about another object and is not changed."""
    store = LocalStore(str(tmp_path))
    with pytest.raises(StoreMissing, match="clips/none"), store.temp_file() as temp:
        temp.write_bytes(b"1")
        store.read("clips/none")


# ---- an output that somebody else made ---------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with documents that no store may touch."""
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "letter.json").write_text('{"private": true}')
    (folder / f"1-{'0' * 32}.tmp").write_text("a draft")
    return folder


def documents(folder: Path) -> dict[str, tuple[str, int]]:
    return {path.name: (path.read_text(), path.stat().st_mtime_ns) for path in folder.iterdir()}


USES: dict[str, Callable[[LocalStore], object]] = {
    "read": lambda store: store.read("_job/tmp/letter.json"),
    "open": lambda store: store.open("_job/tmp/letter.json"),
    "head": lambda store: store.head("_job/tmp/letter.json"),
    "list": lambda store: list(store.list("_job/tmp/")),
    "create": lambda store: store.create("_job/tmp/new.json", b"{}"),
    "replace": lambda store: store.replace("_job/tmp/letter.json", b"{}"),
    "delete": lambda store: store.delete("_job/tmp/letter.json"),
    "set aside": lambda store: store.set_aside("_job/tmp/letter.json"),
    "build": lambda store: store.temp_file().__enter__(),
    "create elsewhere": lambda store: store.create("clips/a.parquet", b"rows"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("link", ["_job", "_job/tmp"])
@pytest.mark.fault(56)
def test_a_link_to_a_folder_is_not_followed(tmp_path: Path, elsewhere: Path, link: str, use: str) -> None:
    """With `_job` or `_job/tmp` as a link, all that needs it is refused by its name; what it points to stays as is."""
    store, target = LocalStore(str(tmp_path / "out")), elsewhere
    (store.root / link).parent.mkdir(parents=True)
    if link == "_job":
        target = tmp_path / "outer"
        target.mkdir()
        elsewhere.rename(target / "tmp")
        elsewhere = target / "tmp"
    (store.root / link).symlink_to(target)
    before = documents(elsewhere)
    with pytest.raises(StoreUnsafe, match=f"{link} is a link, which is not opened or followed"):
        USES[use](store)
    assert documents(elsewhere) == before and [path.name for path in target.iterdir()]
    assert all(info.key != "_job/tmp/letter.json" for info in store.list())


class Swaps:
    """The `os` of the store, whose nth call exchanges the folder `path` for a link to `target` before it runs."""

    def __init__(self, path: Path, target: Path, nth: int) -> None:
        self.path, self.target, self.left = path, target, nth

    def __getattr__(self, name: str) -> Any:
        true = getattr(os, name)
        if not callable(true) or name in ("fspath", "fsencode", "fsdecode", "getpid"):
            return true

        def call(*given: Any, **named: Any) -> Any:
            self.left -= 1
            if not self.left and self.path.exists():
                self.path.rename(self.path.with_name("moved"))
                self.path.symlink_to(self.target)
            return true(*given, **named)

        return call


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("folder", ["_job", "_job/tmp", "clips"])
@pytest.mark.fault(56)
def test_a_link_that_takes_the_place_of_a_folder_at_any_moment_leads_nowhere(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, folder: str, use: str
) -> None:
    """Before each system call in turn the folder becomes a link to documents: none of them is read or changed.

    A new temporary file may appear there, if that is the moment in which it is written.
    """
    if folder == "_job":
        (tmp_path / "outer").mkdir()
        elsewhere = elsewhere.rename(tmp_path / "outer" / "tmp")
    before, private = documents(elsewhere), (elsewhere / "letter.json").read_bytes()
    for nth in range(1, 200):
        store = LocalStore(str(tmp_path / f"out{nth}"))
        for key in ("_job/tmp/letter.json", "clips/b.parquet", "clips/letter.json"):
            (store.root / key).parent.mkdir(parents=True, exist_ok=True)
            (store.root / key).write_bytes(b"ours")
        target = elsewhere.parent if folder == "_job" else elsewhere
        swaps = Swaps(store.root / folder, target, nth)
        monkeypatch.setattr(store_module, "os", swaps)
        got: Any = None
        with contextlib.suppress(StoreError), warnings.catch_warnings():
            warnings.simplefilter("ignore", StrayFile)
            got = USES[use](store)
            got = got.read() if use == "open" else got
        monkeypatch.setattr(store_module, "os", os)
        assert got != private and not (use == "list" and "1-" in str(got))
        there = documents(elsewhere)
        assert {name: there[name] for name in before} == before
        for name in there.keys() - before.keys():
            assert re.fullmatch(r"\d+-[0-9a-f]{32}\.tmp", name), name
            (elsewhere / name).unlink()
        if swaps.left > 0:  # it has fewer calls
            break
    assert nth > 3


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "socket", "huge file"])
@pytest.mark.fault(56)
def test_what_is_not_a_small_regular_file_is_no_record(
    tmp_path: Path, elsewhere: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read and open refuse it at once, and listings skip and name it; replace and delete act on the name alone."""
    store, key = LocalStore(str(tmp_path / "out")), "_job/record.json"
    path = store.root / key
    path.parent.mkdir(parents=True)
    if "link" in kind:
        path.symlink_to(elsewhere / ("nothing" if "dangling" in kind else "letter.json"))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(path.parent)  # the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    before = documents(elsewhere)
    for use in (store.read, store.open, lambda key: store.download(key, tmp_path / "copy")):
        with pytest.raises(StoreUnsafe, match=re.escape(str(path))):
            use(key)
    if kind != "huge file":
        with pytest.raises(StoreUnsafe):
            store.head(key)
        with pytest.warns(StrayFile, match=re.escape(f"{path} is a {kind.split()[-1]}")):
            assert list(store.list()) == []
    assert store.create(key, b"{}") == EXISTS
    store.replace(key, b"{}")
    assert store.read(key) == b"{}"
    store.delete(key)
    assert not path.exists() and documents(elsewhere) == before


def test_a_huge_record_on_s3_is_refused_before_it_fills_the_memory(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record larger than any that p3d writes is refused by its name on S3, too."""
    store = open_store(f"s3://{bucket}")
    store.create("job.json", b"x" * 100_000)
    monkeypatch.setattr("p3d.pipeline.storage.store.RECORD_BYTES", 99_999)
    with pytest.raises(StoreUnsafe, match=f"s3://{bucket}/job.json has .* bytes, more than any file of that kind"):
        store.read("job.json")


@pytest.mark.parametrize(
    "key", ["../documents/letter.json", "/etc/passwd", "clips/../../documents/letter.json", "a//b"]
)
@pytest.mark.fault(57)
def test_a_key_names_only_what_is_below_the_root(tmp_path: Path, elsewhere: Path, key: str) -> None:
    """Keys with `..`, an empty part or a leading `/` are refused by every operation of a folder."""
    store, before = LocalStore(str(tmp_path / "out")), documents(elsewhere)
    store.create("clips/a", b"rows")
    for use in (store.read, store.open, store.head, store.set_aside, lambda key: store.create(key, b"{}")):
        with pytest.raises(StoreUnsafe, match="names no object"):
            use(key)
    for use in (store.delete, lambda key: store.replace(key, b"{}")):
        with pytest.raises(StoreUnsafe, match="names no object"):
            use(f"_job/../{key}")
    assert documents(elsewhere) == before


def test_the_root_itself_may_be_a_link(tmp_path: Path) -> None:
    """The user named the root, so a link there is followed."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    store = LocalStore(str(tmp_path / "out"))
    assert store.create("clips/a", b"rows") == CREATED
    assert store.read("clips/a") == b"rows" and [info.key for info in store.list()] == ["clips/a"]


# ---- an output that goes away ------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[LocalStore], object]] = {
    "create": lambda store: store.create("clips/b", b"rows"),
    "replace": lambda store: store.replace("_job/heartbeats/000001.json", b"{}"),
    "build": lambda store: store.temp_file().__enter__(),
    "set aside": lambda store: store.set_aside("clips/a"),
}


@pytest.mark.parametrize("held", [False, True], ids=["the root", "job.json"])
@pytest.mark.parametrize("how", ["removed", "an empty folder", "another job"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.fault(55)
def test_a_root_that_goes_away_is_never_made_again(tmp_path: Path, write: str, how: str, held: bool) -> None:
    """After its first write, a store writes only into the folder that it began with, and with hold_to into that job."""
    store = LocalStore(str(tmp_path / "out"))
    store.create("job.json", b"{}")
    store.create("clips/a", b"rows")
    if held:
        store.hold_to("job.json")
    store.root.rename(tmp_path / "unmounted")
    if how != "removed":
        store.root.mkdir()
    if how == "another job":
        (store.root / "job.json").write_bytes(b"{}")
    with pytest.raises(StoreGone, match=r"is gone, or another file or folder is in its place.* then resume"):
        WRITES[write](store)
    there = sorted(path.name for path in store.root.rglob("*")) if store.root.exists() else None
    assert there == {"removed": None, "an empty folder": [], "another job": ["job.json"]}[how]
    if store.root.exists():
        shutil.rmtree(store.root)
    (tmp_path / "unmounted").rename(store.root)
    WRITES[write](store)


@pytest.mark.fault(55)
def test_a_root_that_goes_away_while_a_file_is_built_is_gone(tmp_path: Path) -> None:
    """It is not mistaken for a temporary file that another run has swept, which would be tried again."""
    store = LocalStore(str(tmp_path / "out"))
    with pytest.raises(StoreGone), store.temp_file() as path:
        shutil.rmtree(store.root)
        path.write_bytes(b"rows")


@pytest.mark.fault(60)
def test_a_full_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for copies that cannot be made is a store error, which names TMPDIR's folder and what to do."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with (
        pytest.raises(StoreFull, match=f"{re.escape(tempfile.gettempdir())}: the disk is full"),
        scratch_folder("p3d-"),
    ):
        pass


@pytest.mark.parametrize(
    "url", ["s3://key:canary@bucket/out", "https://user:canary@host/out", "https://b.host/o?X-Amz-Signature=canary"]
)
def test_a_credential_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    """A message may end up in a log."""
    with pytest.raises(InputError, match="contains a credential") as caught:
        open_store(url)
    assert "canary" not in str(caught.value)
