"""Throughput of a decode-bound job whose source and output are 50 ms away, against the same job on local disk.

    python -m bench.latency --rounds 3            from the repository's root; SeaweedFS behind tests/s3/proxy.py

Videos/s from the first commit to the last: the file times of clips/ on disk, the arrival of their PUTs at the proxy. So
the start of Ray is not in it, and whatever lies between two shards is. Local and S3 take turns; the same
videos, the same weights (P3D-63 on 64x64 pixels and few clips, so that decoding is the slow side).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from urllib.parse import unquote

import boto3

import p3d.weights
from bench.rounds import take_turns
from tests.s3.proxy import Proxy, proxy
from tests.servers import weed
from tests.zoo import make

P3D = [sys.executable, "-c", "from jobs.cli import main; main()"]


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


def launch(source: str, out: str, weights: Path, given: argparse.Namespace, env: dict[str, str]) -> None:
    words = [
        source,
        out,
        "--weights",
        weights,
        "--shard-videos",
        given.shard_videos,
        "--threads",
        1,
        "--clips",
        "every:134",
    ]
    done = subprocess.run(
        [*P3D, "launch", *map(str, words)], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {done.stderr}")


def rate(times: list[float], given: argparse.Namespace) -> float:
    """Videos/s after the first commit."""
    last = given.videos - given.shard_videos * (len(times) - 1)
    return (given.shard_videos * (len(times) - 2) + last) / (max(times) - min(times))


def local_rate(folder: Path, weights: Path, given: argparse.Namespace) -> float:
    out = folder / "out"
    launch(str(folder / "videos"), str(out), weights, given, {})
    times = [path.stat().st_mtime_ns / 1e9 for path in (out / "clips").glob("*.parquet")]
    shutil.rmtree(out)
    return rate(times, given)


def s3_rate(number: int, front: Proxy, weights: Path, given: argparse.Namespace) -> float:
    front.requests.clear()
    launch("s3://bench/in", f"s3://bench/out{number}", weights, given, front.env)
    put = {unquote(r.path): r.at_s for r in front.requests if r.method == "PUT" and f"/out{number}/clips/" in r.path}
    return rate(list(put.values()), given)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--videos", type=int, default=128)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--noise", type=int, default=0)
    parser.add_argument("--shard-videos", type=int, default=32)
    parser.add_argument("--latency-ms", type=float, default=50)
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
        front.latency_s = given.latency_ms / 1000
        numbers = count()  # each round writes to a prefix of its own
        arms = {
            "local": lambda: local_rate(folder, weights, given),
            f"S3 at {given.latency_ms:g} ms a request": lambda: s3_rate(next(numbers), front, weights, given),
        }
        print(take_turns(arms, given.rounds, "videos/s", warm=False).table("Videos/s", "local"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
