"""The classes of a job's scores: their names, and which of them a row ranks first. Derived when read, never stored.

The names are in the job's weights (OUT/weights/<sha256>.safetensors). A safetensors file begins with the length of its
header, 8 bytes little-endian, then the JSON header, whose `__metadata__` entry `p3d` describes the network.
"""

from __future__ import annotations

import json
import struct

import numpy as np

from p3d.pipeline.dataset.files import check, local_path, reading, sha256_of
from p3d.pipeline.recipe import Recipe
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import FLOAT32, INT64

TOP = 5  # of the hit rate among the most probable classes; with no more classes it is always 1


def class_names(store: Store, recipe: Recipe) -> tuple[str, ...]:
    """The names of the classes, by class number; empty if the weights have none, or OUT has no weights.

    DamagedJob if the weights are not those that the recipe names.
    """
    key = f"weights/{recipe.weights_sha256}.safetensors"
    if store.head(key) is None:
        return ()
    with reading(store, key, "Restore it"), local_path(store, key) as path:
        check(sha256_of(path) == recipe.weights_sha256, "its sha256 differs from its name")
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            check(length < path.stat().st_size, "it is not a safetensors file")
            names = json.loads(json.loads(file.read(length))["__metadata__"]["p3d"])["class_names"]
        check(len(names) in (0, recipe.num_classes), f"it names {len(names)} of {recipe.num_classes} classes")
    return tuple(names)


def top_k(probs_NK: FLOAT32, k: int) -> INT64:
    """The k most likely classes of each row, best first, [N, min(k, K)]. Ties: the lower class number first."""
    if k == 1:  # argmax also returns the first of equal ones, without sorting every row
        order_NK: INT64 = probs_NK.argmax(axis=1)[:, None]
    else:
        order_NK = np.argsort(-probs_NK, axis=1, kind="stable")
    return order_NK[:, :k]
