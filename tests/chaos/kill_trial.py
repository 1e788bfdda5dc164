"""One job under kills: launched, killed by a seeded plan, resumed until finished, and watched by a reader."""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.monkey import ENDS_THE_RUN, LOOK_S, ROLES, Kill, Mourners, Running, commits, strike
from tests.chaos.reader import Seen, reading
from tests.conftest import LONG, p3d
from tests.jobs.launched import rows

RUN_S = 420.0  # time limit of one run
END_S = 60.0  # time limit for a run to notice that its raylet or head has died
DEATHS_PER_SHARD = 2  # of the worker without a commit in between; a shard has four attempts


@dataclass(slots=True)
class KillTrial:
    """What happened to one job, and its result."""

    seed: int
    shards: int = 0
    kills: list[Kill] = field(default_factory=list)
    missed: Counter[str] = field(default_factory=Counter)  # planned, but the job ended first
    runs: list[dict[str, Any]] = field(default_factory=list)  # exit code, seconds to end after a kill, last output
    seconds: float = 0.0
    verified: dict[str, Any] = field(default_factory=dict)
    reader: Seen = field(default_factory=Seen)
    same_rows: bool = False
    redone: int = 0  # shards in flight when their process was killed: at most one per kill
    not_redone: bool = True  # no resume repeated a committed shard
    ours_s: float = 0.0  # longest time that our processes outlived their driver
    rays_s: float = 0.0
    left: list[str] = field(default_factory=list)

    def of(self, role: str) -> int:
        return sum(kill.role == role for kill in self.kills)

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"landed": {role: self.of(role) for role in ROLES}}


def plan(quotas: dict[str, int], shards: int, rng: random.Random) -> list[tuple[int, str]]:
    """Sorted (minimum number of commits, role): kills spread over the job, with time left after the last one.

    The short form is a job of seconds on a loaded machine, so its kills come early: it may not end before they do.
    """
    latest = shards * 3 // 4 if LONG else shards // 4
    roles = [role for role, count in quotas.items() for _ in range(count)]
    rng.shuffle(roles)
    return list(zip(sorted(rng.randint(1, latest) for _ in roles), roles, strict=True))


def kill_trial(
    seed: int,
    source: Path,
    out: Path,
    launch: tuple[object, ...],
    quotas: dict[str, int],
    shards: int,
    serial: Path,
    *,
    patience: bool,
) -> KillTrial:
    """Launch, kill, resume until finished; then check everything. With `patience`, wait for Ray's own processes too."""
    rng, it = random.Random(seed), KillTrial(seed, shards)
    left, mourners = plan(quotas, shards, rng), list[Mourners]()
    started = time.monotonic()
    out.mkdir(parents=True)
    with reading(out, out.parent / f"{out.name}.seen.json") as it.reader:
        words: tuple[object, ...] = ("launch", source, out, *launch)
        for run in range(1 + sum(quotas.values())):
            before = commits(out)
            running = Running(words, out.parent / f"{out.name}.said{run}")
            try:
                _strike_all(running, run, out, left, it, mourners, rng, patience)
            except BaseException:
                running.end()
                raise
            if not running.ended:  # a defect: the run's code is None; its processes must not disturb the next run
                running.end()
            if run and (todo := re.search(r"(\d+) of (\d+) shards? to do", running.talk)):
                # fewer if a worker that outlived its driver commits while the next run starts
                it.not_redone &= int(todo[1]) <= shards - before
            if it.runs[-1]["code"] == 0:
                break
            words = ("resume", out)
        it.missed.update(role for _, role in left)
        it.verified = verified(out)
    it.seconds = round(time.monotonic() - started, 1)
    it.redone = sum(kill.role != "task" for kill in it.kills)
    it.same_rows = all(rows(out, folder).equals(rows(serial, folder)) for folder in ("clips", "videos", "failures"))
    for one in mourners:
        one.join()
        it.ours_s, it.rays_s = max(it.ours_s, one.ours_s), max(it.rays_s, one.rays_s)
        it.left += one.left
    it.left += [str(path) for path in (out / "_job" / "tmp").glob("*")]
    return it


def _strike_all(
    running: Running,
    run: int,
    out: Path,
    left: list[tuple[int, str]],
    it: KillTrial,
    mourners: list[Mourners],
    rng: random.Random,
    patience: bool,
) -> None:
    """Kill processes of one run until a kill ends it or it finishes."""
    until, deaths, at = time.monotonic() + RUN_S, 0, -1
    ended_by, ended_at = "", 0.0
    while not running.ended:
        assert time.monotonic() < until, f"the run neither progresses nor ends: {running.talk[-2000:]}"
        now = commits(out)
        due = [index for index, (min_commits, _) in enumerate(left) if min_commits <= now]
        if now != at:
            deaths, at = 0, now
        waits = deaths >= DEATHS_PER_SHARD
        index = next((index for index in due if not (waits and left[index][1] == "worker")), None)
        if index is None:
            time.sleep(0.01)
            continue
        role = left[index][1]
        family = running.family() if role in ENDS_THE_RUN else {}
        if not (kill := strike(running, role, out, it.shards, run, rng)):
            time.sleep(LOOK_S)
            continue
        it.kills.append(kill)
        left.pop(index)
        deaths += role == "worker"
        if role in ENDS_THE_RUN:
            ended_by, ended_at = role, time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(END_S)
            mourners.append(Mourners(family, patience=patience))
            break
    it.runs.append(
        {
            "ended_by": ended_by,
            "code": running.process.poll(),
            "end_s": round(time.monotonic() - ended_at, 2) if ended_by else None,
            "said": running.talk.strip().splitlines()[-3:],
        }
    )


def verified(out: Path) -> dict[str, Any]:
    """The result of `p3d verify --deep`."""
    ran = p3d("verify", out, "--deep", "--json")
    names = ("manifest", "ok", "failed", "pending", "underived", "lost", "duplicated", "unexpected", "changed")
    return {name: ran.json[name] for name in names} | {"code": ran.code, "reasons": ran.json["reasons"]}
