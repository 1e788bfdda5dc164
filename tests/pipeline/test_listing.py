"""Sources -> rows: every video of a source is a row with a stable id, and all other files are reported or refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p3d.pipeline.dataset.schema import MANIFEST, own_columns
from p3d.pipeline.decode.fetch import local_file
from p3d.pipeline.errors import InputError, Reason, StoreMissing, VideoError
from p3d.pipeline.sources.identity import content_version, local_path, stat_version, video_id
from p3d.pipeline.sources.listing import SourceListing, find
from p3d.pipeline.sources.lists import line_numbers
from p3d.pipeline.storage.s3.uri import s3_uri
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import VideoRef

HERE = StoreOptions()
TREE = ("a.mp4", "more/a.mp4", "more/deep/b.MKV", "z z.webm")
ODD_NAMES = (
    "new\nline.mp4",
    "a b.mp4",
    "\u00fcml\u00e4ut \u6620\u753b.mp4",
    "per%2Fcent.mp4",
    "plus+and&.mp4",
    "#?.mp4",
)
ODD_KEYS = ODD_NAMES[1:]  # the S3 server of the tests does not support a newline in a key
Put = Callable[..., Any]


def fill(root: Path, *names: str) -> Path:
    """Files whose content is their own name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def rows(found: SourceListing) -> list[dict[str, Any]]:
    return found.videos.to_pylist()


def column(found: SourceListing, name: str) -> list[Any]:
    return found.videos[name].to_pylist()


@pytest.fixture(scope="module")
def client(s3_server: dict[str, str]) -> Any:
    """A client of the server, shared because making one takes longer than most tests."""
    import boto3

    return boto3.client("s3")


@pytest.fixture
def put(bucket: str, client: Any) -> Put:
    """Create objects in the bucket. Their content is as given, by default their own key."""

    def put(key: str, body: bytes | None = None) -> None:
        client.put_object(Bucket=bucket, Key=key, Body=key.encode() if body is None else body)

    return put


# --- folders ----------------------------------------------------------------------------------------------------------

