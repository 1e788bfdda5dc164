"""The progress of a job, read only from its store: no cluster, no scheduler, no database.

A listing of clips/ shows which shards are committed; the newest heartbeat has the live numbers. Deleting `_job/` loses
no data: without a heartbeat, the totals are read from the footers of the committed shards.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from p3d.jobs.job import manifests, survey
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler.run_snapshot import RunSnapshot, WorkerSnapshot
from p3d.pipeline.dataset.plans import load_plans
from p3d.pipeline.dataset.stored_files import StoredFiles
from p3d.pipeline.dataset.totals import Totals
from p3d.pipeline.errors import counted
from p3d.pipeline.recipe import JobRecord, with_short_digests
from p3d.pipeline.storage.store import Store

SUBMITTED = "submitted"
DAMAGED = 7  # exit code of a run that found damage: it has not finished, whatever is listed
TIE = "\u00a0"  # a blank at which `textwrap` breaks no line
UNDER_WAY = (SUBMITTED, control.RUNNING)
NOT_STARTED = RunSnapshot(counter=0, state="not started")


@dataclass(frozen=True, slots=True, repr=False)
class Status:
    """The status of a job. `state` is submitted (to a cluster, where the driver has not begun), running, finished,
    stopped, dead (its process no longer exists) or not started.

    `exit_code` is that of the last run, or None while a run is submitted or running. `limit` is the resource that
    limits most of its workers. `videos_superseded` counts rows of older plans for videos that a newer plan names.
    """

    out: str
    state: str
    model: str
    weights: str
    clips: str
    plans: int
    shards_all: int
    shards_done: int
    videos_all: int
    videos_done: int
    videos_failed: int
    videos_superseded: int
    clips_done: int
    failures: dict[str, int] = field(default_factory=dict)
    exit_code: int | None = None
    sentence: str = ""
    clips_per_s: float = 0.0
    eta_s: float | None = None
    elapsed_s: float | None = None
    host: str = ""
    workers: tuple[WorkerSnapshot, ...] = ()
    limit: str | None = None
    outage: str = ""
    stopping: str = ""

    def __repr__(self) -> str:
        failed = f", {self.videos_failed} failed" if self.videos_failed else ""
        counts = f"{self.videos_done} of {self.videos_all} videos{failed}, {self.clips_done} clips"
        return f"Status({self.out!r}: {self.state}, {counts})"


def read_status(store: Store, job: JobRecord, *, over: bool = False) -> Status:
    """Read the status once. A run passes `over` when it has ended, as a full disk may have lost its last heartbeat.

    A run whose heartbeat says running may be dead. On this machine its process is checked. From another machine only a
    heartbeat that changes between two reads can tell (`status --watch` says when it stopped changing).
    """
    plans = load_plans(store)
    found = StoredFiles(store, plans)
    n_all = sum(plan.n_shards for plan in plans)
    n_done, n_whole = (sum(int(shards(plan).sum()) for plan in plans) for shards in (found.committed, found.whole))
    epoch = control.newest_epoch(store)
    beat = (control.heartbeat(store, epoch.number) if epoch else None) or NOT_STARTED
    state = beat.state
    if state == control.RUNNING and epoch is not None and (over or epoch.died_here()):
        state = "dead"
    if state == "finished" and n_whole < n_all:
        missing = f"files of {counted(n_all - n_whole, 'shard')} are missing; `p3d resume` makes them again"
        state, beat = "stopped", replace(beat, exit_code=6, sentence=missing)
    if plans and n_whole == n_all and state != control.RUNNING and beat.exit_code != DAMAGED:
        state = "finished"
    waiting = "" if state == control.RUNNING else control.not_begun(store, epoch.number if epoch else 0)
    if waiting and state != "finished":
        state = SUBMITTED
    if beat.videos.all and (state == control.RUNNING or (beat.counted and beat.shards.done == n_done)):
        n_videos, n_failed = beat.videos.all, beat.videos.failed
        done = Totals(beat.videos.done, beat.clips, Counter(beat.failures))
    else:
        work = survey(store, manifests(store, job))
        n_videos, done, n_failed = work.n_videos, work.done, work.done.failed
    running = state == control.RUNNING
    code, sentence = (None, waiting) if state in UNDER_WAY else _outcome(state, beat, done.failures)
    return Status(
        out=store.url,
        state=state,
        model=job.recipe.model,
        weights=job.weights_origin,
        clips=job.recipe.clips,
        plans=len(plans),
        shards_all=n_all,
        shards_done=n_done,
        videos_all=n_videos,
        videos_done=done.videos,
        videos_failed=n_failed,
        videos_superseded=max(0, sum(plan.n_videos for plan in plans) - n_videos),
        clips_done=done.clips,
        failures=dict(done.failures),
        exit_code=code,
        sentence=sentence,
        clips_per_s=beat.clips_per_s,
        eta_s=beat.eta_s if running else None,
        elapsed_s=beat.elapsed_s,
        host=epoch.host if epoch else "",
        workers=beat.workers if running else (),
        limit=limit_of(beat.workers) if running else None,
        outage=beat.outage if running else "",
        stopping=_stopping(store, epoch, beat) if running else "",
    )


def _stopping(store: Store, epoch: control.Epoch | None, beat: RunSnapshot) -> str:
    """What a run that was asked to stop does, or that it has not yet seen the request; empty without one."""
    if beat.stopping or epoch is None or control.cancel_asked(store, epoch.number) is None:
        return beat.stopping
    return f"cancelled: the run looks for requests every {control.HEARTBEAT_S:.0f} s"


def _outcome(state: str, beat: RunSnapshot, failures: Counter[str]) -> tuple[int, str]:
    sentence = beat.sentence
    if state == "finished":
        code = 1 if failures.get("internal") else 3 if failures else 0
        return code, "finished" if sentence is None else sentence
    if state == "dead":
        return 6, "the process that ran it no longer exists; `p3d resume` continues"
    code = 6 if beat.exit_code is None else beat.exit_code
    return code, "not started; `p3d resume` starts it" if sentence is None else sentence


def render(status: Status, *, width: int, escape: Callable[[Status], Status]) -> RenderableType:
    """The status of a job for a terminal of `width` columns. `escape` makes its texts harmless: they are from OUT.

    A `str` in a table is markup for Rich, so each cell is a `Text`.
    """
    status = escape(status)
    weights = with_short_digests(status.weights)
    head = Text.assemble((status.out, "bold"), f"  {status.model}  {weights}  {status.clips}")
    colour = {"running": "green", "finished": "cyan", SUBMITTED: "yellow"}.get(status.state, "red")
    share = status.videos_done / status.videos_all if status.videos_all else 0.0
    line = Text.assemble((status.state, colour))
    parts: list[RenderableType] = [head, line]
    if status.plans:
        line.append(f"  {status.videos_done}/{status.videos_all} videos ({share:.0%})  {status.clips_done} clips")
        line.append(f"  {status.videos_failed} failed", "red" if status.videos_failed else "default")
        if status.videos_superseded:
            line.append(f"  {status.videos_superseded} superseded")
    if status.state == control.RUNNING:
        eta = "-" if status.eta_s is None else clock(status.eta_s)
        rate = f"{status.clips_per_s:.2f}" if status.clips_per_s else "-"
        line.append(f"  {rate} clips/s  ETA {eta}")
        bar = Table.grid()  # a bar alone does not end with a newline
        bar.add_row(ProgressBar(max(status.videos_all, 1), status.videos_done, width=min(width, 78)))
        parts.insert(1, bar)
    if status.plans:
        parts.append(_shards(status))
    if status.workers:
        parts.append(_workers(status.workers))
        if sentence := _limit(status.workers):
            parts.append(Text(sentence))
    if status.failures:
        parts += [Text(line, "red") for line in _failures(status.failures, width)]
    if status.outage:
        parts.append(Text(f"paused: {status.outage}", "yellow"))
    if status.stopping:
        parts.append(Text(f"stopping: {status.stopping}", "yellow"))
    if status.sentence:
        parts.append(Text(status.sentence))
    return Group(*parts)


def _failures(failures: dict[str, int], width: int) -> list[str]:
    """The counts by reason, the most frequent first, in lines that break only between two reasons."""
    reasons = sorted(failures.items(), key=lambda one: -one[1])
    items = ", ".join(f"{count}{TIE}{reason}" for reason, count in reasons)
    lines = textwrap.wrap(f"failures: {items}", width, break_long_words=False, break_on_hyphens=False)
    return [line.replace(TIE, " ") for line in lines]


def _shards(status: Status) -> Text:
    line = Text(f"shards {status.shards_done}/{status.shards_all} committed")
    if status.workers:
        left = status.shards_all - status.shards_done
        running = min(left, sum(len(worker.shards) for worker in status.workers))  # as of the last heartbeat
        line.append(f"  {running} in progress  {left - running} queued")
    return line


SENTENCES: dict[str, str] = {  # by limit
    "network": "limited by the network, busy {inference_threads} of the time: add more or faster devices",
    "decoding": "limited by decoding, the network is busy {inference_threads} of the time: add cores",
    "fetching": "limited by fetching videos, the network is busy {inference_threads} of the time",
    "overhead": "limited by neither network ({inference_threads} of the time) nor decoding ({decoding})",
}


def limit_of(workers: Sequence[WorkerSnapshot]) -> str | None:
    """The limit of most workers; None before any has worked."""
    limits = Counter(worker.limit for worker in _limited(workers))
    return limits.most_common(1)[0][0] if limits else None


def _limited(workers: Sequence[WorkerSnapshot]) -> list[WorkerSnapshot]:
    """The busy workers whose limit this version knows."""
    return [worker for worker in workers if worker.state == "busy" and worker.limit in SENTENCES]


def _limit(workers: Sequence[WorkerSnapshot]) -> str | None:
    if (limit := limit_of(workers)) is None:
        return None
    loads = [worker.load for worker in _limited(workers)]
    shares = {
        name: f"{sum(getattr(load, name) for load in loads) / len(loads):.0%}"
        for name in ("inference_threads", "decoding")
    }
    return SENTENCES[limit].format(**shares)


def _workers(workers: Sequence[WorkerSnapshot]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("worker", "device", "state", "shards", "videos", "clips", "network", "queued", "decoding"):
        table.add_column(
            name, justify="left" if name in ("device", "state", "shards", "decoding") else "right", no_wrap=True
        )
    for worker in workers:
        load = worker.load
        known = worker.state == "busy" and load.decode_concurrency
        cells = (
            str(worker.worker),
            worker.device,
            worker.state,
            " ".join(worker.shards) or "-",
            str(worker.videos),
            str(worker.clips),
            f"{load.inference_threads:.0%}" if known else "-",
            f"{load.queued:g}" if known else "-",
            f"{load.decoding:.0%} of {load.decode_concurrency}" if known else "-",
        )
        table.add_row(*map(Text, cells))
    return table


def clock(seconds: float) -> str:
    """Seconds as 1:02:03, or as 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
