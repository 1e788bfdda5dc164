"""Look at jobs from outside: the log of a run, the jobs of a folder, the timeline of a finished job."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p3d.jobs.machine import boot_id, is_alive
from p3d.jobs.monitor.outputs import outputs_below
from p3d.jobs.monitor.report import _runs
from p3d.jobs.monitor.trace import trace_events
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler import log as runlog
from p3d.jobs.scheduler.control import Epoch
from p3d.jobs.scheduler.log import RunLog, read_log, told
from p3d.jobs.scheduler.run_snapshot import RunSnapshot, ShardCounts, VideoCounts
from p3d.jobs.scheduler.state import (
    Checked,
    CheckFailed,
    Counted,
    ShardDone,
    ShardTrouble,
    Stop,
    TryAgain,
    WorkerDied,
    WorkerReady,
)
from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.shard_times import ShardTime, shard_times
from p3d.pipeline.dataset.totals import ShardKey, Totals
from p3d.pipeline.errors import DamagedJob, InputError, StoreUnknown, StoreUnsafe
from p3d.pipeline.results.report.render import plot
from p3d.pipeline.results.report.template import clock, human_time
from p3d.pipeline.results.report.throughput import timeline
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import Store, StoreOptions
from p3d.pipeline.storage.urls import open_store
from tests.jobs.test_cli import in_process
from tests.pipeline.rows import planned, recipe, shard_rows

KEY = ShardKey(1, 3)


def with_job(store: Store) -> Store:
    """A job of three shards, of which one is committed."""
    manifest = planned(store, tuple("abcdefghij"))
    commit_shard(store, shard_rows(manifest, 0), recipe(), manifest.user_columns(0))
    return store


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"s3://{request.getfixturevalue('bucket')}/outputs"


def test_jobs_of_a_folder_are_listed_with_how_far_they_are(root: str) -> None:
    """Lists outputs directly in the root, by name, local and on S3; not deeper folders or other ones."""
    for name in ("b", "a", "deep/er"):
        with_job(open_store(f"{root}/{name}"))
    open_store(f"{root}/none").create("readme", b"no job")
    code, out, err = in_process("jobs", "list", root, "--json")
    assert code == 0, err
    jobs = json.loads(out)["jobs"]
    assert [job["out"].rpartition("/")[2] for job in jobs] == ["a", "b"]
    assert {(job["state"], job["videos_all"], job["videos_done"]) for job in jobs} == {("not started", 10, 4)}
    code, out, _ = in_process("jobs", "list", root)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["output", "a", "b"]
    assert "4/10" in out and max(map(len, out.splitlines())) <= 80
    assert [store.url for store in outputs_below(f"{root}/a", StoreOptions())] == [f"{root}/a"]


def test_a_job_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    """An output with a damaged job.json gives a message; the others are listed."""
    with_job(LocalStore(str(tmp_path / "good")))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "job.json").write_text("{")
    code, out, err = in_process("jobs", "list", str(tmp_path))
    assert code == 0 and "good" in out and "bad" not in out
    assert f"{tmp_path}/bad: " in err


def test_a_root_without_jobs_or_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    """An empty folder is a valid result; a missing one is an error."""
    assert in_process("jobs", "list", str(tmp_path)) == (0, "", f"no job found in {tmp_path}\n")
    code, _, err = in_process("jobs", "list", str(tmp_path / "nowhere"))
    assert code == 2 and "needs the folder that contains the outputs" in err
    with pytest.raises(InputError):
        list(outputs_below(str(tmp_path / "nowhere"), StoreOptions()))


def test_every_event_is_logged_with_its_values() -> None:
    """The log says which worker and shard, what happened and why."""
    said = [
        told(event)
        for event in (
            WorkerReady(2),
            WorkerDied(2, "killed by SIGKILL"),
            ShardDone(2, KEY, 64, 800, (("truncated", 2), ("no_frames", 1))),
            ShardTrouble(2, KEY, "outage", "no answer"),
            Checked(KEY, committed=True),
            Checked(KEY, committed=False),
            CheckFailed(KEY, "no answer"),
            TryAgain(),
            Stop(6, "cancelled"),
        )
    ]
    assert said == [
        "worker 2 is ready",
        "worker 2 died: killed by SIGKILL",
        "worker 2 committed shard 1/3: 64 videos, 800 clips; failed: 2 truncated, 1 no_frames",
        "worker 2 could not do shard 1/3 (outage): no answer",
        "shard 1/3 of a worker that died is committed",
        "shard 1/3 of a worker that died is not committed",
        "could not check whether shard 1/3 is committed: no answer",
        "retrying the store that failed",
        "stopping: cancelled",
    ]
    assert told(Counted(Totals())) == ""


def test_a_log_is_bounded_and_says_what_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest entries are kept, one line each even with newlines, and the number of dropped ones is logged."""
    monkeypatch.setattr(runlog, "LINES", 3)
    log = RunLog(LocalStore(str(tmp_path)), 7)
    for number in range(5):
        log.add(f"number {number}\nof five")
    log.write(now=True)
    lines = read_log(log.store, 7).splitlines()
    assert lines[0] == "(2 older lines were dropped)"
    assert [line.partition("  ")[2] for line in lines[1:]] == [f"number {number} of five" for number in (2, 3, 4)]


