"""How close a job comes to what its stages allow: clips per second over the harmonic limit, and where time is lost.

    python -m bench.pipeline                           the small form, some minutes
    python -m bench.pipeline --full                    more videos and rounds, and an S3 server
    python -m bench.pipeline --only decode --s3 --latency-ms 50

The limit: one decode process per core reaches D clips per second, and one encode process per core reaches E. The same
cores cannot do both faster than 1 / (1/D + 1/E). Stages and jobs take turns, so a machine that slows down slows all of
them. A second table gives CPU seconds per clip, which other programs on the machine change less. What a job takes more
than its stages is orchestration; what it leaves unused of the cores is waiting.

The S3 server and the proxy that adds latency run on the same cores as the job. What S3 costs without latency is their
work and the job's own fetching.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import stages
from bench.inputs import make_weights, options_of
from bench.processes import NULL, Launched, launch
from bench.rounds import Report, Rounds, Spread, Table, parser_of, take_turns
from bench.stages import Cost
from tests.zoo import corpus

SHARD = 64  # videos, the default of a job: with fewer, the ends of shards weigh more


@dataclass(frozen=True, slots=True)
class Work:
    """A job to measure: its videos and weights, and how many batches the network alone does."""

    name: str
    source: Path
    weights: Path
    clips: str
    batches: int


def efficiency(report: Report, work: Work, rounds: int, out: Path, servers: Mapping[str, dict[str, str]]) -> None:
    """Measure stages and jobs in turn; `servers` maps the name of an S3 arm to the environment of its server."""
    decodes: list[Cost] = []
    encodes: list[Cost] = []
    jobs: dict[str, list[Launched]] = {"local": [], **{name: [] for name in servers}}

    def stage(name: str, what: str | Path, kept: list[Cost]) -> float:
        kept.append(stages.run(name, what, work.weights, work.clips))
        return kept[-1].clips_per_s

    def job(where: str) -> float:
        os.environ.update(servers.get(where, {}))  # for the launch, and for this process, which reads the footers
        remote = where in servers
        target = f"s3://bench/{uuid.uuid4().hex}" if remote else str(out / uuid.uuid4().hex)
        source = f"s3://bench/{work.source.name}" if remote else work.source
        options = ("--weights", work.weights, *options_of(work.clips), "--shard-videos", SHARD)
        jobs[where].append(launch(source, target, *options))
        shutil.rmtree(target, ignore_errors=True)
        return jobs[where][-1].clips_per_s

    arms: dict[str, Callable[[], float]] = {
        "decoding alone": partial(stage, "decode", work.source, decodes),
        "network alone": partial(stage, "encode", str(work.batches), encodes),
        **{f"job, {where}": partial(job, where) for where in jobs},
    }
    found = take_turns(arms, rounds, "clips/s", warm=False)
    limits = [1 / (1 / d + 1 / e) for d, e in zip(found.of["decoding alone"], found.of["network alone"], strict=True)]
    with_limit = Rounds("clips/s", {**found.of, "limit of both": limits})
    report.add(with_limit.table(work.name, "limit of both"))
    if servers:
        report.add(found.table(f"{work.name}: over the local job", "job, local"))
    rows = [_losses(where, done, decodes, encodes) for where, done in jobs.items()]
    columns = ("job", "CPU s per clip", "decoding", "network", "rest", "stages / CPU", "cores used", "startup, s")
    report.add(Table(f"{work.name}: where the time goes, in CPU seconds per clip", columns, tuple(rows)))


def _losses(where: str, jobs: list[Launched], decodes: list[Cost], encodes: list[Cost]) -> tuple[str, ...]:
    """Medians over the rounds. `cores used` is the job's share of the machine: the rest was waiting, or other work."""
    rounds = list(zip(jobs, decodes, encodes, strict=True))
    figures = (
        Spread.of(job.cpu_s / job.clips for job in jobs),
        Spread.of(cost.per_clip_s for cost in decodes),
        Spread.of(cost.per_clip_s for cost in encodes),
        Spread.of(job.cpu_s / job.clips - d.per_clip_s - e.per_clip_s for job, d, e in rounds),
        Spread.of((d.per_clip_s + e.per_clip_s) * job.clips / job.cpu_s for job, d, e in rounds),
        Spread.of(job.cpu_s / job.seconds for job in jobs),
        Spread.of(job.startup_s for job in jobs),
    )
    return (where, *map(str, figures))


