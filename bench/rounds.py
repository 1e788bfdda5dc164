"""How every bench measures: its arms take turns in every round, and results are ratios within a round.

    {arm: work} --take_turns--> Rounds --table--> Table --Report.write--> NAME.json, NAME.md

A machine that slows down, or is shared, slows all arms of a round alike. Each round begins with another arm, so that no
arm always follows the same one. Figures are medians with the lowest and the highest value. A ratio is taken in each
round and then its median, never between two medians. Run benches as modules (`python -m bench.NAME`).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
VERSIONS = ("torch", "ray", "decord", "av", "numpy", "pyarrow")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, lowest and highest of some values."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ValueError where there are no values."""
        values = list(values)
        if not values:
            raise ValueError("there is no median of nothing")
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.lowest)} to {_short(self.highest)})"


@dataclass(frozen=True, slots=True)
class Rounds:
    """What each arm gave in each round, in `unit`; every arm has one value per round, otherwise ValueError."""

    unit: str
    of: Mapping[str, Sequence[float]]

    def __post_init__(self) -> None:
        if len({len(values) for values in self.of.values()}) > 1:
            raise ValueError(f"every arm has one value per round, not { ({k: len(v) for k, v in self.of.items()}) }")

    def spread(self, arm: str) -> Spread:
        return Spread.of(self.of[arm])

    def ratio(self, arm: str, base: str) -> Spread:
        """`arm` over `base`, per round."""
        return Spread.of(mine / its for mine, its in zip(self.of[arm], self.of[base], strict=True))

    def table(self, heading: str, base: str) -> Table:
        """A row per arm: its figure, and its ratio to that of `base`. For a unit of time, less is better."""
        rows = tuple((arm, str(self.spread(arm)), str(self.ratio(arm, base))) for arm in self.of)
        return Table(heading, ("arm", self.unit, f"over {base}"), rows, self)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a report as printed, and the rounds behind them, if any."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    rounds: Rounds | None = None

    def __str__(self) -> str:
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        return f"### {self.heading}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a report was made: `cores` are those of this process, `load` is the average of the minute before."""

    cpu: str
    cores: int
    memory_gb: float
    load: float
    python: str
    versions: Mapping[str, str]
    commit: str

    @classmethod
    def here(cls) -> Machine:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        versions = {name: version for name in VERSIONS if (version := _version(name))}
        python = platform.python_version()
        return cls(_cpu(), cores, round(memory, 1), round(os.getloadavg()[0], 2), python, versions, _commit())

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.cores} cores of {self.cpu}, {self.memory_gb:.0f} GB, load {self.load} before; "
            f"Python {self.python}, {versions}; commit {self.commit}"
        )


@dataclass(slots=True)
class Report:
    """The tables of one run. `write` saves them as NAME.json, with every round, and NAME.md."""

    name: str
    title: str
    machine: Machine = field(default_factory=Machine.here)
    command: str = field(default_factory=lambda: _command())
    tables: list[Table] = field(default_factory=list)

    def add(self, table: Table) -> None:
        """Add a table, and print it at once."""
        self.tables.append(table)
        print(f"\n{table}", flush=True)

    def __str__(self) -> str:
        return "\n".join([f"## {self.title}\n", f"`{self.command}`\n", f"{self.machine}\n", *map(str, self.tables)])

    def write(self, folder: Path) -> Path:
        """Write both files, and return the path of the Markdown file."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        path = folder / f"{self.name}.md"
        path.write_text(f"{self}\n")
        return path


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A command line that shows the docstring of a bench, with the option `--out`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = REPO / "bench" / "out"
    parser.add_argument("--out", type=Path, default=out, help="write the report into this folder (default: bench/out)")
    return parser


def take_turns(
    arms: Mapping[str, Callable[[], float]],
    rounds: int,
    unit: str,
    *,
    warm: bool = True,
    tell: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Rounds:
    """Let each arm work once per round and return its figure; each round begins one arm later than the one before.

    `warm` gives every arm one turn that is not counted. See `seconds` for work that returns no figure.
    """
    if rounds < 1 or not arms:
        raise ValueError(f"there is nothing to measure: {rounds = }, {len(arms) = }")
    names = list(arms)
    for name in names if warm else ():
        arms[name]()
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(arms[name]())
        tell(f"round {number + 1} of {rounds}: " + ", ".join(f"{name} {_short(found[name][-1])}" for name in names))
    return Rounds(unit, {name: tuple(values) for name, values in found.items()})


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """An arm whose figure is the time that `work` takes, in seconds.

    `time.process_time` as the clock excludes the time of other processes, and waiting.
    """

    def arm() -> float:
        started = clock()
        work()
        return clock() - started

    return arm


def per_second(
    work: Callable[[], object], amount: float, clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """An arm whose figure is `amount`, which one call of `work` does, per second."""
    timed = seconds(work, clock)
    return lambda: amount / timed()


def _short(value: float) -> str:
    """Three significant digits, and no exponent for usual sizes: 0.0123, 1.23, 123, 12345."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    """The CPU model as the kernel names it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit that was measured, "-dirty" where files differ from it."""
    words = ["git", "-C", str(REPO), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _command() -> str:
    """The command that started this process, as typed in a shell."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["-m", module.name] if module else sys.argv[:1]
    return shlex.join(["python", *start, *sys.argv[1:]])
