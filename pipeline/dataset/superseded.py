"""Which rows of a large job are superseded, kept in OUT: a run that begins would sort all ids to find that.

    NewestPlans of 10^8 rows ──one bit for each──> _job/superseded/DIGEST.parquet ──> NewestPlans of a later run

The file is named by the digests of all plans, and is never the truth: any process may make it again. Only counts of a
run depend on it. Readers of rows sort the ids.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from p3d.pipeline.dataset.files import UNREADABLE
from p3d.pipeline.dataset.plans import Manifest, NewestPlans
from p3d.pipeline.dataset.summaries import ABOUT, content_of
from p3d.pipeline.errors import StoreError
from p3d.pipeline.storage.store import Store

LEAST_ROWS = 1 << 20  # of all plans; fewer ids are sorted in memory, in a second
FOLDER = "_job/superseded/"
SCHEMA = pa.schema([("bits", pa.uint8())])


def newest_plans(store: Store, manifests: Collection[Manifest], *, write: bool) -> NewestPlans:
    """Which rows are current, from the file that an earlier run has made. With `write` it is made if it is missing.

    DamagedJob if a plan is damaged.
    """
    n_rows = sum(one.plan.n_videos for one in manifests)
    if len(manifests) < 2 or n_rows < LEAST_ROWS:
        return NewestPlans(manifests)
    digests = [one.plan.digest for one in sorted(manifests, key=lambda one: one.plan.seq)]
    key = f"{FOLDER}{hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:32]}.parquet"
    about: dict[str, object] = {"plan_digests": digests}
    bits = _read(store, key, about, -(-n_rows // 8))
    if bits is not None:
        return NewestPlans(manifests, bits)
    made = NewestPlans(manifests)
    if write:
        with contextlib.suppress(StoreError):
            store.create(key, content_of(pa.table([pa.array(made.superseded)], schema=SCHEMA), about))
    return made


def _read(store: Store, key: str, about: dict[str, object], n_bytes: int) -> npt.NDArray[np.uint8] | None:
    """The bits in a file; None if it does not exist, is not of these plans, or cannot be read."""
    try:
        content = pa.BufferReader(store.read(key))
        with pq.ParquetFile(content, page_checksum_verification=True) as file:
            said = json.loads((file.schema_arrow.metadata or {})[ABOUT])
            if said != about or file.metadata.num_rows != n_bytes:
                return None
            rows = file.read(use_threads=False)
        if not rows.schema.remove_metadata().equals(SCHEMA) or rows["bits"].null_count:
            return None
        return np.asarray(rows["bits"])
    except (StoreError, *UNREADABLE):
        return None
