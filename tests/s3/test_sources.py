"""Videos on S3: odd keys, objects that change, vanish or are denied, and bodies that do not arrive completely."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.dataset.plans import Manifest, write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.decode.fetch import local_file
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.errors import Reason, StoreDenied, StoreNoBucket, StoreUnknown, VideoError
from p3d.pipeline.recipe import ShardSizing
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.s3 import body as s3_body
from p3d.pipeline.storage.s3.client import client_for
from p3d.pipeline.storage.s3.store import S3Store
from p3d.pipeline.storage.s3.uri import s3_uri
from p3d.pipeline.storage.store import DEFAULTS, StoreOptions
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import DecodeMessage, Failure, FrameSpec, VideoEnd, VideoRef, VideoStart
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.jobs.test_cli import in_process
from tests.pipeline.rows import recipe
from tests.s3.conftest import new_store
from tests.s3.proxy import Fault, Proxy
from tests.servers import ACCESS_KEY
from tests.zoo import make

NAMES = (
    "a.mp4",
    "caf\u00e9.mp4",
    "cafe\u0301.mp4",  # the same to the eye
    "\u65e5\u672c\u8a9e/\U0001f3ac.mp4",
    "trailing space /x.mp4 ",
    " leading.mp4",
    "a%2Fb.mp4",
    "a%252Fb.mp4",
    "a+b.mp4",
    "a b.mp4",
    "q?x=1&y=2#z.mp4",
    "quote'\"`.mp4",
    "back\\slash.mp4",
    "tab\t.mp4",
    "line\nfeed.mp4",
    "return\r.mp4",
    "escape\x1b[31m.mp4",
    "one\x01.mp4",
    "delete\x7f.mp4",
    "<&>]]>.mp4",
    "~$@!*'();:,=.mp4",
    "x" * 200 + "/" + "\u00fc" * 100 + ".mp4",
)
UNTYPED = ("trailing space /x.mp4 ",)  # no known extension, so only a list can name them
BEYOND_SERVER = ("back\\slash.mp4", "line\nfeed.mp4")  # SeaweedFS treats \ as /, moto rejects a line feed
LONGEST = 1024  # bytes of a key


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder for copies, which must be empty after every test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real video of 30 frames."""
    path = tmp_path_factory.mktemp("v") / "v.mp4"
    return make.video(path, "libx264", 30, options={"preset": "ultrafast"}, noise=40).read_bytes()


def put(store: S3Store, key: str, content: bytes) -> None:
    client_for(DEFAULTS).put_object(Bucket=store.bucket, Key=store.prefix + key, Body=content)


def planned(store: S3Store, front: Proxy, key: str = "v.mp4") -> VideoRef:
    """The row of one object as in a plan; the recorded requests of the proxy are cleared."""
    [row] = find(f"{store.url}/{key}", DEFAULTS).videos.to_pylist()
    front.requests.clear()
    return VideoRef(**row)


def fetched(video: VideoRef, scratch: Path, options: StoreOptions = DEFAULTS) -> bytes:
    with local_file(video, options, scratch) as path:
        return Path(path).read_bytes()


def decoded(video: VideoRef, scratch: Path) -> list[DecodeMessage]:
    frames, sampling = FrameSpec((64, 64), (72, 96)), parse_sampling("every:16", clip_frames=16)
    limits, policy = DecodeLimits(), DecodePolicy()
    where = {"store_options": DEFAULTS, "scratch": scratch}
    return list(decode_messages(video, frames, sampling, policy=policy, limits=limits, **where))  # type: ignore[arg-type]


def reason_of(video: VideoRef, scratch: Path) -> Reason:
    """Why a video has no frames. Only its start message may come before the failure."""
    start, failure = decoded(video, scratch)
    assert isinstance(start, VideoStart) and isinstance(failure, Failure)
    return failure.reason


@pytest.fixture
def store(any_front: Proxy, content: bytes) -> S3Store:
    """A store with one video, on each server in turn."""
    made = new_store(any_front)
    made.create("v.mp4", content)
    made.create("other.mp4", content)
    return made


