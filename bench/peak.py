"""The arithmetic peak and the memory rate of this machine, by loops in C (`peak.c`) that are compiled at run time.

Matrix products through torch do not reach the peak on every CPU, so a share of them says little. Multiply-adds are
counted, not operations: one is two FLOP. The bf16 loop uses AMX's product of tiles if the CPU has it, otherwise
AVX-512's dot product of pairs. A CPU with neither has no figure. `describe` says which was used.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

COMPILE = "cc -O3 -march=native -shared -fPIC -pthread".split()
TURN_S = 0.05  # of one turn of a loop, approximately
COPIED_BYTES = 64 << 20  # per thread, twice: far more than its share of the caches


class Peak:
    """Loops whose length is set once so that a turn takes about TURN_S seconds. Needs a C compiler called `cc`.

    `clock` measures seconds: elapsed time, or the CPU time of this process, which excludes other processes.
    """

    def __init__(self, threads: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.threads = threads
        self.clock = clock
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "peak.so"
            subprocess.run([*COMPILE, "-o", str(library), str(Path(__file__).with_name("peak.c"))], check=True)
            self._loops = ctypes.CDLL(str(library))
        for name in ("fma_fp32", "fma_bf16"):
            loop = getattr(self._loops, name)
            loop.restype, loop.argtypes = ctypes.c_double, [ctypes.c_long, ctypes.c_int]
        pointer, copies = ctypes.c_void_p, self._loops.copy_bytes
        copies.restype, copies.argtypes = (
            ctypes.c_double,
            [pointer, pointer, ctypes.c_size_t, ctypes.c_long, ctypes.c_int],
        )
        self._count = {name: self._sized(name) for name in ("fma_fp32", "fma_bf16")}
        self._from, self._to = (np.ones(threads * COPIED_BYTES, np.uint8) for _ in range(2))

    def macs_per_s(self, precision: str) -> float:
        """Multiply-adds per second in "fp32" or "bf16", of all threads; 0 if the CPU has no instruction for it."""
        name = f"fma_{precision}"
        return self._rate(name, self._count[name])

    def copied_per_s(self) -> float:
        """Bytes per second, read and written, of copies that do not fit into a cache."""
        started = self.clock()
        moved: float = self._loops.copy_bytes(
            self._to.ctypes.data, self._from.ctypes.data, COPIED_BYTES, 4, self.threads
        )
        return moved / (self.clock() - started)

    def _rate(self, name: str, count: int) -> float:
        started = self.clock()
        macs: float = getattr(self._loops, name)(count, self.threads)
        return macs / (self.clock() - started)

    def _sized(self, name: str) -> int:
        """How many iterations take TURN_S."""
        count = 100_000
        self._rate(name, count)  # wakes the vector units
        started = self.clock()
        self._rate(name, count)
        return max(1, int(count * TURN_S / (self.clock() - started)))

    def describe(self) -> str:
        """The instructions that are measured."""
        bits = self._loops.vector_bits()
        if self._loops.has_amx():
            bf16 = "bf16 by AMX products of tiles"
        elif "avx512_bf16" in _flags():
            bf16 = "bf16 by AVX512_BF16 dot products"
        else:
            bf16 = "no bf16 instruction that this bench measures"
        return f"fp32 by {bits}-bit vectors, {bf16}"


def _flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())
