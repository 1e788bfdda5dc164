"""Complete jobs with real videos, real Ray, the real network and real kills."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import time
from pathlib import Path

import boto3
import duckdb
import numpy as np
import polars as pl
import psutil
import pyarrow.parquet as pq
import pytest

from tests.conftest import LONG, REPO, p3d
from tests.jobs.launched import LAUNCH, rows, running, wait_until
from tests.servers import SECRET_KEY


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, archive: Path, real_weights: Path) -> Path:
    """The dataset of the archive, from one run with one worker."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    ran = p3d("launch", archive, out, "--weights", real_weights, *LAUNCH)
    assert ran.code == 0, ran.err
    return out


def test_every_video_of_a_folder_is_embedded(undisturbed: Path, archive: Path) -> None:
    """Twelve videos give twelve video rows and the clips of the sampling rule; verify finds no problem."""
    videos, clips = rows(undisturbed, "videos"), rows(undisturbed, "clips")
    assert sorted(videos["path"].to_pylist()) == sorted(
        str(path.relative_to(archive)) for path in archive.rglob("*.mp4")
    )
    assert clips.num_rows == sum(videos["n_clips"].to_pylist())
    by_frames = dict(zip(videos["n_frames"].to_pylist(), videos["n_clips"].to_pylist(), strict=True))
    assert by_frames == {40: 3, 16: 1, 9: 1, 33: 3, 64: 4, 20: 2}
    ran = p3d("verify", undisturbed, "--json")
    assert (ran.code, ran.json["ok"], ran.json["damaged"]) == (0, 12, False)


def test_features_are_those_of_the_network_on_the_frames(undisturbed: Path, archive: Path, real_weights: Path) -> None:
    """A stored row equals the plain network applied to the clip's frames, decoded here by hand."""
    import av

    import p3d.weights
    from p3d.encoder import Encoder
    from p3d.pipeline.types import FrameSpec

    weights = p3d.weights.load(real_weights)
    row = next(r for r in rows(undisturbed, "clips").to_pylist() if r["path"] == "video0.mp4" and r["clip_index"] == 1)
    assert (row["start_frame"], row["end_frame"], row["n_padded"]) == (16, 32, 0)
    assert (row["start_s"], row["end_s"]) == (16 / 25, 32 / 25)
    with av.open(str(archive / "video0.mp4")) as container:
        frames = [
            frame.reformat(width=108, height=72, format="rgb24", interpolation="BILINEAR").to_ndarray()
            for frame in container.decode(video=0)
        ]
    spec = FrameSpec(crop_hw=(64, 64), resize_hw=(72, 108))
    frames_NHWC = spec.crop(np.stack(frames[16:32]))
    encoder = Encoder(weights, batch_size=1)
    [feature], [probs] = encoder.encode(frames_NHWC, np.arange(16)[None], probs=True)
    stored = np.array(row["embedding"], np.float32)
    cosine = float(feature @ stored / np.linalg.norm(feature) / np.linalg.norm(stored))
    assert cosine > 0.9999  # not equal: `reformat` uses another chroma position than the decoder's scaler
    stored = np.array(row["probs"], np.float32)
    assert len(stored) == 10 and np.abs(probs - stored).max() < 1e-3 < np.ptp(probs)


