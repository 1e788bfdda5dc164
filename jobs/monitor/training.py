"""The progress of a training, read only from its store, and how it looks on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from p3d.jobs.monitor.status import clock
from p3d.jobs.scheduler import control
from p3d.jobs.training import snapshot
from p3d.jobs.training.record import RESULT_KEY, TrainRecord, code_of_result
from p3d.jobs.training.snapshot import FINISHED, RUNNING, TESTING, TRAINING, TrainSnapshot
from p3d.pipeline.errors import counted
from p3d.pipeline.recipe import with_short_digests
from p3d.pipeline.results.evaluation.classes import TOP
from p3d.pipeline.storage.store import Store

BAR = 78  # columns, at most


@dataclass(frozen=True, slots=True)
class TrainStatus:
    """The status of a training. `state` is running, finished, stopped, dead (its process is gone) or not started.

    `exit_code` is that of the last run, None while it is running. `progress` is the newest heartbeat.
    """

    out: str
    state: str
    model: str
    start: str
    classes: int
    train_videos: int
    test_videos: int
    steps: int
    progress: TrainSnapshot
    exit_code: int | None
    sentence: str
    host: str = ""


def read_training_status(store: Store, record: TrainRecord) -> TrainStatus:
    """Read the status of a training once."""
    epoch = control.newest_epoch(store)
    now = (snapshot.read(store, epoch.number) if epoch else None) or TrainSnapshot(state="not started")
    state, code, sentence = now.state, now.exit_code, now.sentence or ""
    if state == RUNNING and epoch is not None and epoch.died_here():
        state, code, sentence = "dead", 6, "the process that ran it no longer exists; `p3d resume` continues"
    if store.head(RESULT_KEY) is not None and state not in (RUNNING, FINISHED):
        state, code, sentence = FINISHED, code_of_result(store), "finished"
    elif state == FINISHED and store.head(RESULT_KEY) is None:
        state, code, sentence = "stopped", 6, f"{RESULT_KEY} is missing; `p3d resume` writes it again"
    if state == "not started":
        code, sentence = 6, "not started; `p3d resume` starts it"
    return TrainStatus(
        out=store.url,
        state=state,
        model=record.model,
        start=record.start,
        classes=len(record.class_names),
        train_videos=record.n_train,
        test_videos=record.n_test,
        steps=record.options.steps,
        progress=now,
        exit_code=None if state == RUNNING else code,
        sentence=sentence,
        host=epoch.host if epoch else "",
    )


def render_training(status: TrainStatus, *, width: int, escape: Callable[[TrainStatus], TrainStatus]) -> RenderableType:
    """The status for a terminal of `width` columns. `escape` makes texts of OUT harmless."""
    status = escape(status)
    now = status.progress
    head = Text.assemble((status.out, "bold"), f"  training {status.model} from {with_short_digests(status.start)}")
    colour = {RUNNING: "green", FINISHED: "cyan"}.get(status.state, "red")
    line = Text.assemble((status.state, colour), f"  step {now.step}/{status.steps}  epoch {now.epochs:.2f}")
    parts: list[RenderableType] = [head, line]
    if status.state == RUNNING:
        done, of = (now.tested, now.to_test) if now.phase == TESTING else (now.step, status.steps)
        bar = Table.grid()  # a bar alone does not end with a newline
        bar.add_row(ProgressBar(max(of, 1), done, width=min(width, BAR)))
        parts.insert(1, bar)
        if now.phase == TRAINING:
            eta = "-" if now.eta_s is None else clock(now.eta_s)
            waiting = "-" if now.waiting is None else f"{now.waiting:.0%}"
            line.append(f"  {now.clips_per_s:.2f} clips/s  waiting for clips {waiting}  ETA {eta}")
        else:
            line.append(f"  {now.phase}" + (f" {now.tested}/{now.to_test} videos" if now.to_test else ""))
    if now.loss is not None and now.top1 is not None:
        rate = "" if now.lr is None else f"  learning rate {now.lr:.2g}"
        parts.append(Text(f"loss {now.loss:.3f}  right {now.top1:.1%}{rate}  (last 50 steps)"))
    data = f"{counted(status.train_videos, 'training video')}, {counted(status.test_videos, 'test video')}"
    line = Text(f"{data}, {status.classes} classes")
    line.append(f"  {now.failed} failed", "red" if now.failed else "default")
    if now.failed and status.state == FINISHED:
        line.append(" (failures.parquet)")
    if now.checkpoint is not None and status.state != FINISHED:
        line.append(f"  checkpoint of step {now.checkpoint}")
    parts.append(line)
    if now.hits and status.state != FINISHED:
        hits = {name: rate for name, rate in now.hits.items() if status.classes > TOP or name != f"video_hit{TOP}"}
        parts.append(Text("last test: " + "  ".join(f"{name} {100 * rate:.1f} %" for name, rate in hits.items())))
    if now.stopping:
        parts.append(Text(f"stopping: {now.stopping}", "yellow"))
    if status.sentence:
        parts.append(Text(status.sentence))
    return Group(*parts)
