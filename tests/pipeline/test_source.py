"""One video -> a local file: the one that was planned, or a failure reason. Nothing else is ever opened."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from p3d.pipeline.decode.fetch import local_file
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import VideoRef

HERE = StoreOptions()
Fetch = Callable[[VideoRef], bytes]


def refs(source: Path | str) -> dict[str, VideoRef]:
    """The planned videos of a source, by path."""
    return {row["path"]: VideoRef(**row) for row in find(str(source), HERE).videos.to_pylist()}


def planned(path: Path, content: bytes = b"content") -> VideoRef:
    """A file that was written and planned, as a video of its own folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return refs(path.parent)[path.name]


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A scratch folder, which every test leaves empty."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def fetch(scratch: Path) -> Fetch:
    """The bytes of a video, read inside its block."""

    def fetch(video: VideoRef) -> bytes:
        with local_file(video, HERE, scratch) as path:
            return Path(path).read_bytes()

    return fetch


def refused(fetch: Fetch, video: VideoRef) -> tuple[Reason, str]:
    """Why a video is refused."""
    with pytest.raises(VideoError) as caught:
        fetch(video)
    return caught.value.reason, caught.value.detail


# --- local files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a b\n%2F\u00fc.mp4", os.fsdecode(b"caf\xe9.mp4")])
def test_a_local_file_is_used_where_it_is(tmp_path: Path, scratch: Path, name: str) -> None:
    """There is no copy: the path is the absolute path of the source, whatever its name."""
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / name).write_bytes(b"content")
    [video] = refs(tmp_path / "v").values()
    with local_file(video, HERE, scratch) as path:
        assert Path(path).samefile(tmp_path / "v" / name) and Path(path).is_absolute()
        assert list(scratch.iterdir()) == []


def test_a_video_that_was_never_there_is_missing(tmp_path: Path, fetch: Fetch) -> None:
    """A list entry without a file stays missing, even if a file appears later: it is not the planned one."""
    (tmp_path / "l.txt").write_text("gone.mp4\n")
    video = refs(tmp_path / "l.txt")["gone.mp4"]
    for _ in range(2):
        assert refused(fetch, video) == (Reason.SOURCE_MISSING, "was not there when the job was planned")
        (tmp_path / "gone.mp4").write_bytes(b"here")


@pytest.mark.fault(26)
def test_a_deleted_file_is_missing(tmp_path: Path, fetch: Fetch) -> None:
    """A file that no longer exists is source_missing."""
    video = planned(tmp_path / "v" / "a.mp4")
    (tmp_path / "v" / "a.mp4").unlink()
    assert refused(fetch, video) == (Reason.SOURCE_MISSING, "is not there any more")


def replaced_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"now a file")


def replaced_by_a_loop(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


@pytest.mark.parametrize("replace", [replaced_by_a_file, replaced_by_a_loop])
def test_a_file_whose_folder_became_something_else_is_missing(
    tmp_path: Path, fetch: Fetch, replace: Callable[[Path], None]
) -> None:
    """If a folder becomes a file or a link to itself, its videos fail; it is not an internal error."""
    video = planned(tmp_path / "v" / "a.mp4")
    replace(tmp_path / "v")
    assert refused(fetch, video)[0] == Reason.SOURCE_MISSING


def make_folder(path: Path) -> None:
    path.mkdir()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock, pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)  # the name of a socket is at most 107 bytes
        sock.bind(path.name)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("make", "detail"),
    [
        (make_folder, "is a directory, not a file"),
        (make_fifo, "is a fifo, not a file"),
        (make_socket, "is a socket, not a file"),
        (link_to_device, "is a device, not a file"),
    ],
)
@pytest.mark.fault(22)
def test_what_is_not_a_file_is_refused_unopened(
    tmp_path: Path, fetch: Fetch, make: Callable[[Path], None], detail: str
) -> None:
    """A directory, fifo, socket or device that was planned, or that replaced a video, is not_a_file."""
    make(tmp_path / "a.mp4")
    (tmp_path / "l.txt").write_text("a.mp4\n")
    assert refused(fetch, refs(tmp_path / "l.txt")["a.mp4"]) == (Reason.NOT_A_FILE, detail)
    video = planned(tmp_path / "v" / "a.mp4")
    (tmp_path / "v" / "a.mp4").unlink()
    make(tmp_path / "v" / "a.mp4")
    assert refused(fetch, video) == (Reason.NOT_A_FILE, detail)


