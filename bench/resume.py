"""Resume a job of 10 000 shards of which 9 990 are done: seconds to the first dispatch, LIST requests, peak memory.

    python bench/resume.py                        10 000 shards in a folder
    python bench/resume.py --s3                   on a real S3 server, requests counted on the way
    python bench/resume.py --shards 1000

The committed shards hold made-up rows of one video each, by the real commit protocol. Then `p3d resume` runs for real,
and once more when nothing is left.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil

import p3d.weights
from p3d.jobs.planning.prepare import JobSpec, add_plan, create_job, prepare
from p3d.pipeline.clips.rules import ClipSpan
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.plans import Manifest, load_plans
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import Store, StoreOptions
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import ClipRow, ShardRows, VideoEnd, VideoInfo, VideoOutcome
from tests.s3.proxy import Proxy, proxy
from tests.servers import weed
from tests.zoo import make

P3D = [sys.executable, "-c", "from p3d.jobs.cli import main; main()"]
LEFT = 10  # shards that are still to be done


def prepare_job(store: Store, folder: Path, shards: int) -> None:
    """A job of `shards` videos, one a shard, all but the last ones committed."""
    weights = p3d.weights.random_weights("p3d63", 0, graph="caffe", num_classes=10)
    weights = replace(weights, recipe=replace(weights.recipe, resize_hw=(72, 108), crop_hw=(64, 64)))
    p3d.weights.save(folder / "small.safetensors", weights)
    (folder / "v").mkdir()
    first = make.video(folder / "v" / "00000.mp4", "mpeg4", 16)
    for number in range(1, shards):
        os.link(first, folder / "v" / f"{number:05d}.mp4")
    prepared = prepare(JobSpec(None, str(folder / "small.safetensors")))
    job = create_job(store, prepared)
    add_plan(store, job, find(str(folder / "v"), StoreOptions()), shard_videos=1, limit=None)
    manifest = Manifest(store, load_plans(store)[0])
    features = np.random.default_rng(0).standard_normal((1, 2048)).astype(np.float32)
    no_probs = np.empty((1, 0), np.float32)

    def commit(shard: int) -> None:
        plan = manifest.shard(shard)
        [video] = plan.videos
        info = VideoInfo(16, 320, 240, 0, 25.0, 0.64, "mp4", "mpeg4", 0, "decord")
        outcome = VideoOutcome(video, 1, info, VideoEnd(16, 0.64))
        clip = ClipRow(video.video_id, video.path, ClipSpan(0, 0, 16, 0), 0.0, 0.64)
        rows = ShardRows(plan, (outcome,), (clip,), features, no_probs, {})
        commit_shard(store, rows, job.recipe, manifest.user_columns(shard))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(commit, range(shards - LEFT)))


def resume(out: str, env: dict[str, str]) -> tuple[float, float, int, float]:
    """(seconds until the work is known, seconds until a decode runs, exit code, peak MB of the driver)."""
    started, known = time.monotonic(), [0.0]
    driver = subprocess.Popen(
        [*P3D, "resume", out], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )

    def read() -> None:
        assert driver.stderr is not None
        for line in driver.stderr:
            if "shards to do" in line or "nothing to do" in line:
                known[0] = time.monotonic() - started

    reader = threading.Thread(target=read)
    reader.start()
    peak, dispatched, process = 0.0, 0.0, psutil.Process(driver.pid)
    while driver.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, process.memory_info().rss / 1e6)
            if not dispatched:
                names = [" ".join(child.cmdline()) for child in process.children(recursive=True)]
                if any("decode_video" in name or "run_shard" in name for name in names):
                    dispatched = time.monotonic() - started
        time.sleep(0.02)
    reader.join()
    return known[0], dispatched, driver.returncode, peak


def requests(server: Proxy | None) -> str:
    """What was asked since the last time, in words."""
    if server is None:
        return ""
    kinds = Counter("LIST" if "list-type" in r.path else r.method for r in server.requests)
    server.requests.clear()
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--s3", action="store_true")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        out, env, server = str(folder / "out"), dict(os.environ), None
        if given.s3:
            real = stack.enter_context(weed(folder / "weed"))
            server = stack.enter_context(proxy(real.env))
            env |= server.env
            os.environ.update(real.env)
            open_store("s3://bench/out")._ask("create_bucket", "")  # type: ignore[attr-defined]
            out = "s3://bench/out"
        started = time.monotonic()
        prepare_job(open_store(out) if given.s3 else LocalStore(out), folder, given.shards)
        print(f"{given.shards} shards, {LEFT} of them open; made in {time.monotonic() - started:.0f} s", flush=True)
        for name in ("resume", "once more, nothing left"):
            known, dispatched, code, peak = resume(out, env)
            print(
                f"{name}: exit code {code}, work known after {known:.1f} s, first decode after {dispatched:.1f} s, "
                f"driver's peak {peak:.0f} MB; {requests(server)}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
