"""Peak memory of the decode of one video, by route: against its length, and while its reader stalls.

    python -m bench.decode_memory                           2 minutes and 2 hours of 720p and of 320x240
    python -m bench.decode_memory --hours 0.05,0.5 --out FOLDER

No two hours are encoded: the packets of a clip of 24 seconds are written again and again with later time stamps. Each
decode is a process of its own, which takes the messages of `open_frames` and throws them away. `steady` takes them as
they come, `sparse` those of uniform:20; `stalled` takes the first block, then nothing for --stall seconds, and does not
go on. Figures are MB of private memory (anonymous pages and memory files, /proc/self/smaps_rollup, looked at every
20 ms by a thread) above what the process had before it opened the file. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench import corpus
from bench.rounds import Report, Table
from bench.routes import SPEC
from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.decode.policy import DecodeLimits, DecodePolicy
from p3d.pipeline.decode.probe import Probe, probe
from p3d.pipeline.errors import VideoError
from p3d.pipeline.types import FrameBlock
from tests.zoo import make

CLIP_FRAMES = 600
LOOK_S = 0.02
KINDS = ("steady", "stalled", "sparse")


def held_bytes() -> int:
    """Private memory of this process: anonymous pages, and files that exist in memory only."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return found["Pss_Anon"] + found["Pss_Shmem"]


class Watch:
    """The most that was held while it watched."""

    def __init__(self) -> None:
        self.before = self.most = held_bytes()
        self._done = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._done.wait(LOOK_S):
            self.most = max(self.most, held_bytes())

    def grown_mb(self) -> float:
        return (max(self.most, held_bytes()) - self.before) / 1e6


def child(path: str, decoder: str, kind: str, stall_s: float) -> None:
    """One decode; prints its figures as JSON."""
    import decord  # noqa: F401 - loaded before memory is looked at

    small = parse_sampling("every:16" if kind != "sparse" else "uniform:20", clip_frames=16)
    watch, started, n_frames, route = Watch(), time.monotonic(), 0, ""
    try:
        for message in open_frames(path, SPEC, small, policy=DecodePolicy(decoder)):  # type: ignore[arg-type]
            route = getattr(message, "route", route)
            n_frames += len(message.frames_NHWC) if isinstance(message, FrameBlock) else 0
            if n_frames and kind == "stalled":
                time.sleep(stall_s)
                break
    except VideoError as error:
        print(json.dumps({"refused": error.detail}))
        return
    print(json.dumps({"mb": watch.grown_mb(), "frames": n_frames, "route": route, "s": time.monotonic() - started}))


def decoded(path: Path, decoder: str, kind: str, stall_s: float) -> str:
    """The cell of one decode."""
    words = ["-m", "bench.decode_memory", "--child", str(path), decoder, kind, str(stall_s)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return "refused" if "refused" in found else f"{found['mb']:.0f}"


def probe_bytes(found: Probe) -> float:
    """Bytes that a probe keeps of one frame."""
    arrays = (found.start_s_N, found.end_s_N, found.key_frames, found.key_pts_K, found.key_dts_K)
    return sum(array.nbytes for array in arrays if array is not None) / found.n_frames


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", default="0.0333,2")
    parser.add_argument("--sizes", default="240x320,720x1280", help="height x width, with commas between")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--decoders", default="decord,pyav")
    parser.add_argument("--stall", type=float, default=5.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=4)
    given = parser.parse_args()
    if given.child:
        child(*given.child[:3], float(given.child[3]))
        return 0
    report = Report("decode_memory", "Peak memory of a decode")
    decoders = given.decoders.split(",")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in given.sizes.split(","):
            height, width = map(int, size.split("x"))
            clip = corpus.film(Path(folder) / f"{size}.mp4", (height, width), CLIP_FRAMES, 60)
            for hours in map(float, given.hours.split(",")):
                path = make.looped(clip, Path(folder) / "long.mp4", max(1, round(hours * 3600 * 25 / CLIP_FRAMES)))
                found = probe(str(path), DecodeLimits())
                for kind in given.kinds.split(","):
                    cells = [decoded(path, decoder, kind, given.stall) for decoder in decoders]
                    what = (f"{width}x{height}", f"{found.n_frames}", f"{found.packet_bytes / 1e6:.0f} MB")
                    rows.append((*what, kind, *cells, f"{probe_bytes(found):.1f}"))
                    print(rows[-1], file=sys.stderr, flush=True)
    columns = (
        "size",
        "frames",
        "packets",
        "reader",
        *(f"{d}, MB" for d in decoders),
        "kept by the probe, bytes a frame",
    )
    report.add(Table("Private memory above what the process had before", columns, tuple(rows)))
    if given.out:
        print(report.write(given.out), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
