"""P3D beside the loops and tools that others use for the same job: clips/s, processor time, and what a kill costs.

    pip install --no-deps -r bench/peers.txt; python -m bench.peers [--full] [--only model|half|decode|kill]

Every arm runs in a process of its own on a few videos and on many; its rate is that of the difference, so that nobody's
start counts. All results are compared: an arm whose rows are not those of the plain loop ends the bench. The code of
the others is in bench/peer_loops.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from bench import corpus, weights
from bench.family import Family
from bench.rounds import REPO, Report, Rounds, Spread, Table, take_turns
from bench.rule import options_of

HALF = "P3D bf16"  # where the processor has instructions for it
ARMS = ("P3D", "plain loop", "loop of today", "DataLoader", "Ray Data", "Daft", HALF)  # those in fp32 first
NEEDS = {"Ray Data": ("ray", "pandas"), "Daft": ("daft",)}
Row = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of an arm: rows, wall seconds, processor seconds and MB."""

    rows: int
    seconds: float
    cpu_s: float
    peak_mb: float


def command(arm: str, source: Path, out: Path, weights_path: Path, clips: str) -> list[str]:
    if arm in ("P3D", HALF):
        start = "from p3d.jobs.cli import main; main()"
        precision = ("--precision", "bf16") if arm == HALF else ()
        words = (source, out, "--weights", weights_path, *options_of(clips), *precision)
        return [sys.executable, "-c", start, "launch", *map(str, words)]
    return [sys.executable, "-m", "bench.peer_loops", arm, str(source), str(out), str(weights_path), clips]


