"""Summary of the rows of some outputs: counts, histograms, failures with examples, and a random sample of videos.

One pass over videos/ and failures/; memory holds the rows of one shard, the sums and the samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import escape
from p3d.pipeline.results.sample import Reservoir

Rows = NewestRows | SnapshotRows
DURATIONS_S = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
SHORT_SIDES = (144, 240, 360, 480, 720, 1080, 1440, 2160)
EXAMPLES = 3  # of each reason
CODECS = 8  # the most frequent ones
SAMPLE_COLUMNS = "video_id path uri version duration_s width height codec n_clips".split()


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a chart: its label, its value, and the text shown for the value."""

    label: str
    value: float
    shown: str


@dataclass(frozen=True, slots=True)
class Example:
    """A failed video: its path, the detail of its failure, and the number of attempts."""

    path: str
    detail: str
    attempts: int


@dataclass(frozen=True, slots=True)
class FailedBy:
    """How many videos failed for a reason, and the first few of them."""

    reason: str
    count: int
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A video as in its row; `width` and `height` are those of the displayed picture (after rotation).

    Ids are unique in one output only: `key` is unique in all outputs of a report.
    """

    video_id: str
    path: str
    uri: str
    version: str
    duration_s: float
    width: int
    height: int
    codec: str
    n_clips: int
    out: str

    @property
    def key(self) -> tuple[str, str]:
        return self.out, self.video_id


@dataclass(frozen=True, slots=True)
class OutputFacts:
    """The part of the sums that is of one output."""

    out: str
    n_videos: int
    n_failed: int
    n_pending: int
    n_clips: int
    hours: float


@dataclass(frozen=True, slots=True)
class Facts:
    """Sums over all current rows. `hours` and `n_frames` are of the videos that have rows."""

    n_videos: int
    n_failed: int
    n_pending: int
    n_clips: int
    n_frames: int
    n_truncated: int
    hours: float
    durations: tuple[Bar, ...]
    short_sides: tuple[Bar, ...]
    codecs: tuple[Bar, ...]
    failures: tuple[FailedBy, ...]
    sample: tuple[Sampled, ...]
    outputs: tuple[OutputFacts, ...]


def in_turn(
    sources: Sequence[Rows], on_step: Callable[[int, int], None] | None
) -> Iterator[tuple[Rows, Callable[[int, int], None] | None]]:
    """Each output, with what its reading calls for progress: `on_step` counts outputs if there are several."""
    if len(sources) == 1:
        yield sources[0], on_step
        return
    for done, source in enumerate(sources):
        yield source, None
        if on_step is not None:
            on_step(done + 1, len(sources))


def name_of(source: Rows) -> str:
    """The url of an output as text: a folder's name may not be UTF-8."""
    return escape(source.store.url)


def with_out(table: pa.Table, source: Rows) -> pa.Table:
    """The table with the name of its output as its last column, `out`."""
    return table.append_column("out", pa.array([name_of(source)] * table.num_rows, pa.string()))


def gather(
    sources: Sequence[Rows],
    *,
    sample: int,
    rng: np.random.Generator,
    on_step: Callable[[int, int], None] | None = None,
) -> Facts:
    """Read every row of videos/ and failures/ once. DamagedJob if a row is damaged."""
    sums, drawn, outputs = _Sums(), Reservoir(rng, sample, 0), list[OutputFacts]()
    for source, told in in_turn(sources, on_step):
        n_videos, n_failed, n_clips, seconds = sums.n_videos, sums.n_failed, sums.n_clips, sums.seconds
        for folder, table in source.rows(clips=False, on_step=told):
            if folder == "videos" and table.num_rows:
                sums.add_videos(table)
                drawn.add(np.empty((table.num_rows, 0), np.float32), with_out(table.select(SAMPLE_COLUMNS), source))
            elif folder == "failures":
                sums.add_failures(table)
        outputs.append(
            OutputFacts(
                name_of(source),
                n_videos=sums.n_videos - n_videos,
                n_failed=sums.n_failed - n_failed,
                n_pending=source.pending,
                n_clips=sums.n_clips - n_clips,
                hours=(sums.seconds - seconds) / 3600,
            )
        )
    return Facts(
        n_videos=sums.n_videos,
        n_failed=sums.n_failed,
        n_pending=sum(source.pending for source in sources),
        n_clips=sums.n_clips,
        n_frames=sums.n_frames,
        n_truncated=sums.n_truncated,
        hours=sums.seconds / 3600,
        durations=_histogram(sums.durations, DURATIONS_S, _time),
        short_sides=_histogram(sums.short_sides, SHORT_SIDES, lambda side: f"{side:g} px"),
        codecs=_most(sums.codecs, CODECS),
        failures=tuple(
            FailedBy(reason, count, tuple(sums.examples[reason])) for reason, count in sums.reasons.most_common()
        ),
        sample=tuple(Sampled(*drawn.keys[at]) for at in rng.permutation(drawn.n).tolist()),
        outputs=tuple(outputs),
    )


