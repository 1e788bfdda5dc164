"""What `p3d plan` predicts for a job, compared with the job: clips, bytes, seconds, and the limiting stage.

    python -m bench.plan [SRC] [--weights FILE]      default: the sample videos, P3D-63

The prediction is made just before the job, on the same machine. Its seconds are those of the whole launch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bench.processes import P3D
from bench.rounds import Report, Table, parser_of
from tests.samples import VIDEOS

FINISHED = (0, 3)


def p3d(*args: object) -> str:
    done = subprocess.run([*P3D, *map(str, args)], capture_output=True, text=True, check=False)
    if done.returncode not in FINISHED:
        raise SystemExit(done.stderr)
    return done.stdout


def real(out: Path, seconds: float) -> dict[str, Any]:
    """What a finished job has: its rows, the size of its files, and the stage that limited it."""
    clips = [pq.ParquetFile(path).metadata for path in (out / "clips").glob("*.parquet")]
    stats = [json.loads(one.metadata[b"p3d.stats"]) for one in clips]
    waited_s, full_s = (sum(one[name] for one in stats) for name in ("wait_s", "full_s"))
    files = [path for folder in ("clips", "videos", "failures") for path in (out / folder).glob("*.parquet")]
    return {
        "n_clips": sum(one.num_rows for one in clips),
        "output_bytes": sum(path.stat().st_size for path in files),
        "seconds": seconds,
        "binding": "decoding" if waited_s > full_s else "network",
    }


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("source", type=Path, nargs="?", default=VIDEOS)
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--clips", default="every:16")
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    report = Report("plan", "What p3d plan predicts")
    words = [given.source.resolve(), "--weights", given.weights, "--model", "p3d63", "--clips", given.clips]
    for number in range(given.rounds):
        said = json.loads(p3d("plan", *words, "--json"))
        with tempfile.TemporaryDirectory() as folder:
            out, started = Path(folder) / "out", time.monotonic()
            p3d("launch", words[0], out, *words[1:])
            was = real(out, time.monotonic() - started)
        names = ("n_clips", "output_bytes", "seconds")
        rows = [(name, f"{said[name]:.0f}", f"{was[name]:.0f}", f"{said[name] / was[name]:.2f}") for name in names]
        rows.append(("binding stage", said["binding"], was["binding"], ""))
        heading = f"Round {number + 1}, {said['n_tried']} videos tried"
        report.add(Table(heading, ("what", "plan", "job", "plan / job"), tuple(rows)))
    print(report.write(given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
