"""Complete jobs that are stopped, or that read odd and broken files, or that run another network."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from pathlib import Path

import psutil
import pytest

from p3d.pipeline.clips.rules import clip_spans, parse_sampling
from tests import samples
from tests.chaos.monkey import title
from tests.conftest import p3d
from tests.jobs.launched import LAUNCH, rows, running, wait_until


def test_another_network_runs_the_same_job(tmp_path: Path) -> None:
    """A network with 3 frames per clip and 4096 features runs, is stored and verified like P3D, whatever OUT's name."""
    import torch

    from p3d import zoo
    from p3d.weights import save
    from p3d.weights.record import assemble
    from tests.zoo import make

    torch.manual_seed(0)
    config, tensors = zoo.config("convpool", num_classes=2), zoo.build("convpool", num_classes=2).state_dict()
    recipe = dataclasses.replace(zoo.recipe("convpool", "caffe"), n_frames=3, resize_hw=(64, 80), crop_hw=(64, 64))
    save(tmp_path / "w.safetensors", assemble("made here", config, recipe, tensors, origin="a test"))
    (tmp_path / "videos").mkdir()
    make.video(tmp_path / "videos" / "a.mp4", "libx264", 9, options={"preset": "ultrafast"})
    make.video(tmp_path / "videos" / "b.mp4", "libx264", 2, options={"preset": "ultrafast"})
    out = tmp_path / "café 日本"
    ran = p3d("launch", tmp_path / "videos", out, "--weights", tmp_path / "w.safetensors", "--clips", "every:4")
    assert ran.code == 0 and "warning" not in ran.err, ran.err
    clips = rows(out, "clips").sort_by([("path", "ascending"), ("clip_index", "ascending")]).to_pylist()
    spans = [(row["path"], row["start_frame"], row["end_frame"], row["n_padded"]) for row in clips]
    assert spans == [("a.mp4", 0, 3, 0), ("a.mp4", 4, 7, 0), ("a.mp4", 6, 9, 0), ("b.mp4", 0, 2, 1)]
    assert {len(row["embedding"]) for row in clips} == {4096}
    assert p3d("verify", out, "--deep").code == 0
    log = p3d("jobs", "logs", out).out
    assert "finished" in log and re.search(r"metrics are at http://127\.0\.0\.1:[0-9]+/", log), log
    assert "café" in p3d("status", out).out


@pytest.mark.fault(2)
def test_ctrl_c_stops_cleanly_and_says_how_to_continue(tmp_path: Path, archive: Path, small_weights: Path) -> None:
    """SIGINT: exit 130, no process or temporary file left, and a message with the resume command (row 2)."""
    out = tmp_path / "out"
    words = ("launch", archive, out, "--weights", small_weights, *LAUNCH, "--clips", "uniform:100")
    with running(*words) as driver:
        wait_until(lambda: any((out / "clips").glob("*.parquet")), driver)
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGINT)
        _, err = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert f"p3d resume {out}" in err
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    ran = p3d("status", out, "--json", "--exit-code")
    assert (ran.code, ran.json["state"]) == (130, "stopped")
    assert p3d("verify", out).code == 6
    assert not list((out / "_job" / "tmp").glob("*"))


def beats(out: Path) -> int:
    """The heartbeats of the first run so far."""
    return json.loads((out / "_job" / "heartbeats" / "000001.json").read_text())["counter"]


@pytest.mark.fault(41)
def test_a_second_launch_is_refused_and_cancel_drains(tmp_path: Path, archive: Path, small_weights: Path) -> None:
    """While a job runs, another launch exits 5 and changes nothing. cancel finishes the shard in progress. That
    --takeover continues at once, and that the first run then exits 5, tests/chaos/test_two_drivers.py shows."""
    out = tmp_path / "out"
    args = ("launch", archive, out, "--weights", small_weights, "--clips", "uniform:100", "--shard-videos", 1)
    with running(*args) as first:
        wait_until(lambda: any((out / "clips").glob("*.parquet")), first)
        family = psutil.Process(first.pid).children(recursive=True)
        [worker] = [one for one in family if title(one.pid).startswith("ray::ShardWorker")]
        worker.suspend()  # so that the job cannot end before the driver has seen the request
        refused = p3d(*args)
        assert refused.code == 5
        assert "--takeover" in refused.err
        assert first.poll() is None
        assert p3d("cancel", out).code == 0
        assert "stopping: cancelled" in p3d("status", out).out
        seen = beats(out)
        wait_until(lambda: beats(out) >= seen + 2, first)  # it looks for requests at each heartbeat
        worker.resume()
        _, err = first.communicate(timeout=100)
        assert (first.returncode, "cancelled" in err) == (6, True), err
    ran = p3d("verify", out, "--json")
    assert (ran.code, ran.json["damaged"], ran.json["pending"] > 0) == (6, False, True)


def test_an_archive_of_odd_and_broken_files_is_accounted_for(tmp_path: Path, small_weights: Path) -> None:
    """Each of the 44 sample videos is a video or a failure with its documented reason, never `internal`. The random
    clips of each video follow from its id and its true frame count."""
    videos_folder = samples.need_all_videos()
    out = tmp_path / "out"
    ran = p3d("launch", videos_folder, out, "--weights", small_weights, "--clips", "random:2@1", "--batch-size", 2)
    assert ran.code == 3, ran.err
    failed = {row["path"]: row["reason"] for row in p3d("failures", out, "--json").json["failures"]}
    assert failed == {
        "decord__corrupted.mp4": "corrupt_frames",
        "generated/audio_only.mp4": "no_video_stream",
        "generated/corrupt_200bytes.mp4": "corrupt_frames",
        "generated/trunc_faststart_50.mp4": "truncated",
        "generated/trunc_moov_end.mp4": "truncated",
        "generated/trunc_mpeg4_avi.avi": "truncated",
        "mp4parse__chunk_out_of_range.mp4": "corrupt_frames",
        "mp4parse__no_timescale.mp4": "corrupt_frames",
        "mp4parse__short-cenc.mp4": "unsupported",
    }
    videos, sampling = rows(out, "videos"), parse_sampling("random:2@1", clip_frames=16)
    paths = videos["path"].to_pylist()
    assert len(set(paths) | failed.keys()) == len(paths) + len(failed) == 44
    expected = [
        (row["video_id"], span.start_frame, span.end_frame)
        for row in videos.select(["video_id", "n_frames"]).to_pylist()
        for span in clip_spans(sampling.for_video(row["video_id"]), row["n_frames"])
    ]
    clips = rows(out, "clips").select(["video_id", "start_frame", "end_frame"]).to_pylist()
    assert [tuple(row.values()) for row in clips] == expected
    assert p3d("verify", out).code == 0
