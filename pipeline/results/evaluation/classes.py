"""The classes of a job's scores: their names, and which of them a row ranks first. Derived when read, never stored.

The names are in the job's weights (OUT/weights/<sha256>.safetensors): a safetensors file begins with the length of its
header, 8 bytes little-endian, then the header, JSON, whose `__metadata__` holds our own card of the network.
"""

from __future__ import annotations

import json
import struct

import numpy as np

from p3d.pipeline.dataset.files import check, local_path, reading, sha256_of
from p3d.pipeline.recipe import Recipe
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import FLOAT32, INT64


def class_names(store: Store, recipe: Recipe) -> tuple[str, ...]:
    """One name a class, by class number; empty where the weights have none, or OUT has no weights.

    DamagedJob if the weights are not those that the recipe names.
    """
    key = f"weights/{recipe.weights_sha256}.safetensors"
    if store.head(key) is None:
        return ()
    with reading(store, key, "Restore it"), local_path(store, key) as path:
        check(sha256_of(path) == recipe.weights_sha256, "its sha256 differs from its name")
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            check(length < path.stat().st_size, "it is no safetensors file")
            names = json.loads(json.loads(file.read(length))["__metadata__"]["p3d"])["class_names"]
        check(len(names) in (0, recipe.num_classes), f"it names {len(names)} of {recipe.num_classes} classes")
    return tuple(names)


def top_k(probs_NK: FLOAT32, k: int) -> INT64:
    """The k most likely classes of each row, the likeliest first, [N, min(k, K)]; of equal ones the lower number."""
    if k == 1:  # also the first of equal ones, without sorting every row
        order_NK: INT64 = probs_NK.argmax(axis=1)[:, None]
    else:
        order_NK = np.argsort(-probs_NK, axis=1, kind="stable")
    return order_NK[:, :k]
