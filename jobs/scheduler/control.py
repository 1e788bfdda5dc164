"""The control objects of an output, all under OUT/_job/: which run is active, its progress, requests to stop.

    epochs/000003.json       created once by each launch or resume: the newest epoch is the active run
    heartbeats/000003.json   replaced every few seconds: a counter, and the progress that `status` shows
    cancel/000003.json       asks that epoch to stop
    submitted.json           a driver that was submitted to a cluster and will become the next epoch

They avoid wasted work by two schedulers at once. Safety comes from the commit protocol alone. Clocks of different
machines are never compared: a run is alive if its heartbeat counter changes while it is watched.

Other files here, such as those of a file manager, are skipped and named once (StrayFile). A record that cannot be read
counts as missing, as a power loss may leave an empty one, but the number of an epoch is taken from its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from p3d.jobs.machine import boot_id, is_alive, user_name
from p3d.jobs.scheduler.run_snapshot import RunSnapshot, typed
from p3d.pipeline.errors import AlreadyRunning, StoreError, StoreMissing, StoreUnknown, StoreUnsafe, StrayFile
from p3d.pipeline.storage.store import CREATED, Store

HEARTBEAT_S = 5.0
WATCHED_PERIODS = 2
RUNNING = "running"
CLAIM_TRIES = 3
EPOCH = re.compile(r"_job/epochs/([0-9]{6,9})\.json")
TEMP = re.compile(r"_job/tmp/[0-9]+-[0-9a-f]{32}\.tmp")  # as LocalStore.temp_file names them


@dataclass(frozen=True, slots=True)
class Epoch:
    """One run of a job, as its record says. `options` are the RunOptions it started with, as a dict."""

    number: int
    host: str
    boot_id: str
    pid: int
    started: str
    options: dict[str, Any]
    token: str = ""  # identifies our own record when the reply to its creation was lost
    user: str = ""  # who started it

    def died_here(self) -> bool:
        """True if it ran on this host since its last boot, and its process has ended."""
        if (self.host, self.boot_id) != (platform.node(), boot_id()) or not self.boot_id:
            return False
        return not is_alive(self.pid)


def epoch_numbers(store: Store) -> list[int]:
    """The numbers of all epochs, in order. Costs one listing."""
    numbers = []
    for info in store.list("_job/epochs/"):
        if name := EPOCH.fullmatch(info.key):
            numbers.append(int(name[1]))
        else:
            _skip(store, info.key, "is not a record of a run")
    return sorted(numbers)


def read_epoch(store: Store, number: int) -> Epoch | None:
    """The record of a run; None if it cannot be read."""
    key = f"_job/epochs/{number:06d}.json"
    with contextlib.suppress(TypeError):
        found: Epoch = typed(_record(store, key), Epoch)
        if found.number == number:
            return found
    _skip(store, key, "cannot be read")
    return None


def newest_epoch(store: Store) -> Epoch | None:
    """The newest run, alive or not; None before the first.

    If its record cannot be read, its options are those of the newest run whose record can.
    """
    numbers = epoch_numbers(store)
    for number in reversed(numbers):
        if (found := read_epoch(store, number)) is not None:
            return found if number == numbers[-1] else Epoch(numbers[-1], "unknown", "", 0, "", found.options)
    return Epoch(numbers[-1], "unknown", "", 0, "", {}) if numbers else None


def newest_number(store: Store) -> int:
    """The number of the newest epoch, 0 before the first. Costs one listing."""
    return max(epoch_numbers(store), default=0)


def heartbeat(store: Store, number: int) -> RunSnapshot | None:
    """The last heartbeat of an epoch, or None. If values that only `status` shows are of other types, without them."""
    record = _record(store, f"_job/heartbeats/{number:06d}.json")
    with contextlib.suppress(TypeError):
        return RunSnapshot.from_json(record or {})
    return None


def _record(store: Store, key: str, **fields: type) -> dict[str, Any] | None:
    """A JSON object whose values, as far as it has them, are of the types in `fields`; else None."""
    try:
        record: dict[str, Any] = typed(json.loads(store.read(key)), dict[str, Any])
        for name in fields.keys() & record.keys():
            typed(record[name], fields[name])
        return record
    except (StoreMissing, ValueError, RecursionError, TypeError):
        return None
    except StoreUnsafe as error:
        warnings.warn(str(error), StrayFile, stacklevel=2)
        return None


def _skip(store: Store, key: str, why: str) -> None:
    warnings.warn(f"{store.url}/{key} {why} and is skipped", StrayFile, stacklevel=3)


def beat(store: Store, number: int, snapshot: RunSnapshot) -> None:
    """Replace an epoch's heartbeat. Its `counter` grows."""
    store.replace(f"_job/heartbeats/{number:06d}.json", (json.dumps(snapshot.to_json(), indent=1) + "\n").encode())


