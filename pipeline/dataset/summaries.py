"""How the videos of many committed shards ended, in one object for BLOCK shards, so that a resume need not ask each.

    the ends of shards, as they become known ──Summaries.add──> _job/summaries/PLAN8-FIRST.parquet ──count──> Totals

A summary is made once all shards of its block are known, and is never the truth: the files of the shards are. It is
used only while all of them exist, and any process may make it again from their footers. It has a row for each video in
the order of the manifest, so that its counts stay right when a newer plan names some of the videos again.
"""

from __future__ import annotations

import io
import json
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from p3d.pipeline.dataset.files import UNREADABLE
from p3d.pipeline.dataset.plans import Manifest, NewestPlans
from p3d.pipeline.dataset.totals import Ended, ShardKey, ShardSet, Totals
from p3d.pipeline.errors import Reason, StoreError
from p3d.pipeline.recipe import PlanRecord
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import BOOL, shard_name

BLOCK = 1024  # shards of a summary; the last shards of a plan, if they are fewer, have none
FOLDER = "_job/summaries/"
SUMMARY_KEY = re.compile(rf"{FOLDER}([0-9a-f]{{8}}-[0-9]{{9,}})\.parquet")
SCHEMA = pa.schema([("n_clips", pa.int32()), ("reason", pa.string())])
# each text once: in a file from somebody else, it may be long, and that of each of a million rows
AS_READ = SCHEMA.set(1, pa.field("reason", pa.dictionary(pa.int32(), pa.string())))
# the number of clips of each video of a shard, and its reason; None if none failed. Many blocks may be incomplete
Ends = tuple[npt.NDArray[np.int32], tuple[str | None, ...] | None]
ABOUT = b"p3d.summary"  # in the metadata of the file


def summary_key(plan: PlanRecord, block: int) -> str:
    """The key of the summary of the shards [block * BLOCK, (block + 1) * BLOCK) of a plan."""
    return f"{FOLDER}{shard_name(plan.plan8, block * BLOCK)}.parquet"


def summarised(store: Store, plans: Mapping[int, PlanRecord]) -> dict[int, BOOL]:
    """Which blocks of each plan have a summary, from one listing."""
    names = {found[1] for info in store.list(FOLDER) if (found := SUMMARY_KEY.fullmatch(info.key))}
    return {
        seq: np.array([shard_name(plan.plan8, at * BLOCK) in names for at in range(plan.n_shards // BLOCK)], bool)
        for seq, plan in plans.items()
    }


class Summaries:
    """The summaries of a job that can be used now: those of blocks whose shards all have their clips file.

    `shards` are the shards that they cover. Thread-safe.
    """

    def __init__(self, store: Store, manifests: Mapping[int, Manifest], committed: ShardSet) -> None:
        self.store, self.manifests = store, manifests
        self._written = summarised(store, {seq: manifest.plan for seq, manifest in manifests.items()})
        self.hold_to(committed)
        self._known: dict[tuple[int, int], dict[int, Ends]] = {}  # of each incomplete block, by shard
        self._lock = threading.Lock()

    def hold_to(self, committed: ShardSet) -> None:
        """Use only the summaries of blocks that are committed."""
        self.stale: list[str] = []  # keys of summaries that cannot be used: a shard is to be computed again
        self._covered: dict[int, BOOL] = {}
        for seq, has_B in self._written.items():
            plan = self.manifests[seq].plan
            held_S = committed.of_plan(seq)[: len(has_B) * BLOCK]
            usable_B = has_B & held_S.reshape(len(has_B), BLOCK).all(axis=1)
            self.stale += [summary_key(plan, at) for at in np.flatnonzero(has_B & ~usable_B).tolist()]
            covered_S = np.zeros(plan.n_shards, bool)
            covered_S[: len(held_S)] = np.repeat(usable_B, BLOCK)
            self._covered[seq] = covered_S
        self.shards = ShardSet(self._covered)

    def count(self, newest: NewestPlans) -> tuple[Totals, list[ShardKey]]:
        """The sums over the videos of all covered shards, and the shards of summaries that cannot be read."""
        totals, unread = Totals(), list[ShardKey]()
        for seq, covered_S in self._covered.items():
            for block in np.flatnonzero(covered_S[::BLOCK]).tolist():
                found = self._read(self.manifests[seq], block, newest)
                if found is None:
                    unread += [ShardKey(seq, at) for at in range(block * BLOCK, (block + 1) * BLOCK)]
                else:
                    totals.add(found)
        return totals, unread

    def _read(self, manifest: Manifest, block: int, newest: NewestPlans) -> Totals | None:
        """The sums over a block; None if its summary is not one of these shards, or cannot be read."""
        first, end = _rows_of(manifest, block)
        try:
            content = pa.BufferReader(self.store.read(summary_key(manifest.plan, block)))
            with pq.ParquetFile(content, page_checksum_verification=True, read_dictionary=["reason"]) as file:
                said = json.loads((file.schema_arrow.metadata or {})[ABOUT])
                if said != about(manifest.plan) or file.metadata.num_rows != end - first:
                    return None
                if not file.schema_arrow.remove_metadata().equals(AS_READ):
                    return None
                rows = file.read(use_threads=False)
            n_clips, reasons = rows["n_clips"], Counter[str]()
            rows = rows.filter(pa.array(newest.current(manifest.plan.seq, first, end)))
            for one in pc.value_counts(rows["reason"].combine_chunks()).to_pylist():
                if one["values"] is not None:
                    reasons[str(Reason(one["values"]))] = one["counts"]
            if n_clips.null_count or pc.min(n_clips).as_py() < 0:
                return None
            return Totals(rows.num_rows, pc.sum(rows["n_clips"]).as_py() or 0, reasons)
        except (StoreError, *UNREADABLE):
            return None

    def add(self, key: ShardKey, videos: Iterable[Ended]) -> None:
        """Note how the videos of a committed shard ended. The last shard of a block writes its summary. StoreError."""
        manifest, block = self.manifests[key.plan_seq], key.shard // BLOCK
        if (block + 1) * BLOCK > manifest.plan.n_shards or key in self.shards:
            return
        _, n_clips, reasons = zip(*videos, strict=True)
        with self._lock:
            known = self._known.setdefault((key.plan_seq, block), {})
            known[key.shard] = np.array(n_clips, np.int32), reasons if any(reasons) else None
            if len(known) < BLOCK:
                return
            del self._known[key.plan_seq, block]
        first, end = _rows_of(manifest, block)
        clips, why = zip(*(known[shard] for shard in sorted(known)), strict=True)
        reason = chain.from_iterable(one or [None] * len(n) for n, one in zip(clips, why, strict=True))
        rows = pa.table([np.concatenate(clips), list(reason)], schema=SCHEMA)
        if rows.num_rows != end - first:
            return  # a damaged shard, which `verify` reports
        self.store.create(summary_key(manifest.plan, block), content_of(rows, about(manifest.plan)))


def content_of(rows: pa.Table, about: dict[str, object]) -> bytes:
    """The file of a summary."""
    content = io.BytesIO()
    rows = rows.replace_schema_metadata({ABOUT: json.dumps(about)})
    pq.write_table(rows, content, compression="zstd", write_page_checksum=True)
    return content.getvalue()


def _rows_of(manifest: Manifest, block: int) -> tuple[int, int]:
    """The rows of a block in its plan: the first, and their end."""
    return manifest.span(block * BLOCK)[0], manifest.span((block + 1) * BLOCK - 1)[1]


def about(plan: PlanRecord) -> dict[str, object]:
    """What a summary says of itself."""
    return {"plan_digest": plan.digest, "block": BLOCK}
