"""One video -> its rows, here and now: no job, no Ray, nothing written. For a notebook, a query, a test of weights.

    path ──decode_apart (a child that may crash or hang)──> extract_shard, pool ──> EmbeddedVideo
                                                                ^
    weights ──> Prepared (the recipe a job would have) ──> Encoder

The route is a job's: the same decoder, clips, batches, encoder and pooling, so that with the same recipe, batch size,
threads and machine every row has the bits that a job would store.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np

from p3d.encoder import Encoder, device_for
from p3d.jobs.planning.prepare import JobSpec, fix, prepare, refuse_unfit_device, run_options
from p3d.pipeline.clips.pool import pool as pool_clips
from p3d.pipeline.decode.child import TIMEOUT_S, decode_in_child
from p3d.pipeline.decode.policy import DecodeLimits, DecodePolicy
from p3d.pipeline.errors import BadVideo, InputError, Reason
from p3d.pipeline.extract import extract_shard
from p3d.pipeline.recipe import Recipe
from p3d.pipeline.sources.identity import local_row
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.types import FLOAT32, INT64, UINT8, ClipRow, ShardPlan, VideoEnd, VideoInfo, VideoRef
from p3d.weights import Weights


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedVideo:
    """A video's rows: N clips and the video itself. float32.

    `clips[i].span` has frames [start_frame, end_frame) and `n_padded`, `clips[i].start_s`, `.end_s` the seconds, of row
    i of `features_ND`. `embedding_D` is pooled from them by `recipe.pool`; `embedding_max_D` is there for "mean+max".
    `layers` has what was asked for, and "prob" if the recipe stores scores, a row a clip. `recipe` decides the numbers:
    rows of equal recipes may be compared. The clips of `random:N@SEED` are those of a job that has the video under its
    bare name.
    """

    recipe: Recipe
    info: VideoInfo
    end: VideoEnd
    clips: tuple[ClipRow, ...]
    features_ND: FLOAT32
    embedding_D: FLOAT32
    embedding_max_D: FLOAT32 | None
    layers: Mapping[str, FLOAT32]


def embed_file(
    path: str | Path,
    weights: Weights | str | Path,
    *,
    model: str | None = None,
    graph: str | None = None,
    clips: str = "every:16",
    frame_step: int = 1,
    fps: float | None = None,
    pool: str = "mean",
    precision: str = "fp32",
    decoder: str = "auto",
    partial: str = "fail",
    layers: Sequence[str] = (),
    device: str = "auto",
    batch_size: int | None = None,
    threads: int | None = None,
    limits: DecodeLimits = DecodeLimits(),  # noqa: B008 - frozen
    timeout_s: float = TIMEOUT_S,
) -> EmbeddedVideo:
    """Embed one local video. `weights` are loaded ones, a file, or "random:SEED" with `model`; there is no default.

    The options and their defaults are those of `p3d launch`. `layers` names layers to return beside the features, such
    as "prob" or "res5c" (`Encoder.layer_names`). `timeout_s` is the longest silence of the decoder, which runs in a
    process of its own. For many files load once and call `embed` with one Encoder, or launch a job.

    Raises BadVideo, with the reason and a sentence, for a video without rows; InputError for anything else that cannot
    be; ValueError for an unknown layer.
    """
    spec = JobSpec(
        model,
        "" if isinstance(weights, Weights) else str(weights),
        graph,
        clips=clips,
        frame_step=frame_step,
        fps=fps,
        pool=pool,
        decoder=decoder,
        partial=partial,
        precision=precision,
    )
    prepared = fix(weights, spec) if isinstance(weights, Weights) else prepare(spec)
    options = run_options({}, workers=1, device=device, batch_size=batch_size, threads=threads)
    refuse_unfit_device(prepared.recipe, options.device)
    encoder = Encoder(
        prepared.weights,
        device=options.device,
        batch_size=options.batch_size,
        threads=options.threads if device_for(options.device).type == "cpu" else None,
        precision=precision,
    )
    return embed(path, encoder, prepared.recipe, layers=layers, limits=limits, timeout_s=timeout_s)


def embed(
    path: str | Path,
    encoder: Encoder,
    recipe: Recipe,
    *,
    layers: Sequence[str] = (),
    limits: DecodeLimits = DecodeLimits(),  # noqa: B008 - frozen
    timeout_s: float = TIMEOUT_S,
) -> EmbeddedVideo:
    """`embed_file` with an encoder that is there already, for a recipe that it fits, such as that of a job.

    Raises ValueError for an encoder of another network or precision; otherwise as `embed_file`.
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
            policy=DecodePolicy(recipe.decoder, recipe.partial),  # type: ignore[arg-type] # checked by Recipe
            limits=limits,
            store_options=DEFAULTS,
            scratch=Path(tempfile.gettempdir()),  # a local file is read where it is: nothing is written
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
        vectors[1] if len(vectors) > 1 else None,
        kept.last(len(rows.clips)),
    )


def _look_at(path: str | Path) -> VideoRef:
    """The video at a local path as it is now."""
    if "://" in str(path):
        raise InputError(f"{path}: only a local file can be embedded by itself; launch a job, or download it first")
    full = os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links
    video = local_row(Path(full).parent, os.fsencode(Path(full).name))
    if video.size_bytes < 0:
        raise BadVideo(str(path), Reason.SOURCE_MISSING, "there is no such file")
    return video


@dataclass(slots=True)
class _Kept:
    """The encoder as `extract_shard` wants it, which also keeps the layers that were asked for.

    Clips of one video come in order. If its decoder began again, rows of clips that were dropped come before them.
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
        """The layers of the last clips, read-only by name."""
        return MappingProxyType(
            {name: np.concatenate([batch[name] for batch in self.batches])[-n_clips:] for name in self.names}
        )