names_of_files = st.tuples(
    st.lists(st.binary(max_size=4), max_size=2).map(tuple),
    st.binary(max_size=6),
    st.sampled_from([b".mp4", b".MKV", b".txt", b".mp4.part", b""]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(names_of_files, min_size=1, max_size=6, unique=True))
@example([((b"\xff",), b"\n", b".mp4"), ((), b"\xe9", b".mp4"), ((), b"\xe9", b".txt")])
def test_every_file_of_a_folder_is_a_row_or_is_named_as_skipped(files: list) -> None:
    """Whatever bytes are in the names: `uri` leads to each video, other files are in `skipped`, ids are distinct, and
    neither the order in which the files were made nor the location of the folder changes the rows."""
    clean = [
        ([b"d" + _legal(part) for part in folders], b"f" + _legal(stem) + suffix) for folders, stem, suffix in files
    ]
    made = {b"/".join([*folders, name]): name.endswith((b".mp4", b".MKV")) for folders, name in clean}
    listed = []
    for order in (sorted(made), sorted(made, reverse=True)):
        with tempfile.TemporaryDirectory() as folder:
            for name in order:
                path = os.path.join(os.fsencode(folder), name)  # noqa: PTH118 - bytes
                os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120 - bytes
                with open(path, "wb") as file:  # noqa: PTH123 - bytes
                    file.write(name)
            if not any(made.values()):
                with pytest.raises(InputError, match=rf"\({len(made)} other files\)"):
                    find(folder, HERE)
                return
            found = find(folder, HERE)
            contents = []
            for uri in column(found, "uri"):
                with open(local_path(uri), "rb") as file:  # noqa: PTH123 - bytes
                    contents.append(file.read())
            listed.append([(row["video_id"], row["path"], row["size_bytes"]) for row in rows(found)])
    assert sorted(contents) == sorted(name for name, is_video in made.items() if is_video)
    assert [path for _, path, _ in listed[0]] == [content.decode("utf-8", "backslashreplace") for content in contents]
    assert sorted(found.skipped) == sorted(
        name.decode("utf-8", "backslashreplace") for name, is_video in made.items() if not is_video
    )
    assert len(set(column(found, "video_id"))) == len(contents)
    assert listed[0] == listed[1]


def _legal(part: bytes) -> bytes:
    return part.replace(b"/", b"_").replace(b"\0", b"_")


def test_a_row_says_which_file_and_which_content(tmp_path: Path) -> None:
    """`video_id` is a hash of the path below the root, `version` of size and mtime; `path` is for display."""
    path = fill(tmp_path, "more/a.mp4") / "more" / "a.mp4"
    [row] = rows(find(str(tmp_path), HERE))
    assert (row["path"], row["uri"], row["size_bytes"]) == ("more/a.mp4", f"file://{quote(str(path))}", 10)
    assert row["video_id"] == video_id(b"more/a.mp4") and row["mtime_ns"] == path.stat().st_mtime_ns
    assert row["version"] == stat_version(path.stat()) == content_version(10, path.stat().st_mtime_ns)
    assert re.fullmatch("[0-9a-f]{32}", row["video_id"]) and re.fullmatch("[0-9a-f]{16}", row["version"])
    assert row["etag"] is None


@pytest.mark.fault(23)
def test_files_of_one_name_in_two_folders_are_two_videos(tmp_path: Path) -> None:
    """`a/cat.mp4` and `b/cat.mp4` do not collide."""
    found = find(str(fill(tmp_path, "a/cat.mp4", "b/cat.mp4")), HERE)
    assert len(set(column(found, "video_id"))) == 2 and column(found, "path") == ["a/cat.mp4", "b/cat.mp4"]


def test_moving_an_archive_changes_neither_id_nor_version(tmp_path: Path) -> None:
    """The location of the root does not matter if the files keep their times. A new time or size is a new version, not
    a new id."""
    before = find(str(fill(tmp_path / "here", *TREE)), HERE)
    shutil.copytree(tmp_path / "here", tmp_path / "elsewhere" / "deep")
    after = find(str(tmp_path / "elsewhere" / "deep"), HERE)
    assert column(after, "uri") != column(before, "uri")
    for name in ("video_id", "version", "path"):
        assert column(after, name) == column(before, name)
    versions = [column(before, "version")]
    for content in (b"a.mp4", b"another size, the same time"):
        (tmp_path / "here" / "a.mp4").write_bytes(content)
        os.utime(tmp_path / "here" / "a.mp4", ns=(1, 1))
        touched = find(str(tmp_path / "here"), HERE)
        assert column(touched, "video_id") == column(before, "video_id")
        versions.append(column(touched, "version"))
    of_paths = dict(zip(column(before, "path"), zip(*versions, strict=True), strict=True))
    assert {path: len(set(of)) for path, of in of_paths.items()} == {path: 3 if path == "a.mp4" else 1 for path in TREE}


def test_one_file_is_a_source(tmp_path: Path) -> None:
    """A single file is named by its own name, whatever its extension, and by `file://` too."""
    fill(tmp_path, "a.mp4", "film.bin")
    [row] = rows(find(str(tmp_path / "a.mp4"), HERE))
    assert row["video_id"] == column(find(str(tmp_path), HERE), "video_id")[0]
    assert rows(find(f"file://{tmp_path}/a.mp4", HERE)) == [row]
    assert column(find(str(tmp_path / "film.bin"), HERE), "path") == ["film.bin"]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.fault(24)
def test_an_odd_name_survives_on_disk(tmp_path: Path, name: str) -> None:
    """`uri` is one line of ASCII that decodes to the bytes of the name, and `path` shows the name."""
    [row] = rows(find(str(fill(tmp_path, name)), HERE))
    assert row["path"] == name and row["uri"].isascii() and len(row["uri"].splitlines()) == 1
    assert local_path(row["uri"]) == os.fsencode(tmp_path / name)


@pytest.mark.fault(24)
def test_bytes_that_are_not_utf8_are_shown_and_survive(tmp_path: Path) -> None:
    r"""A Latin-1 name is shown with \xNN in `path` and `skipped`, and its own bytes are in `uri`."""
    for name in (b"caf\xe9.mp4", b"caf\xe9.txt"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb"):  # noqa: PTH118, PTH123 - bytes
            pass
    found = find(str(tmp_path), HERE)
    assert column(found, "path") == ["caf\\xe9.mp4"] and found.skipped == ("caf\\xe9.txt",)
    assert local_path(column(found, "uri")[0]) == os.fsencode(tmp_path) + b"/caf\xe9.mp4"


@pytest.mark.timeout(60)
@pytest.mark.fault(22)
def test_a_folder_or_a_fifo_named_like_a_video_does_not_hang(tmp_path: Path) -> None:
    """A fifo becomes a row without being opened, by walk, list or name; a folder named like a video is walked."""
    fill(tmp_path, "folder.mp4/inner.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    os.mkfifo(tmp_path / "list.txt.mp4")
    assert column(find(str(tmp_path), HERE), "path") == ["folder.mp4/inner.mp4", "list.txt.mp4", "pipe.mp4"]
    assert column(find(str(tmp_path / "pipe.mp4"), HERE), "path") == ["pipe.mp4"]
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(InputError, match="is neither a folder nor a file"):
        find(str(tmp_path / "pipe.csv"), HERE)
    (tmp_path / "list.txt").write_text("folder.mp4\npipe.mp4\n")
    assert [size >= 0 for size in column(find(str(tmp_path / "list.txt"), HERE), "size_bytes")] == [True, True]


def test_links_to_files_are_rows(tmp_path: Path) -> None:
    """A link has the size and version of its target; a broken link is a row of a missing video."""
    fill(tmp_path, "a.mp4")
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    (tmp_path / "broken.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    by_path = {row["path"]: row for row in rows(find(str(tmp_path), HERE))}
    assert by_path["link.mp4"]["version"] == by_path["a.mp4"]["version"]
    assert by_path["broken.mp4"]["size_bytes"] == by_path["loop.mp4"]["size_bytes"] == -1


def test_a_linked_folder_is_not_skipped_silently(tmp_path: Path) -> None:
    """A link to a folder of videos is either walked or named in `skipped`."""
    fill(tmp_path, "root/a.mp4", "other/b.mp4")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "other")
    found = find(str(tmp_path / "root"), HERE)
    assert "linked/b.mp4" in column(found, "path") or any(name.startswith("linked") for name in found.skipped)


def test_a_folder_that_cannot_be_read_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos below a folder without permission are not dropped from the plan silently: planning fails."""
    fill(tmp_path, "a.mp4", "secret/b.mp4")
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if not isinstance(path, int) and os.fsencode(path).endswith(b"/secret"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputError, match="secret"):
        find(str(tmp_path), HERE)


APPLE_DOUBLE = b"\0\x05\x16\x07\0\2\0\0Mac OS X        "


def test_apple_double_files_are_skipped_and_counted(tmp_path: Path, bucket: str, put: Put) -> None:
    """A Mac writes `._a.mp4` next to `a.mp4`: not a video in a folder, a list or a bucket. A real video may have such a
    name."""
    fill(tmp_path, "a.mp4", "._a.mp4", "more/._b.mp4", "._real.mp4")
    for name in ("._a.mp4", "more/._b.mp4"):
        (tmp_path / name).write_bytes(APPLE_DOUBLE)
        put(f"x/{name}", APPLE_DOUBLE)
    put("x/a.mp4")
    put("x/._real.mp4")
    (tmp_path / "l.csv").write_text("path,label\n._a.mp4,1\na.mp4,2\nmore/._b.mp4,3\n._real.mp4,4\n")
    put("x/l.txt", b"._a.mp4\na.mp4\nmore/._b.mp4\n._real.mp4\n")
    sources = [str(tmp_path), f"s3://{bucket}/x", str(tmp_path / "l.csv"), f"s3://{bucket}/x/l.txt"]
    for source in sources:
        found = find(source, HERE)
        assert sorted(column(found, "path")) == ["._real.mp4", "a.mp4"], source
        assert {"._a.mp4", "more/._b.mp4"} <= set(found.skipped) and found.n_skipped == len(found.skipped)
    assert column(find(str(tmp_path / "l.csv"), HERE), "label") == [2, 4]


@pytest.fixture
def ordinary() -> Iterator[Path]:
    """A folder of an ordinary user, as which the test runs."""
    with tempfile.TemporaryDirectory() as place:  # tmp_path cannot be entered by an ordinary user
        user = os.geteuid()
        try:
            if user == 0:
                os.chown(place, 65534, 65534)
                os.seteuid(65534)
            yield Path(place)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("mode", [0o000, 0o400])
def test_a_folder_that_may_not_be_entered(ordinary: Path, mode: int) -> None:
    """Below a source it is a message. A video that a list names in it is denied, not missing; a list in it is too."""
    fill(ordinary, "a.mp4", "locked/b.mp4", "locked/l.txt", "l.txt")
    (ordinary / "l.txt").write_text("a.mp4\nlocked/b.mp4\n")
    (ordinary / "locked").chmod(mode)
    try:
        with pytest.raises(InputError, match=r"locked/?\.? cannot be read \(Permission denied\)"):
            find(str(ordinary), HERE)
        for name in ("l.txt", "b.mp4"):
            with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
                find(str(ordinary / "locked" / name), HERE)
        row = rows(find(str(ordinary / "l.txt"), HERE))[1]
        with pytest.raises(VideoError) as caught, local_file(VideoRef(**row), HERE, ordinary):
            pass
        assert (caught.value.reason, caught.value.detail) == (Reason.SOURCE_DENIED, "no permission to reach the file")
    finally:
        (ordinary / "locked").chmod(0o700)


# --- S3 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.fault(24)
def test_a_copy_on_s3_has_the_same_ids(tmp_path: Path, bucket: str, put: Put) -> None:
    """A folder and its copy below a prefix give the same ids and paths in the same order, odd names included."""
    names = [*TREE, *ODD_KEYS]
    fill(tmp_path, *names)
    for name in names:
        put(f"arch ive/{name}", name.encode())
    local, remote = find(str(tmp_path), HERE), find(f"s3://{bucket}/arch%20ive", HERE)
    for name in ("video_id", "path", "size_bytes"):
        assert column(local, name) == column(remote, name)
    assert column(remote, "uri") == [s3_uri(bucket, f"arch ive/{path}") for path in column(remote, "path")]


def test_a_prefix_is_a_folder(bucket: str, put: Put) -> None:
    """`s3://b/videos` has what is below `videos/`, not `videos2/`; folder markers are neither rows nor skipped."""
    for key in ("videos/b.mp4", "videos/more/", "videos/more/a.mp4", "videos/notes.txt", "videos2/c.mp4", "videos.mp4"):
        put(key)
    found = find(f"s3://{bucket}/videos", HERE)
    assert column(found, "path") == ["b.mp4", "more/a.mp4"] and found.skipped == ("notes.txt",)
    assert rows(find(f"s3://{bucket}/videos/", HERE)) == rows(found)
    assert column(find(f"s3://{bucket}", HERE), "path")[-2:] == ["videos/more/a.mp4", "videos2/c.mp4"]
    for row in rows(found):
        assert row["version"] == content_version(row["size_bytes"], row["etag"])


def test_the_marker_of_the_prefix_itself_is_not_skipped(bucket: str, put: Put) -> None:
    """The empty object `videos/`, which the S3 console makes for a folder, is not named in `skipped`."""
    put("videos/", b"")
    put("videos/a.mp4")
    assert find(f"s3://{bucket}/videos", HERE).skipped == ()


def test_one_object_is_a_source(tmp_path: Path, bucket: str, put: Put) -> None:
    """A single object has the id of a single file of that name; a replaced one has another version."""
    fill(tmp_path, "a.mp4")
    put("some/where/a.mp4", b"one")
    [before] = rows(find(f"s3://{bucket}/some/where/a.mp4", HERE))
    assert before["path"] == "a.mp4" and before["video_id"] == column(find(str(tmp_path), HERE), "video_id")[0]
    put("some/where/a.mp4", b"two")
    [after] = rows(find(f"s3://{bucket}/some/where/a.mp4", HERE))
    assert after["version"] != before["version"] and after["video_id"] == before["video_id"]


def test_more_objects_than_one_page_are_all_rows(bucket: str, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing of several pages is complete and sorted."""
    monkeypatch.setattr("p3d.pipeline.storage.s3.store.PAGE_KEYS", 2)
    for number in range(5):
        put(f"v/{number}.mp4")
    assert column(find(f"s3://{bucket}/v", HERE), "path") == [f"{number}.mp4" for number in range(5)]


# --- lists ------------------------------------------------------------------------------------------------------------


def write_list(kind: str, entries: list[str]) -> bytes:
    """The content of a list of that kind; a text list has blank lines and CRLF, which are ignored."""
    out = io.BytesIO()
    if kind == "txt":
        out.write(("\r\n \n\n".join(entries) + "\n").encode())
    elif kind == "csv":
        pyarrow.csv.write_csv(pa.table({"path": entries}), out)
    else:
        pq.write_table(pa.table({"path": entries}), out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("kind", "place"), [("txt", "local"), ("csv", "local"), ("parquet", "local"), ("parquet", "s3")]
)
def test_a_list_has_relative_absolute_and_s3_entries(
    kind: str, place: str, tmp_path: Path, bucket: str, put: Put
) -> None:
    """Entries keep their order. Relative ones are relative to the list and have the ids of a folder walk. A missing
    file is a row of size -1."""
    fill(tmp_path / "lists", *TREE)
    for name in TREE:
        put(f"lists/{name}", name.encode())
    put("far/x.mp4", b"far away")
    entries = ["z z.webm", "more/a.mp4", f"s3://{bucket}/far/x.mp4", "gone.mp4", f"s3://{bucket}/far/gone.mp4"]
    sizes = [8, 10, 8, -1, -1]
    if place == "local":
        entries, sizes = [*entries, f"{tmp_path}/lists/a.mp4"], [*sizes, 5]
        (tmp_path / "lists" / f"l.{kind}").write_bytes(write_list(kind, entries))
        walked, source = find(str(tmp_path / "lists"), HERE), str(tmp_path / "lists" / f"l.{kind}")
        base = f"file://{tmp_path}/lists"
    else:
        put(f"lists/l.{kind}", write_list(kind, entries))
        walked, source = find(f"s3://{bucket}/lists", HERE), f"s3://{bucket}/lists/l.{kind}"
        base = f"s3://{bucket}/lists"
    listed = find(source, HERE)
    assert column(listed, "path") == entries and column(listed, "size_bytes") == sizes
    ids = {row["path"]: row["video_id"] for row in rows(walked)}
    assert column(listed, "video_id")[:2] == [ids["z z.webm"], ids["more/a.mp4"]]
    assert column(listed, "uri")[:4] == [
        f"{base}/z%20z.webm",
        f"{base}/more/a.mp4",
        f"s3://{bucket}/far/x.mp4",
        f"{base}/gone.mp4",
    ]
    assert listed.skipped == ()


@pytest.mark.parametrize("name", ["uri", "url", "path", "video", "file", "filename"])
def test_the_column_of_paths_may_have_any_usual_name(tmp_path: Path, name: str) -> None:
    """It may be uri, url, path, video, file or filename; an entry needs no known extension."""
    fill(tmp_path, "film.bin").joinpath("l.csv").write_text(f"n,{name}\n1,film.bin\n")
    [row] = rows(find(str(tmp_path / "l.csv"), HERE))
    assert (row["path"], row["size_bytes"], row["n"]) == ("film.bin", 8, 1)


def test_users_columns_are_kept_with_their_types(tmp_path: Path) -> None:
    """Every other column of a Parquet list is unchanged in the rows: name, type, values, order."""
    own = pa.table(
        {
            "split": pa.array(["a", "b", "a"]).dictionary_encode(),
            "score": pa.array([1.5, None, 2.5], pa.float32()),
            "tags": pa.array([["x"], [], None], pa.list_(pa.string())),
            "taken": pa.array([0, 1, None], pa.timestamp("us", "UTC")),
            "flag": pa.array([True, None, False]),
            "raw": pa.array([b"\xff", b"", None], pa.binary()),
            "nested": pa.array([{"a": 1}, {"a": None}, None], pa.struct([("a", pa.int8())])),
        }
    )
    pq.write_table(own.append_column("path", pa.array(["c.mp4", "a.mp4", "b.mp4"])), tmp_path / "l.parquet")
    videos = find(str(tmp_path / "l.parquet"), HERE).videos
    assert videos.column_names == [name for name in MANIFEST.names if name != "shard"] + own.column_names
    assert videos.select(own.column_names).equals(own)
    assert videos["path"].to_pylist() == ["c.mp4", "a.mp4", "b.mp4"]


def test_no_column_of_ours_can_be_overwritten(tmp_path: Path) -> None:
    """A list with a column that the dataset writes itself is refused, and the message names it."""
    for name in sorted(own_columns(1) - {"uri"}):  # a column `uri` is that of the paths
        (tmp_path / "l.csv").write_text(f"uri,{name}\na.mp4,1\n")
        with pytest.raises(InputError, match=rf"columns \['{name}'\] have names that the dataset uses itself; rename"):
            find(str(tmp_path / "l.csv"), HERE)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_users_own_ids_name_the_videos(tmp_path: Path, kind: str) -> None:
    """With --id-column the ids are its values as text, and the column is not kept twice."""
    table = pa.table({"file": ["a.mp4", "b.mp4"], "key": [17, 4], "video_id": ["x", "y"]})
    write = pyarrow.csv.write_csv if kind == "csv" else pq.write_table
    write(table, str(tmp_path / f"l.{kind}"))
    with pytest.raises(InputError, match="video_id"):  # a column of the dataset that is not the id
        find(str(tmp_path / f"l.{kind}"), HERE, id_column="key")
    write(table.drop_columns(["video_id"]), str(tmp_path / f"l.{kind}"))
    found = find(str(tmp_path / f"l.{kind}"), HERE, id_column="key")
    assert column(found, "video_id") == ["17", "4"] and "key" not in found.videos.column_names
    write(table.drop_columns(["key"]), str(tmp_path / f"l.{kind}"))
    assert column(find(str(tmp_path / f"l.{kind}"), HERE, id_column="video_id"), "video_id") == ["x", "y"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_paths_may_be_the_ids(tmp_path: Path, kind: str) -> None:
    """--id-column may name the column of paths: the ids are the paths as written, and other columns are kept."""
    write = pyarrow.csv.write_csv if kind == "csv" else pq.write_table
    write(pa.table({"path": ["a.mp4", "more/b.mp4"], "n": [1, 2]}), str(tmp_path / f"l.{kind}"))
    found = find(str(tmp_path / f"l.{kind}"), HERE, id_column="path")
    assert column(found, "video_id") == column(found, "path") == ["a.mp4", "more/b.mp4"]
    assert column(found, "n") == [1, 2]


@pytest.mark.parametrize(
    ("content", "id_column", "message"),
    [
        ("path,key\na.mp4,x\nb.mp4,\n", "key", "no id in column 'key'"),
        ("path,key\na.mp4,1\nb.mp4,\n", "key", "no id in column 'key'"),
        ("path,key\na.mp4,x\n", "kee", "has no column 'kee'; it has path, key"),
        ("path,key\na.mp4,x\nb.mp4,x\n", "key", "1 video listed more than once.*a.mp4 in line 2, b.mp4 in line 3 "),
        ("path\na.mp4\nb.mp4\na.mp4\n", None, "1 video listed more than once.* as a.mp4 in lines 2, 4 .*--id-column"),
        ("where,key\na.mp4,x\n", None, "no column of paths.*uri, url, path"),
        ("path,n\na.mp4,1\nb.mp4\n", None, "cannot be read as a list"),
        ("", None, "cannot be read as a list"),
        ("path\n", None, "no videos"),
    ],
)
def test_an_invalid_list_is_refused(tmp_path: Path, content: str, id_column: str | None, message: str) -> None:
    """Missing ids, duplicates, no paths, ragged or empty files: an error that says what is wrong."""
    (tmp_path / "l.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        find(str(tmp_path / "l.csv"), HERE, id_column=id_column)


@pytest.mark.fault(49)
def test_a_parquet_list_with_holes_or_of_other_bytes_is_refused(tmp_path: Path) -> None:
    """A row without a path, and a file that is not Parquet, are refused."""
    pq.write_table(pa.table({"path": ["a.mp4", None]}), tmp_path / "l.parquet")
    with pytest.raises(InputError, match="1 row without a path in column 'path'"):
        find(str(tmp_path / "l.parquet"), HERE)
    (tmp_path / "l.parquet").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read as a list"):
        find(str(tmp_path / "l.parquet"), HERE)


@pytest.mark.fault(23)
def test_repeats_in_a_text_list_are_refused_with_a_remedy(tmp_path: Path) -> None:
    """The message counts the duplicates, names the lines of the first and says what to do."""
    (tmp_path / "l.txt").write_text("# mine\na.mp4\n\nb.mp4\na.mp4\nb.mp4\nc.mp4\na.mp4\na.mp4\n")
    with pytest.raises(
        InputError,
        match=r"2 videos.* a\.mp4 in lines 2, 5, 8, \.\.\. .*remove the duplicates, or give each row its own id",
    ):
        find(str(tmp_path / "l.txt"), HERE)


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("l.txt", b"\xef\xbb\xbf# x\r\n\r\na\r\nb", ("line", [3, 4])),
        ("l.csv", b"\npath,x\na,1\n\nb,2\n", ("line", [3, 5])),
        ("l.tsv", b'path\tx\na\t"1\n2"\nb\t3\n', ("row", [1, 2])),  # a row of two lines
        ("l.jsonl", b'{"path": "a"}\n\n{"path": "b"}\n', ("line", [1, 3])),
        ("l.parquet", b"", ("row", [1, 2])),
    ],
)
def test_the_entries_of_a_list_have_line_numbers(name: str, content: bytes, numbers: tuple[str, list[int]]) -> None:
    """Blank lines, comments and the header count; without lines, or with several for a row, rows are counted."""
    assert line_numbers(name, content, 2) == numbers


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    "other", ["./a.mp4", "{0}/a.mp4", "{0}//a.mp4", "more/../a.mp4", "link.mp4", "linked/a.mp4", "file://{0}//a.mp4"]
)
def test_two_names_of_one_file_are_refused(tmp_path: Path, other: str) -> None:
    """The message has both. With ids of their own the rows are two videos, and copies with equal bytes are, too."""
    fill(tmp_path, "a.mp4", "more/b.mp4")
    shutil.copy(tmp_path / "a.mp4", tmp_path / "copy.mp4")
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    (tmp_path / "linked").symlink_to(".")
    other = other.format(tmp_path)
    (tmp_path / "l.txt").write_text(f"a.mp4\ncopy.mp4\n{other}\n")
    with pytest.raises(
        InputError, match=r"a\.mp4.*line.* 3.*(two names of one file; remove one|remove the duplicates)"
    ):
        find(str(tmp_path / "l.txt"), HERE)
    (tmp_path / "l.csv").write_text(f"path,id\na.mp4,1\n{other},2\n")
    assert len(rows(find(str(tmp_path / "l.csv"), HERE, id_column="id"))) == 2
    (tmp_path / "l.txt").write_text("a.mp4\ncopy.mp4\n")
    assert len(rows(find(str(tmp_path / "l.txt"), HERE))) == 2


@pytest.mark.parametrize("source", ["folder", "l.txt"])
def test_an_id_column_needs_a_table(tmp_path: Path, source: str) -> None:
    """--id-column is refused for a source without columns."""
    fill(tmp_path, "folder/a.mp4").joinpath("l.txt").write_text("folder/a.mp4\n")
    with pytest.raises(InputError, match="--id-column key needs a CSV, TSV, JSONL or Parquet list"):
        find(str(tmp_path / source), HERE, id_column="key")


@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_a_list_may_name_files_that_are_not_utf8(tmp_path: Path, kind: str) -> None:
    """In text such a name is a percent-encoded URI; a binary column of Parquet has its bytes."""
    content = parquet(path=pa.array([b"caf\xe9.mp4"]))
    if kind == "txt":
        content = f"file://{tmp_path}/caf%E9.mp4\n".encode()
    for name, body in ((b"caf\xe9.mp4", b"123"), (f"l.{kind}".encode(), content)):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:  # noqa: PTH118, PTH123 - bytes
            file.write(body)
    [listed], walked = rows(find(str(tmp_path / f"l.{kind}"), HERE)), rows(find(str(tmp_path), HERE))
    assert listed["size_bytes"] == 3 and [listed["uri"]] == [row["uri"] for row in walked if row["size_bytes"] == 3]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "http://example.org/a.mp4",
        "HTTPS://example.org/",
        "gs://bucket/a",
        "https://user:canary@example.org/a.mp4",
        "s3://key:canary@bucket/videos",
        "https://bucket.s3.amazonaws.com/a.mp4?X-Amz-Expires=1&X-Amz-Signature=canary",
        "s3://bucket/a.mp4?x-amz-signature=canary",
    ],
)
@pytest.mark.fault(47, 49)
def test_other_urls_and_credentials_are_refused(source: str) -> None:
    """Only paths and s3:// are sources. A credential in a source is refused and never repeated."""
    with pytest.raises(InputError) as caught:
        find(source, HERE)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