def test_scores_of_a_job_are_evaluated(undisturbed: Path, tmp_path: Path) -> None:
    """`results evaluate` on a real job agrees with numpy on the stored rows; labels are names of the weights' classes,
    or numbers; a video's scores are the mean of its clips'."""
    videos, clips = rows(undisturbed, "videos").to_pylist(), rows(undisturbed, "clips").to_pylist()
    label = {row["path"]: int(np.argsort(row["probs"])[-1 - at % 3]) for at, row in enumerate(videos)}
    lines = [f"{path},{f'class {number}' if number % 2 else number}" for path, number in label.items()]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *lines, "elsewhere.mp4,class 3", ""]))
    ran = p3d("results", "evaluate", undisturbed, "--labels", tmp_path / "labels.csv", "--json", "--top", 2)
    assert ran.code == 0, ran.err
    of_videos = [list(np.argsort(row["probs"])[::-1]).index(label[row["path"]]) for row in videos]
    assert sorted(set(of_videos)) == [0, 1, 2]
    expected = {
        "videos": 12,
        "clips": len(clips),
        "clip_hit1": np.mean([np.argmax(row["probs"]) == label[row["path"]] for row in clips]),
        "video_hit1": np.mean([at == 0 for at in of_videos]),
        "video_hit_top": np.mean([at < 2 for at in of_videos]),
    }
    assert {name: ran.json[name] for name in expected} == pytest.approx(expected)
    assert (ran.json["unlabelled"], ran.json["failed"], ran.json["unknown_labels"]) == (0, 0, 1)
    for row in videos:
        of_clips = [np.array(clip["probs"]) for clip in clips if clip["video_id"] == row["video_id"]]
        assert np.array_equal(np.float32(row["probs"]), np.float32(sum(of_clips) / len(of_clips)))


def test_a_past_job_tells_what_happened(undisturbed: Path, tmp_path: Path) -> None:
    """Its log names every shard, and its timeline holds each of them once, within the time of the run."""
    ran = p3d("jobs", "logs", undisturbed)
    lines = [line.partition("  ")[2] for line in ran.out.splitlines()]
    committed = sorted(line.split()[4].rstrip(":") for line in lines if "committed shard" in line)
    n_shards = len(list((undisturbed / "clips").iterdir()))
    assert committed == sorted(f"1/{number}" for number in range(n_shards))
    assert lines[0].endswith(f"{n_shards} shards to do") and "worker 0 is ready" in lines
    assert lines[-1].startswith("run 1 ended with exit code 0")
    assert p3d("jobs", "logs", undisturbed, "--tail", 1).out.splitlines() == ran.out.splitlines()[-1:]
    ran = p3d("jobs", "trace", undisturbed, "-o", tmp_path / "trace.json")
    assert ran.code == 0 and f"{n_shards} shards of 1 worker process" in ran.err
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks: dict[int, list[tuple[int, int]]] = {}
    for event in events:
        if event["ph"] == "X":
            tracks.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert sum(map(len, tracks.values())) == n_shards and len(tracks) <= 2  # a worker may have two shards at once
    for spans in tracks.values():
        assert all(later[0] >= earlier[1] for earlier, later in itertools.pairwise(sorted(spans)))
    assert events[-1]["args"] == {"clips": rows(undisturbed, "clips").num_rows, "failed videos": 0}
    ran = p3d("results", "report", undisturbed, "-o", tmp_path / "report.html", "--videos", 2, "--queries", 1)
    report = (tmp_path / "report.html").read_text()
    assert ran.code == 0 and report.count("data:image/jpeg") == 2 + 5, ran.err
    for said in ("State: <b>finished", "Newest run: 1", "decode_tasks", "clips/s on average", "waiting for frames"):
        assert said in report


def test_one_call_gives_the_rows_of_the_job(undisturbed: Path, archive: Path, real_weights: Path) -> None:
    """`p3d.embed_file` gives what the job stored, bit for bit."""

    import p3d

    found = p3d.embed_file(archive / "video0.mp4", real_weights, device="cpu", threads=threads(undisturbed))
    clips = [row for row in rows(undisturbed, "clips").to_pylist() if row["path"] == "video0.mp4"]
    assert np.array_equal(found.features_ND, np.array([row["embedding"] for row in clips], np.float32))
    assert [(row.start_s, row.end_s) for row in found.clips] == [(row["start_s"], row["end_s"]) for row in clips]
    video = next(row for row in rows(undisturbed, "videos").to_pylist() if row["path"] == "video0.mp4")
    assert np.array_equal(found.embedding_D, np.array(video["embedding"], np.float32))


