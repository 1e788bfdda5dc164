"""Does a job cost more a video the more there are, or the longer they are? With a network that computes nothing.

    python -m bench.scale               10, 100 and 1 000 short videos; videos of 1, 4 and 16 minutes
    python -m bench.scale --full        10 000 videos and 64 minutes too

Figures are of the whole launch; a rate without the start is that of the difference to the row above.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

from bench import corpus, weights
from bench.family import Family
from bench.rounds import REPO, Report, Table

COLUMNS = ("clips", "seconds", "CPU s", "clips/s more", "CPU ms a clip more", "peak MB")


def launch(source: Path, out: Path, weights_path: Path) -> tuple[int, float, float, float]:
    """(clips, seconds, processor seconds, peak MB) of one launch."""
    words = [sys.executable, "-m", "bench.null", "launch", *map(str, (source, out, "--weights", weights_path))]
    started = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPO)
    family = Family(process)
    process.wait()
    seconds = time.monotonic() - started
    family.stop()
    if process.returncode != 0:
        raise SystemExit(f"{words} ended with exit code {process.returncode}")
    clips = sum(pq.ParquetFile(path).metadata.num_rows for path in (out / "clips").glob("*.parquet"))
    return clips, seconds, family.cpu_s(), family.peak_mb


def table(heading: str, what: str, sources: dict[int, Path], folder: Path, weights_path: Path) -> Table:
    """A row a source, the smallest first."""
    rows = []
    before = (0, 0.0, 0.0)
    for size, source in sources.items():
        clips, seconds, cpu_s, peak_mb = launch(source, folder / f"out-{what}-{size}", weights_path)
        more, more_s, more_cpu_s = clips - before[0], seconds - before[1], cpu_s - before[2]
        grown = (f"{more / more_s:.0f}", f"{1e3 * more_cpu_s / more:.2f}") if before[0] else ("", "")
        rows.append((str(size), str(clips), f"{seconds:.1f}", f"{cpu_s:.1f}", *grown, f"{peak_mb:.0f}"))
        before = (clips, seconds, cpu_s)
    return Table(heading, (what, *COLUMNS), tuple(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--out", type=Path, default=REPO / "bench" / "out")
    given = parser.parse_args()
    report = Report("scale", "Scale")
    with tempfile.TemporaryDirectory(prefix="p3d-bench-") as name:
        folder = Path(name)
        small = weights.make(folder, "p3d63", 64)
        counts = (10, 100, 1000, 10_000) if given.full else (10, 100, 1000)
        sources = {n: corpus.make(folder / f"{n}-videos", n, (120, 160), 16, 16) for n in counts}
        report.add(table("Videos of one clip", "videos", sources, folder, small))
        minutes = (1, 4, 16, 64) if given.full else (1, 4, 16)
        sources = {n: corpus.make(folder / f"{n}-minutes", 1, (240, 320), n * 1500, 50) for n in minutes}
        report.add(table("One video", "minutes", sources, folder, small))
    print(report.write(given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
