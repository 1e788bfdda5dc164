"""The progress of a run or a download on stderr: a bar on a terminal, periodic lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from p3d.jobs.cli import output

if TYPE_CHECKING:
    from rich.progress import TaskID

    from p3d.jobs.scheduler.run_snapshot import RunSnapshot

LINE_EVERY_S = 10.0  # between two plain progress lines, where stderr is not a terminal
SHOWN_EVERY_S = 0.2  # between two of them on a terminal, where one takes the place of the other
STEP_WIDTH = 60  # of one, so that it covers a longer one before it


@contextmanager
def show_progress(n_videos: int) -> Iterator[Callable[[RunSnapshot], None]]:
    """A bar with ETA on a terminal, a line every `LINE_EVERY_S` elsewhere; both on stderr."""
    if output.shows_bars():
        yield from _bar(n_videos)
        return
    last, paused, stopping = [-LINE_EVERY_S], [""], [""]

    def line(now: RunSnapshot) -> None:
        if now.stopping and not stopping[0]:
            output.say(f"stopping: {now.stopping}")
        stopping[0] = now.stopping or stopping[0]
        if bool(now.outage) != bool(paused[0]):
            output.say(f"paused: {now.outage}" if now.outage else "continuing: the store answers again")
        paused[0], elapsed_s = now.outage, now.elapsed_s or 0.0
        if elapsed_s - last[0] >= LINE_EVERY_S or now.state != "running":
            last[0] = elapsed_s
            rate = f"{now.clips_per_s:.2f}" if now.clips_per_s else "-"  # not known at the beginning
            output.say_progress(
                f"{now.videos.done}/{now.videos.all} videos, {now.videos.failed} failed, "
                f"{output.count(now.clips, 'clip')}, {rate} clips/s, ETA {output.human_time(now.eta_s)}"
            )

    yield line


def _bar(n_videos: int) -> Iterator[Callable[[RunSnapshot], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("videos"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[failed]} failed"),
        TimeElapsedColumn(),
        TextColumn("ETA {task.fields[eta]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=n_videos, rate="starting", failed=0, eta="-")

        def update(now: RunSnapshot) -> None:
            rate = f"{now.clips_per_s:.2f} clips/s" if now.clips_per_s else "starting"
            rate = "paused: a store does not answer" if now.outage else "stopping" if now.stopping else rate
            done, count, failed = now.videos.done, now.videos.all, now.videos.failed
            bar.update(task, completed=done, total=count, rate=rate, failed=failed, eta=output.human_time(now.eta_s))

        yield update


def show_steps(quiet: bool) -> Callable[[str, int, int], None]:
    """Show `(what, done, all)` with the time that is left: rewritten on a terminal, now and then a line elsewhere.

    Nothing if `quiet`.
    """
    on_terminal, began = output.shows_bars(), dict[str, float]()
    last = [time.monotonic() - (LINE_EVERY_S if on_terminal else 0.0)]

    def show(what: str, done: int, count: int) -> None:
        now = time.monotonic()
        since = began.setdefault(what, now)
        ended = on_terminal and done == count
        if quiet or not (ended or now - last[0] >= (SHOWN_EVERY_S if on_terminal else LINE_EVERY_S)):
            return
        last[0] = now
        left_s = (now - since) * (count - done) / done if done > 0 and now > since else None
        text = f"{what} {done}/{count}, ETA {output.human_time(left_s)}" if done < count else f"{what} {done}/{count}"
        if on_terminal:
            click.echo(f"\r{text:<{STEP_WIDTH}}", nl=ended, err=True)
        else:
            output.say_progress(text)

    return show


@contextmanager
def step_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each step on a terminal, a line every `LINE_EVERY_S` elsewhere, with rate and ETA; both on stderr."""
    if output.shows_bars():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        with Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            tasks: dict[str, TaskID] = {}

            def update(what: str, done: int, count: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=count, rate="")
                speed = bar.tasks[tasks[what]].speed
                bar.update(tasks[what], completed=done, rate=f"{speed:.1f}/s" if speed else "")

            yield update
        return
    began, last = dict[str, float](), [time.monotonic()]

    def line(what: str, done: int, count: int) -> None:
        now = time.monotonic()
        start = began.setdefault(what, now)
        if now - last[0] >= LINE_EVERY_S:
            last[0] = now
            left_s = (now - start) * (count - done) / max(done, 1)
            rate = done / max(now - start, 1e-9)
            output.say_progress(f"{what} {done}/{count}, {rate:.1f}/s, ETA {output.human_time(left_s)}")

    yield line


@contextmanager
def show_download(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar of bytes on a terminal, a line every `LINE_EVERY_S` elsewhere; both on stderr."""
    if output.shows_bars():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as SpeedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), SpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(name, total=None)
            yield lambda received, total: bar.update(task, completed=received, total=total)
        return
    last = [-LINE_EVERY_S]

    def line(received: int, total: int | None) -> None:
        if (now := time.monotonic()) - last[0] >= LINE_EVERY_S:
            last[0] = now
            of_all = "" if total is None else f" of {output.human_bytes(total)}"
            output.say_progress(f"{name}: {output.human_bytes(received)}{of_all}")

    yield line


@contextmanager
def show_count(noun: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and ETA on a terminal, a line every `LINE_EVERY_S` elsewhere, both on stderr; of (done, all)."""
    if output.shows_bars():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn(f"{noun}s"), BarColumn(bar_width=None), MofNCompleteColumn())
        texts = TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("ETA {task.fields[eta]}")
        started = time.monotonic()
        with Progress(*columns, *texts, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=None, rate="starting", eta="-")

            def update(done: int, count: int) -> None:
                rate, eta = _rate(noun, done, count, started)
                bar.update(task, completed=done, total=count, rate=rate, eta=eta)

            yield update
        return
    started = time.monotonic()
    last = [started]

    def line(done: int, count: int) -> None:
        if (now := time.monotonic()) - last[0] >= LINE_EVERY_S:
            last[0] = now
            rate, eta = _rate(noun, done, count, started)
            output.say_progress(f"{done}/{count} {noun}s, {rate}, ETA {eta}")

    yield line


def _rate(noun: str, done: int, count: int, started: float) -> tuple[str, str]:
    """The rate since the start, and the time that the rest takes at it."""
    took_s = max(time.monotonic() - started, 1e-3)
    eta_s = took_s * (count - done) / done if done else None
    return f"{done / took_s:.2f} {noun}s/s", output.human_time(eta_s)
