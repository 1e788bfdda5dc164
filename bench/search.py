"""A million clips: exact search, building an index, search by it; seconds and peak memory of each command.

    python -m bench.search --rows 1000000 --folder /tmp/bench     needs 5 GB there, and 3 GB more for the index

The dataset is written by the commit protocol, in float16 to save disk: videos of 100 clips of 2048 features. A feature
row is the centre of its video plus noise of half its size, cut off at 0 as by a ReLU. Such rows are easier for an
inverted-list index than pure noise, and harder than copies. Peak memory is the largest resident set of the process,
which includes pages of a mapped file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from p3d.pipeline.clips.rules import ClipSpan
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.plans import Manifest, write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.recipe import JobRecord, Recipe, ShardSizing
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.types import ClipRow, ShardRows, VideoEnd, VideoInfo, VideoOutcome
from tests.pipeline.rows import recipe, videos

# the kernel's peak of a child includes its parent before exec; /proc/self/status does not
P3D = """
import atexit, os, pathlib
status, note = pathlib.Path("/proc/self/status"), pathlib.Path(os.environ["P3D_PEAK"])
atexit.register(lambda: note.write_text(status.read_text().split("VmHWM:")[1].split()[0]))
from p3d.jobs.cli import main
main()
"""
CLIPS = 100  # per video
DIM = 2048


def write(folder: Path, n_rows: int) -> None:
    """Write the dataset."""
    store = LocalStore(str(folder))
    chosen: Recipe = recipe(feature_dim=DIM, embedding_dtype="float16")
    store.create("job.json", JobRecord(chosen, "random:0", {}).to_json())
    names = [f"v{at:06d}" for at in range(n_rows // CLIPS)]
    manifest = Manifest(
        store, write_plan(store, 1, chosen, with_shards(videos(names), ShardSizing(64)), 0, ShardSizing())
    )
    n_frames = 16 * CLIPS
    info = VideoInfo(n_frames, 320, 240, 0, 25.0, n_frames / 25, "mp4", "h264", 0, "decord")
    for at in range(manifest.plan.n_shards):
        rng = np.random.default_rng([3, at])
        plan = manifest.shard(at)
        centres = rng.standard_normal((len(plan.videos), 1, DIM), np.float32)
        noise = rng.standard_normal((len(plan.videos), CLIPS, DIM), np.float32)
        features = np.maximum(centres + 0.5 * noise, 0).reshape(-1, DIM).astype(np.float16).astype(np.float32)
        clips = tuple(
            ClipRow(one.video_id, one.path, ClipSpan(k, 16 * k, 16 * k + 16, 0), 16 * k / 25, (16 * k + 16) / 25)
            for one in plan.videos
            for k in range(CLIPS)
        )
        outcomes = tuple(VideoOutcome(one, CLIPS, info, VideoEnd(n_frames, n_frames / 25)) for one in plan.videos)
        rows = ShardRows(plan, outcomes, clips, features, np.empty((len(clips), 0), np.float32), {})
        commit_shard(store, rows, chosen, manifest.user_columns(at))


def run(*words: object) -> tuple[dict[str, object], float, float, float]:
    """Run a command: (its JSON output, seconds, CPU seconds, peak MB)."""
    with tempfile.TemporaryDirectory() as folder:
        peak, started = Path(folder) / "peak", time.monotonic()
        command, env = [sys.executable, "-c", P3D, *map(str, words)], {**os.environ, "P3D_PEAK": str(peak)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env)
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(map(str, words))} ended with {status}")
        seconds, cpu = time.monotonic() - started, used.ru_utime + used.ru_stime
        return json.loads(printed), seconds, cpu, int(peak.read_text()) * 1024 / 1e6


def table(label: str, runs: list[tuple[dict[str, object], float, float, float]], more: str = "") -> None:
    seconds, cpu, peak = ([one[at] for one in runs] for at in (1, 2, 3))
    spread = f" ({min(seconds):.1f}-{max(seconds):.1f})" if len(runs) > 1 else ""
    cells = f"{statistics.median(seconds):.1f}{spread} | {statistics.median(cpu):.1f} | {max(peak):.0f}"
    print(f"| {label} | {cells} | {more} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["sq8"])
    parser.add_argument("--keep", action="store_true", help="keep the dataset for another run")
    given = parser.parse_args()
    out = given.folder / f"out-{given.rows}"
    if not out.exists():
        started = time.monotonic()
        write(out, given.rows)
        size = sum(path.stat().st_size for path in out.rglob("*.parquet"))
        print(
            f"{given.rows} rows of {DIM} float16, {size / 1e9:.2f} GB, in {time.monotonic() - started:.0f} s",
            flush=True,
        )
    print("| | seconds | CPU seconds | peak MB | |\n|---|---|---|---|---|", flush=True)
    query = ("search", out, "v000123@20.1s", "--every-clip", "--with-self", "--json")
    exact = [run(*query) for _ in range(given.runs)]
    rate = given.rows / statistics.median(float(one[0]["seconds"]) for one in exact)  # type: ignore[arg-type]
    table("exact, clips", exact, f"{rate:,.0f} rows/s")
    table("exact, videos", [run("search", out, "v000123", "--level", "video", "--json") for _ in range(given.runs)])
    true = [(hit["video_id"], hit["clip_index"]) for hit in exact[0][0]["hits"]]  # type: ignore[attr-defined]
    for kind in given.kinds:
        built = run("results", "index", out, "--kind", kind, "--rebuild", "--json")
        said = built[0]
        about = f"{said['factory']}, {said['nprobe']} lists searched, recall@10 {said['recall_at_10']:.3f}"
        table(f"index {kind}, built", [built], f"{about}, {said['index_bytes'] / 1e9:.2f} GB")  # type: ignore[operator]
        found = [run(*query, "--index") for _ in range(given.runs)]
        mine = [(hit["video_id"], hit["clip_index"]) for hit in found[0][0]["hits"]]  # type: ignore[attr-defined]
        table(f"by index {kind}", found, f"{len(set(mine) & set(true))} of the 10 exact hits")
    if not given.keep:
        shutil.rmtree(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
