"""SRC and OUT of a launch are two places, the right way round; an OUT inside SRC is allowed, and its cost is said."""

from __future__ import annotations

import os
from pathlib import Path

import boto3
import pytest

from p3d.jobs.planning.places import check_places
from p3d.pipeline.errors import InputError
from p3d.pipeline.recipe import PlanOptions
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.storage.urls import open_store


def said(src: str, out: str, **plan: object) -> list[str]:
    """What `check_places` says."""
    heard: list[str] = []
    check_places(src, open_store(out), PlanOptions(**plan), DEFAULTS, heard.append)  # type: ignore[arg-type]
    return heard


@pytest.fixture
def videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `v` of one video in the working directory, and links to it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v" / "more").mkdir(parents=True)
    (tmp_path / "v" / "a.mp4").write_bytes(b"x")
    (tmp_path / "v" / "list.txt").write_text("a.mp4\n")
    (tmp_path / "link").symlink_to("v")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "v" / "out-link").symlink_to(tmp_path / "elsewhere")
    return tmp_path


@pytest.mark.parametrize(
    ("src", "out"),
    [
        ("v", "v"),
        ("v", "v/"),
        ("v/", "more/../v"),
        ("v", "link"),
        ("link", "v"),
        ("v/*.mp4", "v"),
        ("v", "file://{0}/v"),
        ("file://{0}/v", "v"),
        (".", "{0}"),
    ],
)
def test_one_place_cannot_be_both(videos: Path, src: str, out: str) -> None:
    """Whatever it is called, by a link, a pattern or a URL, it is refused."""
    with pytest.raises(InputError, match="are the same place"):
        said(src.format(videos), out.format(videos))


@pytest.mark.parametrize(
    ("src", "out", "inside"),
    [
        ("v", "v/out", True),
        ("link", "v/out", True),
        ("v", "link/more/out", True),
        ("v/**/*.mp4", "v/out", True),
        (".", "out", True),
        ("v", "out", False),
        ("v", "v2", False),
        ("v", "v/out-link", False),  # no listing follows the link
        ("v/list.txt", "v/out", False),
        ("v/a.mp4", "v/out", False),
    ],
)
@pytest.mark.usefixtures("videos")
def test_an_output_inside_the_source_is_allowed_and_said(src: str, out: str, inside: bool) -> None:
    """The message is there if a listing goes through OUT, unless a pattern excludes it, and only then."""
    assert ["is inside SRC" in text for text in said(src, out)] == [True] * inside
    if not src.endswith((".txt", "a.mp4")):
        assert said(src, out, exclude=("out",)) == []


def test_no_file_of_an_output_is_taken_for_a_video(videos: Path) -> None:
    """The names of all kinds of files of an output are skipped by a listing of the source that it is in."""
    names = ("job.json", "clips/0a1b2c3d-000000000.parquet", "weights/aa.safetensors", "_job/tmp/1-ab.tmp")
    for name in (*names, "plans/0001.json", "_job/logs/000001.log", "report.html"):
        (videos / "v" / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (videos / "v" / "out" / name).write_bytes(b"x")
    found = find("v", DEFAULTS)
    assert found.videos["path"].to_pylist() == ["a.mp4"] and "out/job.json" in found.skipped


def test_swapped_places_are_shown_in_the_right_order(videos: Path) -> None:
    """If OUT holds videos and no job, and SRC is an output, empty or absent, the right command is in the message."""
    (videos / "made").mkdir()
    for src, what in (("none", "is empty or does not exist"), ("made", "is empty or"), ("made", "is an output of p3d")):
        with pytest.raises(InputError, match=f"swapped: {videos}/v holds videos, and {videos}/{src} {what}") as caught:
            said(src, "v")
        assert str(caught.value).endswith(f"`p3d launch {videos}/v {src}`")
        (videos / "made" / "job.json").write_text("{}") if src == "made" else None
    assert said("made", "out") == []  # it may hold videos, too
    with pytest.raises(InputError, match="none does not exist"):
        said("none", "elsewhere")
    assert said("v/a.mp4", "v") == []  # OUT is not empty, which a launch refuses


def test_places_on_s3_are_compared_too(bucket: str) -> None:
    """Equal prefixes are refused, one inside the other is said, and swapped ones are shown in the right order."""
    client = boto3.client("s3")
    for key in ("v/a.mp4", "v2/a.mp4", "out/job.json"):
        client.put_object(Bucket=bucket, Key=key, Body=b"x")
    for src, out in (("v", "v/"), ("v/", "v"), ("v/*.mp4", "v"), ("", "")):
        with pytest.raises(InputError, match="are the same place"):
            said(f"s3://{bucket}/{src}", f"s3://{bucket}/{out}")
    for src, out, inside in (("v", "v/new", True), ("", "new", True), ("v", "v3", False), ("v", "out", False)):
        assert len(said(f"s3://{bucket}/{src}", f"s3://{bucket}/{out}")) == inside
    for src in ("out", "none"):
        with pytest.raises(InputError, match=rf"swapped.*`p3d launch s3://{bucket}/v s3://{bucket}/{src}`"):
            said(f"s3://{bucket}/{src}", f"s3://{bucket}/v")
    assert said(f"s3://{bucket}/v", os.fspath(Path.cwd() / "nowhere")) == []
