"""How often search finds the original of an altered copy: recall@1 and recall@10 by alteration and level.

    python -m bench.search_quality                                 P3D-63, random:0; some ten minutes on two cores
    python -m bench.search_quality --weights p3d63.safetensors     other weights

Each of the generated videos (tests/zoo/moving.py) is altered in four ways. One dataset holds the originals. Every copy,
embedded by the same recipe, is a query whose answer is known. By chance, recall@1 is 1/videos and recall@10 ten times
that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from p3d.jobs.api.search import find, resolve
from p3d.jobs.job import rows_of
from p3d.jobs.planning.prepare import JobSpec
from p3d.pipeline.results.search.options import LEVELS, Level, SearchOptions
from p3d.pipeline.storage.urls import open_store
from tests.jobs.embedded import embed_all
from tests.zoo import moving


def recalls(originals: Path, copies: Path, names: list[str], level: Level) -> dict[str, tuple[float, float]]:
    """(recall@1, recall@10) of each alteration; the copy HOW/NAME is of the original NAME."""
    source, queries = rows_of(open_store(str(originals))), rows_of(open_store(str(copies)))
    found = {}
    for how in moving.ALTERATIONS:
        ranks = []
        for name in names:
            query = resolve(queries, f"{how}/{name}", level=level)
            ranked = [hit.path for hit in find(source, query, SearchOptions(level=level, top=1000)).hits]
            ranks.append(ranked.index(name))
        found[how] = (sum(rank < 1 for rank in ranks) / len(ranks), sum(rank < 10 for rank in ranks) / len(ranks))
    return found


def make(folder: Path, n_videos: int, n_frames: int) -> list[str]:
    """Write originals into `folder`/originals and copies into `folder`/copies/HOW; return the originals' names."""
    (folder / "originals").mkdir()
    originals = [moving.video(folder / "originals" / f"{at:03d}.mp4", at, n_frames) for at in range(n_videos)]
    for how in moving.ALTERATIONS:
        (folder / "copies" / how).mkdir(parents=True)
        for path in originals:
            moving.altered(path, folder / "copies" / how / path.name, how)
    return [path.name for path in originals]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=52)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--model", default="p3d63")
    parser.add_argument("--weights", default="random:0")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = make(folder, given.videos, given.frames)
        spec = JobSpec(given.model if given.weights.startswith("random:") else None, given.weights)
        for what in ("originals", "copies"):
            store = open_store(str(folder / f"{what}-out"))
            embed_all(str(folder / what), store, spec, folder, shard_videos=64, batch_size=4)
        print(f"{given.videos} originals of {given.frames} frames, {given.weights}", flush=True)
        for level in LEVELS:
            print(f"| {level} level | recall@1 | recall@10 |\n|---|---|---|")
            found = recalls(folder / "originals-out", folder / "copies-out", names, level)
            for how, (first, tenth) in found.items():
                print(f"| {how} | {first:.3f} | {tenth:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
