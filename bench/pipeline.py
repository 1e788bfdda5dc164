"""How close a job comes to what its stages allow: clips/s end to end over the harmonic limit, and what is lost where.

    python -m bench.pipeline            a small form, some minutes
    python -m bench.pipeline --full     more videos, rounds and an S3 server

The limit of one run: with `cores` plain processes that only decode at a rate D clips/s, and as many that only encode at
E, the same cores cannot do both faster than 1 / (1/D + 1/E). Stages and jobs take turns, so that a machine that slows
down slows all of them. Beside it stands the same in CPU seconds a clip, which a busy neighbour changes less: what a job
takes more than its stages is orchestration, and what it leaves of the cores is waiting.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import corpus, stages, weights
from bench.launching import Launched, launch
from bench.rounds import REPO, Report, Rounds, Spread, Table, take_turns
from bench.rule import options_of
from bench.stages import Cost

SHARD = 64  # videos, the default of a job: with less, the ends of shards weigh more


@dataclass(frozen=True, slots=True)
class Work:
    """A job to measure: which videos and weights, how many videos a shard, how many batches the network alone does."""

    name: str
    source: Path
    weights: Path
    clips: str
    shard_videos: int
    batches: int


def efficiency(report: Report, work: Work, rounds: int, out: Path, bucket: str | None) -> None:
    """Stages and jobs in turn, then the table of what is lost."""
    decodes: list[Cost] = []
    encodes: list[Cost] = []
    jobs: dict[str, list[Launched]] = {"local": [], **({"S3": []} if bucket else {})}

    def stage(name: str, what: str | Path, kept: list[Cost]) -> Callable[[], float]:
        def arm() -> float:
            kept.append(stages.run(name, what, work.weights, work.clips))
            return kept[-1].clips_per_s

        return arm

    def job(where: str) -> Callable[[], float]:
        def arm() -> float:
            place = f"s3://{bucket}/{uuid.uuid4().hex}" if where == "S3" else str(out / uuid.uuid4().hex)
            source = f"s3://{bucket}/{work.source.name}" if where == "S3" else work.source
            options = ("--weights", work.weights, *options_of(work.clips), "--shard-videos", work.shard_videos)
            jobs[where].append(launch(source, place, *options))
            shutil.rmtree(place, ignore_errors=True)
            return jobs[where][-1].clips_per_s

        return arm

    arms = {
        "decoding alone": stage("decode", work.source, decodes),
        "network alone": stage("encode", str(work.batches), encodes),
        **{f"job, {where}": job(where) for where in jobs},
    }
    found = take_turns(arms, rounds, "clips/s", warm=False)
    limits = [1 / (1 / d + 1 / e) for d, e in zip(found.of["decoding alone"], found.of["network alone"], strict=True)]
    with_limit = Rounds("clips/s", {**found.of, "limit of both": limits})
    report.add(with_limit.table(work.name, "limit of both"))
    rows = [_losses(where, done, decodes, encodes) for where, done in jobs.items()]
    columns = (
        "job",
        "CPU s a clip",
        "decoding",
        "network",
        "the rest",
        "stages / CPU",
        "cores used",
        "startup, s",
    )
    report.add(Table(f"{work.name}: where the time goes, in CPU seconds a clip", columns, tuple(rows)))


def _losses(where: str, jobs: list[Launched], decodes: list[Cost], encodes: list[Cost]) -> tuple[str, ...]:
    """Medians over the rounds. `cores used` is what the job had of the machine: the rest was waiting, or neighbours."""
    decode_s = Spread.of(cost.per_clip_s for cost in decodes)
    encode_s = Spread.of(cost.per_clip_s for cost in encodes)
    job_s = Spread.of(job.cpu_s / job.clips for job in jobs)
    rest_s = Spread.of(
        job.cpu_s / job.clips - d.per_clip_s - e.per_clip_s for job, d, e in zip(jobs, decodes, encodes, strict=True)
    )
    share = Spread.of(
        (d.per_clip_s + e.per_clip_s) * job.clips / job.cpu_s for job, d, e in zip(jobs, decodes, encodes, strict=True)
    )
    used = Spread.of(job.cpu_s / job.seconds for job in jobs)
    startup_s = Spread.of(job.startup_s for job in jobs)
    return (where, *map(str, (job_s, decode_s, encode_s, rest_s, share, used, startup_s)))


def orchestration(report: Report, folder: Path, weights_path: Path, rounds: int, videos: int) -> None:
    """A network of nothing over videos of one clip and of many: CPU seconds beyond decoding, a video and a clip."""
    few, many = 1, 20
    counts = {few: 5 * videos, many: videos}  # several seconds of either, for processes that start are in it, too
    sources = {n: corpus.make(folder / f"{n}-clips", counts[n], (120, 160), 16 * n, 16) for n in counts}
    jobs: dict[int, list[Launched]] = {few: [], many: []}
    decodes: dict[int, list[Cost]] = {few: [], many: []}

    def job(n: int) -> float:
        out = folder / uuid.uuid4().hex
        options = ("--weights", weights_path, "--shard-videos", 40)
        jobs[n].append(launch(sources[n], str(out), *options, module="bench.null"))
        shutil.rmtree(out)
        return 1e3 * jobs[n][-1].cpu_s / jobs[n][-1].videos

    def decode(n: int) -> float:
        decodes[n].append(stages.run("decode", sources[n], weights_path, "every:16"))
        return 1e3 * decodes[n][-1].cpu_s / decodes[n][-1].videos

    arms = {f"{what}, {n} clips": _of(work, n) for n in sources for what, work in (("decoding", decode), ("job", job))}
    found = take_turns(arms, rounds, "CPU ms a video", warm=False)
    rest = {
        n: [a - b for a, b in zip(found.of[f"job, {n} clips"], found.of[f"decoding, {n} clips"], strict=True)]
        for n in sources
    }
    a_clip = [(b - a) / (many - few) for a, b in zip(rest[few], rest[many], strict=True)]
    a_video = [a - few * clip for a, clip in zip(rest[few], a_clip, strict=True)]
    rows = [(arm, str(found.spread(arm))) for arm in arms]
    rows += [("orchestration, a video", str(Spread.of(a_video))), ("orchestration, a clip", str(Spread.of(a_clip)))]
    report.add(Table("Null network: orchestration", ("what", "CPU ms"), tuple(rows), found))


def _of(work: Callable[[int], float], n: int) -> Callable[[], float]:
    return lambda: work(n)


@contextmanager
def _bucket(works: list[Work], folder: Path) -> Iterator[str]:
    """A bucket with the videos of all jobs; this process and those it starts reach it by the environment."""
    import boto3

    from tests.servers import weed

    with weed(folder / "weed") as server:
        os.environ.update(server.env)
        client = boto3.session.Session().client("s3")
        client.create_bucket(Bucket="bench")
        for work in works:
            for path in work.source.iterdir():
                client.upload_file(str(path), "bench", f"{work.source.name}/{path.name}")
        yield "bench"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", choices=("model", "half", "decode", "null"))
    parser.add_argument("--s3", action="store_true", help="also from and to a SeaweedFS server (of the tests)")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, default=REPO / "bench" / "out")
    given = parser.parse_args()
    rounds = given.rounds or (7 if given.full else 3)
    size = 3 if given.full else 1
    report = Report("pipeline", "Pipeline efficiency")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="p3d-bench-")))
        works = []
        small = weights.make(folder, "p3d63", 64)
        if given.only in (None, "model"):
            source = corpus.make(folder / "small", 2 * SHARD * size, (240, 320), 40, 12)
            own = weights.make(folder, "p3d63")
            works.append(Work("Model-bound: P3D-63, 320x240, 3 clips a video", source, own, "every:16", SHARD, 10))
        if given.only in (None, "half"):
            source = corpus.make(folder / "720p", 3 * SHARD * size, (720, 1280), 96, 250)
            works.append(Work("Half decode: 64x64, 1280x720, every frame", source, small, "every:16", SHARD, 40))
        if given.only in (None, "decode"):
            source = corpus.make(folder / "1080p", 3 * SHARD * size, (1080, 1920), 250, 250)
            works.append(
                Work("Decode-bound: 64x64, 1920x1080, every third frame", source, small, "every:48/3", SHARD, 40)
            )
        bucket = stack.enter_context(_bucket(works, folder)) if (given.full or given.s3) and works else None
        for work in works:
            efficiency(report, work, rounds, folder, bucket)
        if given.only in (None, "null"):
            orchestration(report, folder, small, rounds, 200 * size)
    print(report.write(given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
