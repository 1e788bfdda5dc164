"""List and plan a million S3 keys: keys/s, requests, peak memory.

    python -m bench.listing                       1 000 000 keys in 200 folders
    python -m bench.listing --keys 100000 --folders 1 --latency-ms 50

The server is a stub in a process of its own that only knows listings, so what is measured is our side. Three steps,
each in a fresh process: the listing alone, listing and writing a plan to a local OUT, reading it as a resume does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

PAGE = 1000
REPO = Path(__file__).resolve().parent.parent


def stub(keys: int, folders: int, latency_s: float) -> None:
    """Answer ListObjectsV2 for keys `archive/<folder>/clip-<number>.mp4`; print the port; run until killed."""
    per_folder = keys // folders
    counted = [0]

    def entry(folder: int, number: int) -> str:
        etag = f"{folder:08x}{number:024x}"
        return (
            f"<Contents><Key>archive/{folder:05d}/clip-{number:08d}.mp4</Key><Size>{1000 + number}</Size>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;{etag}&quot;</ETag></Contents>"
        )

    def answer(query: dict[str, list[str]]) -> str:
        counted[0] += 1
        prefix, start = query.get("prefix", [""])[0], int(query.get("continuation-token", ["0"])[0])
        inside = prefix.removeprefix("archive/").rstrip("/")
        if "delimiter" in query and not inside:
            names = [f"archive/{n:05d}/" for n in range(start, min(start + PAGE, folders))]
            if prefix == "":
                names = ["archive/"]
            more, body = start + PAGE < folders and prefix != "", ""
            body = "".join(f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" for name in names)
        else:
            end = min(start + PAGE, per_folder)
            more, body = end < per_folder, "".join(entry(int(inside), n) for n in range(start, end))
        token = f"<NextContinuationToken>{start + PAGE}</NextContinuationToken>" if more else ""
        return f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{body}</ListBucketResult>"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/count":
                content = str(counted[0]).encode()
            else:
                time.sleep(latency_s)
                content = answer(parse_qs(urlsplit(self.path).query)).encode()
            self.send_response_only(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


def step(name: str, out: Path) -> None:
    """One measured step, in this process; prints JSON."""
    from p3d.jobs.job import manifests, survey
    from p3d.jobs.planning.prepare import add_plan
    from p3d.pipeline.recipe import JobRecord
    from p3d.pipeline.sources.listing import find
    from p3d.pipeline.storage.local import LocalStore
    from p3d.pipeline.storage.store import StoreOptions
    from tests.pipeline.rows import recipe

    store, job = LocalStore(str(out)), JobRecord(recipe(), "random:0", {})
    before, started, size_bytes = peak_mb(), time.monotonic(), 0
    if name == "resume":
        plans = manifests(store, job)
        rows, size_bytes = survey(store, plans).n_videos, sum(plan.videos.nbytes for plan in plans.values())
    else:
        found = find("s3://bucket/archive", StoreOptions())
        rows = found.videos.num_rows
        if name == "plan":
            add_plan(store, job, found, shard_videos=64, limit=None)
            size_bytes = sum(path.stat().st_size for path in (out / "plans").rglob("*.parquet"))
    figures = {"s": time.monotonic() - started, "cpu": time.process_time(), "bytes": size_bytes / rows}
    print(json.dumps({"rows": rows, "before": before, "peak": peak_mb(), **figures}))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--folders", type=int, default=200)
    parser.add_argument("--latency-ms", type=float, default=0)
    parser.add_argument("--step", choices=["list", "plan", "resume"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.step:
        step(given.step, given.out)
        return 0
    stub_of = f"stub({given.keys}, {given.folders}, {given.latency_ms / 1000})"
    words = [sys.executable, "-c", f"from bench.listing import stub; {stub_of}"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=REPO)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        env = {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "x"}
        env |= {"AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        print(f"{given.keys} keys in {given.folders} folders, {given.latency_ms:g} ms a request")
        print("step    seconds  CPU s   rows/s    peak MB (of which before the step)  bytes a row, written or held")
        with tempfile.TemporaryDirectory() as folder:
            for name in ("list", "plan", "resume"):
                words = [sys.executable, "-m", "bench.listing", "--step", name, "--out", folder]
                done = subprocess.run(words, cwd=REPO, env=env, capture_output=True, text=True, check=True)
                got = json.loads(done.stdout)
                assert got["rows"] == given.keys, got
                rate = got["rows"] / got["s"]
                took = f"{name:6}  {got['s']:7.1f}  {got['cpu']:5.1f}  {rate:7.0f}"
                print(f"{took}   {got['peak']:6.0f} ({got['before']:.0f})  {got['bytes']:.0f}", flush=True)
        from urllib.request import urlopen

        with urlopen(f"http://127.0.0.1:{port}/count") as reply:
            print(f"LIST requests of two listings: {reply.read().decode()}")
    finally:
        server.kill()
        server.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
