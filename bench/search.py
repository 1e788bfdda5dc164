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
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from bench.outputs import Ran, id_of, measured, write
from p3d.pipeline.types import FLOAT32

CLIPS = 100  # per video
DIM = 2048


def vectors(shard: int, n_videos: int, n_clips: int, dim: int) -> FLOAT32:
    """Features of a shard: the centre of each video plus noise, not below 0, as float16 holds them."""
    rng = np.random.default_rng([3, shard])
    centres = rng.standard_normal((n_videos, 1, dim), np.float32)
    noise = rng.standard_normal((n_videos, n_clips, dim), np.float32)
    return np.maximum(centres + 0.5 * noise, 0).reshape(-1, dim).astype(np.float16).astype(np.float32)


def run(*words: object) -> tuple[dict[str, object], Ran]:
    """Run a command: its JSON output, and what it took."""
    ran = measured(*words)
    return json.loads(ran.printed), ran


def table(label: str, runs: list[tuple[dict[str, object], Ran]], more: str = "") -> None:
    seconds, cpu, peak = ([getattr(ran, name) for _, ran in runs] for name in ("seconds", "cpu_s", "peak_mb"))
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
        write(out, given.rows // CLIPS, CLIPS, vectors, feature_dim=DIM, embedding_dtype="float16")
        size = sum(path.stat().st_size for path in out.rglob("*.parquet"))
        print(
            f"{given.rows} rows of {DIM} float16, {size / 1e9:.2f} GB, in {time.monotonic() - started:.0f} s",
            flush=True,
        )
    print("| | seconds | CPU seconds | peak MB | |\n|---|---|---|---|---|", flush=True)
    query = ("search", out, f"{id_of(123)}@20.1s", "--every-clip", "--with-self", "--json")
    exact = [run(*query) for _ in range(given.runs)]
    rate = given.rows / statistics.median(float(one[0]["seconds"]) for one in exact)  # type: ignore[arg-type]
    table("exact, clips", exact, f"{rate:,.0f} rows/s")
    table("exact, videos", [run("search", out, id_of(123), "--level", "video", "--json") for _ in range(given.runs)])
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
