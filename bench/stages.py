"""The stages of a job alone, in plain processes without Ray: the cost of decoding and of the network per clip.

    python -m bench.stages decode FOLDER WEIGHTS CLIPS      decode every video of a folder, drop the frames
    python -m bench.stages encode BATCHES WEIGHTS CLIPS     encode batches of one clip that is always the same

One such process per core runs at a time, so that they share caches and memory as in a job. A child process prints
"warm" and waits for a line. Then it works, and prints its cost as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.inputs import load, recipe_of, sampling_of
from p3d.jobs.machine import usable_cpus
from p3d.jobs.planning.prepare import default_batch
from p3d.pipeline.clips.rules import Sampling, clip_spans
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.types import FrameSpec, VideoEnd
from p3d.pipeline.types.policy import DecodePolicy

BATCH = default_batch("cpu")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one stage took in all processes together; `seconds` is that of the slowest process."""

    clips: int
    videos: int
    cpu_s: float
    seconds: float

    @property
    def per_clip_s(self) -> float:
        """CPU seconds per clip."""
        return self.cpu_s / self.clips

    @property
    def clips_per_s(self) -> float:
        """Rate of all cores together."""
        return self.clips / self.seconds


def run(stage: str, what: str | Path, weights: Path | str, clips: str) -> Cost:
    """Run one process per core; they begin together once all are warm."""
    n = usable_cpus()
    words = [sys.executable, "-m", "bench.stages", stage, str(what), str(weights), clips]
    children = [
        subprocess.Popen([*words, f"{at}/{n}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for at in range(n)
    ]
    for child in children:
        assert child.stdout is not None
        if child.stdout.readline() != "warm\n":
            raise SystemExit(f"{' '.join(words)} failed to start")
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    costs = [Cost(**json.loads(child.communicate()[0])) for child in children]
    clips_n, videos_n = sum(cost.clips for cost in costs), sum(cost.videos for cost in costs)
    return Cost(clips_n, videos_n, sum(cost.cpu_s for cost in costs), max(cost.seconds for cost in costs))


def main() -> None:
    stage, what, weights, clips, turn = sys.argv[1:]
    at, n = map(int, turn.split("/"))
    if stage == "decode":
        _decode(sorted(Path(what).iterdir())[at::n], weights, clips)
    else:
        _encode(int(what), weights)


def _decode(paths: list[Path], weights: str, clips: str) -> None:
    recipe = recipe_of(weights)
    spec = FrameSpec(crop_hw=recipe.crop_hw, resize_hw=recipe.resize_hw, short_side=recipe.short_side)
    sampling = sampling_of(clips, recipe.n_frames)
    _decode_one(paths[0], spec, sampling)
    cpu_s, started = _begin()
    n_clips = sum(_decode_one(path, spec, sampling) for path in paths)
    _print_cost(n_clips, len(paths), cpu_s, started)


def _decode_one(path: Path, spec: FrameSpec, sampling: Sampling) -> int:
    end = [m for m in open_frames(str(path), spec, sampling, policy=DecodePolicy()) if isinstance(m, VideoEnd)][-1]
    return len(clip_spans(sampling, end.n_frames))


def _encode(batches: int, weights: str) -> None:
    import numpy as np

    from p3d.encoder import Encoder, golden_clip

    encoder = Encoder(load(weights), batch_size=BATCH, threads=1)
    frames_NHWC, index_BT = golden_clip(encoder.recipe)
    frames_NHWC = np.tile(frames_NHWC, (BATCH, 1, 1, 1))
    index_BT = np.concatenate([index_BT + len(frames_NHWC) // BATCH * at for at in range(BATCH)])
    encoder.encode(frames_NHWC, index_BT)
    cpu_s, started = _begin()
    for _ in range(batches):
        encoder.encode(frames_NHWC, index_BT)
    _print_cost(batches * BATCH, 0, cpu_s, started)


def _begin() -> tuple[float, float]:
    print("warm", flush=True)
    sys.stdin.readline()
    return time.process_time(), time.monotonic()


def _print_cost(clips: int, videos: int, cpu_s: float, started: float) -> None:
    took = Cost(clips, videos, time.process_time() - cpu_s, time.monotonic() - started)
    print(json.dumps(asdict(took)))


if __name__ == "__main__":
    main()
