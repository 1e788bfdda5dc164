"""`p3d launch` with a network that computes nothing: only decoding and orchestration are left.

python -m bench.null launch SRC OUT ...
"""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import numpy as np

from p3d.jobs.cli import main
from p3d.jobs.scheduler import loop as scheduler
from p3d.jobs.worker.actor import Ready, ShardWorker
from p3d.networks.fused import keep_freed_memory
from p3d.pipeline.types import FLOAT32, INT64, UINT8


class _NullEncoder:
    """An encoder whose features are all 1."""

    device, busy = "cpu", None

    def __init__(self, batch_size: int, feature_dim: int) -> None:
        self.batch_size, self.feature_dim = batch_size, feature_dim

    def encode(self, frames_NHWC: UINT8, index_BT: INT64) -> FLOAT32:
        return np.ones((len(index_BT), self.feature_dim), np.float32)


class NullWorker(ShardWorker):
    """A worker without a network."""

    def setup(self) -> Ready:
        keep_freed_memory()  # as an Encoder does
        self.encoder: Any = _NullEncoder(self.spec.options.batch_size, self.spec.recipe.feature_dim)
        self.inference_threads = self.inference_threads_on("cpu")
        return Ready("cpu", platform.node(), os.getpid())


if __name__ == "__main__":
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    scheduler.ShardWorker = NullWorker  # type: ignore[misc]
    main()
