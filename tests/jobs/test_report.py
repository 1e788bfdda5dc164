"""`p3d results report`: correct contents, harmless file names, and no error of a source ends it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import boto3
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p3d.jobs.monitor.report import make_report
from p3d.jobs.planning.prepare import JobSpec
from p3d.jobs.scheduler import control
from p3d.pipeline.dataset.shard_times import ShardTime
from p3d.pipeline.errors import REASON_REMEDY, Reason
from p3d.pipeline.results.report.render import render
from p3d.pipeline.results.report.template import shown
from p3d.pipeline.results.report.throughput import RunFacts, RunRecord, timeline
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.storage.urls import open_store
from tests.jobs.embedded import embed_all
from tests.jobs.test_cli import in_process
from tests.report_page import harmless
from tests.zoo import moving

HOSTILE = (
    b"<script>alert(1)<!--.mp4",
    b"\"onload='alert(2)' x=\".mp4",
    b"line\nbreak\x1b[31m{{ 7 * 7 }}.mp4",
    b"&lt;\xff\xe2\x80\xaegpj.mp4",
)
BROKEN = b"<img src=x onerror=alert(3)>.mp4"


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos whose names contain markup, and a broken one."""
    root = tmp_path_factory.mktemp("films")
    for at, name in enumerate(HOSTILE):
        made = moving.video(root / "made.mp4", at, 20)
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(made.read_bytes())
        made.unlink()
    Path(os.fsdecode(os.fsencode(root) + b"/" + BROKEN)).write_bytes(b"\0" * 5000)
    return root


def test_a_report_from_end_to_end(out: LocalStore, films: Path, tmp_path: Path) -> None:
    """Every video has a picture, every failure its reason, an example and a remedy; hostile names are text."""
    code, said, err = in_process("results", "report", out.url, "-o", str(tmp_path / "r.html"), "--json")
    assert code == 0, err
    told = json.loads(said)
    assert {name: told[name] for name in ("videos", "failed", "pending", "clips", "without_picture")} == {
        "videos": 4,
        "failed": 1,
        "pending": 0,
        "clips": 8,
        "without_picture": 0,
    }
    html = (tmp_path / "r.html").read_text()
    assert told["size_bytes"] == len(html.encode()) < 1_000_000
    page = harmless(html)
    pictures = [image for image in page.all("img") if str(image["src"]).startswith("data:image/jpeg;base64,/9j/")]
    assert len(pictures) == 4 + 4 * 4  # the contact sheet, and four queries with the three other videos each
    for name in (r"<script>alert(1)<!--.mp4", r"line\x0abreak\x1b[31m{{ 7 * 7 }}.mp4", r"gpj.mp4"):
        assert name in page.text
    assert (
        "4 of 4 videos" in page.text
        and "1 × not_a_video" in page.text
        and REASON_REMEDY[Reason.NOT_A_VIDEO] in page.text
    )
    assert "<img src=x onerror=alert(3)>.mp4" in page.text
    assert "The times of the shards could not be read" in page.text  # no worker wrote these footers
    assert not list(tmp_path.glob("*.part"))


def test_missing_sources_are_reported(out: LocalStore, films: Path, tmp_path: Path) -> None:
    """A video without its source stays on the contact sheet, with the reason; a seed always draws the same videos."""
    away = films.rename(films.with_name("away"))
    try:
        made = make_report([out], DEFAULTS)
    finally:
        away.rename(films)
    assert all(one.startswith("source_missing: ") for one in made.pictures.values() if isinstance(one, str))
    assert made.n_pictures == 0
    page = harmless(render(made))
    assert not page.all("img") and page.text.count("source not readable") == 4 + 4 * 4
    again = make_report([out], DEFAULTS, videos=0, queries=0)
    assert not again.pictures and again.facts.durations == made.facts.durations
    assert "No pictures were requested" in harmless(render(again)).text


def test_neighbours_are_those_of_a_plain_comparison(out: LocalStore) -> None:
    """For each query: the best clip of each other video, by the cosine that numpy gives."""
    from p3d.jobs.job import rows_of
    from p3d.pipeline.dataset import schema

    rows: list[tuple[str, float, np.ndarray]] = []
    for folder, table in rows_of(out).rows():
        if folder == "clips":
            vectors = schema.features_of(table["embedding"], 512).astype(np.float64)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            rows += zip(table["video_id"].to_pylist(), table["start_s"].to_pylist(), vectors, strict=True)
    made = make_report([out], DEFAULTS, videos=0).neighbours
    assert (made.n_clips, made.n_videos, len(made.found)) == (8, 4, 4)
    for query, others in made.found:
        (asked,) = [v for name, start, v in rows if (name, start) == (query.video.video_id, query.start_s)]
        best = {name: max(float(v @ asked) for other, _, v in rows if other == name) for name, _, _ in rows}
        del best[query.video.video_id]
        assert [one.video.video_id for one in others] == sorted(best, key=lambda name: -best[name])
        assert [one.cosine for one in others] == pytest.approx(sorted(best.values(), reverse=True), abs=1e-6)