def test_a_log_is_written_seldom_and_a_store_that_fails_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is not written for every line; the next write replaces a failed one; without news nothing is written."""
    now, writes = [0.0], []
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    store = LocalStore(str(tmp_path))

    def replace(key: str, content: bytes) -> None:
        writes.append(now[0])
        if len(writes) == 1:
            raise StoreUnknown("no answer")

    monkeypatch.setattr(store, "replace", replace)
    log = RunLog(store, 1)
    for second in range(100):
        now[0] = float(second)
        if second < 50:
            log.add("something")
        log.write()
    assert writes == [30.0, 60.0]


def test_logs_of_a_run_that_does_not_exist_or_wrote_nothing(tmp_path: Path) -> None:
    """Both give a message, and only the first is an error."""
    store = with_job(LocalStore(str(tmp_path)))
    code, out, err = in_process("jobs", "logs", store.url)
    assert (code, out) == (2, "") and "was never run" in err
    control.claim(store, {}, takeover=True, say=print)
    code, out, err = in_process("jobs", "logs", store.url)
    assert (code, out) == (0, "") and "run 1 has not written a log" in err
    code, _, err = in_process("jobs", "logs", store.url, "--run", "2")
    assert code == 2 and "has had 1 run" in err


def test_a_trace_has_a_track_for_each_worker_and_every_shard_at_its_time() -> None:
    """Intervals are in microseconds, counters add up, and each machine and worker is named once, before its use."""

    def shard(name: str, host: str, pid: int, ended_s: float, clips: int, failed: int) -> ShardTime:
        return ShardTime(name, host, pid, "cuda:0", ended_s, 2.5, 1.5, 0.5, 4, failed, clips, 64, 0.2, "")

    shards = [shard("s0", "a", 11, 100.0, 7, 0), shard("s1", "b", 11, 101.0, 5, 2), shard("s2", "a", 11, 103.0, 1, 0)]
    events = list(trace_events(shards))
    spans = [event for event in events if event["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"], e["pid"], e["tid"]) for e in spans] == [
        ("s0", 97_500_000, 2_500_000, 1, 11),
        ("s1", 98_500_000, 2_500_000, 2, 11),
        ("s2", 100_500_000, 2_500_000, 1, 11),
    ]
    assert [e["args"] for e in events if e["ph"] == "C"] == [
        {"clips": 7, "failed videos": 0},
        {"clips": 12, "failed videos": 2},
        {"clips": 13, "failed videos": 2},
    ]
    overlapping = list(trace_events([shard("t0", "a", 1, 10.0, 5, 0), shard("t1", "a", 1, 9.0, 3, 0)]))
    assert [(e["ts"], e["args"]["clips"]) for e in overlapping if e["ph"] == "C"] == [(9_000_000, 3), (10_000_000, 8)]
    assert len({e["tid"] for e in overlapping if e["ph"] == "X"}) == 2
    names = [(e["name"], e["pid"], e["args"]["name"]) for e in events if e["ph"] == "M"]
    assert names == [
        ("process_name", 1, "a"),
        ("thread_name", 1, "cuda:0 (pid 11)"),
        ("process_name", 2, "b"),
        ("thread_name", 2, "cuda:0 (pid 11)"),
    ]


def test_a_footer_without_times_is_damage_with_its_name(tmp_path: Path) -> None:
    """Files of another program have no timeline, which is an error and not a guess."""
    store = with_job(LocalStore(str(tmp_path)))
    with pytest.raises(DamagedJob, match=r"clips/.*parquet: its footer does not say when it was made"):
        shard_times(store)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["1e999", 10**400]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
STATS: dict[str, Any] = {"host": "a", "pid": 1, "device": "cpu", "ended": "2026-01-02T03:04:05+00:00", "shard_s": 1.0}
STATS |= {"encode_s": 0.5, "wait_s": 0.1, "videos": 2, "failed": 0, "clips": 3, "frames": 9, "full_s": 0.0}
ODD = ["0001-01-01", "9999-12-31T23:59:59", "1969-01-01T00:00:00+00:00", float("nan"), float("-inf"), -1, 1e308, 10**30]


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from([*STATS, "batch_size"]), JSON | st.sampled_from(ODD), min_size=1), st.booleans())
def test_any_footer_gives_a_timeline_or_an_error_with_its_name(odd: dict[str, Any], whole: bool) -> None:
    """Values of other types, NaN, negative and huge ones: no trace, plot or page of a report ends in a traceback."""
    name = f"{'0' * 8}-00000"
    stats = {**STATS, **odd} if whole else odd
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        path = Path(folder, "clips", f"{name}.parquet")
        path.parent.mkdir()
        schema.write_parquet(path, pa.table({"a": [1]}), {schema.STATS_KEY: json.dumps(stats)})
        try:
            shards = shard_times(store)
        except DamagedJob as error:
            assert f"clips/{name}.parquet: its footer" in str(error) and len(str(error)) < 400
            return
    assert list(trace_events(shards))
    drawn = timeline(shards)
    assert drawn is not None and np.isfinite(drawn.throughput.clips_per_s).all() and plot(drawn.throughput)
    assert clock(drawn.throughput.began_s) and clock(drawn.throughput.ended_s) and human_time(drawn.machines[0].busy_s)


@pytest.mark.parametrize("stats", ["[1]", "null", '"x"', "[" * 100_000, "1" * 9999, "\\ud800", "{"])
def test_a_footer_that_is_not_a_record_is_an_error_with_its_name(tmp_path: Path, stats: str) -> None:
    """Lists, texts, endless nesting and half a record in the place of the record are damage, and `trace` exits 7."""
    store = with_job(LocalStore(str(tmp_path / "out")))
    path = next((tmp_path / "out" / "clips").iterdir())
    schema.write_parquet(path, pa.table({"a": [1]}), {schema.STATS_KEY: stats})
    code, _, err = in_process("jobs", "trace", store.url, "-o", str(tmp_path / "t.json"))
    assert code == 7 and path.name in err and len(err) < 600, err


def test_an_epoch_with_odd_options_is_shown_in_a_report(tmp_path: Path) -> None:
    """Options of any JSON type and depth are text, and a pid that no system has belongs to no process."""
    deep: dict[str, Any] = {}
    for _ in range(800):
        deep = {"a": deep, "b": [deep] if len(deep) < 2 else 1}
    options = {"deep": deep, "nan": float("nan"), "list": [[1]], **{f"o{at}": at for at in range(500)}}
    store = with_job(LocalStore(str(tmp_path)))
    epoch = Epoch(1, platform.node(), boot_id(), 10**17, "now", options)
    record = {name: getattr(epoch, name) for name in Epoch.__slots__}
    store.create("_job/epochs/000001.json", json.dumps(record).encode())
    control.beat(store, 1, RunSnapshot(counter=1, state="running"))
    (run,) = _runs(store)
    assert run.state == "dead" and len(run.options) <= 100 and all(len(text) < 50 for _, text in run.options)
    assert not any(is_alive(pid) for pid in (0, -1, -(10**17), 10**17))


@pytest.mark.fault(58)
def test_one_bad_record_of_any_kind_hides_no_other_output(tmp_path: Path) -> None:
    """Half, empty and foreign control files, links and fifos in one output: it is listed or named, others listed."""
    bad = {
        "epoch": "_job/epochs/000001.json",
        "beat": "_job/heartbeats/000001.json",
        "plan": "plans/0002.json",
        "job": "job.json",
        "submitted": "_job/submitted.json",
    }
    for name, key in bad.items():
        for how, content in (("half", b'{"state": '), ("empty", b""), ("list", b"[1]"), ("fifo", None), ("link", None)):
            store = with_job(LocalStore(str(tmp_path / f"{name}-{how}")))
            path = store.root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
            elif how == "fifo":
                os.mkfifo(path)
            else:
                path.symlink_to(tmp_path)
    with_job(LocalStore(str(tmp_path / "good")))
    code, out, err = in_process("jobs", "list", str(tmp_path), "--json")
    found = json.loads(out)
    listed = {job["out"].rpartition("/")[2] for job in found["jobs"]}
    named = {sentence.partition(": ")[0].rpartition("/")[2] for sentence in found["unreadable"]}
    assert code == 0 and "good" in listed and "Error" not in "".join(found["unreadable"]), (found["unreadable"], err)
    assert listed | named == {"good", *(path.name for path in tmp_path.iterdir())}
    assert {name.partition("-")[0] for name in named} == {"job", "plan"}


@pytest.mark.fault(56)
def test_links_in_an_output_are_not_followed_to_other_outputs(tmp_path: Path) -> None:
    """If ROOT is itself an output or a snapshot, links in it are not looked into; in a folder of outputs they are."""
    with_job(LocalStore(str(tmp_path / "outs" / "a")))
    root = with_job(LocalStore(str(tmp_path / "b")))
    copied = LocalStore(str(tmp_path / "copy"))
    copied.create("snapshot.json", b"{}")
    for folder in (root.root, copied.root, tmp_path / "outs"):
        (folder / "link").symlink_to(tmp_path / "outs" / "a")
    assert list(outputs_below(copied.url, StoreOptions())) == []
    (copied.root / "snapshot.json").unlink()
    (copied.root / "snapshot.json").symlink_to(tmp_path / "outs" / "a")
    with pytest.raises(StoreUnsafe):
        list(outputs_below(copied.url, StoreOptions()))
    assert [store.url for store in outputs_below(root.url, StoreOptions())] == [root.url]
    assert len(list(outputs_below(str(tmp_path / "outs"), StoreOptions()))) == 2


def test_an_output_that_lost_a_derived_file_is_not_finished(tmp_path: Path) -> None:
    """`status` says that files are missing and exits 6, as `verify` does, although the last run finished."""
    store = LocalStore(str(tmp_path / "out"))
    manifest = planned(store, tuple("abcdefgh"))
    for shard in (0, 1):
        commit_shard(store, shard_rows(manifest, shard), recipe(), manifest.user_columns(shard))
    epoch = control.claim(store, {}, takeover=False, say=print)
    control.beat(store, epoch.number, RunSnapshot(counter=1, state="finished", exit_code=3, sentence="finished"))
    code, printed, _ = in_process("status", store.url, "--exit-code")
    assert code in (0, 3) and "finished" in printed
    next((store.root / "videos").iterdir()).unlink()
    code, printed, _ = in_process("status", store.url, "--exit-code")
    assert code == 6 and "stopped" in printed and "files of 1 shard are missing" in printed
    code, _, said = in_process("verify", store.url)
    assert code == 6 and "not made yet: 1 file of videos/ and failures/" in said


def test_a_run_that_ended_before_it_had_counted_hides_nothing(tmp_path: Path) -> None:
    """Its last heartbeat has the shards of earlier runs, and not their videos: these are read from the footers."""
    store = LocalStore(str(tmp_path / "out"))
    manifest = planned(store, tuple("abcdefgh"))
    commit_shard(store, shard_rows(manifest, 0), recipe(), manifest.user_columns(0))
    epoch = control.claim(store, {}, takeover=False, say=print)
    beat = RunSnapshot(
        counter=1,
        state="stopped",
        exit_code=6,
        sentence="cancelled",
        shards=ShardCounts(all=2, done=1),
        videos=VideoCounts(all=8, done=0, failed=0),
    )
    for counted, n_videos in ((True, 0), (False, 4)):
        control.beat(store, epoch.number, replace(beat, counted=counted))
        _, printed, _ = in_process("status", store.url, "--json")
        assert json.loads(printed)["videos_done"] == n_videos