def test_queries_of_the_pages_run(undisturbed: Path) -> None:
    """DuckDB and Polars read the dataset with the queries that the README and docs/how-to/results.md show."""
    for page, n in (("README.md", 1), ("docs/how-to/results.md", 3)):
        blocks = (REPO / page).read_text().split("```")
        sql = next(block for block in blocks if block.startswith("sql")).removeprefix("sql")
        sql = sql.replace("'out/", f"'{undisturbed}/").replace("OUT", str(undisturbed))
        found = [duckdb.sql(one).fetchall() for one in sql.strip().split(";") if one.strip()]
        assert len(found) == n
        assert all(found)
    python = next(block for block in blocks if block.startswith("python") and "polars" in block).removeprefix("python")
    names: dict[str, object] = {}
    exec(python.replace("OUT", str(undisturbed)), names)
    assert isinstance(names["nearest"], pl.DataFrame)
    assert names["nearest"].height == 5
    python = next(block for block in blocks if block.startswith("python") and "top_k" in block).removeprefix("python")
    exec(python.replace("OUT", str(undisturbed)), names)
    probs = {row["path"]: row["probs"] for row in rows(undisturbed, "videos").to_pylist()}
    assert {path: top[0] for path, top in names["shown"].items()} == {
        path: f"class {np.argmax(one)}" for path, one in probs.items()
    }


def threads(out: Path) -> int:
    """The threads of the last run at an output."""
    epoch = max((out / "_job" / "epochs").iterdir())
    return json.loads(epoch.read_text())["options"]["threads"]


def same_rows(out: Path, other: Path) -> bool:
    """Equal clips and videos, every column, every bit."""
    return all(rows(out, folder).equals(rows(other, folder)) for folder in ("clips", "videos"))


SKEW = """
import os, time
true_time, true_ns, true_gmtime, skew = time.time, time.time_ns, time.gmtime, int(os.environ["SKEW_S"])
time.gmtime = lambda seconds=None: true_gmtime(time.time() if seconds is None else seconds)
time.time = lambda: true_time() + skew
time.time_ns = lambda: true_ns() + skew * 10**9
"""


def with_clock(folder: Path, years: int) -> dict[str, str]:
    """The environment of processes whose clock is wrong by a number of years."""
    (folder / "sitecustomize.py").write_text(SKEW)
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": paths, "SKEW_S": str(years * 365 * 24 * 3600)}


