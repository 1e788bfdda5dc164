"""What an interrupt costs with the shards that a launch cuts by default, and what smaller shards cost in throughput.

    python -m bench.shards                       both, about an hour
    python -m bench.shards --only interrupts     SIGINT, SIGTERM and SIGKILL in turn, at random moments of a job
    python -m bench.shards --only rounds --s3    shards of 64 and of 8 videos in turn, also from and to an S3 server

Work lost is the time from the last committed shard, or from the begin of the first one, to the end of the launch. One
worker computes its shards one after the other, so a resume computes this again. The cost of a shard is the difference
of two launches over the same videos, divided by the difference of their numbers of shards. A job whose shards take a
minute pays it once per minute.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench.inputs import make_weights
from bench.pipeline import Work, servers_of
from bench.processes import P3D, run
from bench.rounds import REPO, Report, Rounds, Spread, Table, parser_of, seconds, take_turns
from p3d.pipeline.dataset.shard_times import shard_times
from p3d.pipeline.storage.urls import open_store
from tests.zoo import corpus

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
MANY, FEW = 64, 8  # videos per shard


def interrupts(report: Report, folder: Path, weights: Path, trials: int, videos: int) -> None:
    """Stop a launch `trials` times at moments that are spread at random over its work."""
    source = corpus.make(folder / "long", videos, (240, 320), 48, 12)
    whole, started = folder / "whole", time.time()
    run([*P3D, "launch", source, whole, "--weights", weights])
    shards = shard_times(open_store(str(whole)))
    startup_s, work_s = shards[0].began_s - started, shards[-1].ended_s - shards[0].began_s
    rng, rows, lost_s = random.Random(0), [], []
    for number in range(trials):
        signal_, moment_s = SIGNALS[number % len(SIGNALS)], rng.uniform(0, work_s)
        out = folder / uuid.uuid4().hex
        lost, took = _stopped(source, out, weights, signal_, startup_s, moment_s)
        lost_s.append(lost)
        rows.append((str(number + 1), signal_.name, f"{moment_s:.0f}", f"{took:.1f}", f"{lost:.1f}"))
        print(*rows[-1], file=sys.stderr, flush=True)
        shutil.rmtree(out, ignore_errors=True)
    rows.append(("all", "", f"of {work_s:.0f}, in {len(shards)} shards", "", str(Spread.of(lost_s))))
    columns = ("trial", "signal", "after s of work", "s to end", "work lost, s")
    report.add(Table("Work lost by an interrupt", columns, tuple(rows)))


def _stopped(
    source: Path, out: Path, weights: Path, number: signal.Signals, startup_s: float, moment_s: float
) -> tuple[float, float]:
    """The work that a signal lost, and how long the launch took to end after it, in seconds."""
    command = [*P3D, "launch", str(source), str(out), "--weights", str(weights)]
    began = time.time()
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    process = subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(max(0.0, began + startup_s + moment_s - time.time()))
    sent = time.time()
    process.send_signal(number)
    process.wait()
    ended = time.time()
    committed = [one.ended_s for one in shard_times(open_store(str(out)))]
    return max(0.0, (ended if number != signal.SIGKILL else sent) - max([began + startup_s, *committed])), ended - sent


def throughput(
    report: Report, work: Work, rounds: int, videos: int, folder: Path, servers: dict[str, dict[str, str]]
) -> None:
    """Launches of the same videos in shards of MANY and of FEW videos, and what a shard costs."""
    for where in ("local", *servers):
        os.environ.update(servers.get(where, {}))

        def job(size: int, remote: bool = where != "local") -> None:
            out = f"s3://bench/{uuid.uuid4().hex}" if remote else str(folder / uuid.uuid4().hex)
            source = f"s3://bench/{work.source.name}" if remote else work.source
            options = ("--weights", work.weights, "--clips", work.clips, "--shard-videos", size)
            run([*P3D, "launch", source, out, *options])
            shutil.rmtree(out, ignore_errors=True)

        names = {size: f"shards of {size} videos" for size in (MANY, FEW)}
        found = take_turns({names[size]: seconds(partial(job, size)) for size in names}, rounds, "s", warm=False)
        report.add(found.table(f"{where}: {videos} videos", names[MANY]))
        more = videos // FEW - videos // MANY
        each = [(a - b) / more for a, b in zip(found.of[names[FEW]], found.of[names[MANY]], strict=True)]
        spread = Spread.of(each)
        rows = (("s per shard", str(spread)), ("of a shard of 60 s, %", f"{100 * spread.median / 60:.2f}"))
        report.add(Table(f"{where}: cost of a shard", ("what", "figure"), rows, Rounds("s", {"per shard": each})))


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--only", choices=("interrupts", "rounds"))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--videos", type=int, default=128, help="of the long job; about 3 minutes on 2 cores")
    parser.add_argument("--s3", action="store_true", help="measure from and to a SeaweedFS server of the tests, too")
    given = parser.parse_args()
    report = Report("shards", "Shards of about a minute")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="p3d-bench-")))
        weights = make_weights(folder, "p3d63")
        if given.only != "rounds":
            interrupts(report, folder, weights, given.trials, given.videos)
        if given.only != "interrupts":
            videos = 2 * MANY
            source = corpus.make(folder / "short", videos, (240, 320), 16, 12)
            work = Work("short", source, weights, "every:16", 0)
            servers = servers_of(stack, [work], folder, 0) if given.s3 else {}
            throughput(report, work, given.rounds, videos, folder, servers)
    print(report.write(given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
