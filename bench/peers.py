"""P3D compared with loops and tools that others use for the same job: clips/s, CPU time, and the cost of a kill.

    pip install --no-deps -r bench/peers.txt; python -m bench.peers [--full] [--only model|half|decode|kill]

Every arm runs in its own process on a few videos and on many. Its rate is that of the difference, so the start of a
process does not count. All results are compared: an arm whose rows differ from those of the first arm ends the bench.
The code of the other tools is in bench/peer_loops.py.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from bench.inputs import make_weights, options_of
from bench.processes import P3D, run
from bench.rounds import Report, Rounds, Spread, Table, parser_of, take_turns
from tests.zoo import corpus

HALF = "P3D bf16"  # where the CPU has instructions for it
ARMS = ("P3D", "plain loop", "loop of today", "DataLoader", "Ray Data", "Daft", HALF)  # fp32 first
NEEDS = {"Ray Data": ("ray", "pandas"), "Daft": ("daft",)}
Row = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of an arm: rows, elapsed seconds, CPU seconds and peak MB."""

    rows: int
    seconds: float
    cpu_s: float
    peak_mb: float


def command(arm: str, source: Path, out: Path, weights_path: Path, clips: str) -> list[str]:
    if arm in ("P3D", HALF):
        precision = ("--precision", "bf16") if arm == HALF else ()
        words = (source, out, "--weights", weights_path, *options_of(clips), *precision)
        return [*P3D, "launch", *map(str, words)]
    return [sys.executable, "-m", "bench.peer_loops", arm, str(source), str(out), str(weights_path), clips]


def rows_of(out: Path) -> list[tuple[Row, np.ndarray]]:
    """All rows of a dataset, ((name of the video, clip), embedding), of complete files only."""
    found = []
    for path in sorted((out / "clips" if (out / "clips").is_dir() else out).glob("*.parquet")):
        try:
            table = pq.ParquetFile(path).read(columns=["path", "clip_index", "embedding"])
        except OSError:
            continue  # cut short by a kill
        for name, index, row in zip(*(table[column].to_pylist() for column in table.column_names), strict=True):
            found.append(((Path(name).name, index), np.array(row, np.float32)))
    return sorted(found, key=lambda pair: pair[0])


def compare(arm: str, found: list[tuple[Row, np.ndarray]], wanted: list[tuple[Row, np.ndarray]]) -> None:
    """SystemExit unless rows agree: to a relative 1e-4, in bf16 by a cosine of 0.999."""
    if [key for key, _ in found] != [key for key, _ in wanted]:
        raise SystemExit(f"{arm} has {len(found)} rows, the first arm {len(wanted)}, or they are of other clips")
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
    """Run all arms in turn over both folders; report clips/s and CPU seconds of the difference."""
    kept: dict[str, list[tuple[Ran, Ran]]] = {arm: [] for arm in arms}
    wanted: dict[Path, list[tuple[Row, np.ndarray]]] = {}

    def once(arm: str, source: Path) -> Ran:
        with tempfile.TemporaryDirectory(prefix="p3d-peers-") as folder:
            out = Path(folder) / "out"
            ended = run(command(arm, source, out, *given))  # type: ignore[arg-type] # weights and clips
            found = rows_of(out)
            compare(arm, found, wanted.setdefault(source, found))
            return Ran(len(found), ended.seconds, ended.tree.cpu_s(), ended.tree.peak_mb)

    def arm_of(arm: str) -> Callable[[], float]:
        def work() -> float:
            a, b = once(arm, few), once(arm, many)
            kept[arm].append((a, b))
            return (b.rows - a.rows) / (b.seconds - a.seconds)

        return work

    found = take_turns({arm: arm_of(arm) for arm in arms}, rounds, "clips/s", warm=False)
    report.add(found.table(f"{heading}: clips/s, without the start", "P3D"))
    cpu_s = {arm: [(b.cpu_s - a.cpu_s) / (b.rows - a.rows) for a, b in pairs] for arm, pairs in kept.items()}
    report.add(Rounds("CPU s per clip", cpu_s).table(f"{heading}: CPU seconds per clip", "P3D"))
    rows = tuple(
        (arm, str(Spread.of(b.seconds for _, b in pairs)), str(Spread.of(b.peak_mb for _, b in pairs)))
        for arm, pairs in kept.items()
    )
    report.add(Table(f"{heading}: the larger run, complete", ("arm", "seconds", "peak MB"), rows))


def kills(report: Report, arms: list[str], source: Path, given: list[Path | str]) -> None:
    """SIGKILL halfway, then the same command again: what it cost, and what is in the output."""
    rows = []
    for arm in arms:
        with tempfile.TemporaryDirectory(prefix="p3d-peers-") as folder:
            whole, out = Path(folder) / "whole", Path(folder) / "out"
            undisturbed = run(command(arm, source, whole, *given)).seconds  # type: ignore[arg-type]
            run(command(arm, source, out, *given), kill_after_s=undisturbed / 2)  # type: ignore[arg-type]
            kept = len(rows_of(out)) if out.exists() else 0
            again = run(command(arm, source, out, *given)).seconds  # type: ignore[arg-type]
            wanted, found = [key for key, _ in rows_of(whole)], [key for key, _ in rows_of(out)]
            lost, twice = len(set(wanted) - set(found)), len(found) - len(set(found))
            lost_s = undisturbed / 2 + again - undisturbed
            cells = (f"{undisturbed:.1f}", str(kept), f"{lost_s:.1f}", f"{lost_s / undisturbed:.0%}")
            rows.append((arm, *cells, str(lost), str(twice)))
            shutil.rmtree(out)
    columns = ("arm", "undisturbed, s", "rows kept", "time lost, s", "of the run", "clips lost", "clips twice")
    report.add(Table("kill -9 halfway, then the same command", columns, tuple(rows)))


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", choices=("model", "half", "decode", "kill"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int)
    given = parser.parse_args()
    missing = set() if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {HALF}
    missing |= {arm for arm in given.arms if any(importlib.util.find_spec(one) is None for one in NEEDS.get(arm, ()))}
    if missing:
        needs = "pip install --no-deps -r bench/peers.txt, and for bf16 a CPU with instructions for it"
        print(f"left out: {', '.join(sorted(missing))}; {needs}", file=sys.stderr)
    arms = [arm for arm in ARMS if arm in given.arms and arm not in missing]
    rounds, size = given.rounds or (5 if given.full else 2), 4 if given.full else 1
    report = Report("peers", "Peers")
    with tempfile.TemporaryDirectory(prefix="p3d-bench-") as name:
        folder = Path(name)
        small = make_weights(folder, "p3d63", 64)
        if given.only in (None, "model"):
            few, many = _two(folder / "model", 8, 32 * size, (240, 320), 80, 12)
            own = make_weights(folder, "p3d63")
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
