"""Throughput of a decode-bound job whose source and output are 50 ms away, against the same job on local disk.

    python -m bench.latency --rounds 3            from the repository's root; SeaweedFS behind tests/s3/proxy.py

Videos/s from the first commit to the last: the file times of clips/ on disk, the arrival of their PUTs at the proxy. So
the start of Ray is not in it, and whatever lies between two shards is. Local, S3 without the latency and S3 with it
take turns; the same videos, the same weights (P3D-63 on 64x64 pixels and few clips, so that decoding is the slow side).

The server and the proxy run on the same cores as the job, which a distant S3 does not. What S3 costs without latency is
their work, and the job's own of fetching; the latency itself is the step from there. Beside the rates stand the
processor seconds a video of each.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from urllib.parse import unquote

import boto3

import p3d.weights
from bench.family import Family, cpu_s
from bench.rounds import REPO, Report, Spread, Table, take_turns
from tests.s3.proxy import Proxy, proxy
from tests.servers import weed
from tests.zoo import make

P3D = [sys.executable, "-c", "from p3d.jobs.cli import main; main()"]


def make_videos(folder: Path, given: argparse.Namespace) -> None:
    folder.mkdir()
    first = folder / "video000.mp4"
    make.video(
        first,
        "libx264",
        given.frames,
        hw=(1080, 1920),
        options={"preset": "ultrafast"},
        gop=given.frames,
        noise=given.noise,  # one GOP, or most would be left out
    )
    for number in range(1, given.videos):
        shutil.copy(first, folder / f"video{number:03d}.mp4")
    print(
        f"{given.videos} videos of {given.frames} frames of 1920x1080, {first.stat().st_size / 1e6:.2f} MB each",
        flush=True,
    )


def make_weights(path: Path) -> None:
    weights = p3d.weights.random_weights("p3d63", 0, graph="caffe", num_classes=10)
    p3d.weights.save(path, replace(weights, recipe=replace(weights.recipe, resize_hw=(72, 108), crop_hw=(64, 64))))


@dataclass
class Arms:
    """The jobs that take turns: where from and to, and what each took of the processors."""

    given: argparse.Namespace
    folder: Path
    weights: Path
    front: Proxy
    weed_pid: int
    cpu_s: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)  # job, server, proxy; whole runs
    numbers: count[int] = field(default_factory=count)  # each round on S3 writes to a prefix of its own

    def local(self) -> float:
        out = self.folder / "out"
        self._launch("local", str(self.folder / "videos"), str(out), {})
        times = [path.stat().st_mtime_ns / 1e9 for path in (out / "clips").glob("*.parquet")]
        shutil.rmtree(out)
        return self._rate(times)

    def s3(self, latency_ms: float) -> float:
        number, self.front.latency_s = next(self.numbers), latency_ms / 1000
        self.front.requests.clear()
        self._launch(s3_arm(latency_ms), "s3://bench/in", f"s3://bench/out{number}", self.front.env)
        seen = self.front.requests
        put = {unquote(r.path): r.at_s for r in seen if r.method == "PUT" and f"/out{number}/clips/" in r.path}
        return self._rate(list(put.values()))

    def _launch(self, arm: str, source: str, out: str, env: dict[str, str]) -> None:
        options = ("--shard-videos", self.given.shard_videos, "--threads", 1, "--clips", "every:134")
        words = ["launch", source, out, "--weights", self.weights, *options]
        before = cpu_s(self.weed_pid), time.process_time()
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen([*P3D, *map(str, words)], env={**os.environ, **env}, stdout=said, stderr=said)
            family = Family(process)
            process.wait()
            family.stop()
            said.seek(0)
            if process.returncode:
                raise SystemExit(f"exit code {process.returncode}: {said.read()}")
        took = (family.cpu_s(), cpu_s(self.weed_pid) - before[0], time.process_time() - before[1])
        self.cpu_s.setdefault(arm, []).append(took)

    def _rate(self, times: list[float]) -> float:
        """Videos/s after the first commit."""
        given = self.given
        last = given.videos - given.shard_videos * (len(times) - 1)
        return float((given.shard_videos * (len(times) - 2) + last) / (max(times) - min(times)))

    def processors(self) -> Table:
        """Milliseconds a video, the start of the job included."""
        rows = []
        for arm, took in self.cpu_s.items():
            parties = zip(*took, strict=True)
            rows.append((arm, *(str(Spread.of(1e3 * each / self.given.videos for each in one)) for one in parties)))
        return Table("Processor ms a video", ("arm", "job", "server", "proxy and this bench"), tuple(rows))


def s3_arm(latency_ms: float) -> str:
    return f"S3 at {latency_ms:g} ms a request"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--videos", type=int, default=128)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--noise", type=int, default=0)
    parser.add_argument("--shard-videos", type=int, default=32)
    parser.add_argument("--latency-ms", type=float, default=50)
    parser.add_argument("--out", type=Path, default=REPO / "bench" / "out")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, weed(Path(name) / "weed") as server, proxy(server.env) as front:
        folder, weights = Path(name), Path(name) / "small.safetensors"
        make_videos(folder / "videos", given)
        make_weights(weights)
        session = boto3.session.Session(server.env["AWS_ACCESS_KEY_ID"], server.env["AWS_SECRET_ACCESS_KEY"])
        client = session.client("s3", endpoint_url=server.env["AWS_ENDPOINT_URL"], region_name="us-east-1")
        client.create_bucket(Bucket="bench")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda p: client.upload_file(str(p), "bench", f"in/{p.name}"), (folder / "videos").iterdir()))
        assert server.process is not None
        arms = Arms(given, folder, weights, front, server.process.pid)
        turns: dict[str, Callable[[], float]] = {"local": arms.local}
        turns |= {s3_arm(ms): lambda ms=ms: arms.s3(ms) for ms in (0, given.latency_ms)}  # type: ignore[misc]
        report = Report("latency", f"S3 with {given.latency_ms:g} ms a request")
        found = take_turns(turns, given.rounds, "videos/s", warm=False)
        report.add(found.table("Videos/s", "local"))
        report.add(found.table("The same, over S3 without latency", s3_arm(0)))
        report.add(arms.processors())
        print(report.write(given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