def run(words: list[str], kill_after_s: float | None = None) -> tuple[float, float, float]:
    """(seconds, processor seconds, MB) of a command, which is killed with all it started if it takes too long."""
    with tempfile.TemporaryFile("w+") as said:
        started = time.monotonic()
        env = {**os.environ, "PYTHONPATH": str(REPO)}
        process = subprocess.Popen(words, stdout=said, stderr=said, cwd=REPO, env=env)
        family = Family(process)
        try:
            process.wait(kill_after_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        seconds = time.monotonic() - started
        family.stop()
        said.seek(0)
        if process.returncode != 0 and kill_after_s is None:
            raise SystemExit(f"{words} ended with exit code {process.returncode}: {said.read()[-3000:]}")
    return seconds, family.cpu_s(), family.peak_mb


def rows_of(out: Path) -> list[tuple[Row, np.ndarray]]:
    """All rows of a dataset, ((name of the video, clip), embedding), whole files only."""
    found = []
    for path in sorted((out / "clips" if (out / "clips").is_dir() else out).glob("*.parquet")):
        try:
            table = pq.ParquetFile(path).read(columns=["path", "clip_index", "embedding"])
        except OSError:
            continue  # torn by a kill
        for name, index, row in zip(*(table[column].to_pylist() for column in table.column_names), strict=True):
            found.append(((Path(name).name, index), np.array(row, np.float32)))
    return sorted(found, key=lambda pair: pair[0])


def compare(arm: str, found: list[tuple[Row, np.ndarray]], wanted: list[tuple[Row, np.ndarray]]) -> None:
    """SystemExit unless the rows are those of the plain loop, to a relative 1e-4, in bf16 by a cosine of 0.999."""
    if [key for key, _ in found] != [key for key, _ in wanted]:
        raise SystemExit(f"{arm} has {len(found)} rows, the plain loop {len(wanted)}, or they are of other clips")
    for (key, mine), (_, its) in zip(found, wanted, strict=True):
        if arm == HALF:
            same = mine @ its > 0.999 * np.linalg.norm(mine) * np.linalg.norm(its)
        else:
            same = np.allclose(mine, its, rtol=1e-4, atol=1e-4 * float(np.abs(its).max()))
        if not same:
            raise SystemExit(f"{arm}: the row of {key} differs by {np.abs(mine - its).max()}")


def measure(
    report: Report, heading: str, arms: list[str], few: Path, many: Path, given: list[Path | str], rounds: int
) -> None:
    """All arms in turn over both folders, then clips/s and processor seconds of the difference."""
    kept: dict[str, list[tuple[Ran, Ran]]] = {arm: [] for arm in arms}
    wanted: dict[Path, list[tuple[Row, np.ndarray]]] = {}

    def once(arm: str, source: Path) -> Ran:
        with tempfile.TemporaryDirectory(prefix="p3d-peers-") as folder:
            out = Path(folder) / "out"
            took = run(command(arm, source, out, *given))  # type: ignore[arg-type] # weights and clips
            found = rows_of(out)
            compare(arm, found, wanted.setdefault(source, found))
            return Ran(len(found), *took)

    def arm_of(arm: str) -> Callable[[], float]:
        def work() -> float:
            a, b = once(arm, few), once(arm, many)
            kept[arm].append((a, b))
            return (b.rows - a.rows) / (b.seconds - a.seconds)

        return work

    found = take_turns({arm: arm_of(arm) for arm in arms}, rounds, "clips/s", warm=False)
    report.add(found.table(f"{heading}: clips/s, without the start", "P3D"))
    cpu_s = {arm: [(b.cpu_s - a.cpu_s) / (b.rows - a.rows) for a, b in pairs] for arm, pairs in kept.items()}
    report.add(Rounds("CPU s a clip", cpu_s).table(f"{heading}: processor seconds a clip", "P3D"))
    rows = tuple(
        (arm, str(Spread.of(b.seconds for _, b in pairs)), str(Spread.of(b.peak_mb for _, b in pairs)))
        for arm, pairs in kept.items()
    )
    report.add(Table(f"{heading}: the larger run whole", ("arm", "seconds", "peak MB"), rows))


def kills(report: Report, arms: list[str], source: Path, given: list[Path | str]) -> None:
    """`kill -9` half way, then the same command again: what it cost, and what is in the output."""
    rows = []
    for arm in arms:
        with tempfile.TemporaryDirectory(prefix="p3d-peers-") as folder:
            whole, out = Path(folder) / "whole", Path(folder) / "out"
            undisturbed, _, _ = run(command(arm, source, whole, *given))  # type: ignore[arg-type]
            run(command(arm, source, out, *given), kill_after_s=undisturbed / 2)  # type: ignore[arg-type]
            kept = len(rows_of(out)) if out.exists() else 0
            again, _, _ = run(command(arm, source, out, *given))  # type: ignore[arg-type]
            wanted, found = [key for key, _ in rows_of(whole)], [key for key, _ in rows_of(out)]
            lost, twice = len(set(wanted) - set(found)), len(found) - len(set(found))
            lost_s = undisturbed / 2 + again - undisturbed
            cells = (
                f"{undisturbed:.1f}",
                str(kept),
                f"{lost_s:.1f}",
                f"{lost_s / undisturbed:.0%}",
                str(lost),
                str(twice),
            )
            rows.append((arm, *cells))
            shutil.rmtree(out)
    columns = ("arm", "undisturbed, s", "rows kept", "time lost, s", "of the run", "clips lost", "clips twice")
    report.add(Table("kill -9 half way, then the same command", columns, tuple(rows)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", choices=("model", "half", "decode", "kill"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, default=REPO / "bench" / "out")
    given = parser.parse_args()
    missing = set() if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {HALF}
    missing |= {arm for arm in given.arms if any(importlib.util.find_spec(one) is None for one in NEEDS.get(arm, ()))}
    if missing:
        needs = "pip install --no-deps -r bench/peers.txt, and for bf16 a processor with instructions for it"
        print(f"left out: {', '.join(sorted(missing))}; {needs}", file=sys.stderr)
    arms = [arm for arm in ARMS if arm in given.arms and arm not in missing]
    rounds, size = given.rounds or (5 if given.full else 2), 4 if given.full else 1
    report = Report("peers", "Peers")
    with tempfile.TemporaryDirectory(prefix="p3d-bench-") as name:
        folder = Path(name)
        small = weights.make(folder, "p3d63", 64)
        if given.only in (None, "model"):
            few, many = _two(folder / "model", 8, 32 * size, (240, 320), 80, 12)
            own = weights.make(folder, "p3d63")
            measure(report, "Model-bound: P3D-63, 320x240", arms, few, many, [own, "every:16"], rounds)
        if given.only in (None, "half"):
            few, many = _two(folder / "half", 8, 96 * size, (720, 1280), 96, 250)
            measure(report, "Half decode: 64x64, 1280x720, every frame", arms, few, many, [small, "every:16"], rounds)
        if given.only in (None, "decode"):
            few, many = _two(folder / "decode", 8, 96 * size, (1080, 1920), 250, 250)
            heading = "Decode-bound: 64x64, 1920x1080, every third frame"
            measure(report, heading, arms, few, many, [small, "every:48/3"], rounds)
        if given.only in (None, "kill"):
            source = corpus.make(folder / "kill", 600 * size, (240, 320), 80, 12)
            kills(report, [arm for arm in arms if arm not in ("loop of today", HALF)], source, [small, "every:16"])
    print(report.write(given.out))
    return 0


def _two(folder: Path, few: int, many: int, hw: tuple[int, int], n_frames: int, gop: int) -> tuple[Path, Path]:
    return (corpus.make(folder / "few", few, hw, n_frames, gop), corpus.make(folder / "many", many, hw, n_frames, gop))


if __name__ == "__main__":
    sys.exit(main())