@pytest.mark.fault(49)
def test_other_urls_in_a_list_are_refused(tmp_path: Path, kind: str) -> None:
    """An http:// entry is refused with the name of the list; the rest of it, which may be a secret, is not repeated."""
    (tmp_path / f"l.{kind}").write_bytes(write_list(kind, ["a.mp4", "http://example.org/a.mp4"]))
    with pytest.raises(InputError, match=rf"l\.{kind} has an entry http://\.\.\.; only local paths and s3://"):
        find(str(tmp_path / f"l.{kind}"), HERE)


def test_a_source_without_videos_is_refused_with_a_count(tmp_path: Path, bucket: str, put: Put) -> None:
    """No videos: the message counts the other files and says how to name videos of other extensions."""
    fill(tmp_path, "a.doc", "more/b.doc", "c")
    put("docs/a.doc")
    for source, count in ((str(tmp_path), 3), (f"s3://{bucket}/docs", 1), (f"s3://{bucket}/nothing", 0)):
        with pytest.raises(InputError, match=rf"no videos in .*\({count} other files\).*\.jsonl or \.parquet list"):
            find(source, HERE)


def test_a_missing_source_is_refused(tmp_path: Path, bucket: str) -> None:
    """A missing folder is an InputError, a missing list on S3 says that there is no such object."""
    with pytest.raises(InputError, match="does not exist"):
        find(str(tmp_path / "nowhere"), HERE)
    with pytest.raises(StoreMissing):
        find(f"s3://{bucket}/nowhere.csv", HERE)


