"""Fault injection in the processes of a real job: the name of the video that is read selects the fault.

As `sitecustomize`, found by PYTHONPATH, this runs before anything else in each process that Ray starts. It wraps two
functions when their modules are imported: `open_frames` and the network's `encode`.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def environment(folder: Path) -> dict[str, str]:
    """The environment variables that inject the faults into a `p3d` process."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(f"import runpy\nrunpy.run_path({__file__!r}, run_name='planted')\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def crash(_: str) -> None:
    ctypes.string_at(0)


def hang(_: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)


def memory(_: str) -> None:
    taken = []
    while True:
        taken.append(b"x" * (16 << 20))


def touch(path: str) -> None:
    os.utime(path, (1, 1))


def defect(_: str) -> None:
    raise KeyError("planted")


def elst(path: str) -> None:
    """A real hang in native code: decord never returns from this file."""
    import decord
    import numpy as np

    reader = decord.VideoReader(path, num_threads=1)
    reader.get_batch(np.linspace(0, len(reader) - 1, 16).astype(int).tolist())


ACTIONS: dict[str, Callable[[str], None]] = {
    "crash": crash,
    "hang": hang,
    "memory": memory,
    "touched": touch,
    "removed": os.unlink,
    "defect": defect,
    "elst": elst,
}


def _into_decoding(module: ModuleType) -> None:
    real = module.open_frames

    def open_frames(path: str, *args: Any, **options: Any) -> Any:
        action = ACTIONS.get(os.path.basename(path).split("_")[0].split(".")[0])  # noqa: PTH119 - any bytes
        for at, message in enumerate(real(path, *args, **options)):
            yield message
            if action is not None and at == 1:  # after the first block
                action(path)

    module.open_frames = open_frames  # type: ignore[attr-defined]


def _into_the_network(module: ModuleType) -> None:
    real = module.Encoder.encode

    def encode(self: Any, frames_NHWC: Any, index_BT: Any) -> Any:
        features_BD = real(self, frames_NHWC, index_BT)
        for at, index_T in enumerate(index_BT):
            frames = frames_NHWC[index_T]
            if frames.std() < 1 and 60 < frames.mean() < 95:  # the grey of flat.mp4
                features_BD[at, 0] = float("nan")
        return features_BD

    module.Encoder.encode = encode  # type: ignore[attr-defined]


PLANTS = {"p3d.pipeline.decode.messages": _into_decoding, "p3d.encoder": _into_the_network}


class Planter(importlib.abc.MetaPathFinder):
    """Performs the real import, then changes the module."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in PLANTS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None and spec.loader is not None
        exec_module = spec.loader.exec_module

        def exec_then_plant(module: ModuleType) -> None:
            exec_module(module)
            PLANTS[name](module)

        spec.loader.exec_module = exec_then_plant  # type: ignore[method-assign]
        return spec


if __name__ == "planted":
    sys.meta_path.insert(0, Planter())
