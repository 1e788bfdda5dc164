"""Pure functions that pool the clip features and class probabilities of a video into those of the video.

The paper represents a video by the mean of its clips' pool5 features (20 clips x 2048 -> 2048). Sums run in float32 in
clip order, one addition at a time. So the same rows give the same bits on every machine, whatever its vector width;
pairwise or BLAS sums would not.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np

from p3d.pipeline.types import FLOAT32


def mean(features_ND: FLOAT32) -> FLOAT32:
    """The mean over clips: [N, D] -> [D], N >= 1."""
    total_D = np.zeros(features_ND.shape[1], np.float32)
    for row_D in features_ND:
        total_D += row_D
    return total_D / np.float32(len(features_ND))


def mean_probs(probs_NK: FLOAT32) -> FLOAT32:
    """The mean of the clips' class distributions, the paper's score of a video: [N, K] -> [K], N >= 1.

    Summed in float64, clip by clip, and rounded once: the result is the float32 nearest to the mean of the stored rows.
    """
    total_K = np.zeros(probs_NK.shape[1], np.float64)
    for row_K in probs_NK:
        total_K += row_K
    return (total_K / len(probs_NK)).astype(np.float32)


def maximum(features_ND: FLOAT32) -> FLOAT32:
    """The maximum over clips: [N, D] -> [D], N >= 1."""
    top_D: FLOAT32 = features_ND.max(axis=0)
    return top_D


# name -> how clips become a vector, [N, D] -> [D]. A new entry here is a new choice of `--pool`, with its own column.
POOLINGS: dict[str, Callable[[FLOAT32], FLOAT32]] = {"mean": mean, "max": maximum}
# what `--pool` takes: one pooling, or several joined by "+" in the order of the table
POOLS = tuple("+".join(names) for n in range(1, len(POOLINGS) + 1) for names in combinations(POOLINGS, n))


def pool_columns(how: str) -> list[str]:
    """The columns of videos/ for a `--pool`: `embedding` for its first pooling, `embedding_NAME` for each other one."""
    if how not in POOLS:
        raise ValueError(f"unknown pooling {how!r}: use one of {', '.join(POOLS)}")
    return ["embedding", *(f"embedding_{name}" for name in how.split("+")[1:])]


def pool(features_ND: FLOAT32, how: str) -> list[FLOAT32]:
    """The video vectors [D] for a `--pool`, such as "mean" or "mean+max", in the order of `pool_columns`.

    ValueError if there are no clips, or for an unknown pooling.
    """
    if len(features_ND) == 0:
        raise ValueError("a video without clips has no video feature")
    pool_columns(how)
    return [POOLINGS[name](features_ND) for name in how.split("+")]
