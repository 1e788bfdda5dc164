"""Several outputs in one command: the status of each as a line of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p3d.jobs.cli import output
from p3d.pipeline.errors import JobError

if TYPE_CHECKING:
    from p3d.jobs.monitor.status import Status
    from p3d.jobs.monitor.training import TrainStatus
    from p3d.pipeline.storage.store import Store

HEAD = ("output", "state", "network", "videos", "failed", "clips", "left")


@dataclass(slots=True)
class Found:
    """The status of each output that could be read, and why others could not: the message and the exit code."""

    statuses: list[Status | TrainStatus] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    @property
    def jobs(self) -> list[Status]:
        from p3d.jobs.monitor.status import Status

        return [one for one in self.statuses if isinstance(one, Status)]

    @property
    def trainings(self) -> list[TrainStatus]:
        from p3d.jobs.monitor.training import TrainStatus

        return [one for one in self.statuses if isinstance(one, TrainStatus)]


def read_all(stores: Sequence[Store], on_step: Callable[[str, int, int], None]) -> Found:
    """Read the status of the job or the training at each store. One that cannot be read does not hide the others.

    `on_step("read", done, all)` counts the stores.
    """
    from p3d.jobs.job import read_job
    from p3d.jobs.monitor.status import read_status
    from p3d.jobs.monitor.training import read_training_status
    from p3d.jobs.training.record import is_training, read_record

    found = Found()
    for done, store in enumerate(stores):
        on_step("read", done, len(stores))
        try:
            if is_training(store):
                found.statuses.append(read_training_status(store, read_record(store)))
            else:
                found.statuses.append(read_status(store, read_job(store)))
        except JobError as error:
            found.broken.append(f"{store.url}: {error}")
            found.codes.append(output.exit_code(error))
        except Exception as error:  # noqa: BLE001 - the boundary of one output: the others are listed in any case
            found.broken.append(f"{store.url}: its records cannot be read ({type(error).__name__}: {error})")
            found.codes.append(1)
    on_step("read", len(stores), len(stores))
    return found


def lines_of(found: Found, *, total: bool = False) -> list[str]:
    """A table with a line for each output and, with `total`, one for all videos of the jobs."""
    from p3d.jobs.monitor.status import Status
    from p3d.pipeline.storage.urls import short_names

    if not found.statuses:
        return []
    names = short_names([one.out for one in found.statuses])
    rows = [
        (names[one.out], one.state, *(_job(one) if isinstance(one, Status) else _training(one)))
        for one in found.statuses
    ]
    if total:
        jobs = found.jobs
        done, every, failed, clips = (
            sum(getattr(one, name) for one in jobs)
            for name in ("videos_done", "videos_all", "videos_failed", "clips_done")
        )
        left = [one.eta_s for one in jobs if one.eta_s is not None]
        longest = output.human_time(max(left, default=None))
        rows.append(("total", "", "", f"{done}/{every}", str(failed), str(clips), longest))
    return output.table([HEAD, *rows], right=(3, 4, 5, 6))


def _job(one: Status) -> tuple[str, ...]:
    videos = f"{one.videos_done}/{one.videos_all}"
    return one.model, videos, str(one.videos_failed), str(one.clips_done), output.human_time(one.eta_s)


def _training(one: TrainStatus) -> tuple[str, ...]:
    now = one.progress
    return f"{one.model}, trained", f"step {now.step}/{one.steps}", str(now.failed), "-", output.human_time(now.eta_s)
