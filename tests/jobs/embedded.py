"""A job without Ray: real videos are processed as a worker does and committed shard by shard."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

from p3d.encoder import Encoder
from p3d.jobs.machine import software
from p3d.jobs.planning.prepare import JobSpec, add_plan, create_job, prepare
from p3d.jobs.worker.encode import encode_of
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.plans import Manifest
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.extract import extract_shard
from p3d.pipeline.recipe import JobRecord, ShardSizing
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.store import DEFAULTS, Store
from p3d.pipeline.types import ShardRows
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.owned import own


def embed_all(
    source: str,
    store: Store,
    spec: JobSpec,
    scratch: Path,
    *,
    shard_videos: int = 4,
    batch_size: int = 3,
    forge: Callable[[ShardRows], ShardRows] = lambda rows: rows,
) -> JobRecord:
    """Plan and embed every video of `source` into `store`, as `p3d launch` would on one CPU with one thread.

    `forge` may change the rows of a shard before they are committed.
    """
    prepared = prepare(spec)
    job = create_job(store, prepared)
    own(store)
    encoder = Encoder(prepared.weights, batch_size=batch_size, threads=1, precision=job.recipe.precision)
    plan = add_plan(store, job, find(source, DEFAULTS), sizing=ShardSizing(shard_videos), limit=None)
    assert plan is not None
    manifest = Manifest(store, plan)
    for at in range(plan.n_shards):
        shard = manifest.shard(at)
        messages = (
            (number, message)
            for number, video in enumerate(shard.videos)
            for message in decode_messages(
                video,
                job.recipe.frame_spec,
                job.recipe.sampling,
                policy=DecodePolicy(),
                limits=DecodeLimits(),
                store_options=DEFAULTS,
                scratch=scratch,
            )
        )
        rows = extract_shard(
            shard,
            messages,
            encode_of(encoder, job.recipe),
            sampling=job.recipe.sampling,
            batch_size=batch_size,
            feature_dim=job.recipe.feature_dim,
            n_scores=job.recipe.n_scores,
            embedding_dtype=job.recipe.embedding_dtype,
        )
        made_on = {"device": "cpu", "host": platform.node(), "software": software()}
        rows.stats.update({**made_on, "batch_size": batch_size, "threads": 1})
        commit_shard(store, forge(rows), job.recipe, manifest.user_columns(at))
    return job