@dataclass(slots=True)
class _Sums:
    n_videos: int = 0
    n_clips: int = 0
    n_frames: int = 0
    n_truncated: int = 0
    seconds: float = 0.0
    durations: Counter[int] = field(default_factory=Counter)  # bin of DURATIONS_S -> number of videos
    short_sides: Counter[int] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)

    @property
    def n_failed(self) -> int:
        return sum(self.reasons.values())

    def add_videos(self, table: pa.Table) -> None:
        columns = {name: table[name].to_numpy() for name in ("n_clips", "n_frames", "truncated", "duration_s")}
        self.n_videos += table.num_rows
        self.n_clips += int(columns["n_clips"].sum())
        self.n_frames += int(columns["n_frames"].sum())
        self.n_truncated += int(columns["truncated"].sum())
        self.seconds += float(columns["duration_s"].sum())
        short_N = np.minimum(table["width"].to_numpy(), table["height"].to_numpy())
        self.durations.update(np.searchsorted(DURATIONS_S, columns["duration_s"], side="right").tolist())
        self.short_sides.update(np.searchsorted(SHORT_SIDES, short_N, side="right").tolist())
        self.codecs.update(table["codec"].to_pylist())

    def add_failures(self, table: pa.Table) -> None:
        for row in table.select(["path", "reason", "detail", "attempts"]).to_pylist():
            self.reasons[row["reason"]] += 1
            examples = self.examples.setdefault(row["reason"], [])
            if len(examples) < EXAMPLES:
                examples.append(Example(row["path"], row["detail"], row["attempts"]))


def _histogram(counts: Counter[int], edges: Sequence[float], shown: Callable[[float], str]) -> tuple[Bar, ...]:
    """One bar per bin, from the first to the last bin that is not empty. Bin i is [edges[i - 1], edges[i])."""
    if not counts:
        return ()

    def label(at: int) -> str:
        if at == 0:
            return f"below {shown(edges[0])}"
        if at == len(edges):
            return f"{shown(edges[-1])} and more"
        start, end = shown(edges[at - 1]), shown(edges[at])
        return f"{start.removesuffix(end[end.index(' ') :])} to {end}"  # "2 to 5 s", "30 s to 1 min"

    return tuple(Bar(label(at), counts[at], f"{counts[at]:,}") for at in range(min(counts), max(counts) + 1))


def _most(counts: Counter[str], size: int) -> tuple[Bar, ...]:
    most = counts.most_common(size)
    rest = sum(counts.values()) - sum(count for _, count in most)
    every = [*most, ("others", rest)] if rest else most
    return tuple(Bar(name, count, f"{count:,}") for name, count in every)


def _time(seconds: float) -> str:
    units = ((1, "s"), (60, "min"), (3600, "h"))
    size, unit = units[bisect_right([size for size, _ in units], seconds) - 1]
    return f"{seconds / size:g} {unit}"


def largest(bars: Iterable[Bar]) -> float:
    """The greatest value; 1 if there are no bars or all are 0, because widths are divided by it."""
    return max((bar.value for bar in bars), default=0) or 1