def test_a_job_on_s3_and_a_snapshot_have_reports(
    out: LocalStore, films: Path, small_weights: Path, bucket: str, tmp_path: Path
) -> None:
    """Source and OUT on S3 give pictures as files do; a changed object has a reason instead. So with a snapshot."""
    client = boto3.client("s3")
    for at in range(2):
        client.upload_file(os.fsdecode(os.fsencode(films) + b"/" + HOSTILE[at]), bucket, f"films/{at}<b>.mp4")
    store = open_store(f"s3://{bucket}/out")
    embed_all(f"s3://{bucket}/films/", store, JobSpec(None, str(small_weights)), tmp_path)
    client.put_object(Bucket=bucket, Key="films/1<b>.mp4", Body=b"another")
    code, said, err = in_process("results", "report", store.url, "-o", str(tmp_path / "s3.html"), "--json")
    assert code == 0, err
    told = json.loads(said)
    page = harmless((tmp_path / "s3.html").read_text())
    assert told["videos"] == 2 and told["pictures"] and told["without_picture"]
    assert len(page.all("img")) == page.text.count(f"{Reason.SOURCE_CHANGED}: is no longer the object") == 1 + 2
    assert in_process("results", "snapshot", out.url, str(tmp_path / "snap"))[0] == 0
    assert in_process("results", "report", str(tmp_path / "snap"), "-o", str(tmp_path / "snap.html"))[0] == 0
    page = harmless((tmp_path / "snap.html").read_text())
    assert "snapshot" in page.text and len(page.all("img")) == 4 + 4 * 4 and "What ran" in page.text


def test_a_job_that_has_nothing_yet_has_a_report(out: LocalStore, tmp_path: Path) -> None:
    """During a job, before its first shard: everything is still to be done, and each section says so."""
    shutil.copytree(out.url, tmp_path / "out")
    for folder in ("clips", "videos", "failures"):
        shutil.rmtree(tmp_path / "out" / folder)
    made = make_report([LocalStore(str(tmp_path / "out"))], DEFAULTS)
    assert (made.facts.n_videos, made.facts.n_pending) == (0, 5)
    assert "No video has rows yet" in harmless(render(made)).text


def test_mistakes_have_messages_and_exit_codes(out: LocalStore, tmp_path: Path) -> None:
    """No job, no folder to write to, and two outputs for one stdout."""
    ask = ("results", "report")
    (tmp_path / "empty").mkdir()
    for words, code, says in (
        ((str(tmp_path / "empty"), "-o", str(tmp_path / "r.html")), 4, "no job exists at"),
        ((out.url, "--queries", "0", "--videos", "0", "-o", str(tmp_path / "no" / "r.html")), 2, "cannot be written"),
        ((out.url, "-o", "-", "--json"), 2, "cannot both go to stdout"),
    ):
        found = in_process(*ask, *words)
        assert found[0] == code and says in found[2] and "Traceback" not in found[2], found


SHARD_TIMES = st.lists(
    st.builds(
        lambda host, pid, at, length, clips, wait: ShardTime(
            "s", host, pid, "cpu", at + length, length, length / 2, length * wait, 1, 0, clips, 16, 0.0, "batch 8"
        ),
        st.sampled_from(["a", "b<i>"]),
        st.integers(1, 2),
        st.floats(0, 1e6),
        st.floats(0, 1e4),
        st.integers(0, 10_000),
        st.floats(0, 1),
    ),
    min_size=1,
    max_size=20,
)


