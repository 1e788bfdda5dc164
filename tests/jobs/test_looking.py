"""Look at jobs from outside: the log of a run, the jobs of a folder, the timeline of a finished job."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from p3d.jobs.monitor.outputs import outputs_below
from p3d.jobs.monitor.trace import trace_events
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler import log as runlog
from p3d.jobs.scheduler.log import RunLog, read_log, told
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
from p3d.jobs.totals import ShardKey, Totals
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.shard_times import ShardTime, shard_times
from p3d.pipeline.errors import DamagedJob, InputError, StoreUnknown
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
    """If ROOT is itself an output, links in it are not looked into; in a folder of outputs they are."""
    with_job(LocalStore(str(tmp_path / "outs" / "a")))
    root = with_job(LocalStore(str(tmp_path / "b")))
    for folder in (root.root, tmp_path / "outs"):
        (folder / "link").symlink_to(tmp_path / "outs" / "a")
    assert [store.url for store in outputs_below(root.url, StoreOptions())] == [root.url]
    assert len(list(outputs_below(str(tmp_path / "outs"), StoreOptions()))) == 2
