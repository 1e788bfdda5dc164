"""Jobs in processes of their own: started, waited for, stopped, and their rows."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import P3D

LAUNCH = ("--shard-videos", 2, "--batch-size", 2, "--scores")


def rows(out: Path, folder: str) -> pa.Table:
    """All rows of a folder of the dataset, sorted."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted((out / folder).glob("*.parquet"))])
    keys = [(name, "ascending") for name in ("video_id", "clip_index") if name in table.column_names]
    return table.sort_by(keys).combine_chunks()


class running:  # noqa: N801 - reads as a verb
    """A `p3d` process that is stopped at the end, whatever happened."""

    def __init__(self, *args: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
        self.args, self.cwd, self.env = args, cwd, env

    def __enter__(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [*P3D, *map(str, self.args)],
            cwd=self.cwd,
            env={**os.environ, **(self.env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self.process

    def __exit__(self, *_: object) -> None:
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        for process in [*children, self.process]:
            if process.pid != os.getpid():
                try:
                    process.kill()
                except (psutil.NoSuchProcess, ProcessLookupError):
                    continue
        self.process.communicate()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    """Poll for a condition; fail if the process ends first or time runs out."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the event never came"
        time.sleep(0.02)
