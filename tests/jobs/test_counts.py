"""A video counts once, for the newest plan that lists it, in every function that counts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from p3d.jobs.job import look, survey
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.plans import Manifest, write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.dataset.totals import count, ended
from p3d.pipeline.recipe import ShardSizing
from tests.pipeline.rows import planned, recipe, shard_rows, videos
from tests.sim.store import MemoryStore


def replaced(name: str) -> pa.Table:
    """The manifest row of a file that has been replaced."""
    table = videos([name])
    at = table.schema.get_field_index("version")
    return table.set_column(at, table.schema.field("version"), pa.array(["1" * 16]))


def test_a_video_that_a_newer_plan_lists_does_not_count_in_its_older_shard() -> None:
    """`d` was replaced before its shard was done: that shard counts one video less, and no failure."""
    store = MemoryStore()
    first = planned(store, "abcd", shard_videos=2)
    second = Manifest(
        store, write_plan(store, 2, recipe(), with_shards(replaced("d"), ShardSizing(2)), 0, ShardSizing())
    )
    plans = {1: first, 2: second}
    work = look(store, plans)
    assert (work.newest.n_superseded, work.n_videos, len(work.todo)) == (1, 4, 3)
    rows = shard_rows(first, 1, frames=(40, 0))  # c is embedded, d fails
    sums = count(ended(rows.outcomes), work.newest.of_shard(first, 1))
    assert (sums.videos, sums.clips, sums.failed) == (1, len(rows.clips), 0)
    for seq, at in work.todo:
        rows = shard_rows(plans[seq], at, frames=(40, 0) if (seq, at) == (1, 1) else (16,))
        commit_shard(store, rows, recipe(), plans[seq].user_columns(at))
    done = survey(store, plans).done
    assert (done.videos, done.failed) == (4, 0)


def test_of_one_plan_every_video_counts() -> None:
    """If no newer plan lists a video again, a shard counts in full, with failures by reason."""
    first = planned(MemoryStore(), "abcd")
    sums = count(ended(shard_rows(first, 0, frames=(40, 0)).outcomes), np.ones(4, bool))
    assert (sums.videos, dict(sums.failures)) == (4, {"truncated": 2})