@pytest.mark.fault(40)
def test_a_grown_and_changed_source_is_planned_again_whatever_the_clock_says(
    tmp_path: Path, archive: Path, small_weights: Path
) -> None:
    """Launched in 1999 and again in 2040, a job plans only what is new or changed; every video counts once, by its
    newest plan; no time is negative or infinite."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    shutil.copy(archive / "video0.mp4", source / "kept.mp4")
    shutil.copy(archive / "video0.mp4", source / "changed.mp4")
    words = ("launch", source, out, "--weights", small_weights, *LAUNCH)
    assert p3d(*words, env=with_clock(tmp_path, -27)).code == 0
    shutil.copy(archive / "video1.mp4", source / "changed.mp4")
    (source / "added.mp4").write_bytes(b"")
    ran = p3d(*words, "--json", env=with_clock(tmp_path, 14))
    assert ran.code == 3, ran.err
    stats = [json.loads(pq.read_metadata(path).metadata[b"p3d.stats"]) for path in (out / "clips").iterdir()]
    assert {one["ended"][:4] for one in stats} == {"1999", "2040"}
    assert all(0 < one["shard_s"] < 200 for one in stats)
    assert (ran.json["plans"], ran.json["videos_all"], ran.json["videos_done"], ran.json["videos_failed"]) == (
        2,
        3,
        3,
        1,
    )
    found = {(row["path"], row["plan_seq"]): row["n_frames"] for row in rows(out, "videos").to_pylist()}
    assert found == {("kept.mp4", 1): 40, ("changed.mp4", 1): 40, ("changed.mp4", 2): 9}
    assert p3d("verify", out).code == 0
    (out / "_job" / "heartbeats" / "000002.json").unlink()
    assert p3d("status", out, "--json").json["videos_done"] == 3


@pytest.mark.skipif(not LONG, reason="the short form of tests/chaos kills a driver too: make chaos")
@pytest.mark.fault(1)
def test_a_killed_driver_loses_nothing(tmp_path: Path, undisturbed: Path, archive: Path, real_weights: Path) -> None:
    """kill -9 after the first commit, then resume: the rows are those of an undisturbed run, bit for bit (row 1)."""
    out = tmp_path / "out"
    with running("launch", archive, out, "--weights", real_weights, *LAUNCH) as driver:
        wait_until(lambda: len(list((out / "clips").glob("*.parquet"))) >= 1, driver)
        driver.kill()
        driver.wait()
    done = len(list((out / "clips").glob("*.parquet")))
    assert done < 6, "the job was over before the kill"
    ran = p3d("status", out, "--json", "--exit-code")
    assert (ran.code, ran.json["state"]) == (6, "dead")
    ran = p3d("resume", out)
    assert ran.code == 0, ran.err
    assert same_rows(out, undisturbed)
    assert p3d("verify", out).code == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert p3d("resume", out).code == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before, "a resume with nothing to do wrote"
    assert not list((out / "_job" / "tmp").glob("*"))


@pytest.mark.fault(47, 50)
def test_two_workers_from_s3_to_s3_give_the_same_rows_and_give_nothing_away(
    tmp_path: Path, undisturbed: Path, archive: Path, real_weights: Path, real_bucket: str
) -> None:
    """Neither the number of workers nor a bucket as source and output changes a bit of any row. No object, Ray log or
    message has the secret key. While the job runs, its processes listen only on loopback."""
    client = boto3.session.Session().client("s3")
    for path in archive.rglob("*.*"):
        client.upload_file(str(path), real_bucket, f"archive/{path.relative_to(archive)}")
    listening = set[str]()
    source, out = f"s3://{real_bucket}/archive", f"s3://{real_bucket}/out"
    words = ("launch", source, out, "--weights", real_weights, *LAUNCH)
    with running(*words, "--workers", 2, "--threads", threads(undisturbed)) as driver:
        while driver.poll() is None:
            with contextlib.suppress(psutil.Error):
                for process in [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        connections = process.net_connections("inet")
                        listening |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
            time.sleep(0.2)
        said = "".join(driver.communicate())
    assert driver.returncode == 0, said
    assert listening and all(ip.removeprefix("::ffff:").startswith("127.") or ip == "::1" for ip in listening), (
        listening
    )
    assert p3d("verify", out).code == 0
    assert p3d("status", out, "--json").json["videos_done"] == 12
    for item in client.list_objects_v2(Bucket=real_bucket, Prefix="out/")["Contents"]:
        path = tmp_path / item["Key"]
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(real_bucket, item["Key"], str(path))
    [session] = Path(f"/tmp/p3d-{os.geteuid()}/ray").glob(f"session_*_{driver.pid}")
    logs = [path for folder in (tmp_path, session) for path in folder.rglob("*") if path.is_file()]
    assert len(logs) > 20
    assert SECRET_KEY not in said
    assert [path for path in logs if SECRET_KEY.encode() in path.read_bytes()] == []
    assert rows(tmp_path / "out", "clips").equals(rows(undisturbed, "clips"))
    there, here = (rows(out, "videos").drop_columns(["uri", "version"]) for out in (tmp_path / "out", undisturbed))
    assert there.equals(here)


def test_a_worker_that_computes_other_numbers_is_refused(tmp_path: Path, undisturbed: Path) -> None:
    """A worker whose golden features differ from the planned ones is refused: nothing is computed, exit 6."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    removed, *kept = sorted((out / "clips").glob("*.parquet"))
    for folder in ("clips", "videos", "failures"):
        (out / folder / removed.name).unlink()
    (golden,) = (out / "weights").glob("*.golden.json")
    record = json.loads(golden.read_text())
    record["features"] = record["features"][::-1]
    golden.write_text(json.dumps(record))
    ran = p3d("resume", out, "--trust")
    assert ran.code == 6
    assert "cosine" in ran.err and "cpu" in ran.err
    assert sorted((out / "clips").glob("*.parquet")) == kept
