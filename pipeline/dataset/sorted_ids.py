"""Rows by the id of their video, sorted in bounded memory: an external sort whose runs are temporary files.

    ids -> 128-bit keys -> one of few files, by the key -> each file sorted alone, the rows of one id together

An id of 32 hex digits is its own key, and any other is hashed. So an honest output has no two ids with one key, and of
10^8 videos no id is ever a Python object. Keys of the user's own ids may be alike, such as numbers or times in hex
digits. So the file of a key is chosen by all of its bits.

Legend: N rows.
"""

from __future__ import annotations

import binascii
import contextlib
import hashlib
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.storage.local import writing
from p3d.pipeline.types import BOOL, INT64

UINT64 = npt.NDArray[np.uint64]
RUN_ROWS = 1 << 20  # of a file, about: it is sorted in memory
MOST_BITS = 8  # of the number of files, since a process may have 1 024 open
HELD_ROWS = 1 << 16  # in memory before they are written: a listing adds a thousand at a time, too few for many files
MIX = np.uint64(0x9E3779B97F4A7C15)  # 2**64 by the golden ratio: the product's high bits depend on all bits of a factor
FEW = 64  # ids that are looked up one by one
ID_DIGITS, VERSION_DIGITS = 32, 16


def keys_of(texts: pa.ChunkedArray | pa.Array, digits: int) -> npt.NDArray[np.uint8]:
    """The bytes that stand for texts, [N, digits / 2]: their value, if all have so many hex digits, else a hash."""
    array = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    if isinstance(array, pa.ChunkedArray):  # more than 2 GiB of text
        return np.concatenate([keys_of(chunk, digits) for chunk in array.chunks])
    array, width = array.cast(pa.large_binary()), digits // 2
    if not len(array):
        return np.empty((0, width), np.uint8)
    offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]
    if not array.null_count and (np.diff(offsets) == digits).all():
        raw = np.frombuffer(array.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
        with contextlib.suppress(ValueError):
            if not ((raw >= ord("A")) & (raw <= ord("F"))).any():
                return np.frombuffer(binascii.unhexlify(raw.data), np.uint8).reshape(-1, width)
    return np.array([_key(text, digits) for text in array.to_pylist()], f"V{width}").view(np.uint8).reshape(-1, width)


def _key(text: bytes | None, digits: int) -> bytes:
    """The same for one text: mixed columns have ids of both kinds."""
    with contextlib.suppress(ValueError):
        if text is not None and len(text) == digits and text == text.lower():
            return binascii.unhexlify(text)
    return hashlib.sha256(b"" if text is None else text).digest()[: digits // 2]


class SortedIds:
    """Add rows, then read `runs`: structured arrays with `high` and `low` (the key), `row` and the named fields.

    Within a run the rows are sorted by key, those of one id in the order in which they were added. All rows of an id
    are in one run. Temporary files have no names, and go with `close`, with this object, or with the process. Several
    threads may read.
    """

    def __init__(self, n_rows: int, *fields: str) -> None:
        self._dtype = np.dtype([(name, np.uint64) for name in ("high", "low", "row", *fields)])
        self._held, self._n_held = [np.empty(0, self._dtype)], 0
        self._files: list[BinaryIO] = []
        self._stack = contextlib.ExitStack()
        self.close = weakref.finalize(self, self._stack.close)
        bits = 0
        while n_rows >> bits > RUN_ROWS and bits < MOST_BITS:
            bits += 1
        self._shift = 64 - bits
        self._folder = Path(tempfile.gettempdir())
        if bits:
            with writing(self._folder):
                for _ in range(1 << bits):
                    file = tempfile.TemporaryFile(prefix="p3d-ids-")  # noqa: SIM115 - the stack closes it
                    self._files.append(self._stack.enter_context(file))
        self._is_sorted = [False] * max(1, len(self._files))
        self._lock = threading.Lock()  # a file has one position

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def in_memory(self) -> bool:
        """Are all rows in memory, without a file?"""
        return not self._files

    def add(self, ids: pa.ChunkedArray | pa.Array, rows_N: INT64 | range, **fields: UINT64) -> None:
        """Add rows of these ids, with their numbers and the values of all fields."""
        made = np.empty(len(ids), self._dtype)
        made["high"], made["low"] = _words(ids)
        made["row"] = rows_N
        for name, values in fields.items():
            made[name] = values
        self._held.append(made)
        self._n_held += len(made)
        if self._files and self._n_held >= HELD_ROWS:
            self._write()

    def _write(self) -> None:
        """Write the rows in memory to their files."""
        made = np.concatenate(self._held)
        self._held, self._n_held = [np.empty(0, self._dtype)], 0
        run_N = self._run_of(made["high"], made["low"])
        made = made[np.argsort(run_N, kind="stable")]
        edges = np.cumsum(np.bincount(run_N, minlength=len(self._files)))
        for file, first, end in zip(self._files, [0, *edges[:-1]], edges, strict=True):
            if first < end:
                with writing(self._folder):
                    made[first:end].tofile(file)

    def _run_of(self, high_N: UINT64, low_N: UINT64) -> npt.NDArray[np.uint16]:
        mixed_N = (high_N * MIX ^ low_N) * MIX
        return (mixed_N >> np.uint64(self._shift)).astype(np.uint16)  # numpy sorts these in one pass

    def runs(self) -> Iterator[npt.NDArray[Any]]:
        """Each run, sorted. No rows may be added afterwards."""
        return (self._run(at) for at in range(len(self._is_sorted)))

    def _run(self, at: int) -> npt.NDArray[Any]:
        """The run number `at`. Its file is sorted when it is read first."""
        if not self._files:
            if not self._is_sorted[0]:
                self._held, self._is_sorted = [_sorted(np.concatenate(self._held))], [True]
            return self._held[0]
        file = self._files[at]
        with self._lock, writing(self._folder):
            if self._n_held:
                self._write()
            file.flush()
            file.seek(0)
            run = np.fromfile(file, self._dtype)
            if not self._is_sorted[at]:
                run = _sorted(run)
                file.seek(0)
                run.tofile(file)
                self._is_sorted[at] = True
        return run

    def find(self, ids: pa.ChunkedArray | pa.Array) -> INT64:
        """The row that was added last of each id, [N]; -1 if no row has it."""
        rows_N = np.full(len(ids), -1, np.int64)
        high_N, low_N = _words(ids)
        run_N = self._run_of(high_N, low_N) if self._files else np.zeros(len(ids), np.uint16)
        for at in np.unique(run_N):
            run, (wanted,) = self._run(int(at)), np.nonzero(run_N == at)
            first_N = np.searchsorted(run["high"], high_N[wanted])
            last_N = np.searchsorted(run["high"], high_N[wanted], side="right")
            for one, first, last in zip(wanted, first_N, last_N, strict=True) if len(wanted) < FEW else ():
                same = np.flatnonzero(run["low"][first:last] == low_N[one])
                if len(same):
                    rows_N[one] = run["row"][first + same[-1]]
            if len(wanted) >= FEW:
                rows_N[wanted] = _last_rows(run, high_N[wanted], low_N[wanted])
        return rows_N


def _last_rows(run: npt.NDArray[Any], high_N: UINT64, low_N: UINT64) -> INT64:
    """The last row of a run for each key, by one sort of the keys and the run; -1 without any."""
    both = np.empty(len(run) + len(high_N), np.dtype([(name, np.uint64) for name in ("high", "low", "at")]))
    both["high"], both["low"] = np.append(run["high"], high_N), np.append(run["low"], low_N)
    both["at"] = np.arange(len(both))
    both = _sorted(both)
    group_N = np.cumsum(np.append(True, ~same_as_next(both)[:-1])) - 1
    held = both["at"] < len(run)
    last = np.full(group_N[-1] + 1, -1, np.int64)
    last[group_N[held]] = run["row"][both["at"][held].astype(np.int64)].astype(np.int64)  # the last of a group stays
    found = np.empty(len(high_N), np.int64)
    found[both["at"][~held].astype(np.int64) - len(run)] = last[group_N[~held]]
    return found


def _words(ids: pa.ChunkedArray | pa.Array) -> tuple[UINT64, UINT64]:
    """The two halves of the key of each id, [N] each."""
    words = keys_of(ids, ID_DIGITS).view(">u8").reshape(-1, 2).astype(np.uint64)
    return words[:, 0], words[:, 1]


def _sorted(run: npt.NDArray[Any]) -> npt.NDArray[Any]:
    run = run[np.argsort(run["high"], kind="stable")]
    if ((run["high"][1:] == run["high"][:-1]) & (run["low"][1:] != run["low"][:-1])).any():
        run = run[np.lexsort((run["low"], run["high"]))]  # stable, too
    return run


def same_as_next(run: npt.NDArray[Any]) -> BOOL:
    """Whether the next row of a sorted run has the same id, [N]; False for the last."""
    same = np.zeros(len(run), bool)
    same[:-1] = (run["high"][1:] == run["high"][:-1]) & (run["low"][1:] == run["low"][:-1])
    return same


def last_of_its_id(run: npt.NDArray[Any]) -> INT64:
    """The position of the last row with the same id, [N]."""
    ends = np.flatnonzero(~same_as_next(run))
    return np.repeat(ends, np.diff(ends, prepend=-1))


def versions_of(versions: pa.ChunkedArray | pa.Array) -> UINT64:
    """Versions as numbers, [N]."""
    return keys_of(versions, VERSION_DIGITS).view(">u8").reshape(-1).astype(np.uint64)


def is_one_of(column: pa.ChunkedArray, values: frozenset[str]) -> BOOL:
    """Whether each value of a column of text is one of these, [N]."""
    if len(column) < len(values):  # a shard, among the ids of many videos
        return np.fromiter((one in values for one in column.to_pylist()), bool, len(column))
    return np.asarray(pc.is_in(column, pa.array(list(values), pa.string())))
