"""What the death of a worker costs: the clips that it had computed and not committed, in shards.

    python -m bench.redone                two jobs of two workers each, some five kills a job: some six minutes
    python -m bench.redone --seed 7 --workers 1

P3D-63 over videos of three clips in shards of 32, so that a shard takes ten seconds or so. A worker is killed at a
random moment, then none until several shards are committed. The job's own log says what a worker had in hand, as it
was heard at most a second before, which is what is done again. The job must end whole and verified.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench import corpus, weights
from bench.rounds import REPO, Report, Spread, Table
from tests.chaos.monkey import Running, commits
from tests.conftest import p3d

CLIPS, SHARD_VIDEOS = 3, 32
DIED = re.compile(r"has died with shard (.+) in hand, (\d+) clips of them computed")


def one_job(source: Path, out: Path, weights_path: Path, shards: int, workers: int, rng: random.Random) -> list[str]:
    """Kill a worker again and again while the job runs; the lines of its log that tell of it. SystemExit on failure."""
    options = ("--weights", weights_path, "--shard-videos", SHARD_VIDEOS, "--workers", workers, "--threads", 1)
    running, allowed = Running(("launch", source, out, *options), out.parent / f"{out.name}.said"), 1
    while not running.ended:
        wait_until = time.monotonic() + rng.uniform(0, 10)
        while not running.ended and (commits(out) < allowed or time.monotonic() < wait_until):
            time.sleep(0.05)
        if (victims := running.of("worker")) and commits(out) < shards:
            os.kill(rng.choice(victims), signal.SIGKILL)
            allowed = commits(out) + workers + 1
            print(f"a worker killed at {commits(out)} of {shards} commits", file=sys.stderr, flush=True)
    verified = p3d("verify", out, "--deep", "--json")
    if running.process.returncode or verified.code:
        raise SystemExit(f"exit codes {running.process.returncode}, {verified.code}: {running.talk[-2000:]}")
    log = "\n".join(path.read_text() for path in sorted((out / "_job" / "logs").glob("*.log")))
    print(json.dumps({name: verified.json[name] for name in ("ok", "lost", "duplicated", "changed")}), file=sys.stderr)
    return [line for line in log.splitlines() if DIED.search(line)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--shards", type=int, default=20, help="of each job")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=REPO / "bench" / "out")
    given = parser.parse_args()
    rng, lines = random.Random(given.seed), list[str]()
    with tempfile.TemporaryDirectory(prefix="p3d-bench-") as name:
        folder = Path(name)
        source = corpus.make(folder / "videos", given.shards * SHARD_VIDEOS, (120, 160), 16 * CLIPS, 16)
        made = weights.make(folder, "p3d63")
        for job in range(given.jobs):
            lines += one_job(source, folder / f"out{job}", made, given.shards, given.workers, rng)
    found = [match for line in lines if (match := DIED.search(line))]
    lost = [int(match[2]) / (CLIPS * SHARD_VIDEOS) for match in found]
    two = sum(" and " in match[1] for match in found)
    report = Report("redone", "What a dead worker had computed and not committed")
    rows = (("worker deaths", str(len(found))), ("of them with two shards in hand", str(two)))
    report.add(Table("In shards", ("what", "figure"), (*rows, ("shards done again, a death", str(Spread.of(lost))))))
    print(report.write(given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
