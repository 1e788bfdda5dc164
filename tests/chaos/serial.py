"""The same job in one process, one video after the other, without Ray and kills: the reference rows.

python -m tests.chaos.serial SRC OUT WEIGHTS SHARD_VIDEOS CLIPS
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from p3d.encoder import Encoder
from p3d.jobs.job import manifests
from p3d.jobs.planning.prepare import JobSpec, add_plan, create_job, default_batch, prepare, run_options
from p3d.jobs.worker.actor import WorkerSpec
from p3d.jobs.worker.encode import encode_of
from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.extract import extract_shard
from p3d.pipeline.recipe import ShardSizing
from p3d.pipeline.sources.listing import find
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import DecodeMessage, ShardPlan


def main() -> None:
    source, out, weights = sys.argv[1:4]
    store = open_store(out)
    prepared = prepare(JobSpec(None, weights, clips=sys.argv[5]))
    job = create_job(store, prepared)
    add_plan(store, job, find(source, DEFAULTS, id_column=None), sizing=ShardSizing(int(sys.argv[4])), limit=None)
    options = run_options({}, batch_size=default_batch("cpu"), device="cpu")
    decoding = WorkerSpec(out, job.recipe, options, (), "", "").decoding
    encoder = Encoder(
        prepared.weights,
        device="cpu",
        batch_size=options.batch_size,
        threads=options.threads,
    )

    def messages(shard: ShardPlan, scratch: Path) -> Iterator[tuple[int, DecodeMessage]]:
        for at, video in enumerate(shard.videos):
            for message in decode_messages(
                video,
                decoding.frames,
                decoding.sampling,
                policy=decoding.policy,
                limits=decoding.limits,
                store_options=decoding.store_options,
                scratch=scratch,
            ):
                yield at, message

    with tempfile.TemporaryDirectory() as folder:
        for manifest in manifests(store, job).values():
            for at in range(manifest.plan.n_shards):
                shard = manifest.shard(at)
                rows = extract_shard(
                    shard,
                    messages(shard, Path(folder)),
                    encode_of(encoder, job.recipe),
                    sampling=job.recipe.sampling,
                    batch_size=options.batch_size,
                    feature_dim=job.recipe.feature_dim,
                    n_scores=job.recipe.n_scores,
                    embedding_dtype=job.recipe.embedding_dtype,
                )
                rows.stats["pid"] = os.getpid()
                commit_shard(store, rows, job.recipe, manifest.user_columns(at))


if __name__ == "__main__":
    main()
