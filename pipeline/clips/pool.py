"""Pure functions that pool the clip features and class probabilities of a video into those of the video.

The paper represents a video by the mean of its clips' pool5 features (20 clips x 2048 -> 2048). Sums run in float32 in
clip order, one addition at a time. So the same rows give the same bits on every machine, whatever its vector width;
pairwise or BLAS sums would not.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from p3d.pipeline.types import FLOAT32, INT64

FloatArray = npt.NDArray[np.floating[Any]]


def _sums(rows_NW: FLOAT32, n_V: INT64, total_VW: FloatArray) -> FloatArray:
    """Add to each total the rows of its video, in their order: video v has the next n_V[v] rows, at least one."""
    first_V = np.cumsum(n_V) - n_V
    for at in range(int(n_V.max(initial=0))):
        has_V = np.flatnonzero(n_V > at)
        total_VW[has_V] += rows_NW[first_V[has_V] + at]
    return total_VW


def means(features_ND: FLOAT32, n_V: INT64) -> FLOAT32:
    """The mean over the clips of each video, [N, D] -> [V, D]; video v has the next n_V[v] clips, at least one."""
    total_VD = _sums(features_ND, n_V, np.zeros((len(n_V), features_ND.shape[1]), np.float32))
    found_VD: FLOAT32 = total_VD / n_V.astype(np.float32)[:, None]
    return found_VD


def mean(features_ND: FLOAT32) -> FLOAT32:
    """The mean over clips: [N, D] -> [D], N >= 1."""
    found_D: FLOAT32 = means(features_ND, np.array([len(features_ND)]))[0]
    return found_D


def means_of_probs(probs_NK: FLOAT32, n_V: INT64) -> FLOAT32:
    """The mean of the class distributions of the clips of each video, the paper's score of a video: [N, K] -> [V, K].

    Summed in float64, clip by clip, and rounded once: the result is the float32 nearest to the mean of the stored rows.
    """
    total_VK = _sums(probs_NK, n_V, np.zeros((len(n_V), probs_NK.shape[1]), np.float64))
    found_VK: FLOAT32 = (total_VK / n_V[:, None]).astype(np.float32)
    return found_VK


def mean_probs(probs_NK: FLOAT32) -> FLOAT32:
    """`means_of_probs` of one video: [N, K] -> [K], N >= 1."""
    found_K: FLOAT32 = means_of_probs(probs_NK, np.array([len(probs_NK)]))[0]
    return found_K


def maxima(features_ND: FLOAT32, n_V: INT64) -> FLOAT32:
    """The maximum over the clips of each video, [N, D] -> [V, D], as in `means`."""
    top_VD: FLOAT32 = np.maximum.reduceat(features_ND, np.cumsum(n_V) - n_V, axis=0)
    return top_VD


def maximum(features_ND: FLOAT32) -> FLOAT32:
    """The maximum over clips: [N, D] -> [D], N >= 1."""
    top_D: FLOAT32 = maxima(features_ND, np.array([len(features_ND)]))[0]
    return top_D


# name -> how clips become vectors, ([N, D], [V]) -> [V, D]. A new entry here is a new choice of `--pool`, with its own
# column.
POOLINGS: dict[str, Callable[[FLOAT32, INT64], FLOAT32]] = {"mean": means, "max": maxima}
# what `--pool` takes: one pooling, or several joined by "+" in the order of the table
POOLS = tuple("+".join(names) for n in range(1, len(POOLINGS) + 1) for names in combinations(POOLINGS, n))


def pool_columns(how: str) -> list[str]:
    """The columns of videos/ for a `--pool`: `embedding` for its first pooling, `embedding_NAME` for each other one."""
    if how not in POOLS:
        raise ValueError(f"unknown pooling {how!r}: use one of {', '.join(POOLS)}")
    return ["embedding", *(f"embedding_{name}" for name in how.split("+")[1:])]


def pool_each(features_ND: FLOAT32, n_V: INT64, how: str) -> list[FLOAT32]:
    """The vectors [V, D] of videos for a `--pool`, such as "mean" or "mean+max", in the order of `pool_columns`.

    Video v has the next n_V[v] clips. ValueError for an unknown pooling, or a video without clips.
    """
    if not (n_V > 0).all():
        raise ValueError("a video without clips has no video feature")
    pool_columns(how)
    return [POOLINGS[name](features_ND, n_V) for name in how.split("+")]


def pool(features_ND: FLOAT32, how: str) -> list[FLOAT32]:
    """`pool_each` of one video: its vectors [D]."""
    return [vector_1D[0] for vector_1D in pool_each(features_ND, np.array([len(features_ND)]), how)]
