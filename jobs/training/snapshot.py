"""The progress of a training: the record that its heartbeats hold and `p3d status` shows. Needs no torch."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from p3d.jobs.scheduler.run_snapshot import typed
from p3d.pipeline.errors import StoreMissing, StoreUnsafe
from p3d.pipeline.storage.store import Store

RUNNING, FINISHED, STOPPED = "running", "finished", "stopped"
PREPARING, STARTING, TRAINING, TESTING = "preparing", "decoding the first clips", "training", "testing"
OWN = 1000  # the counters of rank 0 begin here, above those of the run that prepares


class Stopped(Exception):
    """The training was asked to stop, and its state is saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSnapshot:
    """A training at one moment. `state` and `counter` are those of every heartbeat (`RunSnapshot`).

    `phase` is preparing, decoding the first clips, training or testing. `loss` and `top1` (a share) are means of the
    last steps. `clips_per_s` and `waiting` (the share of time in which no clip was ready) are of this run. `tested`
    counts videos. `hits` are those of the last test, in [0, 1]: clip_hit1, video_hit1 and video_hit5.
    """

    counter: int = 0
    state: str = RUNNING
    phase: str = PREPARING
    step: int = 0
    steps: int = 0
    epochs: float = 0.0
    loss: float | None = None
    top1: float | None = None
    lr: float | None = None
    clips_per_s: float = 0.0
    waiting: float | None = None
    eta_s: float | None = None
    checkpoint: int | None = None
    failed: int = 0
    tested: int = 0
    to_test: int = 0
    hits: dict[str, float] = field(default_factory=dict)
    stopping: str = ""
    exit_code: int | None = None
    sentence: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object of a heartbeat, without what is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def key_of(epoch: int) -> str:
    """The key of the heartbeat of a run."""
    return f"_job/heartbeats/{epoch:06d}.json"


def write(store: Store, epoch: int, snapshot: TrainSnapshot) -> None:
    """Replace the heartbeat of a run."""
    store.replace(key_of(epoch), (json.dumps(snapshot.to_json(), indent=1) + "\n").encode())


def read(store: Store, epoch: int) -> TrainSnapshot | None:
    """The last heartbeat of a run; None if it has none that can be read."""
    with contextlib.suppress(StoreMissing, StoreUnsafe, ValueError, TypeError, RecursionError):
        found: TrainSnapshot = typed(json.loads(store.read(key_of(epoch))), TrainSnapshot)
        return found
    return None