def is_live(store: Store, epoch: Epoch, *, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Watch an epoch's heartbeat for two periods. False at once if the run ended, or died on this machine."""
    before = heartbeat(store, epoch.number)
    if epoch.died_here() or (before is not None and before.state != RUNNING):
        return False
    sleep(HEARTBEAT_S * WATCHED_PERIODS)
    after = heartbeat(store, epoch.number)
    return after is not None and after.state == RUNNING and (before is None or after.counter != before.counter)


def claim(store: Store, options: dict[str, Any], *, takeover: bool, say: Callable[[str], None]) -> Epoch:
    """Become the newest epoch. AlreadyRunning if another run is alive (unless `takeover`) or claimed it first."""
    last = newest_epoch(store)
    if last is not None and not takeover:
        if not last.died_here() and ((found := heartbeat(store, last.number)) is None or found.state == RUNNING):
            say(f"checking for {HEARTBEAT_S * WATCHED_PERIODS:.0f} s if the run on {last.host} is still alive ...")
        if is_live(store, last):
            raise AlreadyRunning(
                f"{store.url} is being worked on by process {last.pid} on {last.host}; watch it with "
                f"`p3d status {store.words()} --watch`, stop it with `p3d cancel`, or take over with --takeover"
            )
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    number, token = (last.number if last else 0) + 1, uuid.uuid4().hex
    epoch = Epoch(number, platform.node(), boot_id(), os.getpid(), started, options, token, user_name())
    key = f"_job/epochs/{epoch.number:06d}.json"
    content = (json.dumps({name: getattr(epoch, name) for name in Epoch.__slots__}, indent=1) + "\n").encode()
    for tries_left in reversed(range(CLAIM_TRIES)):
        try:
            if store.create(key, content) != CREATED and store.read(key) != content:
                raise AlreadyRunning(
                    f"another run of {store.url} started at this moment; watch it with `p3d status --watch`"
                )
            beat(store, epoch.number, RunSnapshot(counter=0, state=RUNNING))
            break
        except StoreUnknown:  # the previous run may have removed the temporary file that was just written
            if not tries_left:
                raise
    return epoch


class Pulse:
    """Writes heartbeats from a thread while a run prepares: planning, the store and the start of Ray may take long.

    A context manager. `stop` ends it early, when the run starts to write its own heartbeats.
    """

    def __init__(self, store: Store, number: int) -> None:
        self._store, self._number = store, number
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(store, number), name="pulse", daemon=True)

    def _beat(self, store: Store, number: int) -> None:
        counter = 0
        while not self._ended.wait(HEARTBEAT_S):
            counter += 1
            with contextlib.suppress(StoreError):  # the run itself will notice
                beat(store, number, RunSnapshot(counter=counter, state=RUNNING))

    def stop(self) -> None:
        """Write no further heartbeat."""
        self._ended.set()
        self._thread.join()

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise AlreadyRunning if a write failed because a newer run removed its temporary file."""
        self.stop()
        if isinstance(error, StoreUnknown):
            with contextlib.suppress(StoreError):
                if newest_number(self._store) > self._number:
                    raise AlreadyRunning(f"{self._store.url}: another run has taken over ({error})") from None


def tell_submitted(store: Store, where: str, name: str, after: int) -> None:
    """Record that a driver was submitted to `where` as `name`. An epoch newer than `after` shows that it began."""
    submission = {"where": where, "name": name, "after": after}
    store.replace("_job/submitted.json", (json.dumps(submission, indent=1) + "\n").encode())


def not_begun(store: Store, newest: int) -> str:
    """A message about a submitted driver that has not started, else empty."""
    submission = _record(store, "_job/submitted.json", where=str, name=str, after=int) or {}
    if submission.keys() != {"where", "name", "after"} or submission["after"] != newest:
        return ""
    return f"submitted to {submission['where']} as {submission['name']}; the driver has not started"


def is_submitted() -> bool:
    """Whether Ray's job server started this process as the driver of a job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def forget_submitted(store: Store) -> None:
    """Remove the record of a submitted driver that ended before it started the run."""
    if not_begun(store, newest_number(store)):
        store.delete("_job/submitted.json")


def ask_cancel(store: Store, number: int, *, now: bool) -> None:
    """Ask an epoch to stop: after the shards in progress, or `now`."""
    store.replace(f"_job/cancel/{number:06d}.json", json.dumps({"now": now}).encode())


def cancel_asked(store: Store, number: int) -> dict[str, Any] | None:
    """The request to stop, if there is one."""
    return _record(store, f"_job/cancel/{number:06d}.json", now=bool)


def sweep_temps(store: Store) -> int:
    """Remove temporary files of dead runs from OUT/_job/tmp, and return how many. Only the newest epoch may do this.

    Only names that this program makes are removed, and nothing in folders below.
    """
    leftovers = [info.key for info in store.list("_job/tmp/") if TEMP.fullmatch(info.key)]
    for key in leftovers:
        store.delete(key)
    return len(leftovers)
