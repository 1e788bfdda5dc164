"""Summaries supply counts, are used only while all their shards exist, and are never the truth."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p3d.jobs import job as jobs
from p3d.jobs.job import look, survey
from p3d.pipeline.dataset import summaries
from p3d.pipeline.dataset.commit import clips_key, commit_shard, failures_key, videos_key
from p3d.pipeline.dataset.plans import Manifest, write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.dataset.summaries import summary_key
from p3d.pipeline.dataset.totals import ShardKey, Totals, ended
from p3d.pipeline.errors import StoreDenied
from p3d.pipeline.recipe import ShardSizing
from tests.pipeline.rows import planned, recipe, shard_rows, videos
from tests.sim.store import MemoryStore

NAMES = "abcdefghijklm"  # in shards of two: seven, and so three whole blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summaries of two shards, as if of 1 024."""
    monkeypatch.setattr(summaries, "BLOCK", 2)


@pytest.fixture
def done() -> tuple[MemoryStore, dict[int, Manifest]]:
    """A job whose shards are all committed and summarised, as by a run that ends."""
    store = MemoryStore()
    plans = {1: planned(store, NAMES, shard_videos=2)}
    for at in range(plans[1].plan.n_shards):
        commit_shard(store, shard_rows(plans[1], at), recipe(), plans[1].user_columns(at))
    jobs.count_done(store, plans, look(store, plans), summarise=True)
    return store, plans


def counts(totals: Totals) -> tuple[int, int, dict[str, int]]:
    return totals.videos, totals.clips, dict(totals.failures)


