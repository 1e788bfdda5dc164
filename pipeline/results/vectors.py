"""The video vectors of a dataset, scaled to length 1, in a temporary file that is mapped: 4 D bytes each on the disk.

The file has no name, so nothing is left of it when the process ends. The system keeps as much of it in memory as fits.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from p3d.pipeline.dataset import schema
from p3d.pipeline.storage.local import writing
from p3d.pipeline.types import FLOAT32


class VectorFile:
    """Vectors [N, D] that are added once, in order, and then `mapped`. StoreFull if the disk is full."""

    def __init__(self, dim: int) -> None:
        self.dim, self.n = dim, 0
        self._folder = Path(tempfile.gettempdir())
        with writing(self._folder):
            self._file = tempfile.TemporaryFile(prefix="p3d-vectors-")  # noqa: SIM115 - it lives as long as its map

    def add(self, table: pa.Table) -> None:
        """Add the vectors of some rows of videos/."""
        units_ND = unit(table, self.dim)
        with writing(self._folder):
            self._file.write(units_ND.tobytes())
        self.n += len(units_ND)

    def mapped(self) -> FLOAT32:
        """All vectors, read only."""
        with writing(self._folder):
            self._file.flush()
        if not self.n:
            return np.empty((0, self.dim), np.float32)
        return np.memmap(self._file, np.float32, "r", shape=(self.n, self.dim))


def unit(table: pa.Table, dim: int) -> FLOAT32:
    """The vectors of some rows, scaled to length 1."""
    features_ND = schema.features_of(table["embedding"], dim)
    found_ND: FLOAT32 = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)
    return found_ND
