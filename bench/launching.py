"""One launch, seen from outside: how fast it is between its first and its last shard, and what it took.

The steady state is what an archive costs: starting Ray and loading weights come before the first shard, and the time
between two shards has all else in it, their commits and the gaps too. When a shard was computed is in its footer,
so nobody has to look for it while the job runs: looking takes a part of the cores that are measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq

from bench.family import Family
from p3d.pipeline.dataset.schema import STATS_KEY
from p3d.pipeline.storage.store import Store
from p3d.pipeline.storage.urls import open_store


@dataclass(frozen=True, slots=True)
class Launched:
    """What a launch did between its first and its last shard, and how long it took to get there (`startup_s`)."""

    clips: int
    videos: int
    seconds: float
    cpu_s: float
    startup_s: float
    peak_mb: float

    @property
    def clips_per_s(self) -> float:
        return self.clips / self.seconds


def launch(src: str | Path, out: str, *options: object, module: str = "p3d.jobs.cli") -> Launched:
    """Run it. SystemExit with what it said if it fails, or if it has fewer than two shards."""
    start = "from p3d.jobs.cli import main; main()"
    words = ["-c", start] if module == "p3d.jobs.cli" else ["-m", module]
    command = [sys.executable, *words, "launch", str(src), out, *map(str, options)]
    with tempfile.TemporaryFile("w+") as said:
        started = time.time()
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        family = Family(process)
        try:
            process.wait()
        finally:
            process.terminate()  # where this is interrupted; a job that has ended takes no notice
        family.stop()
        said.seek(0)
        shards = sorted(_shards(open_store(out)))
        if process.returncode != 0 or len(shards) < 2:
            raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}: {said.read()[-2000:]}")
    (first, _, _), *later = shards
    last, _, _ = later[-1]
    return Launched(
        sum(clips for _, clips, _ in later),
        sum(videos for _, _, videos in later),
        last - first,
        family.cpu_s_at(last) - family.cpu_s_at(first),
        first - started - (last - first) / len(later),
        family.peak_mb,
    )


def _shards(store: Store) -> Iterator[tuple[float, int, int]]:
    """(when its rows were there, clips, videos) of each shard."""
    for info in list(store.list("clips/")):
        with store.open(info.key) as clips, store.open(info.key.replace("clips/", "videos/")) as videos:
            footer = pq.ParquetFile(clips).metadata
            ended = json.loads(footer.metadata[STATS_KEY.encode()])["ended"]
            yield datetime.fromisoformat(ended).timestamp(), footer.num_rows, pq.ParquetFile(videos).metadata.num_rows
