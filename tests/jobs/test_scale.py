"""Many shards through the real driver loop, over workers that are done at once: the short form of `bench.scheduler`."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import pytest

from bench import scheduler as bench
from jobs import runlog, state

SHARDS = 5000


def test_a_driver_keeps_nothing_of_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 000 shards are each done once, and the last 3 000 leave less than 20 bytes each; what the run keeps of the
    newest events has a bound, which is lowered here."""
    monkeypatch.setattr(state, "STORY_EVENTS", 500)
    monkeypatch.setattr(runlog, "LINES", 500)
    with bench.without_ray():
        run = bench.run_of(SHARDS, workers=8, shard_videos=2)
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
    assert held[SHARDS - 20] - held[2000] < 60_000, held
