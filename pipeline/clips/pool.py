"""Pure: a video's clip features -> its video feature, and its clips' class probabilities -> the video's.

The paper's representation: the mean over a video's clips of their pool5 features (20 clips x 2048 -> 2048). Sums run in
float32 in clip order, one add at a time, so that the same rows give the same bits everywhere, whatever the machine's
vector width; pairwise or BLAS sums would not.
"""

from __future__ import annotations

import numpy as np

from p3d.pipeline.types import FLOAT32


def mean(features_ND: FLOAT32) -> FLOAT32:
    """[N, D] -> [D], N >= 1."""
    total_D = np.zeros(features_ND.shape[1], np.float32)
    for row_D in features_ND:
        total_D += row_D
    return total_D / np.float32(len(features_ND))


def mean_probs(probs_NK: FLOAT32) -> FLOAT32:
    """[N, K] -> [K], N >= 1: the mean of the clips' full distributions, the paper's score of a video.

    Summed in float64, clip by clip, and rounded once, so that it is the nearest float32 to the mean of what is stored.
    """
    total_K = np.zeros(probs_NK.shape[1], np.float64)
    for row_K in probs_NK:
        total_K += row_K
    return (total_K / len(probs_NK)).astype(np.float32)


def maximum(features_ND: FLOAT32) -> FLOAT32:
    """[N, D] -> [D], N >= 1."""
    top_D: FLOAT32 = features_ND.max(axis=0)
    return top_D


def pool(features_ND: FLOAT32, how: str) -> list[FLOAT32]:
    """The video's vectors for `--pool mean`, `max` or `mean+max`, in the order of their columns."""
    if len(features_ND) == 0:
        raise ValueError("a video without clips has no video feature")
    return [{"mean": mean, "max": maximum}[one](features_ND) for one in how.split("+")]
