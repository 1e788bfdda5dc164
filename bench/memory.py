"""Peak memory of a job on one long video while the network is the slow side, by role, and whether it grows with length.

    python bench/memory.py 2 10        minutes of 1280x720 at 25 frames/s; P3D-63, every:16, CPU
    python bench/memory.py --clips uniform:20 2 10

Private memory by role, and once for all the shared memory that frames travel in (bounded by Ray's object store, see
jobs/scheduler/cluster.py); from /proc/PID/smaps_rollup, sampled every 0.5 s. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil

P3D = [sys.executable, "-c", "from p3d.jobs.cli import main; main()"]
ROLES = {"ray::decode": "decode task", "ray::ShardWorker": "worker", "p3d": "driver"}


def make_video(path: Path, minutes: float) -> None:
    """Drifting bars, GOP 50: cheap to encode, as costly to hold as any other 720p video."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "50"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        wide = np.tile((np.arange(1280 + 256) % 256).astype(np.uint8), (1080, 1))
        for number in range(int(minutes * 60 * 25)):
            at = number % 256
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(wide[:, at : at + 1280]), format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def private_and_shared_bytes(pid: int) -> tuple[int, int]:
    """(anonymous pages, share of shared-memory pages) of a process; zeros once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0, 0
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return found.get("Pss_Anon", 0), found.get("Pss_Shmem", 0)


def peaks(command: list[str]) -> dict[str, float]:
    """Run a launch; peak MB by role and of everything together."""
    top: dict[str, float] = defaultdict(float)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    family = psutil.Process(process.pid)
    while process.poll() is None:
        sums: dict[str, int] = defaultdict(int)
        try:
            members = [family, *family.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for member in members:
            try:
                line = " ".join(member.cmdline())
            except psutil.Error:
                continue
            role = next((name for mark, name in ROLES.items() if mark in line), "Ray itself")
            private, shared = private_and_shared_bytes(member.pid)
            sums[role] += private
            sums["shared frames"] += shared
        sums["all"] = sum(sums.values())
        for role, count in sums.items():
            top[role] = max(top[role], count / 1e6)
        time.sleep(0.5)
    if process.returncode != 0:
        raise SystemExit(f"the launch ended with exit code {process.returncode}")
    return dict(top)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float, nargs="+")
    parser.add_argument("--clips", default="every:16")
    parser.add_argument("--decoder", default="auto")
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    print("| minutes | " + " | ".join([*ROLES.values(), "Ray itself", "shared frames", "all"]) + " | seconds |")
    print("|---" * 8 + "|")
    for minutes in given.minutes:
        with tempfile.TemporaryDirectory() as folder:
            make_video(Path(folder) / "long.mp4", minutes)
            started = time.monotonic()
            options = ["--model", "p3d63", "--weights", given.weights, "--threads", str(given.threads)]
            options += ["--clips", given.clips, "--decoder", given.decoder]
            top = peaks([*P3D, "launch", f"{folder}/long.mp4", f"{folder}/out", *options])
            cells = [f"{top.get(role, 0):.0f} MB" for role in [*ROLES.values(), "Ray itself", "shared frames", "all"]]
            print(f"| {minutes:g} | " + " | ".join(cells) + f" | {time.monotonic() - started:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
