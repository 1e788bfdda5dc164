"""The progress of a run as one record: for the loop, the heartbeat, `status`, the metrics and the progress bar."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from p3d.jobs.worker.autoscale import Load

MOST = 1e18  # of a number in a record
LOAD = {"inference_threads", "decoding", "decode_concurrency"}  # keys of a load that can be shown


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCounts:
    """Shards of a job, and those that are committed."""

    all: int = 0
    done: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoCounts:
    """Videos of a job; those that are done, failed ones included; and those that failed."""

    all: int
    done: int
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    """One worker of a run. `state` is starting, idle or busy; `shards`, `videos` and `clips` are those in progress.

    `limit` is network, decoding, fetching or overhead, or None before the worker has measured its `load`.
    """

    worker: int
    state: str
    device: str
    host: str = ""
    shards: tuple[str, ...]
    videos: int
    clips: int
    load: Load = field(default_factory=Load)
    limit: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSnapshot:
    """The progress of the whole job at one moment of a run, as the run counts it.

    `state` is running, finished or stopped, and `counter` the number of heartbeats so far. `videos`, `clips`, `shards`
    and `failures` (reason -> videos in committed shards) include what earlier runs did. While a run prepares, they are
    not known, and `videos.all` is 0. `counted` is false while the videos of earlier runs are still being counted: until
    then, only `shards` includes them. `elapsed_s`, `clips_per_s` and `eta_s` (time left) are of this run alone, in
    seconds and clips per second. `eta_s` is None until a video is done. `outage` says which store the run waits for,
    and is empty without one. `stopping` says what a run that was asked to stop finishes first. `exit_code` and
    `sentence` say how the run ended, and are None before.
    """

    schema_version: int = 1
    epoch: int = 0
    counter: int
    state: str
    outage: str = ""
    stopping: str = ""
    elapsed_s: float | None = None
    shards: ShardCounts = ShardCounts(done=0)
    videos: VideoCounts = VideoCounts(all=0, done=0, failed=0)
    counted: bool = True
    clips: int = 0
    clips_per_s: float = 0.0
    eta_s: float | None = None
    failures: dict[str, int] = field(default_factory=dict)
    workers: tuple[WorkerSnapshot, ...] = ()
    exit_code: int | None = None
    sentence: str | None = None

    def __repr__(self) -> str:
        videos = f"{self.videos.done} of {self.videos.all} videos, {self.videos.failed} failed"
        return f"RunSnapshot({self.state}, {videos}, {self.clips} clips, {self.clips_per_s:.2f} clips/s)"

    def to_json(self) -> dict[str, Any]:
        """The JSON object of a heartbeat. It has no counts before they are known, and no end before the run's end."""
        record = asdict(self)
        names = record if self.videos.all else ("counter", "state", "exit_code", "sentence")
        return {name: record[name] for name in names if record[name] is not None or name == "eta_s"}

    @classmethod
    def from_json(cls, record: Any) -> RunSnapshot:
        """Read the JSON of a heartbeat, which may be anybody's. TypeError if it does not say who is alive.

        If another value is not of its field's type, only `counter` and `state` are read. A later version may add keys.
        """
        alive: RunSnapshot = typed({name: record[name] for name in ("counter", "state") if name in record}, cls)
        try:
            found: RunSnapshot = typed(record, cls)
        except TypeError:
            return alive
        loads = [worker["load"] for worker in record.get("workers", ()) if worker.get("load")]
        whole = "videos" not in record or {"shards", "clips", "failures"} <= record.keys()
        return found if whole and all(load.keys() >= LOAD for load in loads) else alive


def typed(value: Any, kind: Any) -> Any:
    """A value of JSON as the type `kind`: a dataclass from an object, a tuple from a list. TypeError if it is not one.

    An object needs the fields that have no default, and its unknown keys are left out. Numbers are below MOST, and an
    integer may stand for a float.
    """
    origin, of, hints = get_origin(kind), get_args(kind), _hints(kind)
    if hints and isinstance(value or {}, dict):
        return kind(**{name: typed(value[name], hint) for name, hint in hints.items() if name in (value or {})})
    if origin is tuple and isinstance(value, list):
        return tuple(typed(one, of[0]) for one in value)
    if origin is dict and isinstance(value, dict):
        return {name: typed(one, of[1]) for name, one in value.items()}
    if not hints and origin not in (tuple, dict) and _fits(value, kind):
        return value
    raise TypeError(f"{type(value).__name__} in the place of {kind}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind) if is_dataclass(kind) else {}


def _fits(value: Any, kind: Any) -> bool:
    if kind is Any or isinstance(value, bool):
        return kind in (Any, bool)
    if isinstance(value, int | float):
        return abs(value) < MOST and (isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind)))
    return isinstance(value, kind)
