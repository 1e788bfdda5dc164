"""The memory limit of one decode: a thread of its process watches it, and ends the process with a note."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

CHILD = """
import os, resource, sys, time
from p3d.jobs.worker.memory import memory_limit
note = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
before, taken = resource.getrlimit(resource.RLIMIT_AS), []
with memory_limit(100 << 20, note):
    exec(sys.argv[2])
assert resource.getrlimit(resource.RLIMIT_AS) == before
taken = [b"x" * (200 << 20)]  # no longer limited
print("whole")
"""


def child(tmp_path: Path, code: str) -> tuple[int, str, str]:
    """(exit code, stdout, note) of a process that runs `code` under a limit of 100 MiB."""
    note = tmp_path / "note"
    words = [sys.executable, "-c", CHILD, str(note), code]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.strip() or done.stderr, note.read_text()


@pytest.mark.fault(12)
def test_a_process_that_takes_too_much_ends_with_a_note(tmp_path: Path) -> None:
    """Small allocations that exceed the limit: the process ends, and its note says how much memory it used."""
    code, out, note = child(tmp_path, "while True: taken.append(b'x' * (8 << 20)); time.sleep(0.005)")
    assert (code, out) == (1, "")
    said = re.fullmatch(r"memory: (\d+) MiB, the limit is 100\n", note)
    assert said is not None and 100 < int(said[1]) < 1000


@pytest.mark.fault(12)
def test_one_huge_allocation_fails_at_once(tmp_path: Path) -> None:
    """An allocation too fast for the watch is refused by the system: a MemoryError, and the process continues."""
    code = "try: taken.append(bytearray(6 << 30)); print('granted')\nexcept MemoryError: pass"
    assert child(tmp_path, code) == (0, "whole", "")


def test_what_was_there_before_does_not_count(tmp_path: Path) -> None:
    """Only additional memory counts, and memory that is mapped but not used does not."""
    code = "import mmap; taken += [b'x' * (60 << 20), mmap.mmap(-1, 2 << 30)]; time.sleep(0.3)"
    assert child(tmp_path, code) == (0, "whole", "")