def test_counts_of_summaries_are_those_of_footers(
    done: tuple[MemoryStore, dict[int, Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three whole blocks have a summary. Of their shards nothing is read, and of the last shard its footer."""
    store, plans = done
    made = [key for key in store.objects if key.startswith(summaries.FOLDER)]
    assert sorted(made) == [summary_key(plans[1].plan, at) for at in range(3)]
    read, asked = jobs.read_committed, list[str]()
    monkeypatch.setattr(jobs, "read_committed", lambda *given: (asked.append(given[1]), read(*given))[1])
    found = survey(store, plans).done
    assert asked == plans[1].plan.shard_names[6:]
    for key in made:
        del store.objects[key]
    assert counts(found) == counts(survey(store, plans).done) and found.failed > 0
    assert sorted(asked[1:]) == plans[1].plan.shard_names


def test_a_newer_plan_is_taken_from_the_counts_of_a_summary(done: tuple[MemoryStore, dict[int, Manifest]]) -> None:
    """`a` (embedded) and `b` (failed) are planned again: the summary of their shard counts neither."""
    store, plans = done
    before = survey(store, plans).done
    again = with_shards(videos("ab"), ShardSizing(2))
    plans[2] = Manifest(store, write_plan(store, 2, recipe(), again, 0, ShardSizing()))
    work = survey(store, plans)
    assert list(work.unsummarised) == [ShardKey(1, 6)] and work.todo == [ShardKey(2, 0)]
    assert (work.done.videos, work.done.failed) == (before.videos - 2, before.failed - 1)


@pytest.mark.parametrize("lost", [clips_key, videos_key, failures_key])
def test_a_shard_whose_file_is_gone_is_open_whatever_a_summary_says(
    done: tuple[MemoryStore, dict[int, Manifest]], lost: Any
) -> None:
    """Without its clips it is computed again and its summary is stale; a derived file is made again."""
    store, plans = done
    del store.objects[lost(plans[1].plan.shard_names[1])]
    work = look(store, plans)
    if lost is clips_key:
        assert work.todo == [ShardKey(1, 1)] and work.summaries.stale == [summary_key(plans[1].plan, 0)]
        assert ShardKey(1, 0) in work.unsummarised and ShardKey(1, 2) not in work.unsummarised
    else:
        assert work.todo == [] and work.underived == [ShardKey(1, 1)] and work.summaries.stale == []


def test_a_summary_that_cannot_be_read_is_as_if_absent(done: tuple[MemoryStore, dict[int, Manifest]]) -> None:
    """Empty, cut, with a flipped bit, or not Parquet: the footers are read."""
    store, plans = done
    key, true = summary_key(plans[1].plan, 0), counts(survey(store, plans).done)
    good = store.objects[key]
    for bad in (b"", good[:-9], bytes([*good[:6], good[6] ^ 1, *good[7:]]), b"PAR1" * 9):
        store.objects[key] = bad
        assert counts(survey(store, plans).done) == true, bad


def test_a_run_counts_on_if_no_summary_can_be_written(
    done: tuple[MemoryStore, dict[int, Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that denies it would else keep the run from ever counting what is done, and so from finishing."""
    store, plans = done
    true = counts(survey(store, plans).done)
    for key in [key for key in store.objects if key.startswith(summaries.FOLDER)]:
        del store.objects[key]

    def denied(*_: object) -> str:
        raise StoreDenied("no")

    monkeypatch.setattr(store, "create", denied)
    assert counts(jobs.count_done(store, plans, look(store, plans), summarise=True)) == true


def test_claims_of_a_summary_are_checked(done: tuple[MemoryStore, dict[int, Manifest]]) -> None:
    """Negative numbers, nulls, unknown reasons, more rows and another plan are not believed."""
    store, plans = done
    key, true = summary_key(plans[1].plan, 0), counts(survey(store, plans).done)
    about = summaries.about(plans[1].plan)
    rows: dict[str, tuple[list[Any], list[Any], dict[str, Any]]] = {
        "negative": ([-1, 1, 1, 1], [None] * 4, about),
        "null": ([None, 1, 1, 1], [None] * 4, about),
        "reason": ([0, 1, 1, 1], ["<b>", None, None, None], about),
        "rows": ([1] * 5, [None] * 5, about),
        "plan": ([1] * 4, [None] * 4, about | {"plan_digest": "0" * 64}),
    }
    for what, (n_clips, reasons, said) in rows.items():
        table = pa.table([pa.array(n_clips, pa.int32()), pa.array(reasons, pa.string())], schema=summaries.SCHEMA)
        store.objects[key] = summaries.content_of(table, said)
        assert counts(survey(store, plans).done) == true, what
    table = pa.table([pa.array([7] * 4, pa.int32()), pa.nulls(4, pa.string())], schema=summaries.SCHEMA)
    store.objects[key] = summaries.content_of(table, about)
    assert counts(survey(store, plans).done) != true  # a summary that could be true is read


def test_a_long_reason_of_many_rows_is_read_once(
    done: tuple[MemoryStore, dict[int, Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parquet stores a repeated text once: 800 bytes may claim gigabytes, and `status` of a foreign OUT reads them."""
    store, plans = done
    key, true = summary_key(plans[1].plan, 0), counts(survey(store, plans).done)
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 4, pa.int32()), ["x" * (32 << 20)])
    rows = pa.table({"n_clips": pa.array([1] * 4, pa.int32()), "reason": text})
    content = io.BytesIO()
    with pq.ParquetWriter(content, rows.schema, compression="zstd", store_schema=False) as writer:
        writer.write_table(rows)
        writer.add_key_value_metadata({summaries.ABOUT.decode(): json.dumps(summaries.about(plans[1].plan))})
    store.objects[key] = content.getvalue()
    read, sizes = pq.ParquetFile.read, list[int]()

    def weighed(file: pq.ParquetFile, **given: Any) -> pa.Table:
        table = read(file, **given)
        sizes.append(table.nbytes)
        return table

    monkeypatch.setattr(pq.ParquetFile, "read", weighed)
    assert counts(survey(store, plans).done) == true
    assert len(store.objects[key]) < 10_000 and max(sizes) < 40 << 20


def test_an_incomplete_block_is_not_summarised() -> None:
    """The last shard of a block writes the summary; a block that a plan does not fill never has one."""
    store = MemoryStore()
    plans = {1: planned(store, "abcde", shard_videos=1)}
    work = look(store, plans)
    for at in (4, 1, 3):
        work.summaries.add(ShardKey(1, at), ended(shard_rows(plans[1], at).outcomes))
    assert not any(key.startswith(summaries.FOLDER) for key in store.objects)
    work.summaries.add(ShardKey(1, 2), ended(shard_rows(plans[1], 2).outcomes))
    assert [key for key in store.objects if key.startswith(summaries.FOLDER)] == [summary_key(plans[1].plan, 1)]
    assert np.array_equal(summaries.summarised(store, {1: plans[1].plan})[1], [False, True])
