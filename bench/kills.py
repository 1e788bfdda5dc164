"""kill -9 of the driver at random moments of a job, then resume: are the rows those of an undisturbed run, bit for bit?

    python bench/kills.py ../shared/videos --kills 3 --seed 0
    python bench/kills.py videos/ --weights FILE --kills 10

Each kill lands after at least one commit and before the last (`--shard-videos 4`). Exit code 1 if a row differs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

P3D = [sys.executable, "-c", "from p3d.jobs.cli import main; main()"]


def p3d(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*P3D, *map(str, args)], capture_output=True, text=True, check=False)


def rows(out: Path, folder: str) -> pa.Table:
    table = pa.concat_tables([pq.read_table(path) for path in sorted((out / folder).glob("*.parquet"))])
    keys = [(name, "ascending") for name in ("video_id", "clip_index") if name in table.column_names]
    return table.sort_by(keys).combine_chunks()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--model", default="p3d63")
    parser.add_argument("--clips", default="every:16")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    words = [given.source.resolve(), "--weights", given.weights, "--model", given.model, "--clips", given.clips]
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        started = time.monotonic()
        done = p3d("launch", words[0], whole, *words[1:], "--shard-videos", 4)
        seconds = time.monotonic() - started
        shards = len(list((whole / "clips").glob("*.parquet")))
        print(
            f"undisturbed: exit code {done.returncode}, {shards} shards, {seconds:.0f} s; seed {given.seed}", flush=True
        )
        bad = 0
        for number in range(given.kills):
            out, after = Path(folder) / f"killed{number}", rng.randint(1, shards - 2)
            launch = [*P3D, "launch", words[0], out, *words[1:], "--shard-videos", 4]
            driver = subprocess.Popen(list(map(str, launch)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(list((out / "clips").glob("*.parquet"))) < after and driver.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, seconds / shards / 2))
            driver.kill()
            driver.wait()
            at_kill = len(list((out / "clips").glob("*.parquet")))
            resumed = p3d("resume", out)
            same = all(rows(out, name).equals(rows(whole, name)) for name in ("clips", "videos", "failures"))
            clean = json.loads(p3d("verify", out, "--json").stdout)
            bad += not same or clean["damaged"] or clean["pending"] > 0 or not 1 <= at_kill < shards
            counts = {name: clean[name] for name in ("ok", "failed", "lost", "duplicated", "unexpected", "changed")}
            print(
                f"kill {number + 1}: at {at_kill} of {shards} commits; resume exit code {resumed.returncode}, "
                f"rows {'bit-identical' if same else 'DIFFER'}, {counts}",
                flush=True,
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
