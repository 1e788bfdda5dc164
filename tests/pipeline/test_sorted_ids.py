"""Rows sorted by id in temporary files are those sorted in memory, for ids of every kind."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from p3d.pipeline.dataset import sorted_ids
from p3d.pipeline.dataset.sorted_ids import SortedIds, is_one_of, keys_of, last_of_its_id, same_as_next


def ids_of(n: int, seed: int) -> list[str]:
    """Hex ids, texts, ids that are alike, and ids twice."""
    rng = random.Random(seed)
    some = [f"{rng.getrandbits(128):032x}" for _ in range(n)]
    texts = ["", "ü", "A" * 32, "a" * 32, "a" * 31, " " * 32, "0x" + "a" * 30, "a\n" * 16]
    return [*some, *texts, *rng.choices(some, k=n // 2), *texts[:3]]


@pytest.mark.parametrize(("run_rows", "held_rows"), [(1 << 20, 1 << 16), (16, 1), (16, 40), (16, 1 << 16)])
@pytest.mark.parametrize("seed", range(3))
def test_the_last_row_of_each_id_is_found(
    run_rows: int, held_rows: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory and in files, one by one and many together, as a dictionary would give it."""
    monkeypatch.setattr(sorted_ids, "RUN_ROWS", run_rows)
    monkeypatch.setattr(sorted_ids, "HELD_ROWS", held_rows)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = ids_of(100, seed)
    with SortedIds(len(names)) as ids:
        for first in range(0, len(names), 33):
            some = names[first : first + 33]
            ids.add(pa.array(some), range(first, first + len(some)))
        assert ids.in_memory == (run_rows >= len(names))
        assert not list(tmp_path.iterdir())  # a kill leaves nothing
        true = {name: row for row, name in enumerate(names)}
        asked = [*true, "unknown", "f" * 32]
        random.Random(seed).shuffle(asked)
        for few in (1, 1000):
            monkeypatch.setattr(sorted_ids, "FEW", few)
            assert ids.find(pa.array(asked)).tolist() == [true.get(name, -1) for name in asked]
        seen = []
        for run in ids.runs():
            rows = run["row"].astype(int).tolist()
            assert [rows[at] for at in last_of_its_id(run)] == [true[names[row]] for row in rows]
            assert (same_as_next(run) == np.array([true[names[row]] != row for row in rows], bool)).all()
            seen += rows
        assert sorted(seen) == list(range(len(names)))


def test_two_ids_with_one_half_of_their_key_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 64 bits alone do not decide."""
    names = [f"{'0' * 16}{at:016x}" for at in (3, 1, 2, 1)]
    with SortedIds(len(names)) as ids:
        ids.add(pa.array(names), range(len(names)))
        assert ids.find(pa.array(names)).tolist() == [0, 3, 2, 3]
        monkeypatch.setattr(sorted_ids, "FEW", 1)
        assert ids.find(pa.array(names)).tolist() == [0, 3, 2, 3]
        (run,) = ids.runs()
        assert run["low"].tolist() == [1, 1, 2, 3] and run["row"].tolist() == [1, 3, 2, 0]


def test_threads_find_what_one_thread_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page answers several requests at a time; the files are sorted while they look for ids."""
    monkeypatch.setattr(sorted_ids, "RUN_ROWS", 1 << 11)
    names = [f"{at:032x}" for at in range(1 << 15)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with SortedIds(len(names)) as ids, ThreadPoolExecutor(8) as pool:
            ids.add(pa.array(names), range(len(names)))
            asked = range(0, len(names), 97)
            assert [one.tolist() for one in pool.map(lambda at: ids.find(pa.array([names[at]])), asked)] == [
                [at] for at in asked
            ]
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("form", ["{0:032x}", "{0:016x}" + "0" * 16, "{0:08x}" * 4, "0190a1b2c3d4{0:020x}"])
def test_ids_that_are_alike_are_in_many_files(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and times in hex digits are divided as hashes are: a run of few rows stays one, and fits into memory."""
    monkeypatch.setattr(sorted_ids, "RUN_ROWS", 128)
    with SortedIds(8192) as ids:
        ids.add(pa.array([form.format(at) for at in range(8192)]), range(8192))
        assert max(map(len, ids.runs())) < 3 * 128


def test_keys_of_a_column_do_not_depend_on_the_other_rows() -> None:
    """A hex id has the same key in a column of hex ids alone, in a mixed one, in a slice, and in several chunks."""
    names = ids_of(20, 0)
    hexes = pa.array(names[:20])
    alone, mixed = keys_of(hexes, 32), keys_of(pa.array(names), 32)
    assert (alone == mixed[:20]).all() and alone[0].tobytes().hex() == names[0]
    assert (keys_of(hexes.slice(5, 3), 32) == alone[5:8]).all()
    assert (keys_of(pa.chunked_array([hexes.slice(0, 7), hexes.slice(7)]), 32) == alone).all()
    assert len({key.tobytes() for key in mixed}) == len(set(names))
    assert (keys_of(pa.array(["A" * 32]), 32) != keys_of(pa.array(["a" * 32]), 32)).any()
    assert keys_of(pa.array([], pa.string()), 32).shape == (0, 16)


def test_membership_is_the_same_for_few_and_for_many_values() -> None:
    """Both ways of asking give what Python gives."""
    column = pa.chunked_array([["a", "b"], ["c", "a"]])
    for values in (frozenset("a"), frozenset("abxyz"), frozenset[str]()):
        assert is_one_of(column, values).tolist() == [one in values for one in "abca"]