@pytest.mark.parametrize("source", ["", "file://host/videos", "fifo", "fifo.txt"])
def test_what_names_no_source_is_refused(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty text (an unset variable) is not the working directory, and a fifo (`<(ls)`) is not waited for."""
    monkeypatch.chdir(tmp_path)
    for name in ("fifo", "fifo.txt"):
        os.mkfifo(name)
    fill(tmp_path, "a.mp4", "host/videos/a.mp4")
    with pytest.raises(InputError):
        find(source, HERE)


# --- odd lists --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "delimiter"), [("csv", ","), ("csv", ";"), ("tsv", "\t"), ("jsonl", "")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_as_programs_save_them_are_read(tmp_path: Path, kind: str, delimiter: str, encoding: str) -> None:
    """UTF-8 with or without a byte order mark, UTF-16 with one; columns separated by commas, semicolons or tabs."""
    table = [{"title": "\u00dcbung", "path": "a.mp4", "n": 7}, {"title": "x, y", "path": "\u00fc.mp4", "n": 8}]
    fill(tmp_path, "a.mp4", "\u00fc.mp4")
    lines = [delimiter.join(table[0]), *(delimiter.join(f'"{value}"' for value in row.values()) for row in table)]
    if kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in table]
    (tmp_path / f"l.{kind}").write_text("\n".join([*lines, ""]), encoding=encoding)
    found = find(str(tmp_path / f"l.{kind}"), HERE)
    assert found.videos.select(["title", "path", "n"]).to_pylist() == table
    assert column(found, "size_bytes") == [5, 6]


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl"])
def test_another_encoding_is_refused_with_its_line_and_a_remedy(tmp_path: Path, kind: str) -> None:
    """Latin-1 is not guessed, not even in a column that is not the path: the message has file, line and a command."""
    text = {"txt": "a.mp4\ncaf\u00e9.mp4", "jsonl": '{"path": "a.mp4"}\n{"path": "caf\u00e9.mp4"}'}
    rest = "path,title\na.mp4,caf\u00e9" if kind == "csv" else "path\ttitle\na.mp4\tcaf\u00e9"
    (tmp_path / f"l.{kind}").write_text(text.get(kind, rest), encoding="latin-1")
    with pytest.raises(
        InputError, match=rf"l\.{kind}, line 2 is not UTF-8: .*caf.*`iconv -f LATIN1 -t UTF-8 .*l\.{kind}"
    ):
        find(str(tmp_path / f"l.{kind}"), HERE)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"path": "a.mp4"}\n{"path"', "line 2 is not JSON"),
        ('["a.mp4"]', "line 1 is not a JSON object"),
        (
            '{"path": "a.mp4", "n": 1}\n{"path": "b.mp4", "n": "x"}',
            "column 'n' cannot be kept.*give its values one type",
        ),
        ('{"path": "a.mp4", "n": {}}', "column 'n' cannot be kept"),
        ('{"path": "a.mp4", "n": 1' + "0" * 30 + "}", "column 'n' cannot be kept"),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_an_invalid_line_of_json_is_refused(tmp_path: Path, lines: str, message: str) -> None:
    """The message has the number of the line, or the column whose values do not fit together."""
    (tmp_path / "l.jsonl").write_text(lines)
    with pytest.raises(InputError, match=message):
        find(str(tmp_path / "l.jsonl"), HERE)


def test_columns_of_jsonl_keep_their_types(tmp_path: Path) -> None:
    """A text is never a number or a time, a missing value is null, and ids may be numbers."""
    lines = '{"path": "a.mp4", "k": 7, "day": "2024-01-01"}\n\n{"k": 8, "path": "b.mp4", "tags": ["x"]}\n'
    (tmp_path / "l.jsonl").write_text(lines)
    found = find(str(tmp_path / "l.jsonl"), HERE, id_column="k")
    assert column(found, "video_id") == ["7", "8"]
    assert (column(found, "day"), column(found, "tags")) == (["2024-01-01", None], [None, ["x"]])


def test_a_line_of_a_text_list_may_be_a_comment(tmp_path: Path) -> None:
    """A line that begins with # is a comment; a file of such a name is written ./#name, and has the id of a walk."""
    fill(tmp_path, "#a.mp4", "b.mp4").joinpath("l.txt").write_text("# two talks\n./#a.mp4\n#b.mp4\nb.mp4\n")
    listed = find(str(tmp_path / "l.txt"), HERE)
    assert column(listed, "video_id") == column(find(str(tmp_path), HERE), "video_id")


# --- patterns ---------------------------------------------------------------------------------------------------------

TALKS = ("a.mp4", "notes.txt", "talks/b.mp4", "talks/old/c.mp4", "talks/old/d.mkv", "x [1].mp4")


@pytest.mark.parametrize("place", ["local", "s3"])
@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (["*.mkv"], [], ["talks/old/d.mkv"]),
        (["talks/*.mp4"], [], ["talks/b.mp4"]),
        (["talks"], ["*.mkv"], ["talks/b.mp4", "talks/old/c.mp4"]),
        (["/*.mp4", "talks/**/*.mkv"], [], ["a.mp4", "talks/old/d.mkv", "x [1].mp4"]),
        ([], ["old"], ["a.mp4", "talks/b.mp4", "x [1].mp4"]),
        ([], ["talks/**", "x [[]1].mp4"], ["a.mp4"]),
        (["**/?.mp4"], ["./talks/old/"], ["a.mp4", "talks/b.mp4"]),
    ],
)
def test_patterns_choose_videos(
    place: str, include: list[str], exclude: list[str], names: list[str], tmp_path: Path, bucket: str, put: Put
) -> None:
    """--include and --exclude mean the same in a folder and below a prefix, and ids stay those of the whole source."""
    for name in TALKS if place == "s3" else ():
        put(f"v/{name}", name.encode())
    source = f"s3://{bucket}/v" if place == "s3" else str(fill(tmp_path, *TALKS))
    found, every = find(source, HERE, include=include, exclude=exclude), find(source, HERE)
    assert sorted(column(found, "path")) == names
    ids = dict(zip(column(every, "path"), column(every, "video_id"), strict=True))
    assert sorted(column(found, "video_id")) == sorted(ids[name] for name in names)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("*.mp4", ["a.mp4", "x [1].mp4"]),
        ("**/*.mp4", ["a.mp4", "talks/b.mp4", "talks/old/c.mp4", "x [1].mp4"]),
        ("talks/**/*.mkv", ["old/d.mkv"]),
        ("t*/old", ["talks/old/c.mp4", "talks/old/d.mkv"]),
        ("x [1].mp4", ["x [1].mp4"]),
    ],
)
@pytest.mark.parametrize("place", ["local", "relative", "s3"])
def test_a_quoted_pattern_is_a_source(
    source: str, names: list[str], place: str, tmp_path: Path, bucket: str, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder before the first wildcard is the source: ids are those of a walk of it. An existing name is a name."""
    for name in TALKS if place == "s3" else ():
        put(f"v/{name}", name.encode())
    monkeypatch.chdir(fill(tmp_path, *TALKS))
    start = {"local": f"{tmp_path}/", "relative": "", "s3": f"s3://{bucket}/v/"}[place]
    found = find(f"{start}{source}", HERE)
    assert sorted(column(found, "path")) == names
    root = find(f"{start}talks" if source.startswith("talks/") else start or ".", HERE)
    assert set(column(found, "video_id")) <= set(column(root, "video_id"))


def test_patterns_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    """A list or one file has no patterns. Without videos the message says what was matched; unused ones are named."""
    fill(tmp_path, *TALKS).joinpath("l.txt").write_text("a.mp4\n")
    for source, include, words in (
        ("l.txt", ["*.mp4"], "is a list; --include"),
        ("a.mp4", ["*.mp4"], "is one file; --include"),
        ("*.mp4", ["*.mp4"], "is a pattern; name the folder"),
        ("no*.mp4", [], "does not exist, and as a pattern it matches no video"),
        (".", ["/data/*.mp4"], "left by --include and --exclude.*paths below SRC"),
        (".", ["../*.mp4"], "'../[*].mp4' matches nothing"),
        (".", [""], "'' matches nothing"),
    ):
        with pytest.raises(InputError, match=words):
            find(f"{tmp_path}/{source}", HERE, include=include)
    with pytest.raises(InputError, match="name the bucket"):
        find("s3://b*/x", HERE)
    said: list[str] = []
    find(str(tmp_path), HERE, exclude=["talks", "typo"], tell=said.append)
    assert said == [f"warning: the pattern 'typo' matches no file of {tmp_path}"]


def test_an_excluded_folder_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be read ends a listing, unless it is excluded; then it is named as skipped."""
    fill(tmp_path, "a.mp4", "secret/b.mp4")
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if not isinstance(path, int) and os.fsencode(path).endswith(b"/secret"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    found = find(str(tmp_path), HERE, exclude=["secret/**"])
    assert (column(found, "path"), found.skipped) == (["a.mp4"], ("secret/ (excluded)",))


@pytest.mark.parametrize("name", ["007", "1.50", "2024-01-01 10:00"])
def test_a_name_that_looks_like_a_number_is_a_name(tmp_path: Path, name: str) -> None:
    """The column of paths is text, whatever type a CSV reader would infer."""
    fill(tmp_path, name).joinpath("l.csv").write_text(f"path\n{name}\n")
    [row] = rows(find(str(tmp_path / "l.csv"), HERE))
    assert row["path"] == name and row["size_bytes"] == len(name)


def test_an_id_that_looks_like_a_number_is_text(tmp_path: Path) -> None:
    """The ids of --id-column are kept as written, so that they can be joined later: 007 and 7 are two videos."""
    (tmp_path / "l.csv").write_text("path,key\na.mp4,007\nb.mp4,7\n")
    assert column(find(str(tmp_path / "l.csv"), HERE, id_column="key"), "video_id") == ["007", "7"]


def test_an_empty_path_is_refused(tmp_path: Path) -> None:
    """A CSV row without a path is refused like a Parquet one."""
    (tmp_path / "l.csv").write_text("path,n\na.mp4,1\n,2\n")
    with pytest.raises(InputError, match="1 row without a path"):
        find(str(tmp_path / "l.csv"), HERE)


@pytest.mark.parametrize(("header", "name"), [("path,path,n", "path"), ("path,x,x", "x")])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, header: str, name: str) -> None:
    """A list with a duplicate column is refused with its name, not with a traceback."""
    (tmp_path / "l.csv").write_text(f"{header}\na.mp4,b.mp4,1\n")
    with pytest.raises(InputError, match=f"more than one column named '{name}'"):
        find(str(tmp_path / "l.csv"), HERE)


@pytest.mark.parametrize("content", ["a.mp4\n".encode("utf-16-le"), "a.mp4\n".encode("utf-32"), b"\xff\xfea"])
def test_text_that_is_not_utf16_is_refused(tmp_path: Path, content: bytes) -> None:
    """UTF-16 without a byte order mark, UTF-32, and half a character after such a mark."""
    (tmp_path / "l.txt").write_bytes(content)
    with pytest.raises(InputError, match="save it as UTF-8"):
        find(str(tmp_path / "l.txt"), HERE)


def test_a_byte_order_mark_is_not_part_of_the_first_name(tmp_path: Path) -> None:
    """A text list saved with a BOM (Windows) names the same videos as one without."""
    fill(tmp_path, "a.mp4").joinpath("l.txt").write_text("a.mp4\n", encoding="utf-8-sig")
    assert column(find(str(tmp_path / "l.txt"), HERE), "size_bytes") == [5]


@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\x0c", "\x1c"])
def test_a_line_of_a_text_list_ends_at_its_newline_only(tmp_path: Path, odd: str) -> None:
    """One path per line: a name may contain any other character."""
    fill(tmp_path, f"a{odd}b.mp4").joinpath("l.txt").write_text(f"a{odd}b.mp4\n")
    assert column(find(str(tmp_path / "l.txt"), HERE), "size_bytes") == [len(f"a{odd}b.mp4".encode())]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_the_uris_of_a_plan_are_a_list_of_the_same_videos(place: str, tmp_path: Path, bucket: str, put: Put) -> None:
    """The `uri` column of a plan can be used as a list: file:// and s3:// entries are percent-decoded, like a
    source."""
    names = ("per%2Fcent \u00fc.mp4", "plus+and&#?.mp4")
    for name in names:
        put(f"v/{name}")
    found = find(str(fill(tmp_path / "v", *names)) if place == "local" else f"s3://{bucket}/v", HERE)
    (tmp_path / "again.txt").write_text("\n".join(column(found, "uri")))
    again = find(str(tmp_path / "again.txt"), HERE)
    assert column(again, "uri") == column(found, "uri") and column(again, "version") == column(found, "version")


def test_a_list_below_an_encoded_prefix_finds_its_neighbours(bucket: str, put: Put) -> None:
    """Relative entries of `s3://b/my%20folder/l.txt` are below `my folder/`, where the list itself was read."""
    put("my folder/a.mp4", b"12345")
    put("my folder/l.txt", b"a.mp4\n")
    assert column(find(f"s3://{bucket}/my%20folder/l.txt", HERE), "size_bytes") == [5]


def test_a_list_on_s3_with_a_name_that_is_not_utf8_is_no_traceback(bucket: str, put: Put) -> None:
    """An S3 key cannot have such a name, so the entry is refused or is a missing video."""
    put("v/l.txt", b"caf\xe9.mp4\n")
    with contextlib.suppress(InputError):
        assert column(find(f"s3://{bucket}/v/l.txt", HERE), "size_bytes") == [-1]


@pytest.mark.parametrize(
    "entry", ["https://user:canary@example.org/a.mp4", "https://b.s3.amazonaws.com/a.mp4?X-Amz-Signature=canary"]
)
@pytest.mark.fault(47)
def test_a_credential_in_a_list_is_refused_and_not_repeated(tmp_path: Path, entry: str) -> None:
    """A list of URLs often has presigned links: none of them may appear in a message or a log."""
    (tmp_path / "l.txt").write_text(f"{entry}\n")
    with pytest.raises(InputError) as caught:
        find(str(tmp_path / "l.txt"), HERE)
    assert "canary" not in str(caught.value)


@pytest.mark.fault(47)
def test_a_credential_in_an_s3_entry_is_refused(tmp_path: Path, s3_server: dict[str, str]) -> None:
    """`s3://key:secret@bucket/a.mp4` in a list is refused as on the command line, and not repeated."""
    (tmp_path / "l.txt").write_text("s3://key:canary@bucket/a.mp4\n")
    with pytest.raises(InputError) as caught:
        find(str(tmp_path / "l.txt"), HERE)
    assert "canary" not in str(caught.value)


def parquet(**columns: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


ODD_LISTS: dict[str, tuple[str, bytes, str | None]] = {
    "a header that is not UTF-8": ("csv", b"cl\xe9,path\n1,a.mp4\n", None),
    "a NUL in a name": ("parquet", parquet(path=["a\0.mp4"]), None),
    "ids that are lists": ("parquet", parquet(path=["a.mp4"], key=[["x"]]), "key"),
    "ids that are no text": ("parquet", parquet(path=["a.mp4"], key=pa.array([b"\xff"])), "key"),
    "an encoded key that is not UTF-8": ("txt", b"s3://bucket/%ff.mp4\n", None),
    "a key that is not UTF-8": ("txt", b"s3://bucket/caf\xe9.mp4\n", None),
    "a file:// of a name that is not UTF-8": ("txt", b"file:///tmp/caf\xe9.mp4\n", None),
    "a bucket without a key": ("txt", b"s3://bucket\n", None),
}


@pytest.mark.parametrize("what", ODD_LISTS)
@pytest.mark.fault(49)
def test_an_odd_list_is_no_traceback(tmp_path: Path, s3_server: dict[str, str], what: str) -> None:
    """Whatever a list contains, it is refused by name, or its invalid entries are missing videos."""
    kind, content, id_column = ODD_LISTS[what]
    (tmp_path / f"l.{kind}").write_bytes(content)
    try:
        sizes = column(find(str(tmp_path / f"l.{kind}"), HERE, id_column=id_column), "size_bytes")
    except InputError as error:
        assert f"l.{kind}" in str(error)
    else:
        assert sizes == [-1]


def test_a_file_uri_is_percent_decoded(tmp_path: Path) -> None:
    """The `uri` of a file in a plan is a valid source, whatever its name; a key that is not UTF-8 is an InputError."""
    [row] = rows(find(str(fill(tmp_path, "a b%.mp4")), HERE))
    assert rows(find(row["uri"], HERE)) == [row]
    with pytest.raises(InputError):
        find("s3://bucket/%ff", HERE)