@pytest.mark.fault(24)
def test_any_key_is_listed_planned_and_read(any_front: Proxy, scratch: Path, tmp_path: Path) -> None:
    """Unicode, 1024 bytes, %2F, plus, blanks, control characters: each is read by its own URI, through Parquet."""
    store = new_store(any_front)
    longest = "l" * 200 + "/"
    longest = longest * ((LONGEST - len(store.prefix) - 10) // len(longest))
    longest += "x" * (LONGEST - len((store.prefix + longest).encode()) - 4) + ".mp4"
    names = {*NAMES, longest} - {BEYOND_SERVER[any_front.env["AWS_ACCESS_KEY_ID"] != ACCESS_KEY]}
    for name in names:
        put(store, name, name.encode())
    assert len((store.prefix + longest).encode()) == LONGEST
    found = find(store.url, DEFAULTS)
    assert any("encoding-type=url" in request.path for request in any_front.requests)
    assert {*found.videos["path"].to_pylist(), *found.skipped} == names
    assert set(found.skipped) == set(UNTYPED)

    listed = tmp_path / "list.parquet"
    uris = [s3_uri(store.bucket, store.prefix + name) for name in UNTYPED]
    pq.write_table(pa.table({"uri": [*found.videos["uri"].to_pylist(), *uris]}), listed)
    out = LocalStore(str(tmp_path / "out"))
    plan = write_plan(
        out, 1, recipe(), with_shards(find(str(listed), DEFAULTS).videos, ShardSizing(100)), 0, ShardSizing()
    )
    videos = Manifest(out, plan).shard(0).videos
    assert len(videos) == len(names)
    assert {fetched(video, scratch).decode() for video in videos} == names


@pytest.mark.fault(25)
def test_an_object_that_was_replaced_is_source_changed(
    any_front: Proxy, store: S3Store, scratch: Path, content: bytes
) -> None:
    """Other bytes of the same length after planning: no frame, one request. The planned content can be read again."""
    video = planned(store, any_front)
    put(store, "v.mp4", content[::-1])
    any_front.requests.clear()
    assert reason_of(video, scratch) == Reason.SOURCE_CHANGED
    assert any_front.counts()["GET"] == 1
    put(store, "v.mp4", content)
    assert isinstance(decoded(video, scratch)[-1], VideoEnd)


@pytest.mark.fault(25)
def test_an_object_that_is_replaced_while_it_is_read_is_never_mixed(
    any_front: Proxy, store: S3Store, scratch: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body is cut off, and the object is replaced before the rest is requested: source_changed, not two halves."""
    video = planned(store, any_front)

    def replace(_: float) -> None:
        put(store, "v.mp4", content[::-1])

    monkeypatch.setattr(s3_body, "time", SimpleNamespace(sleep=replace, monotonic=time.monotonic))
    any_front.faults = [Fault("cut", method="GET", at=len(content) // 2, times=1)]
    assert reason_of(video, scratch) == Reason.SOURCE_CHANGED


@pytest.mark.fault(25)
def test_a_server_that_returns_another_object_is_detected(moto_front: Proxy, content: bytes, scratch: Path) -> None:
    """If-Match is removed and the object replaced: the ETag of the reply shows it."""
    store = new_store(moto_front)
    store.create("v.mp4", content)
    video = planned(store, moto_front)
    put(store, "v.mp4", content[::-1])
    moto_front.faults = [Fault("strip", method="GET", header="if-match")]  # moto accepts any signature
    assert reason_of(video, scratch) == Reason.SOURCE_CHANGED


@pytest.mark.fault(26)
def test_a_deleted_object_is_source_missing(any_front: Proxy, store: S3Store, scratch: Path) -> None:
    """Deleted after planning: reported after at most two requests."""
    video = planned(store, any_front)
    client_for(DEFAULTS).delete_object(Bucket=store.bucket, Key=f"{store.prefix}v.mp4")
    any_front.requests.clear()
    assert reason_of(video, scratch) == Reason.SOURCE_MISSING
    assert len(any_front.requests) <= 2


@pytest.mark.fault(26)
def test_one_object_that_is_denied_fails_alone(any_front: Proxy, store: S3Store, scratch: Path) -> None:
    """403 for one key: source_denied after two requests; the others are read."""
    video, other = planned(store, any_front), planned(store, any_front, "other.mp4")
    any_front.faults = [Fault("status", key="/v.mp4", status=403, code="AccessDenied")]
    assert reason_of(video, scratch) == Reason.SOURCE_DENIED
    assert any_front.counts() == {"GET": 2}  # the object, and whether anything is answered
    assert isinstance(decoded(other, scratch)[-1], VideoEnd)


@pytest.mark.fault(26)
def test_denial_of_everything_is_an_error_of_the_job(any_front: Proxy, store: S3Store, scratch: Path) -> None:
    """403 for every request, or a missing bucket: an error is raised, and no video fails."""
    video = planned(store, any_front)
    any_front.faults = [Fault("status", status=403, code="AccessDenied")]
    with pytest.raises(StoreDenied):
        decoded(video, scratch)
    assert len(any_front.requests) <= 4
    any_front.faults = [Fault("status", status=404, code="NoSuchBucket")]
    with pytest.raises(StoreNoBucket):
        decoded(video, scratch)


@pytest.mark.fault(30)
@pytest.mark.parametrize("kind", ["cut", "reset", "trickle"])
def test_a_body_that_is_cut_off_fails_no_video(front: Proxy, content: bytes, scratch: Path, kind: Any) -> None:
    """If once, all frames arrive. If always, it is a store error, which the job waits out, and no frame is used."""
    store = new_store(front)
    store.create("v.mp4", content)
    video = planned(store, front)
    at = len(content) // 3
    front.faults = [Fault(kind, method="GET", at=at, times=1)]
    end = decoded(video, scratch)[-1]
    assert isinstance(end, VideoEnd) and end.n_frames == 30
    front.faults, seen = [Fault(kind, method="GET", at=at if kind == "cut" else 0)], []
    if kind == "cut":  # always at the same share of the range: it would complete in the end
        front.faults = [Fault(kind, method="GET", at=10)]
    with pytest.raises(StoreUnknown, match="was cut off"):
        seen = decoded(video, scratch)
    assert seen == []


@pytest.mark.fault(31)
def test_only_what_is_stored_corrupt_is_source_corrupt(any_front: Proxy, store: S3Store, scratch: Path) -> None:
    """A flipped byte is fetched again. The same wrong bytes twice fail the video; different ones are a store error."""
    video = planned(store, any_front)
    any_front.faults = [Fault("flip", method="GET", times=1)]
    assert isinstance(decoded(video, scratch)[-1], VideoEnd)
    any_front.faults = [Fault("flip", method="GET", at=50)]
    assert reason_of(video, scratch) == Reason.SOURCE_CORRUPT
    any_front.faults = [Fault("flip", method="GET")]
    with pytest.raises(StoreUnknown, match="different every time"):
        decoded(video, scratch)


@pytest.mark.fault(28)
def test_an_outage_fails_no_video(any_front: Proxy, store: S3Store, scratch: Path) -> None:
    """A source that does not answer is an error of the job; a partial copy is removed."""
    video = planned(store, any_front)
    any_front.faults = [Fault("status")]
    with pytest.raises(StoreUnknown):
        decoded(video, scratch)


def test_options_are_sent_in_the_requests(any_front: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Requester pays in every request, encryption in every write; profile, region and endpoint from the options."""
    bucket = new_store(any_front).bucket
    config = "[profile archive]\nregion = eu-west-3\naws_access_key_id = AKPROFILE\naws_secret_access_key = x\n"
    (tmp_path / "config").write_text(config)
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    how = {"endpoint_url": any_front.url, "profile": "archive", "requester_pays": True, "sse": "aws:kms"}
    options = StoreOptions(**how, sse_kms_key_id="key-1", addressing="path")  # type: ignore[arg-type]
    store = open_store(f"s3://{bucket}/wire", options)
    any_front.faults = [Fault("status", status=403, code="AccessDenied")]
    any_front.requests.clear()
    asks = (
        lambda: store.create("k", b"1"),
        lambda: store.read("k"),
        lambda: store.head("k"),
        lambda: list(store.list()),
        lambda: store.set_aside("k"),
        lambda: store.replace("_job/k", b"1"),
        lambda: store.delete("_job/k"),
    )
    for ask in asks:
        with contextlib.suppress(StoreDenied):
            ask()
    assert any_front.counts() == {"PUT": 3, "GET": 3, "HEAD": 1, "DELETE": 1}
    for request in any_front.requests:
        assert request.headers["x-amz-request-payer"] == "requester", request
        assert "Credential=AKPROFILE/" in request.headers["authorization"]
        assert "/eu-west-3/s3/" in request.headers["authorization"]
        assert request.path.startswith(f"/{bucket}")
        encrypted = request.headers.get("x-amz-server-side-encryption")
        assert encrypted == ("aws:kms" if request.method == "PUT" else None)
        if request.method == "PUT":
            assert request.headers["x-amz-server-side-encryption-aws-kms-key-id"] == "key-1"


def test_the_bucket_is_in_the_host_with_virtual_addressing(moto_front: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """--addressing-style virtual names the bucket in the host, path in the path."""
    port = moto_front.url.rpartition(":")[2]
    plain = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **how: plain("127.0.0.1", *more, **how))
    moto_front.faults = [Fault("status", status=403, code="AccessDenied")]
    for addressing, host, path in (
        ("virtual", f"bucket.s3.test:{port}", "/key"),
        ("path", f"s3.test:{port}", "/bucket/key"),
    ):
        moto_front.requests.clear()
        store = open_store("s3://bucket", StoreOptions(endpoint_url=f"http://s3.test:{port}", addressing=addressing))
        with pytest.raises(StoreDenied):
            store.read("key")
        assert [(r.headers["host"], r.path) for r in moto_front.requests] == [(host, path)]


def test_a_video_error_is_what_the_block_raises(front: Proxy, content: bytes, scratch: Path) -> None:
    """Inside the data plane the error is a VideoError with the location, and the copy is removed."""
    store = new_store(front)
    store.create("v.mp4", content)
    video = planned(store, front)
    put(store, "v.mp4", b"other")
    with pytest.raises(VideoError, match="no longer the object that was planned"):
        fetched(video, scratch)


def test_plan_of_a_prefix_decodes_a_sample_and_names_what_fails(
    any_front: Proxy, store: S3Store, content: bytes, small_weights: Path
) -> None:
    """Videos on S3 are downloaded for the trial, which counts their clips and failures; no header is probed."""
    put(store, "in/good.mp4", content)
    put(store, "in/cut.mp4", content[: len(content) // 2])
    words = ["plan", f"{store.url}/in", "--weights", str(small_weights), "--json"]
    code, shown, said = in_process(*words)
    assert code == 0, said
    found = json.loads(shown)
    assert (found["n_videos"], found["n_tried"], found["n_failed"]) == (2, 2, 1)
    assert [one["examples"][0][0] for one in found["failing"]] == ["cut.mp4"]
    assert found["n_clips"] >= 1 and found["size_bytes"] == len(content) + len(content) // 2
