"""Two runs of one job at once, as real processes: paused, superseded, taking over from each other.

P3D_CHAOS=1 gives 50 rounds (P3D_ROUNDS another number), the suite one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.conftest import CLIPS, SHARD_VIDEOS, SHARDS
from tests.chaos.kill_trial import rows, verified
from tests.chaos.monkey import Running, commits, note_of
from tests.chaos.reader import reading
from tests.conftest import LONG

SEED = int(os.environ.get("P3D_SEED", "0"))
ROUNDS = int(os.environ.get("P3D_ROUNDS", "50" if LONG else "1"))
WAIT_S = 240.0
CLEAN = {"failed": 0, "pending": 0, "underived": 0, "lost": 0, "duplicated": 0, "unexpected": 0, "changed": 0}


@contextlib.contextmanager
def p3d_running(*words: object, said: Path, env: dict[str, str] | None = None, first: str = "") -> Iterator[Running]:
    """A `p3d` process; all its processes are killed at the end."""
    running = Running(words, said, env or {}, first)
    try:
        yield running
    finally:
        running.end()


def wait_for(true: Callable[[], bool], *, running: Running | None = None) -> None:
    until = time.monotonic() + WAIT_S
    while not true():
        assert running is None or not running.ended, running.talk
        assert time.monotonic() < until, "the event never came"
        time.sleep(0.01)


@pytest.mark.timeout(1200)
@pytest.mark.fault(5, 41)
@pytest.mark.parametrize("at", range(ROUNDS))
def test_of_runs_that_meet_one_is_in_charge_and_a_zombie_changes_nothing(
    at: int, tmp_path: Path, shorts: Path, tiny_weights: Path, serial: Path
) -> None:
    """A run stops in mid-shard, two others take over at once, the first wakes up: one finishes, the others exit 5."""
    rng, out = random.Random(SEED + at), tmp_path / "out"
    whole = at % 2 == 1  # pause all processes, so that another run commits the zombie's shard first
    first_commits = rng.randint(1, max(1, SHARDS // 4))
    out.mkdir()
    words = ("launch", shorts, out, "--weights", tiny_weights, "--shard-videos", SHARD_VIDEOS, "--clips", CLIPS)
    with (
        reading(out, tmp_path / "seen.json") as seen,
        p3d_running(*words, said=tmp_path / "said0") as first,
    ):
        wait_for(lambda: commits(out) >= first_commits and any(map(note_of, first.of("task"))), running=first)
        paused = [first.process.pid, *first.family()] if whole else first.of("worker")
        for pid in paused:
            os.kill(pid, signal.SIGSTOP)
        at_pause = commits(out)
        with (
            p3d_running("resume", out, "--takeover", said=tmp_path / "said1") as second,
            p3d_running("resume", out, "--takeover", said=tmp_path / "said2") as third,
        ):
            rivals = {"second": second, "third": third}
            wait_for(lambda: commits(out) > at_pause + 1)
            if not whole:
                first.process.wait(WAIT_S)  # it notices although its worker does not answer
            for pid in paused:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            codes = {name: rival.process.wait(WAIT_S) for name, rival in rivals.items()}
            first.process.wait(WAIT_S)
    print(f"\nseed {SEED + at}, {'machine' if whole else 'worker'} paused at {at_pause} of {SHARDS} commits, {codes}")
    assert sorted(codes.values()) == [0, 5], [rival.talk for rival in rivals.values()]
    assert first.process.returncode == 5, first.talk
    assert "superseded" in first.talk
    found = verified(out)
    assert {name: found[name] for name in CLEAN} == CLEAN
    assert all(rows(out, folder).equals(rows(serial, folder)) for folder in ("clips", "videos", "failures"))
    assert (seen.errors, seen.files) == ([], 3 * SHARDS)


@pytest.mark.skipif(not LONG, reason="makes suites long: make chaos")
@pytest.mark.timeout(1200)
@pytest.mark.fault(5)
def test_a_worker_that_pauses_is_given_up_and_changes_nothing_when_it_wakes(
    tmp_path: Path, shorts: Path, tiny_weights: Path, serial: Path
) -> None:
    """A worker stopped in mid-shard loses its shard to another after the silence limit and does no harm later."""
    out = tmp_path / "out"
    out.mkdir()
    words = ("launch", shorts, out, "--weights", tiny_weights, "--shard-videos", SHARD_VIDEOS)
    with (
        reading(out, tmp_path / "seen.json") as seen,
        p3d_running(
            *words, said=tmp_path / "said", first="import p3d.jobs.scheduler.loop as s; s.SILENT_S = 5"
        ) as running,
    ):
        wait_for(lambda: commits(out) >= 1 and any(map(note_of, running.of("task"))), running=running)
        (paused,) = running.of("worker")
        os.kill(paused, signal.SIGSTOP)
        at_pause = commits(out)
        wait_for(lambda: commits(out) > at_pause + 1, running=running)
        assert [pid for pid in running.of("worker") if pid != paused], "no worker took over"
        with contextlib.suppress(ProcessLookupError):
            os.kill(paused, signal.SIGCONT)
        assert running.process.wait(WAIT_S) == 0, running.talk
    found = verified(out)
    assert {name: found[name] for name in CLEAN} == CLEAN
    assert all(rows(out, folder).equals(rows(serial, folder)) for folder in ("clips", "videos", "failures"))
    assert (seen.errors, seen.files) == ([], 3 * SHARDS)


@pytest.mark.skipif(not LONG, reason="makes suites long: make chaos")
@pytest.mark.timeout(1200)
@pytest.mark.fault(8)
def test_lost_requests_and_lost_replies_between_rays_processes_cost_work_only(
    tmp_path: Path, shorts: Path, tiny_weights: Path
) -> None:
    """Ray loses requests, replies and whole calls that hand out work: the job succeeds, and no video fails."""
    chances = {"num_failures": 2, "req_failure_prob": 15, "resp_failure_prob": 15, "in_flight_failure_prob": 15}
    env = {"RAY_testing_rpc_failure": json.dumps({"CoreWorkerService.grpc_client.PushTask": chances})}
    words = ("launch", shorts, tmp_path / "out", "--weights", tiny_weights, "--shard-videos", 4, "--limit", 8)
    with p3d_running(*words, said=tmp_path / "said", env=env) as running:
        assert running.process.wait(WAIT_S) == 0, running.talk
    fired = lost_calls(running.process.pid)
    print(f"\n{fired} calls lost")
    assert fired > 0
    found = verified(tmp_path / "out")
    assert {name: found[name] for name in ("ok", *CLEAN)} == {"ok": 8, **CLEAN}


@pytest.mark.skipif(not LONG, reason="makes suites long: make chaos")
@pytest.mark.fault(12)
def test_workers_that_rays_memory_monitor_kills_are_deaths_like_others(
    tmp_path: Path, shorts: Path, tiny_weights: Path
) -> None:
    """If Ray kills every worker for lack of memory, the run uses up its attempts and exits 6 with the reason."""
    env = {"RAY_memory_usage_threshold": "0.01"}
    with p3d_running(
        "launch", shorts, tmp_path / "out", "--weights", tiny_weights, said=tmp_path / "s", env=env
    ) as one:
        assert one.process.wait(WAIT_S) == 6, one.talk
    assert "workers died in a row" in one.talk
    assert "memory" in one.talk
    assert "Traceback" not in one.talk


def lost_calls(driver: int) -> int:
    """The number of lost calls in the Ray logs of a driver's session."""
    (session,) = Path(f"/tmp/p3d-{os.geteuid()}/ray").glob(f"session_*_{driver}")
    return sum(path.read_text(errors="replace").count("Inject RPC") for path in (session / "logs").rglob("*.log"))
