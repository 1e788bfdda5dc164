"""How many clips per second one worker on a GPU can be fed, and which stage limits that. Pure.

    decoding      processes of their own, a core each
    reading       in the worker's process: messages out of shared memory, clips out of frames, frames into batches
    committing    in the same process: the rows of a shard become Parquet and reach the store
    shards        few are in hand at a time, so the seconds of a shard in which nothing is computed limit the rate

Reading and committing share one Python interpreter, so their seconds per clip add up. The other stages overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stage = Literal["decoding", "reading", "committing", "shards"]
SHARDS_EACH = 2  # of a worker at a time, so that it need not wait for a commit or for the driver
# CPU seconds of a process that does only this, with the code of `bench.feeding`: a fit to clips of 64x64 and 160x160
READ_S_PER_FRAME = 18e-6
READ_S_PER_MB = 0.35e-3
COMMIT_S_PER_CLIP = 0.1e-3
# Estimated seconds of a shard in which nothing of it is computed: it is handed out, its first decode starts, it is
# committed.
LOCAL_SHARD_S, S3_SHARD_S = 0.15, 0.45


@dataclass(frozen=True, slots=True)
class Feeding:
    """Clips per second that one worker can be fed: in all, and by each stage alone. `binding` is the lowest stage."""

    clips_per_s: float
    binding: Stage
    by_stage: dict[Stage, float]


def feeding(
    *, cores: float, decode_s: float, read_s: float, commit_s: float, shard_clips: float, shard_s: float
) -> Feeding:
    """What limits the rate at which one worker gets clips; all arguments are more than 0.

    `cores` decode for this worker. Per clip, `decode_s` are seconds of a core, `read_s` and `commit_s` seconds of the
    worker's process, each measured alone. A shard has `shard_clips` clips, and takes `shard_s` seconds in which nothing
    of it is computed.
    """
    by_stage: dict[Stage, float] = {
        "decoding": cores / decode_s,
        "reading": 1 / read_s,
        "committing": 1 / commit_s,
        "shards": SHARDS_EACH * shard_clips / shard_s,
    }
    rates: dict[Stage, float] = {
        "decoding": by_stage["decoding"],
        "reading" if read_s >= commit_s else "committing": 1 / (read_s + commit_s),
        "shards": by_stage["shards"],
    }
    binding = min(rates, key=rates.__getitem__)
    return Feeding(rates[binding], binding, by_stage)


def read_seconds(clip_frames: int, frame_bytes: int) -> float:
    """Seconds that the worker's process takes to read a clip of so many frames, about."""
    return clip_frames * (READ_S_PER_FRAME + READ_S_PER_MB * frame_bytes / 1e6)
