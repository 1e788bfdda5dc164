"""`p3d plan` says what will go wrong, and how many videos a launch into an existing output will embed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import p3d.jobs.scheduler.run as running
from p3d.jobs.planning import estimate
from p3d.jobs.planning.prepare import JobSpec
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler.run_snapshot import RunSnapshot
from p3d.jobs.scheduler.state import Finish
from p3d.pipeline.clips.rules import clip_spans, looked_at, parse_sampling
from p3d.pipeline.recipe import JobRecord
from p3d.pipeline.storage.local import LocalStore
from tests.jobs.embedded import embed_all
from tests.jobs.test_cli import in_process
from tests.zoo import make


def test_a_plan_says_what_will_go_wrong(tmp_path: Path, small_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing files, failures with reason and example, the share of frames, and the weights; in 80 columns."""
    make.video(tmp_path / "good.mp4", "libx264", 400, options={"preset": "ultrafast"})
    long = f"{'long ' * 20}{'name' * 20}.mp4"
    (tmp_path / long).write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    listed = tmp_path / "list.txt"
    listed.write_text(f"good.mp4\n{long}\nempty.mp4\nlost.mp4\n")
    line = ("plan", str(listed), str(tmp_path / "out"), "--weights", str(small_weights), "--clips", "uniform:2")
    code, text, err = in_process(*line)
    assert code == 0, err
    assert err.splitlines()[0] == "loading the network ..." and "decoding 3 videos" in err
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for part in (
        "looks at 8 % of the frames of the median video",
        "missing 1 file does not exist: lost.mp4",
        "failing 2 of 3 videos looked at (67%)",
        "1 empty_file, such as empty.mp4: ",
        "1 not_a_video, such as ...",
        "videos 4 (",
    ):
        assert part in words, (part, text)
    assert "of weights" in text and not (tmp_path / "out").exists()
    said = json.loads(in_process(*line, "--json")[1])
    assert (said["n_missing"], said["missing"], said["n_failed"], said["n_sampled"]) == (1, ["lost.mp4"], 2, 3)
    assert {one["reason"]: one["examples"][0][0] for one in said["failing"]} == {
        "empty_file": "empty.mp4",
        "not_a_video": long,
    }
    monkeypatch.setattr(estimate, "TRIED", 1)  # the others are only probed
    assert json.loads(in_process(*line, "--json")[1])["failing"] == said["failing"]
    assert said["n_clips"] == 2 and said["weights_bytes"] >= small_weights.stat().st_size


@pytest.mark.parametrize(
    ("rule", "n_frames", "share"),
    [
        ("uniform:10", 2000, 0.08),
        ("uniform:10", 40, 37 / 40),  # the authors' rule never sees the end
        ("every:16", 40, 1.0),
        ("every:32", 64, 0.75),
        ("every:16", 5, 1.0),
        ("uniform:1", 0, 0.0),
    ],
)
def test_the_share_of_frames_that_clips_look_at(rule: str, n_frames: int, share: float) -> None:
    """Each frame counts once, however many clips it is in."""
    sampling = parse_sampling(rule, clip_frames=16)
    assert looked_at(sampling, clip_spans(sampling, n_frames), n_frames) == share


def test_a_launch_does_what_was_announced(tmp_path: Path, small_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New, changed and pending videos are those that `launch` then computes; unchanged ones are not estimated."""
    computed: list[list[str]] = []

    def loop(_: JobRecord, run: running.ClaimedRun, plans: dict[int, Any], work: Any, *__: Any) -> Finish:
        computed.append([video.path for seq, at in work.todo for video in plans[seq].shard(at).videos])
        control.beat(run.store, run.epoch.number, RunSnapshot(counter=2, state="stopped"))
        return Finish(6, "stopped")

    monkeypatch.setattr(running, "_loop", loop)
    source, out = tmp_path / "v", tmp_path / "out"
    source.mkdir()
    for at, name in enumerate("abcdefg"):
        make.video(source / f"{name}.mp4", "libx264", 16 + at, options={"preset": "ultrafast"})
    store = LocalStore(str(out))
    embed_all(str(source), store, JobSpec(None, str(small_weights)), tmp_path, shard_videos=3)
    for folder in ("clips", "videos", "failures"):
        (last,) = (out / folder).glob("*-000000002.parquet")  # g is pending
        last.unlink()
    shutil.copy(source / "b.mp4", source / "a.mp4")  # changed
    make.video(source / "new.mp4", "libx264", 16)
    line = (str(source), str(out), "--weights", str(small_weights))
    code, text, err = in_process("plan", *line)
    assert code == 0 and "(1 new, 1 changed, 6 unchanged, and 1 pending of earlier plans)" in text, err
    assert "of weights" not in text  # OUT has them
    said = json.loads(in_process("plan", *line, "--json")[1])
    assert in_process("launch", *line, "--device", "cpu")[0] == 6
    assert sorted(computed[0]) == ["a.mp4", "g.mp4", "new.mp4"] and said["n_videos"] == len(computed[0])
    assert (said["n_shards"], said["n_pending"]) == (2, 1)


def test_nothing_to_do_is_said(tmp_path: Path, small_weights: Path) -> None:
    """If OUT has every video of SRC, nothing is decoded."""
    make.video(tmp_path / "v.mp4", "libx264", 16)
    out = str(tmp_path / "out")
    embed_all(str(tmp_path / "v.mp4"), LocalStore(out), JobSpec(None, str(small_weights)), tmp_path)
    line = ("plan", str(tmp_path / "v.mp4"), out, "--weights", str(small_weights))
    code, text, err = in_process(*line)
    assert code == 0 and "nothing to do" in text and "1 unchanged" in text and "decoding" not in err
    assert json.loads(in_process(*line, "--json")[1])["n_videos"] == 0
