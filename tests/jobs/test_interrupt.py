"""What a run does when it is interrupted: shards that are nearly done are finished, unless it is asked twice."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p3d.jobs.scheduler import loop as loops
from p3d.jobs.scheduler.loop import GRACE_S, RayLoop, _Worker
from p3d.jobs.scheduler.state import Scheduler, Stop, StopWorker
from p3d.jobs.worker.actor import Ready
from p3d.pipeline.dataset.plans import Manifest, write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.dataset.totals import ShardKey
from p3d.pipeline.extract import Progress
from p3d.pipeline.recipe import ShardSizing
from p3d.pipeline.storage.local import LocalStore
from tests.pipeline.rows import recipe, videos

KEY = ShardKey(1, 0)
BEGAN = 1000.0
Interrupted = Callable[..., list[Stop]]


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Interrupted:
    """A run with one shard of four videos in progress, which began at BEGAN: its answer to signals at some seconds."""
    store, sizing = LocalStore(str(tmp_path)), ShardSizing(4, "cpu", seconds_per_video=5.0)
    plan = write_plan(store, 1, recipe(), with_shards(videos("abcd"), sizing), 0, sizing)

    def run(progress: Progress, *seconds: float, until: float | None = None) -> list[Stop]:
        run = object.__new__(RayLoop)
        run.workers = {0: _Worker(None, in_hand={KEY: progress}, began={KEY: BEGAN})}
        run.manifests, run.signals, run.said = {1: Manifest(store, plan)}, [], []  # type: ignore[attr-defined]
        run.say = run.said.append  # type: ignore[attr-defined]
        run.state, run.waits, events = Scheduler([KEY], n_workers=1, n_videos=4), False, list[Stop]()
        for at in seconds:
            monkeypatch.setattr(loops.time, "monotonic", lambda at=at: BEGAN + at)
            run._on_signal(signal.SIGINT, None)
            events += run._interrupted()
        assert len(run.said) == run.waits  # type: ignore[attr-defined]
        if until is not None:
            monkeypatch.setattr(loops.time, "monotonic", lambda: BEGAN + until)
            events += run._interrupted()
        assert {event.exit_code for event in events} == {130}
        return events

    return run


@pytest.mark.parametrize(
    ("progress", "at", "drains"),
    [
        (Progress(videos=3, frames=9), 12.0, True),  # 4 s left, by its videos
        (Progress(videos=1, frames=9), 12.0, False),  # 36 s left
        (Progress(videos=4, frames=9), 50.0, True),  # only its commit is left
        (Progress(frames=9), 15.0, True),  # 5 s left of 20, by the sizing of its plan
        (Progress(frames=9), 5.0, False),
        (Progress(), 15.0, False),  # it has not begun
    ],
)
def test_shards_that_will_end_soon_are_finished(
    progress: Progress, at: float, drains: bool, interrupted: Interrupted
) -> None:
    """A shard with less than GRACE_S left is waited for, and no other is started; else the run stops at once."""
    assert [event.drain for event in interrupted(progress, at)] == [drains]


def test_a_second_signal_stops_at_once(interrupted: Interrupted) -> None:
    """Signals that come together are one, as from a shell and from a wrapper that forwards them."""
    near = Progress(videos=3, frames=9)
    assert [event.drain for event in interrupted(near, 12.0, 12.1)] == [True]
    assert [event.drain for event in interrupted(near, 12.0, 13.0)] == [True, False]


def test_nothing_is_waited_for_longer_than_was_said(interrupted: Interrupted) -> None:
    """A shard that takes longer than expected is abandoned when the time is up."""
    near = Progress(videos=3, frames=9)
    assert [event.drain for event in interrupted(near, 12.0, until=12.0 + GRACE_S - 1)] == [True]
    assert [event.drain for event in interrupted(near, 12.0, until=12.0 + GRACE_S)] == [True, False]


def test_a_worker_that_is_ready_when_the_run_has_stopped_it_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round reads several replies. The first may end the run, which stops a worker whose reply is the second."""
    actor: Any = SimpleNamespace(setup=SimpleNamespace(remote=lambda: "setup"))
    made: Any = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda _: actor))
    monkeypatch.setattr(loops, "ray", SimpleNamespace(remote=lambda _: made, kill=lambda *_, **__: None))
    run: Any = object.__new__(RayLoop)
    run.workers, run.pending, run.spec, run.cpus_each, run.gpus_each, run.lost = {}, {}, None, 1, 0.0, False
    run._start(3)
    run._carry_out([StopWorker(3)])
    assert run.pending["setup"](Ready("cpu", "here", 1)) is None
