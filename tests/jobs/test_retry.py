"""`p3d retry` retries failed videos as a new plan; committed files do not change."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import duckdb

from tests.conftest import p3d

BY_NEWEST_PLAN = """
    SELECT path, state FROM (
      SELECT video_id, path, plan_seq, 'ok' AS state FROM '{out}/videos/*.parquet'
      UNION ALL SELECT video_id, path, plan_seq, reason FROM '{out}/failures/*.parquet')
    QUALIFY plan_seq = max(plan_seq) OVER (PARTITION BY video_id)
"""


def states(out: Path) -> dict[str, str]:
    """path -> ok or the reason, by a one-line rule in SQL."""
    return dict(duckdb.sql(BY_NEWEST_PLAN.format(out=out)).fetchall())


def digests(out: Path) -> dict[str, str]:
    """sha256 of every file of the dataset."""
    files = [path for folder in ("clips", "videos", "failures", "plans") for path in (out / folder).rglob("*.parquet")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_failed_videos_are_retried_as_they_are_now(tmp_path: Path, archive: Path, small_weights: Path) -> None:
    """A repaired file and a restored one are embedded, those that stay broken fail again; no old file changes. In a
    list, a folder, a fifo and a link out of it are failures too."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    shutil.copy(archive / "video0.mp4", source / "good.mp4")
    (source / "repaired.mp4").write_text("not a video")
    (source / "broken.mp4").write_bytes(b"")
    (source / "folder.mp4").mkdir()
    os.mkfifo(source / "fifo.mp4")
    (source / "link.mp4").symlink_to(archive / "video0.mp4")
    no_files = dict.fromkeys(("folder.mp4", "fifo.mp4", "link.mp4"), "not_a_file")
    names = ("good", "repaired", "broken", "back", "folder", "fifo", "link")
    (source / "list.csv").write_text("path,label\n" + "".join(f"{name}.mp4,label of {name}\n" for name in names))
    ran = p3d("launch", source / "list.csv", out, "--weights", small_weights, "--shard-videos", 2)
    assert ran.code == 3, ran.err
    assert states(out) == {
        "good.mp4": "ok", "repaired.mp4": "not_a_video", "broken.mp4": "empty_file", "back.mp4": "source_missing"
    } | no_files  # fmt: skip
    before = digests(out)
    shutil.copy(archive / "video1.mp4", source / "repaired.mp4")
    shutil.copy(archive / "video1.mp4", source / "back.mp4")

    assert "nothing to retry" in p3d("retry", out, "--reason", "decode_timeout").err
    ran = p3d("retry", out, "--json")
    assert ran.code == 3, ran.err
    assert "2 of 6 retried videos recovered, 4 failed again" in ran.err
    counts = {name: ran.json[name] for name in ("plans", "videos_all", "videos_done", "videos_failed")}
    assert counts == {"plans": 2, "videos_all": 7, "videos_done": 7, "videos_failed": 4}
    repaired = {"good.mp4": "ok", "repaired.mp4": "ok", "broken.mp4": "empty_file", "back.mp4": "ok"}
    assert states(out) == repaired | no_files
    assert before.items() <= digests(out).items()
    labels = duckdb.sql(f"SELECT path, label, plan_seq FROM '{out}/videos/*.parquet' ORDER BY path").fetchall()
    assert labels == [
        (f"{name}.mp4", f"label of {name}", 1 + (name != "good")) for name in ("back", "good", "repaired")
    ]
    failed = {row["path"]: row["reason"] for row in p3d("failures", out, "--json").json["failures"]}
    assert failed == {"broken.mp4": "empty_file"} | no_files
    assert p3d("verify", out).code == 0


def test_an_unknown_reason_is_refused(tmp_path: Path) -> None:
    """An unknown reason exits 2 and lists the known ones; a missing job exits 4."""
    ran = p3d("retry", tmp_path, "--reason", "bad_luck")
    assert ran.code == 2
    assert "decode_timeout" in ran.err
    assert p3d("retry", tmp_path).code == 4