@pytest.mark.fault(26)
def test_a_file_without_permission_is_denied(scratch: Path) -> None:
    """A folder without permission is source_denied; root switches to an ordinary user to test it."""
    with tempfile.TemporaryDirectory() as place:  # tmp_path cannot be entered by an ordinary user
        Path(place).chmod(0o755)
        video = planned(Path(place) / "v" / "a.mp4")
        (Path(place) / "v").chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(VideoError) as caught, local_file(video, HERE, scratch):
                pass
        finally:
            os.seteuid(user)
            (Path(place) / "v").chmod(0o755)
    assert (caught.value.reason, caught.value.detail) == (Reason.SOURCE_DENIED, "no permission to reach the file")


def rewrite(path: Path) -> None:
    """The same size, a different time."""
    times = path.stat()
    path.write_bytes(b"CONTENT")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


def grow(path: Path) -> None:
    """A different size, the same time."""
    times = path.stat()
    path.write_bytes(b"content, and more of it")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def swap(path: Path) -> None:
    """Another file is moved over it."""
    path.with_name("b").write_bytes(b"a longer content")
    path.with_name("b").rename(path)


@pytest.mark.parametrize("change", [rewrite, grow, swap])
@pytest.mark.fault(25)
def test_a_file_that_was_changed_after_planning_is_refused(
    tmp_path: Path, fetch: Fetch, change: Callable[[Path], None]
) -> None:
    """A size or time that differs from the plan is source_changed, before a byte is read."""
    video = planned(tmp_path / "v" / "a.mp4")
    assert fetch(video) == b"content"
    change(tmp_path / "v" / "a.mp4")
    assert refused(fetch, video)[0] == Reason.SOURCE_CHANGED


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rewrite, Reason.SOURCE_CHANGED),
        (grow, Reason.SOURCE_CHANGED),
        (swap, Reason.SOURCE_CHANGED),
        (Path.unlink, Reason.SOURCE_MISSING),
    ],
)
@pytest.mark.fault(25)
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, scratch: Path, change: Callable[[Path], None], reason: Reason
) -> None:
    """Frames of two versions are never mixed: at the end of the block the file must still be the planned one."""
    video = planned(tmp_path / "v" / "a.mp4")
    read = b""
    with pytest.raises(VideoError) as caught, local_file(video, HERE, scratch) as path:
        read = Path(path).read_bytes()
        change(Path(path))
    assert (read, caught.value.reason) == (b"content", reason)


def test_an_error_inside_the_block_passes(tmp_path: Path, scratch: Path) -> None:
    """An error of the decoder reaches its caller unchanged."""
    video = planned(tmp_path / "v" / "a.mp4")
    with pytest.raises(VideoError) as caught, local_file(video, HERE, scratch):
        raise VideoError(Reason.TRUNCATED, "ends early")
    assert caught.value.reason == Reason.TRUNCATED


# --- links ------------------------------------------------------------------------------------------------------------


def test_a_link_inside_the_source_folder_is_followed(tmp_path: Path, fetch: Fetch) -> None:
    """A link to a file of the same archive is followed from any depth, and the archive itself may be a link."""
    (tmp_path / "v" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "v" / "a.mp4").write_bytes(b"content")
    (tmp_path / "v" / "deep" / "er" / "link.mp4").symlink_to("../../a.mp4")
    (tmp_path / "v" / "absolute.mp4").symlink_to(tmp_path / "v" / "a.mp4")
    (tmp_path / "other").symlink_to(tmp_path / "v")
    for root in ("v", "other"):
        videos = refs(tmp_path / root)
        assert sorted(videos) == ["a.mp4", "absolute.mp4", "deep/er/link.mp4"]
        assert {fetch(video) for video in videos.values()} == {b"content"}


