"""What each verb that reads an output costs, at two sizes: elapsed and CPU seconds, and peak memory.

    python -m bench.reading                    20 000 videos of 10 clips, and 200 000 videos of one clip; 3 GB in /tmp
    python -m bench.reading --dim 2048         vectors as those of P3D-199; 10 GB
    python -m bench.reading --only search      the verbs whose name contains this

The vectors are random, and of 64 videos two have failed. DuckDB and numpy read the same files, and check nothing but
what Parquet's readers check by default. Peak memory is the largest resident set of the process, which includes pages of
mapped files. The page is measured over HTTP: until its first answer, until it can search, and some questions.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.outputs import P3D, Ran, id_of, measured, write
from bench.rounds import REPO, Report, Table, parser_of

FAILING = 32
AT = 12_345  # the video that is looked for
SIZES = ((20_000, 10), (200_000, 1))
DUCKDB = """
import sys, duckdb
glob, column, video = sys.argv[1:]
duckdb.sql("SET threads = 2; SET enable_progress_bar = false")
found = duckdb.execute(f"WITH query AS (SELECT {column} AS q FROM '{glob}' WHERE video_id = ? LIMIT 1) "
    f"SELECT path, list_cosine_similarity({column}, q) AS c FROM '{glob}', query ORDER BY c DESC LIMIT 11", [video])
print(len(found.fetchall()))
"""
NUMPY = """
import sys, numpy as np, pyarrow.dataset as ds
folder, column, video = sys.argv[1:]
table = ds.dataset(folder).to_table(columns=["video_id", column])
vectors = np.concatenate([c.flatten().to_numpy() for c in table[column].chunks]).reshape(table.num_rows, -1)
query = vectors[table["video_id"].to_pylist().index(video)]
near = vectors @ query / np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
print(len(np.argpartition(-near, 10)[:11]))
"""


def arms(out: Path, folder: Path) -> dict[str, Callable[[], Ran]]:
    """Name -> what runs it."""
    video = id_of(AT)

    def snapshot() -> Ran:
        dest = folder / "snapshot"
        shutil.rmtree(dest, ignore_errors=True)
        return measured("results", "snapshot", out, dest, "--json")

    def other(code: str, level: str, glob: str = "") -> Callable[[], Ran]:
        return lambda: measured(f"{out}/{level}{glob}", "embedding", video, code=code)

    def verb(*words: object) -> Callable[[], Ran]:
        return lambda: measured(*words)

    return {
        "search, one clip": verb("search", out, f"{video}@0", "--json"),
        "search, one clip: DuckDB": other(DUCKDB, "clips", "/*.parquet"),
        "search, one clip: numpy": other(NUMPY, "clips"),
        "search, one video": verb("search", out, video, "--level", "video", "--json"),
        "search, one video: DuckDB": other(DUCKDB, "videos", "/*.parquet"),
        "search, one video: numpy": other(NUMPY, "videos"),
        "search, --where on one id": verb("search", out, video, "--where", f"video_id={id_of(AT + 1)}", "--json"),
        "search, --where on one path": verb("search", out, video, "--where", f"path={id_of(AT + 1)}.mp4", "--json"),
        "dedup": verb("results", "dedup", out, "--json"),
        "verify": verb("verify", out, "--json"),
        "verify --deep": verb("verify", out, "--deep", "--json"),
        "snapshot": snapshot,
        "status": verb("status", out, "--json"),
        "failures": verb("failures", out),
    }


def page(out: Path, folder: Path) -> list[tuple[str, float, float, float]]:
    """(what, seconds, CPU seconds of the server, its peak MB): the first answer of the page, its start, questions."""
    said = folder / "said"
    env = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": "1", "P3D_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", P3D, "results", "serve", str(out), "--no-open"]
    found = []
    with said.open("w") as errors:
        began = time.monotonic()
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env, text=True)
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            if not url:
                raise SystemExit(f"the page did not start: {said.read_text()[-2000:]}")

            def note(what: str, since: float) -> None:
                found.append((what, time.monotonic() - since, *_used(server.pid)))

            _get(url)
            note("page, its first answer", began)
            for name, what in (("api/videos", "page, all videos listed"), ("api/map", "page, with its map")):
                while "loading" in _ask(url, name):
                    time.sleep(0.1)
                note(what, began)
            for what, asked in (
                ("a text", {"text": id_of(AT)[:8]}),
                ("similar videos", {"id": id_of(AT)}),
                ("similar videos, another one", {"id": id_of(AT + 2)}),
            ):
                since = time.monotonic()
                _ask(url, "api/videos" if "text" in asked else "api/similar", **asked)
                note(f"page, {what}", since)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait()
    return found


def _ask(url: str, name: str, **query: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(_get(f"{url}{name}?{urllib.parse.urlencode(query)}"))
    return answer


def _get(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url) as response:
            return bytes(response.read())
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return error.read()
        raise


def _used(pid: int) -> tuple[float, float]:
    """CPU seconds and peak MB of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    peak = Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(peak) * 1024 / 1e6


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="", help="the rows whose name contains this")
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 1], choices=range(len(SIZES)))
    parser.add_argument("--keep", type=Path, help="keep the outputs in this folder for another run")
    given = parser.parse_args()
    report = Report("reading", "Reading an output")
    with tempfile.TemporaryDirectory(prefix="p3d-bench-") as name:
        for n_videos, n_clips in [SIZES[at] for at in given.sizes]:
            out = (given.keep or Path(name)) / f"out-{n_videos}-{n_clips}-{given.dim}"
            if not out.exists():
                began = time.monotonic()
                write(out, n_videos, n_clips, failing=FAILING, feature_dim=given.dim)
                print(f"{out.name} was written in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            runs: dict[str, list[Ran]] = {}
            for _ in range(given.rounds):
                for arm, work in arms(out, Path(name)).items():
                    if given.only in arm:
                        runs.setdefault(arm, []).append(work())
                        print(f"{arm}: {runs[arm][-1].seconds:.1f} s", file=sys.stderr, flush=True)
            rows = [
                (
                    arm,
                    *(
                        f"{statistics.median(getattr(one, what) for one in each):.{digits}f}"
                        for what, digits in (("seconds", 1), ("cpu_s", 1), ("peak_mb", 0))
                    ),
                )
                for arm, each in runs.items()
            ]
            if given.only in "page":
                rows += [(what, f"{s:.1f}", f"{cpu:.1f}", f"{mb:.0f}") for what, s, cpu, mb in page(out, Path(name))]
            heading = f"{n_videos} videos, {n_clips} clip(s) each, {given.dim} features"
            report.add(Table(heading, ("verb", "seconds", "CPU s", "peak MB"), tuple(rows)))
            if not given.keep:
                shutil.rmtree(out)
    print(report.write(given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