def orchestration(report: Report, folder: Path, weights_path: Path, rounds: int, videos: int) -> None:
    """CPU time beyond decoding, per video and per clip, of a network that computes nothing."""
    few, many = 1, 20
    counts = {few: 5 * videos, many: videos}  # several seconds of either, because the start of processes counts too
    sources = {n: corpus.make(folder / f"{n}-clips", counts[n], (120, 160), 16 * n, 16) for n in counts}

    def job(n: int) -> float:
        out = folder / uuid.uuid4().hex
        done = launch(sources[n], str(out), "--weights", weights_path, "--shard-videos", 40, command=NULL)
        shutil.rmtree(out)
        return 1e3 * done.cpu_s / done.videos

    def decode(n: int) -> float:
        done = stages.run("decode", sources[n], weights_path, "every:16")
        return 1e3 * done.cpu_s / done.videos

    arms = {f"{what}, {n} clips": partial(do, n) for n in sources for what, do in (("decoding", decode), ("job", job))}
    found = take_turns(arms, rounds, "CPU ms per video", warm=False)
    rest = {
        n: [a - b for a, b in zip(found.of[f"job, {n} clips"], found.of[f"decoding, {n} clips"], strict=True)]
        for n in sources
    }
    per_clip = [(b - a) / (many - few) for a, b in zip(rest[few], rest[many], strict=True)]
    per_video = [a - few * clip for a, clip in zip(rest[few], per_clip, strict=True)]
    rows = [(arm, str(found.spread(arm))) for arm in arms]
    rows += [("orchestration per video", str(Spread.of(per_video))), ("per clip", str(Spread.of(per_clip)))]
    report.add(Table("Null network: orchestration", ("what", "CPU ms"), tuple(rows), found))


def servers_of(stack: ExitStack, works: list[Work], folder: Path, latency_ms: float) -> dict[str, dict[str, str]]:
    """Start an S3 server with the videos of all jobs, and a proxy that delays each request where one is asked for."""
    import boto3

    from tests.s3.proxy import proxy
    from tests.servers import weed

    server = stack.enter_context(weed(folder / "weed"))
    os.environ.update(server.env)
    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket="bench")
    for work in works:
        for path in work.source.iterdir():
            client.upload_file(str(path), "bench", f"{work.source.name}/{path.name}")
    servers = {"S3": server.env}
    if latency_ms:
        delayed = stack.enter_context(proxy(server.env))
        delayed.latency_s = latency_ms / 1e3
        servers[f"S3 at {latency_ms:g} ms"] = delayed.env
    return servers


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--full", action="store_true", help="measure three times the videos in 7 rounds, S3 included")
    parser.add_argument("--only", choices=("model", "half", "decode", "null"))
    parser.add_argument("--s3", action="store_true", help="measure from and to a SeaweedFS server of the tests, too")
    parser.add_argument(
        "--latency-ms", type=float, default=0, help="with S3: measure with this latency, too (default 0)"
    )
    parser.add_argument("--rounds", type=int)
    given = parser.parse_args()
    rounds = given.rounds or (7 if given.full else 3)
    size = 3 if given.full else 1
    report = Report("pipeline", "Pipeline efficiency")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="p3d-bench-")))
        works = []
        small = make_weights(folder, "p3d63", 64)
        if given.only in (None, "model"):
            source = corpus.make(folder / "small", 2 * SHARD * size, (240, 320), 40, 12)
            own = make_weights(folder, "p3d63")
            works.append(Work("Model-bound: P3D-63, 320x240, 3 clips per video", source, own, "every:16", 10))
        if given.only in (None, "half"):
            source = corpus.make(folder / "720p", 3 * SHARD * size, (720, 1280), 96, 250)
            works.append(Work("Half decode: 64x64, 1280x720, every frame", source, small, "every:16", 40))
        if given.only in (None, "decode"):
            source = corpus.make(folder / "1080p", 3 * SHARD * size, (1080, 1920), 250, 250)
            works.append(Work("Decode-bound: 64x64, 1920x1080, every third frame", source, small, "every:48/3", 40))
        servers = servers_of(stack, works, folder, given.latency_ms) if (given.full or given.s3) and works else {}
        for work in works:
            efficiency(report, work, rounds, folder, servers)
        if given.only in (None, "null"):
            orchestration(report, folder, small, rounds, 200 * size)
    print(report.write(given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
