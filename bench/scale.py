"""Whether a video costs more in larger jobs, or a clip more in longer videos, with a network that computes nothing.

    python -m bench.scale               10, 100 and 1 000 short videos; videos of 1, 4 and 16 minutes
    python -m bench.scale --full        10 000 videos and 64 minutes, too

Figures are of the whole launch. A rate without the start is that of the difference to the row above.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from bench.inputs import make_weights
from bench.processes import NULL, run
from bench.rounds import Report, Table, parser_of
from tests.zoo import corpus

COLUMNS = ("clips", "seconds", "CPU s", "clips/s of the difference", "CPU ms per clip of it", "peak MB")


def table(heading: str, what: str, sources: dict[int, Path], folder: Path, weights_path: Path) -> Table:
    """A row per source, the smallest first."""
    rows = []
    before = (0, 0.0, 0.0)
    for size, source in sources.items():
        out = folder / f"out-{what}-{size}"
        ended = run([*NULL, "launch", source, out, "--weights", weights_path])
        clips = sum(pq.ParquetFile(path).metadata.num_rows for path in (out / "clips").glob("*.parquet"))
        seconds, cpu_s = ended.seconds, ended.tree.cpu_s()
        more, more_s, more_cpu_s = clips - before[0], seconds - before[1], cpu_s - before[2]
        grown = (f"{more / more_s:.0f}", f"{1e3 * more_cpu_s / more:.2f}") if before[0] else ("", "")
        rows.append((str(size), str(clips), f"{seconds:.1f}", f"{cpu_s:.1f}", *grown, f"{ended.tree.peak_mb:.0f}"))
        before = (clips, seconds, cpu_s)
    return Table(heading, (what, *COLUMNS), tuple(rows))


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--full", action="store_true")
    given = parser.parse_args()
    report = Report("scale", "Scale")
    with tempfile.TemporaryDirectory(prefix="p3d-bench-") as name:
        folder = Path(name)
        small = make_weights(folder, "p3d63", 64)
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
