"""The heartbeats of a training, and the requests to stop it."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, replace

import torch

from p3d.jobs.scheduler import control
from p3d.jobs.training import snapshot
from p3d.jobs.training.snapshot import OWN, STARTING, TrainSnapshot
from p3d.pipeline.errors import AlreadyRunning, StoreError
from p3d.pipeline.storage.store import Store


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a training: its rank among `world` processes, its device, and the run that it belongs to."""

    rank: int
    world: int
    device: torch.device
    epoch: int  # the number of the run


class Pulse:
    """Writes the heartbeats of a run from a thread of rank 0, and looks whether somebody has asked it to stop."""

    def __init__(self, store: Store, process: Process) -> None:
        self.now = TrainSnapshot(phase=STARTING)
        self.asked = threading.Event()
        self.error: AlreadyRunning | None = None
        self._store, self._process, self._ended = store, process, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        if self._process.rank == 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._process.rank == 0:
            self._thread.join()
            with contextlib.suppress(StoreError):
                snapshot.write(self._store, self._process.epoch, self.now)

    def _beat(self) -> None:
        counter = OWN
        while not self._ended.is_set():
            counter += 1
            with contextlib.suppress(StoreError):  # an outage: the next heartbeat may succeed
                stopping = "the step under way" if self.asked.is_set() else ""
                snapshot.write(self._store, self._process.epoch, replace(self.now, counter=counter, stopping=stopping))
                if control.newest_number(self._store) > self._process.epoch:
                    self.error = AlreadyRunning(f"{self._store.url}: another run has taken over")
                    self.asked.set()
                elif control.cancel_asked(self._store, self._process.epoch) is not None:
                    self.asked.set()
            self._ended.wait(1.0 if self._store.url.startswith("/") else control.HEARTBEAT_S)