@given(SHARD_TIMES)
def test_a_timeline_loses_no_clip_and_no_second(shards: list[ShardTime]) -> None:
    """The plot's area is the number of clips, its mean their share of the time, and the stages add up to the whole."""
    found = timeline(shards)
    assert found is not None
    line = found.throughput
    step_s = (line.ended_s - line.began_s) / len(line.clips_per_s)
    clips = sum(one.clips for one in shards)
    assert sum(line.clips_per_s) * step_s == pytest.approx(clips)
    assert line.mean * (line.ended_s - line.began_s) == pytest.approx(clips)
    assert min(line.clips_per_s) >= 0 and all(bar.value >= 0 for bar in found.stages)
    busy_s = sum(one.ended_s - one.began_s for one in shards)
    assert sum(bar.value for bar in found.stages) == pytest.approx(busy_s, abs=1e-6)  # times of 1e6 s are rounded
    assert 0 <= found.network_share <= 1 and 0 <= found.idle_share <= 1
    assert sum(one.clips for one in found.machines) == clips


def test_runs_machines_and_time_are_shown(out: LocalStore) -> None:
    """The page shows what footers and epochs say; a pause is a gap in the plot, and host names are text."""
    shards = [
        ShardTime("s", "node<1>", 7, "cuda:0", at + 10, 10, 6, 7, 5, 0, 100, 1600, 1, "batch 8, threads 1")
        for at in (0, 10, 80)
    ]
    run = RunFacts(
        "finished",
        "finished: 15 videos embedded",
        (
            RunRecord(1, "2026-01-01", "node<1>", "stopped", (("workers", "1"),)),
            RunRecord(2, "x", "y", "finished", (("s", "<u>"),)),
        ),
        (("torch", "2"),),
        timeline(shards),
    )
    page = harmless(render(replace(make_report([out], DEFAULTS, videos=0, queries=0), run=run)))
    for text in ("node<1>", "cuda:0", "Newest run: 2", "Run 1, started 2026-01-01", "3.33 clips/s", "<u>", "30 s"):
        assert text in page.text, text
    assert "more cores for decoding, or a faster source, would help" in page.text
    assert "for 60% of the time" in page.text and "no shard for 67%" in page.text
    twice = timeline([*shards, *shards])  # two shards at once
    assert twice is not None and (twice.network_share, round(twice.idle_share, 2)) == (1.0, 0.67)
    assert timeline([]) is None


def test_nothing_hides_in_a_shown_name() -> None:
    """Control, direction and invalid characters are escaped, other scripts are unchanged, long names are cut."""
    assert shown("a\x00\n\x9b\u202e\ud800b") == r"a\x00\x0a\x9b\u202e\ud800b"
    assert shown("Käse 猫 العربية é") == "Käse 猫 العربية é"
    assert len(shown("x" * 10_000)) == 300
    assert REASON_REMEDY.keys() == set(Reason)


def test_an_old_runs_record_that_cannot_be_read_is_said(out: LocalStore, tmp_path: Path) -> None:
    """A damaged record does not end the report; its run is shown as unreadable."""
    shutil.copytree(out.root, tmp_path / "out")
    store = LocalStore(str(tmp_path / "out"))
    control.claim(store, {}, takeover=False, say=print)
    for content in (b"", b"{}"):
        (tmp_path / "out" / "_job" / "epochs" / "000000.json").write_bytes(content)
        made = make_report([store], DEFAULTS, videos=0, queries=0)
        assert made.run is not None and "its record cannot be read" in harmless(render(made)).text


def test_a_report_that_cannot_be_written_is_said_first(out: LocalStore, tmp_path: Path) -> None:
    """Before any picture is made, and without touching other files in the folder."""
    (tmp_path / "r.html.part").write_text("mine")
    code, _, err = in_process("results", "report", out.url, "-o", str(tmp_path / "no" / "r.html"))
    assert code == 2 and "cannot be written" in err
    assert (
        in_process("results", "report", out.url, "-o", str(tmp_path / "r.html"), "--videos", "0", "--queries", "0")[0]
        == 0
    )
    assert {path.name for path in tmp_path.iterdir()} == {"r.html", "r.html.part"}


def test_a_report_replaces_no_device_pipe_or_link(out: LocalStore, tmp_path: Path) -> None:
    """Else root would lose the device of `-o /dev/null`. A link stays a link, and what it leads to is written."""
    words = ("results", "report", out.url, "--videos", "0", "--queries", "0", "-o")
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "r.html"
    os.mkfifo(pipe)
    link.symlink_to(file)
    file.touch()
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert in_process(*words, str(pipe))[0] == in_process(*words, str(link))[0] == 0
        assert os.read(reader, 15) == b"<!DOCTYPE html>"
    finally:
        os.close(reader)
    assert pipe.is_fifo() and link.is_symlink() and file.read_bytes().startswith(b"<!DOCTYPE html>")
    assert in_process(*words, "")[0] == 2
