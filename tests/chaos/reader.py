"""An independent reader: globs the dataset in a loop while the job is being killed, and records what it saw.

    python -m tests.chaos.reader OUT REPORT      until its stdin is closed; REPORT is one JSON object

It checks that a file is complete as soon as it is visible, and that no visible file ever changes or disappears.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FOLDERS = ("clips", "videos", "failures")
WHOLE_PASS_S = 2.0  # time between two passes that read every row again; new files are read at once


@dataclass(slots=True)
class Seen:
    """What the reader did, and all errors that it found."""

    globs: int = 0
    passes: int = 0
    reads: int = 0
    rows: int = 0
    files: int = 0
    errors: list[str] = field(default_factory=list)


def read(path: Path) -> tuple[str, int]:
    """Read every row of a file with page checksums -> (sha256 of its bytes, number of rows)."""
    content = path.read_bytes()
    with pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True, pre_buffer=False) as file:
        table = file.read(use_threads=False)
        outcomes = json.loads((file.metadata.metadata or {}).get(b"p3d.outcomes", b"null"))
    stated = sum(outcome.get("n_clips") or 0 for outcome in outcomes) if isinstance(outcomes, list) else table.num_rows
    if stated != table.num_rows:
        raise ValueError(f"{table.num_rows} rows, but its footer says {stated}")
    return hashlib.sha256(content).hexdigest(), table.num_rows


def watch(out: Path, ended: threading.Event, began: Path) -> Seen:
    """Glob and read until told to stop, then make one complete pass. `began` is created after the first glob."""
    seen, known = Seen(), dict[Path, tuple[str, int]]()
    whole_at = time.monotonic() + WHOLE_PASS_S
    while True:
        last = ended.is_set()
        found = {path for folder in FOLDERS for path in (out / folder).glob("*.parquet")}
        seen.globs += 1
        seen.errors += [f"{path} was withdrawn" for path in known.keys() - found]
        whole = last or time.monotonic() >= whole_at
        for path in sorted(found if whole else found - known.keys()):
            try:
                now = read(path)
            except (OSError, ValueError, KeyError, pa.ArrowException) as error:
                seen.errors.append(f"{path}: {type(error).__name__}: {error}")
                continue
            seen.reads += 1
            if known.setdefault(path, now) != now:
                seen.errors.append(f"{path} changed: {known[path]} -> {now}")
        if whole:
            seen.passes += 1
            whole_at = time.monotonic() + WHOLE_PASS_S
        if last:
            seen.files, seen.rows = len(known), sum(rows for _, rows in known.values())
            return seen
        began.touch()
        ended.wait(0.01)


def main() -> None:
    out, report = map(Path, sys.argv[1:])
    ended = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    report.write_text(json.dumps(asdict(watch(out, ended, report.with_suffix(".began")))))


@contextlib.contextmanager
def reading(out: Path, report: Path) -> Iterator[Seen]:
    """Run a reader in its own process within this context; the record is filled at the end."""
    seen = Seen()
    report.with_suffix(".began").unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.chaos.reader", str(out), str(report)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        try:
            yield seen
        finally:
            assert process.stdin is not None
            process.stdin.close()
            code = process.wait(120)
    assert code == 0, "the reader itself died"
    for name, value in json.loads(report.read_text()).items():
        setattr(seen, name, value)


if __name__ == "__main__":
    main()