@pytest.mark.parametrize("target", ["secret.mp4", "videos2/a.mp4"])
@pytest.mark.parametrize("link", ["link.mp4", "deep/link.mp4"])
@pytest.mark.fault(22)
def test_a_link_out_of_the_source_folder_is_refused(tmp_path: Path, fetch: Fetch, target: str, link: str) -> None:
    """A link that leads out is not_a_file, also if the name of the target folder starts with that of the source."""
    (tmp_path / "videos" / "deep").mkdir(parents=True)
    (tmp_path / "videos2").mkdir()
    (tmp_path / target).write_bytes(b"secret")
    (tmp_path / "videos" / link).symlink_to(tmp_path / target)
    video = refs(tmp_path / "videos")[link]
    assert video.size_bytes == 6
    assert refused(fetch, video) == (Reason.NOT_A_FILE, "is a link that leads out of the source folder")


@pytest.mark.fault(22)
def test_a_link_that_replaces_a_file_is_refused(tmp_path: Path, fetch: Fetch) -> None:
    """A file of the same size and time that is now a link out of the folder is refused."""
    video = planned(tmp_path / "v" / "a.mp4")
    shutil.copy2(tmp_path / "v" / "a.mp4", tmp_path / "outside.mp4")
    (tmp_path / "v" / "a.mp4").unlink()
    (tmp_path / "v" / "a.mp4").symlink_to(tmp_path / "outside.mp4")
    assert refused(fetch, video)[0] == Reason.NOT_A_FILE


def test_a_list_may_name_any_path(tmp_path: Path, fetch: Fetch) -> None:
    """Absolute entries and entries with `..` have no source folder, so a link is followed."""
    (tmp_path / "lists").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"content")
    (tmp_path / "b.mp4").write_bytes(b"content")
    (tmp_path / "link.mp4").symlink_to("b.mp4")
    (tmp_path / "lists" / "l.txt").write_text(f"../a.mp4\n{tmp_path}/link.mp4\n")
    videos = refs(tmp_path / "lists" / "l.txt")
    assert len(videos) == 2 and {fetch(video) for video in videos.values()} == {b"content"}


def test_a_video_right_below_the_root_of_the_disk_is_a_file(tmp_path: Path, fetch: Fetch) -> None:
    """A source folder `/` (a container with /video.mp4) is valid."""
    video = planned(tmp_path / "v" / "a.mp4")
    path = str(tmp_path / "v" / "a.mp4").removeprefix("/")
    below_root = VideoRef("id", path, video.uri, video.version, video.size_bytes, video.mtime_ns)
    assert fetch(below_root) == b"content"


# --- S3 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def put(bucket: str) -> Callable[[str, bytes], Any]:
    import boto3

    client = boto3.client("s3")
    return lambda key, body: client.put_object(Bucket=bucket, Key=key, Body=body)


def test_an_object_is_copied_to_scratch_and_removed(bucket: str, put: Any, scratch: Path) -> None:
    """Inside the block there is a local copy with the right bytes and extension. Afterwards scratch is empty, even
    after an error."""
    content = bytes(range(256)) * 100
    put("v/a b %2F \u00fc.mp4", content)
    [video] = refs(f"s3://{bucket}/v").values()
    with local_file(video, HERE, scratch) as path:
        assert Path(path).read_bytes() == content
        assert Path(path).suffix == ".mp4" and scratch in Path(path).parents
    assert list(scratch.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), local_file(video, HERE, scratch):
        raise KeyboardInterrupt


@pytest.mark.fault(25)
def test_an_object_that_is_no_longer_the_same(bucket: str, put: Any, fetch: Fetch) -> None:
    """Replaced after planning (even by the same size) is source_changed, deleted is source_missing."""
    import boto3

    put("v/a.mp4", b"one")
    video = refs(f"s3://{bucket}/v")["a.mp4"]
    assert fetch(video) == b"one"
    put("v/a.mp4", b"two")
    reason, detail = refused(fetch, video)
    assert reason == Reason.SOURCE_CHANGED and "other ETag" in detail
    put("v/a.mp4", b"one")
    assert fetch(video) == b"one"
    boto3.client("s3").delete_object(Bucket=bucket, Key="v/a.mp4")
    assert refused(fetch, video)[0] == Reason.SOURCE_MISSING
