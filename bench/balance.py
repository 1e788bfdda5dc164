"""What it brings that decodes go where they are needed: two workers, of which one has a network that is much slower.

    python -m bench.balance [--rounds 3]

Eight processors are declared, and a decode sleeps instead of computing, so that two real cores are enough. One arm lets
each worker have as many decodes as seem best; the other gives both four for ever. The network of one worker takes 2
clips a second, that of the other as many as come.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jobs.cluster
from bench import corpus, weights
from bench.launching import launch
from bench.null import NullWorker
from bench.rounds import REPO, Report, take_turns
from jobs import decode_task, decoding, planning, scheduler
from jobs.balance import Balance
from jobs.cli import main
from jobs.parcels import Parcel
from pipeline.types import FLOAT32, INT64, UINT8, FrameBlock

CPUS = 8
BLOCK_S = 0.5  # that a decode sleeps for a block of 64 frames
SLOW_S = 0.5  # that the slow network takes for a clip
FIXED, CLAIM = "P3D_BENCH_FIXED", "P3D_BENCH_CLAIM"  # environment: no change of slots; a file that the slow one makes


def sleepy(*given: Any) -> Iterator[Parcel]:
    """`decode_video`, whose time is slept."""
    for message in decode_task.decode_video(*given):
        if isinstance(message, FrameBlock):
            time.sleep(BLOCK_S)
        yield (message,)


class Uneven(NullWorker):
    """The first that starts has the slow network."""

    def setup(self) -> Any:
        import ray

        ready = super().setup()
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": decode_task.BLOCKS_AHEAD}
        decoding._decode_video = ray.remote(num_cpus=1, max_retries=0, **options)(sleepy)
        decoding.RUN_VIDEOS = 1
        if os.environ.get(FIXED):
            Balance.sample = lambda balance, *_: balance.slots  # type: ignore[method-assign]
        try:
            os.close(os.open(os.environ[CLAIM], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return ready
        quick = self.encoder.encode

        def encode(frames_NHWC: UINT8, index_BT: INT64) -> FLOAT32:
            time.sleep(SLOW_S * len(index_BT))
            return quick(frames_NHWC, index_BT)

        self.encoder.encode = encode
        return ready


def measure() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--videos", type=int, default=120)
    parser.add_argument("--out", type=Path, default=REPO / "bench" / "out")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="p3d-bench-") as name:
        folder = Path(name)
        source = corpus.make(folder / "videos", given.videos, (120, 160), 160, 16)
        path = weights.make(folder, "p3d63", 64)
        n = 0

        def arm(fixed: str) -> float:
            nonlocal n
            n += 1
            os.environ |= {FIXED: fixed, CLAIM: str(folder / f"claim{n}")}
            words = ("--weights", path, "--workers", 2, "--shard-videos", 3, "--decoder", "pyav")
            return launch(source, str(folder / f"out{n}"), *words, module="bench.balance").clips_per_s

        report = Report("balance", "Decodes where they are needed")
        arms = {"four decodes each": lambda: arm("1"), "as many as needed": lambda: arm("")}
        found = take_turns(arms, given.rounds, "clips/s", warm=False)
        report.add(found.table("A worker with a slow network beside one with a fast one", "four decodes each"))
        print(report.write(given.out))


if __name__ == "__main__":
    if sys.argv[1:2] == ["launch"]:
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules["__main__"])
        cloudpickle.register_pickle_by_value(sys.modules["bench.null"])
        scheduler.ShardWorker = Uneven  # type: ignore[misc]
        jobs.cluster.usable_cpus = planning.usable_cpus = lambda: CPUS
        main()
    else:
        measure()
