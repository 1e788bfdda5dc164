"""Embed one video without a job or Ray; nothing is written. For a notebook, a query, a test of weights.

    path ──decode_in_child (may crash or hang)──> extract_shard, pool ──> EmbeddedVideo
                                                      ^
    weights ──> Prepared (the recipe of a job) ──> Encoder

Decoder, clips, batches, encoder and pooling are those of a job. With the same recipe, batch size, threads and machine,
every row is therefore bit-identical to the one that a job would store.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Unpack

import numpy as np

from p3d.jobs.api.keywords import explicit, listed, path_of
from p3d.jobs.planning.job_spec import JobSpec
from p3d.pipeline.clips.pool import pool as pool_clips
from p3d.pipeline.clips.pool import pool_columns
from p3d.pipeline.decode.child import decode_in_child, started_child
from p3d.pipeline.errors import BadVideo, InputError, Reason
from p3d.pipeline.extract import extract_shard
from p3d.pipeline.recipe import VIDEO_TIMEOUT_S, Recipe, RecipeKeywords, RecipeOptions
from p3d.pipeline.sources.identity import local_row
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.types import FLOAT32, INT64, UINT8, ClipRow, ShardPlan, VideoEnd, VideoInfo, VideoRef
from p3d.pipeline.types.policy import DecodeLimits

if TYPE_CHECKING:
    from p3d.encoder import Encoder
    from p3d.weights import Weights


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class EmbeddedVideo:
    """The embeddings of a video: N clips and the video itself, as float32 arrays.

    Row i of `features_ND` belongs to `clips[i]`: `.span` has its frames [start_frame, end_frame) and `n_padded`,
    `.start_s` and `.end_s` are its seconds. `embedding_D` is pooled from the rows by the first pooling of
    `recipe.pool`. `pooled` has the vectors of all its poolings, by the name of their column in videos/. `layers` has
    the requested layers, and "prob" if the recipe stores scores, one row per clip. Rows of equal recipes may be
    compared. With `random:N@SEED`, the clips are those of a job in which the path of the video is its bare file name.
    """

    recipe: Recipe
    info: VideoInfo
    end: VideoEnd
    clips: tuple[ClipRow, ...]
    features_ND: FLOAT32
    embedding_D: FLOAT32
    pooled: Mapping[str, FLOAT32]
    layers: Mapping[str, FLOAT32]

    def __repr__(self) -> str:
        n_clips, dim = self.features_ND.shape
        return f"EmbeddedVideo({self.recipe.model}, {n_clips} clips, {dim} features, {self.end.duration_s:.2f} s)"


@explicit(RecipeKeywords, RecipeOptions)
def embed_file(
    path: str | Path,
    weights: Weights | str | Path,
    *,
    model: str | None = None,
    graph: str | None = None,
    layers: str | Sequence[str] = (),
    device: str = "auto",
    batch_size: int | None = None,
    threads: int | None = None,
    limits: DecodeLimits = DecodeLimits(),  # noqa: B008 - frozen
    timeout_s: float = VIDEO_TIMEOUT_S,
    **options: Unpack[RecipeKeywords],
) -> EmbeddedVideo:
    """Embed one local video. `weights` is a loaded object, a file, or "random:SEED" with `model`; it has no default.

    The options and their defaults are those of `p3d launch`. `layers` names layers to return in addition to the
    features, such as "prob" or "res5c" (`Encoder.layer_names`). The decoder runs in a child process; it fails after
    `timeout_s` seconds without output. For many files load once and call `embed` with one Encoder, or launch a job.

    Raises BadVideo, with a reason and a message, for a video without rows; InputError for other invalid input;
    ValueError for an unknown layer.
    """
    named = "" if hasattr(weights, "network") else path_of(weights, "weights")
    spec = JobSpec(model, named, graph, **options)
    with started_child():  # it imports its decoders while this process imports torch
        from p3d.device import device_for
        from p3d.encoder import Encoder
        from p3d.jobs.planning.prepare import fix, prepare, refuse_unfit_device, run_options
        from p3d.weights import Weights

        prepared = fix(weights, spec) if isinstance(weights, Weights) else prepare(spec)
        run = run_options({}, workers=1, device=device, batch_size=batch_size, threads=threads)
        refuse_unfit_device(prepared.recipe, run.device)
        encoder = Encoder(
            prepared.weights,
            device=run.device,
            batch_size=run.batch_size,
            threads=run.threads if device_for(run.device).type == "cpu" else None,
            precision=prepared.recipe.precision,
        )
        return embed(path, encoder, prepared.recipe, layers=listed(layers), limits=limits, timeout_s=timeout_s)


def embed(
    path: str | Path,
    encoder: Encoder,
    recipe: Recipe,
    *,
    layers: Sequence[str] = (),
    limits: DecodeLimits = DecodeLimits(),  # noqa: B008 - frozen
    timeout_s: float = VIDEO_TIMEOUT_S,
) -> EmbeddedVideo:
    """`embed_file` with an existing encoder and a recipe that it fits, such as that of a job.

    Raises ValueError for an encoder of another network or precision; other errors are those of `embed_file`.
    """
    if (encoder.name, encoder.precision) != (recipe.model, recipe.precision):
        raise ValueError(
            f"the recipe is for {recipe.model} in {recipe.precision}, the encoder runs {encoder.name} in "
            f"{encoder.precision}"
        )
    if unknown := [name for name in layers if name not in encoder.layer_names]:
        raise ValueError(f"{encoder.name} has no layer {unknown[0]!r}; there are {', '.join(encoder.layer_names)}")
    shard = ShardPlan(0, "", 0, (_look_at(path),))
    kept = _Kept(encoder, tuple(dict.fromkeys((*layers, *(["prob"] if recipe.scores else [])))), recipe.scores)
    with closing(
        decode_in_child(
            shard.videos[0],
            recipe.frame_spec,
            recipe.sampling,
            policy=recipe.decode_policy,
            limits=limits,
            store_options=DEFAULTS,
            scratch=Path(tempfile.gettempdir()),  # a local file is read in place: nothing is written
            timeout_s=timeout_s,
        )
    ) as messages:
        rows = extract_shard(
            shard,
            ((0, message) for message in messages),
            kept.encode,
            sampling=recipe.sampling,
            batch_size=encoder.batch_size,
            feature_dim=recipe.feature_dim,
            n_scores=recipe.n_scores,
            embedding_dtype=recipe.embedding_dtype,
        )
    (outcome,) = rows.outcomes
    if outcome.failure is not None:
        raise BadVideo(str(path), outcome.failure.reason, outcome.failure.detail)
    assert outcome.info is not None and outcome.end is not None, "an outcome is rows or a failure"
    vectors = pool_clips(rows.features_RD, recipe.pool)
    return EmbeddedVideo(
        recipe,
        outcome.info,
        outcome.end,
        rows.clips,
        rows.features_RD,
        vectors[0],
        MappingProxyType(dict(zip(pool_columns(recipe.pool), vectors, strict=True))),
        kept.last(len(rows.clips)),
    )


def _look_at(path: str | Path) -> VideoRef:
    """The video at a local path, in its present version. BadVideo if the file does not exist."""
    if "://" in str(path):
        raise InputError(f"{path}: only a local file can be embedded without a job; launch a job, or download it first")
    full = os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links
    video = local_row(Path(full).parent, os.fsencode(Path(full).name))
    if video.size_bytes < 0:
        raise BadVideo(str(path), Reason.SOURCE_MISSING, "there is no such file")
    return video


@dataclass(slots=True)
class _Kept:
    """The `encode` function for `extract_shard`, which also keeps the requested layers.

    Clips of one video come in order. If its decoder restarted, rows of discarded clips come before them.
    """

    encoder: Encoder
    names: tuple[str, ...]
    scores: bool
    batches: list[Mapping[str, FLOAT32]] = field(default_factory=list)

    def encode(self, frames_NHWC: UINT8, index_BT: INT64) -> tuple[FLOAT32, FLOAT32]:
        found = self.encoder.encode_layers(frames_NHWC, index_BT, ("pool5", *self.names))
        self.batches.append({name: found[name] for name in self.names})
        return found["pool5"], found["prob"] if self.scores else np.empty((len(index_BT), 0), np.float32)

    def last(self, n_clips: int) -> Mapping[str, FLOAT32]:
        """The layers of the last `n_clips` clips, as a read-only mapping by name."""
        return MappingProxyType(
            {name: np.concatenate([batch[name] for batch in self.batches])[-n_clips:] for name in self.names}
        )
