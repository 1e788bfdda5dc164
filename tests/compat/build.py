"""Write the outputs of this version that later versions are tested with: `python -m tests.compat.build`.

One file holds them all, and what they were made from:

    videos/             the source, which the plans name as s3://archive/videos/: a test serves it from there
    complete/           three shards, a failure, an own column of the list
    killed/             the same job, killed with `kill -9` after its first shard
    retried/            a video failed, its file was replaced, and it was retried
    scores/             float16, two poolings, class probabilities, videos resampled to a rate
    snapshot/           of complete/

The network is p3d-demo. Most of its weights are zero and the others are powers of two, so that the file stays small.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import torch

import p3d.weights
from p3d.pipeline.recipe import SCHEMA_VERSION
from tests.conftest import P3D
from tests.servers import moto
from tests.zoo import make

HERE = Path(__file__).parent
BUCKET = "archive"
SOURCE = f"s3://{BUCKET}/videos"
LATE = "late.mp4"  # the video that is retried
KEPT = 24  # of the filters' values one in so many is kept
SMALL = ("--batch-size", "2", "--threads", "1")
KILLS = 10  # tries, as the job may be faster than the kill


def fixture(version: int = SCHEMA_VERSION) -> Path:
    """The file with the outputs of a schema version."""
    return HERE / f"version{version}.tar.xz"


def unpack(folder: Path, version: int = SCHEMA_VERSION) -> Path:
    """Write the outputs of a schema version, and their source, into a folder."""
    with tarfile.open(fixture(version)) as tar:
        tar.extractall(folder, filter="data")
    return folder


@contextlib.contextmanager
def s3() -> Iterator[tuple[Any, dict[str, str]]]:
    """A boto3 client of an S3 server in this process that has the bucket, and the environment that reaches it."""
    with moto() as env:
        client = boto3.client(
            "s3",
            endpoint_url=env["AWS_ENDPOINT_URL"],
            region_name=env["AWS_DEFAULT_REGION"],
            aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket=BUCKET)
        yield client, env


def put(client: Any, folder: Path) -> None:
    """Upload the files of a folder to SOURCE."""
    for path in sorted(folder.iterdir()):
        client.put_object(Bucket=BUCKET, Key=f"videos/{path.name}", Body=path.read_bytes())


def _videos(folder: Path) -> None:
    """Five videos of one to three clips, a file that is cut, and LATE, which is text at first."""
    folder.mkdir()
    for at, n_frames in enumerate((18, 40, 16, 33, 12)):
        make.video(folder / f"video{at}.mp4", "libx264", n_frames, hw=(48, 64), options={"preset": "ultrafast"}, gop=8)
    whole = (folder / "video1.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / LATE).write_text("not yet a video\n")


def _weights(path: Path) -> None:
    weights = p3d.weights.random_weights("p3d-demo", 0, num_classes=4)
    for key, value in weights.network.state_dict().items():
        if value.ndim < 2:
            continue
        flat, rng = value.flatten().numpy(), np.random.default_rng(len(key))
        kept = np.where(rng.integers(0, KEPT, flat.shape) == 0, flat, 0)
        with np.errstate(divide="ignore"):
            powers = np.where(kept == 0, 0, np.sign(kept) * np.exp2(np.round(np.log2(np.abs(kept)))) * KEPT**0.5)
        value.copy_(torch.from_numpy(powers.astype(np.float32)).reshape(value.shape))
    p3d.weights.save(path, replace(weights, class_names=("one", "two", "three", "four")))


def _p3d(env: dict[str, str], *words: object, codes: tuple[int, ...] = (0, 3)) -> None:
    done = subprocess.run([*P3D, *map(str, words)], env=env, check=False)
    if done.returncode not in codes:
        raise SystemExit(f"{words[0]} ended with {done.returncode}")


def _killed(env: dict[str, str], out: Path, words: list[object]) -> None:
    """The job of `words`, killed when it has committed a shard."""
    for attempt in range(KILLS):
        there = out if attempt == 0 else out.with_name(f"{out.name}{attempt}")
        given = [there if word == out else word for word in words]
        run = subprocess.Popen([*P3D, *map(str, given)], env=env, start_new_session=True)
        while run.poll() is None and not list(there.glob("clips/*.parquet")):
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        if len(list(there.glob("clips/*.parquet"))) == 1:
            there.rename(out)
            return
    raise SystemExit("the job was always faster than the kill")


def build(folder: Path) -> None:
    """Make all outputs in an empty folder."""
    state = folder / "state"
    _videos(folder / "videos")
    _weights(weights := folder / "weights.safetensors")
    names = sorted(path.name for path in (folder / "videos").iterdir())
    (listed := folder / "list.csv").write_text(
        "path,label\n" + "".join(f"{SOURCE}/{name},label {at}\n" for at, name in enumerate(names))
    )
    (late := folder / "late.txt").write_text(f"{SOURCE}/{LATE}\n{SOURCE}/video0.mp4\n")
    (whole := folder / "whole.txt").write_text("".join(f"{SOURCE}/{name}\n" for name in names if "video" in name))
    with s3() as (client, given):
        put(client, folder / "videos")
        env = {**os.environ, **given, "P3D_STATE": str(state)}
        job: list[object] = ["--weights", weights, "--shard-videos", 3, *SMALL]
        _p3d(env, "launch", listed, folder / "complete", *job)
        _p3d(env, "results", "snapshot", folder / "complete", folder / "snapshot")
        _killed(env, folder / "killed", ["launch", SOURCE, folder / "killed", *job])
        _p3d(env, "launch", late, folder / "retried", *job)
        make.video(folder / "videos" / LATE, "libx264", 20, hw=(48, 64), options={"preset": "ultrafast"}, gop=8)
        put(client, folder / "videos")
        _p3d(env, "retry", folder / "retried")
        more = ["--scores", "--pool", "mean+max", "--embedding-dtype", "float16", "--fps", 20, "--clips", "uniform:2"]
        _p3d(env, "launch", whole, folder / "scores", *job, *more)


def main() -> None:
    """Build the fixture of this version, and say how large it is."""
    with tempfile.TemporaryDirectory() as name:
        build(folder := Path(name))
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:xz", preset=9) as tar:
            for part in ("videos", "complete", "killed", "retried", "scores", "snapshot"):
                tar.add(folder / part, part, filter=_nameless)
        fixture().write_bytes(content.getvalue())
    print(f"{fixture()}: {fixture().stat().st_size} bytes")


def _nameless(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main()
