"""A process and all it starts: the CPU seconds they took and the memory they hold, whatever else the machine does.

CPU seconds are what a busy neighbour cannot change much, where wall time is his to spoil. Every process is looked at
twice a second, so what one takes between its last look and its end is missed. Looking costs 1% of a core, and the
memory, which the kernel counts page by page, some 50 ms: that is why it is asked so seldom. Linux only.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
LOOK_S = 0.5
MEMORY_LOOKS = 10  # from one look at the memory to the next


class Family:
    """A running command, seen from outside: `cpu_s` now, `cpu_s_at` a time, the most memory it had in `peak_mb`."""

    def __init__(self, process: subprocess.Popen[Any]) -> None:
        self.peak_mb = 0.0
        self._looks: list[tuple[float, float]] = []  # time of the wall clock, CPU seconds until then
        self._root = psutil.Process(process.pid)
        self._cpu_s: dict[int, float] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def cpu_s(self) -> float:
        """CPU seconds that all of them took so far, those that have ended included."""
        with self._lock:
            for pid in self._pids():
                self._cpu_s[pid] = max(cpu_s(pid), self._cpu_s.get(pid, 0.0))
            return sum(self._cpu_s.values())

    def cpu_s_at(self, when: float) -> float:
        """CPU seconds until a time of the wall clock, between two looks by a straight line."""
        times, values = zip(*self._looks, strict=True)
        return float(np.interp(when, times, values))

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self._watcher.join()

    def _pids(self) -> list[int]:
        try:
            return [self._root.pid, *(child.pid for child in self._root.children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            self._looks.append((time.time(), self.cpu_s()))
            if len(self._looks) % MEMORY_LOOKS == 0:
                self.peak_mb = max(self.peak_mb, sum(map(own_mb, self._pids())))


def cpu_s(pid: int) -> float:
    """User and system seconds of one process; 0 once it is gone. proc(5)."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(words[11]) + int(words[12])) * TICK_S


def own_mb(pid: int) -> float:
    """MB of one process that are its own, and its share of what is shared; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0.0
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return (found.get("Pss_Anon", 0) + found.get("Pss_Shmem", 0)) / 1e3
