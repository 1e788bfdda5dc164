"""Live kills of decode tasks, worker, driver, raylet and head, while a job of many short videos runs and is read.

    make test                            a short form: one job
    make chaos                           500 kills over many jobs of 200 videos
    P3D_KILLS=100 P3D_SEED=7 make chaos  fewer, from another seed; job N of a run has the seed P3D_SEED + N
    P3D_CHAOS_LOG=FILE                   append one JSON line per job to this file

Half of the kills are of decode tasks, 30 % of workers, 15 % of drivers and 5 % of raylets. In every fifth job the head
is killed as well.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from tests.chaos.conftest import CLIPS, SHARD_VIDEOS, SHARDS, VIDEOS
from tests.chaos.kill_trial import KillTrial, kill_trial
from tests.chaos.monkey import ENDS_THE_RUN, ROLES
from tests.conftest import LONG

SEED = int(os.environ.get("P3D_SEED", "0"))
KILLS = int(os.environ.get("P3D_KILLS", "500"))
SHARES = {"task": 50, "worker": 30, "driver": 15, "raylet": 5}
SHORT = {"task": 2, "worker": 1, "driver": 1, "raylet": 1}
KILLS_PER_JOB = 27
JOBS = max(1, round(KILLS / KILLS_PER_JOB)) if LONG else 1
OURS_S, RAYS_S = 5.0, 90.0  # how long processes may outlive their driver
FDS = 8  # allowed variation of a driver's open files
OWN_FDS = 2  # files that this process opens at first use and keeps


def quotas(job: int) -> dict[str, int]:
    """The kills of one job, so that all jobs together have the given shares."""
    if not LONG:
        return SHORT
    whole = {role: KILLS * share // 100 for role, share in SHARES.items()}
    part = {role: count * (job + 1) // JOBS - count * job // JOBS for role, count in whole.items()}
    return part | {"gcs": int(job % 5 == 4)}


@pytest.mark.timeout(1200)
@pytest.mark.fault(1, 3, 6, 7)
@pytest.mark.parametrize("job", range(JOBS))
def test_kills_lose_nothing_and_change_no_bit(
    job: int, tmp_path: Path, shorts: Path, tiny_weights: Path, serial: Path
) -> None:
    """After any kill in mid-shard, resumes finish the job with an undisturbed run's rows, and no reader sees errors."""
    fds = psutil.Process().num_fds()
    launch = ("--weights", tiny_weights, "--shard-videos", SHARD_VIDEOS, "--clips", CLIPS)
    it = kill_trial(SEED + job, shorts, tmp_path / "out", launch, quotas(job), SHARDS, serial, patience=LONG)
    tell(it)
    classes = {name: it.verified[name] for name in ("ok", "failed", "pending", "underived")}
    assert classes == {"ok": VIDEOS, "failed": 0, "pending": 0, "underived": 0}
    assert [it.verified[name] for name in ("lost", "duplicated", "unexpected", "changed", "code")] == [0] * 5
    assert it.same_rows
    assert it.reader.errors == []
    assert it.reader.files == 3 * SHARDS
    assert it.not_redone, "a resume repeated a committed shard"
    codes = {"driver": -9, "raylet": 6, "gcs": 6, "": 0}
    assert [(run["ended_by"], run["code"]) for run in it.runs] == [
        (run["ended_by"], codes[run["ended_by"]]) for run in it.runs
    ]
    assert it.left == []
    assert it.ours_s <= OURS_S
    assert it.rays_s <= RAYS_S  # the short form kills them instead of waiting
    assert psutil.Process().num_fds() <= fds + OWN_FDS
    assert max(kill.driver_fds for kill in it.kills) - min(kill.driver_fds for kill in it.kills) <= FDS
    if not LONG:
        assert it.missed == {}, "the job ended before all kills had happened"


def tell(it: KillTrial) -> None:
    """Print the results of one job; only kills that happened are counted."""
    record = it.record()
    ends = [f"{run['ended_by']} {run['code']} in {run['end_s']} s" for run in it.runs if run["ended_by"]]
    print(f"\nseed {it.seed}: {len(it.kills)} kills in mid-shard, {len(it.runs)} runs, {it.seconds} s")
    print("   ".join(f"{role} {record['landed'][role]}" for role in ROLES), f"  missed {dict(it.missed)}")
    print(f"shards redone {it.redone}; at most one per kill of {', '.join(('worker', *ENDS_THE_RUN))}; {it.verified}")
    print(f"reader: {it.reader.reads} reads, {it.reader.globs} globs, {len(it.reader.errors)} errors; runs: {ends}")
    print(f"outlived their driver: ours {it.ours_s:.1f} s, Ray's {it.rays_s:.1f} s; left: {it.left}")
    if log := os.environ.get("P3D_CHAOS_LOG"):
        with Path(log).open("a") as file:
            file.write(json.dumps(record, default=str) + "\n")
