"""What `extract_shard` calls for a batch. Needs no Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from p3d.pipeline.extract import Encode
from p3d.pipeline.recipe import Recipe
from p3d.pipeline.types import FLOAT32, INT64, UINT8

if TYPE_CHECKING:
    from p3d.encoder import Encoder


def encode_of(encoder: Encoder, recipe: Recipe) -> Encode:
    """The function that `extract_shard` calls for a batch: features, and scores if the job stores them."""

    def with_scores(frames_NHWC: UINT8, index_BT: INT64) -> tuple[FLOAT32, FLOAT32]:
        return encoder.encode(frames_NHWC, index_BT, probs=True)

    def without(frames_NHWC: UINT8, index_BT: INT64) -> tuple[FLOAT32, FLOAT32]:
        features_BD = encoder.encode(frames_NHWC, index_BT)
        return features_BD, np.empty((len(features_BD), 0), np.float32)

    return with_scores if recipe.scores else without
