"""The progress of a run or a download on stderr: a bar on a terminal, periodic lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from p3d.jobs.cli import output

LINE_EVERY_S = 10.0  # between two plain progress lines, where stderr is not a terminal


@contextmanager
def show_progress(n_videos: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar with ETA on a terminal, a line every `LINE_EVERY_S` elsewhere; both on stderr."""
    if sys.stderr.isatty():
        yield from _bar(n_videos)
        return
    last, paused = [-LINE_EVERY_S], [""]

    def line(snapshot: dict[str, Any]) -> None:
        if bool(snapshot["outage"]) != bool(paused[0]):
            output.say(f"paused: {snapshot['outage']}" if snapshot["outage"] else "continuing: the store answers again")
        paused[0] = snapshot["outage"]
        if snapshot["elapsed_s"] - last[0] >= LINE_EVERY_S or snapshot["state"] != "running":
            last[0] = snapshot["elapsed_s"]
            videos = snapshot["videos"]
            output.say(
                f"{videos['done']}/{videos['all']} videos, {videos['failed']} failed, {snapshot['clips']} clips, "
                f"{snapshot['clips_per_s']:.2f} clips/s, ETA {output.human_time(snapshot['eta_s'])}"
            )

    yield line


def _bar(n_videos: int) -> Iterator[Callable[[dict[str, Any]], None]]:
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

        def update(snapshot: dict[str, Any]) -> None:
            videos = snapshot["videos"]
            rate = f"{snapshot['clips_per_s']:.2f} clips/s" if snapshot["clips_per_s"] else "starting"
            rate = "paused: a store does not answer" if snapshot["outage"] else rate
            eta = output.human_time(snapshot["eta_s"])
            bar.update(task, completed=videos["done"], total=videos["all"], rate=rate, failed=videos["failed"], eta=eta)

        yield update


@contextmanager
def show_download(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar of bytes on a terminal, a line every `LINE_EVERY_S` elsewhere; both on stderr."""
    if sys.stderr.isatty():
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
            output.say(f"{name}: {output.human_bytes(received)}{of_all}")

    yield line
