"""Many shards through the real driver loop, with workers that finish at once: the short form of `bench.scheduler`."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import pytest
from ray.exceptions import RayActorError

from bench import scheduler as bench
from p3d.jobs.scheduler import log as runlog
from p3d.jobs.scheduler import loop as scheduler
from p3d.jobs.scheduler import state
from p3d.jobs.worker.actor import Done

SHARDS = 5000


def test_a_driver_keeps_nothing_of_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 000 shards are each done once, and the last 3 000 leave less than 20 bytes each. The bound on the newest events
    that a run keeps is lowered here."""
    monkeypatch.setattr(state, "STORY_EVENTS", 500)
    monkeypatch.setattr(runlog, "LINES", 500)
    with bench.without_ray():
        run = bench.run_of(SHARDS, workers=8, shard_videos=2)
        assert not run.snapshot("running").counted
        held, done, handle = dict[int, int](), 0, run.state.handle

        def looking(event: Any) -> Any:
            nonlocal done
            commands = handle(event)
            done += isinstance(event, state.ShardDone)
            if done in (2000, SHARDS - 20) and done not in held:
                gc.collect()
                held[done] = tracemalloc.get_traced_memory()[0]
            return commands

        monkeypatch.setattr(run.state, "handle", looking)
        tracemalloc.start()
        try:
            finish = run.loop()
        finally:
            tracemalloc.stop()
    assert (finish.exit_code, done, run.state.totals.videos) == (0, SHARDS, 2 * SHARDS)
    assert run.snapshot("finished", finish).counted
    assert held[SHARDS - 20] - held[2000] < 60_000, held


def test_answers_of_one_round_are_handled_one_after_the_other() -> None:
    """One shard of a worker is done, and the worker died with its other one: it gets no further shard."""

    class Ray(bench.NullRay):
        rounds = 0

        def wait(self, refs: list[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
            if timeout:
                return [], refs
            self.rounds += 1
            ready = list(self.answers)
            self.answers.clear()
            runs = [answer for answer in ready if isinstance(answer.value, Done)]
            if len(runs) == 2 and self.rounds < 10:
                runs[1].value = RayActorError()
            return ready, []

    with bench.without_ray(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "ray", Ray())
        run = bench.run_of(50, workers=1, shard_videos=2)
        finish = run.loop()
    assert (finish.exit_code, run.state.totals.videos) == (0, 100)
