"""Hit rates of the stored scores against labels, as in the Sports-1M table of the P3D paper.

A hit is a label among the k most likely classes: of a clip for clip hit@k, of a video for video hit@k. The scores of a
video are the mean of its clips' distributions. If a video has several labels, any one of them counts. Every row is
checked as it is read. Memory holds one row group, the pooled rows of a shard, and the labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import InputError
from p3d.pipeline.results.evaluation.classes import top_k
from p3d.pipeline.results.evaluation.labels import Labels

Truth = dict[str, frozenset[int]]  # video_id -> the numbers of its classes


@dataclass(frozen=True, slots=True)
class Hits:
    """Hit rates in [0, 1]; `clip_hit1` is None for a snapshot without clips/.

    `videos` (evaluated), `unlabelled`, `failed` and `pending` add up to all videos. `unknown_labels` counts the labels
    that name none of the finished videos.
    """

    top: int
    videos: int
    clips: int
    clip_hit1: float | None
    video_hit1: float
    video_hit_top: float
    unlabelled: int
    failed: int
    pending: int
    unknown_labels: int


@dataclass(slots=True)
class _Tally:
    """Labelled rows of a folder, and how many of them hit at each k."""

    ks: tuple[int, ...]
    rows: int = 0
    hits: Counter[int] = field(default_factory=Counter)

    def add(self, table: pa.Table, truth: Truth, n_scores: int) -> None:
        truths = [truth.get(video_id) for video_id in table["video_id"].to_pylist()]
        labelled = pa.array([classes is not None for classes in truths], pa.bool_())
        probs_NK = schema.probs_of(table.select(["probs"]).filter(labelled), n_scores)
        truths_N = [classes for classes in truths if classes is not None]
        self.rows += len(truths_N)
        for k in self.ks:
            tops_Nk = top_k(probs_NK, k).tolist()
            self.hits[k] += sum(not one.isdisjoint(top) for one, top in zip(truths_N, tops_Nk, strict=True))

    def rate(self, k: int) -> float:
        return self.hits[k] / self.rows


def evaluate(
    source: NewestRows | SnapshotRows,
    labels: Labels,
    *,
    top: int = 5,
    on_step: Callable[[int, int], None] | None = None,
) -> Hits:
    """Hit rates of the labelled videos that have rows: clip hit@1, video hit@1 and video hit@`top`, with `top` > 1.

    InputError if no scores are stored, or no label names a video; DamagedJob if a row is damaged.
    """
    refuse_without_scores(source)
    recipe = source.job.recipe
    truth, n_rows, n_known = _match(source, labels)
    clips, videos = _Tally((1,)), _Tally((1, top))
    for folder, table in source.rows(clips=source.with_clips, on_step=on_step):
        if folder != "failures":
            (clips if folder == "clips" else videos).add(table, truth, recipe.n_scores)
    return Hits(
        top=top,
        videos=videos.rows,
        clips=clips.rows,
        clip_hit1=clips.rate(1) if clips.rows else None,
        video_hit1=videos.rate(1),
        video_hit_top=videos.rate(top),
        unlabelled=n_rows["videos"] - len(truth),
        failed=n_rows["failures"],
        pending=source.pending,
        unknown_labels=len(labels.of) - n_known,
    )


def refuse_without_scores(source: NewestRows | SnapshotRows) -> None:
    """InputError unless the rows have class scores."""
    if not source.job.recipe.scores:
        raise InputError(
            f"{source.store.url} stores no class scores to evaluate: embed its videos into another output with --scores"
        )


def _match(source: NewestRows | SnapshotRows, labels: Labels) -> tuple[Truth, Counter[str], int]:
    """The classes of each labelled video with rows, the number of rows per folder, and the number of labels in use.

    This takes a pass of its own, because rows of clips/ do not have all the columns that may name a video.
    """
    truth, n_rows, known, other = Truth(), Counter[str](), set[str](), ""
    for folder, table in source.rows(clips=False):
        n_rows[folder] += table.num_rows
        for name, video_id in zip(table[labels.key].to_pylist(), table["video_id"].to_pylist(), strict=True):
            other = name
            if name not in labels.of:
                continue
            if name in known:
                raise InputError(f"several videos of {source.store.url} have {labels.key} {name!r}; label by video_id")
            known.add(name)
            if folder == "videos":
                truth[video_id] = labels.of[name]
    if not truth:
        label = next(iter(labels.of), None)
        raise InputError(
            f"none of {len(labels.of)} labels is of a video that has rows in {source.store.url}: "
            f"column {labels.key} holds {label!r} in the list, and {other!r} in the dataset"
        )
    return truth, n_rows, len(known)
