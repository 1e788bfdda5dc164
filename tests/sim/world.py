"""Simulates many processes in one, controlled by a seed: each runs real code in its own thread, one at a time.

    step(what)   called for every store operation: others may run first, faults may happen, time passes
    wait(...)    a process sleeps until a time, or until a condition is true

A process that yields draws the next one from the seed alone; time is virtual. A killed process does nothing more: its
next step raises Died, which no code catches.
"""

from __future__ import annotations

import hashlib
import heapq
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

from tests.sim.store import Died

MOST_STEPS = 20_000  # of a whole life: more is treated as never ending (I11)
STAYS = 0.4  # share of steps after which the same process continues
SLEEPER = 0.02  # share of steps at which all ready processes are slow, so that a sleeper wakes first


@dataclass(eq=False)
class Process:
    """A simulated process on `host`. It is `dead` as soon as it is killed and `over` when its thread has ended."""

    kind: str
    name: str
    number: int
    host: str
    act: Callable[[], Any]
    wake: float = 0.0
    until: Callable[[], bool] | None = None
    thread: threading.Thread | None = None
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    dead: bool = False
    over: bool = False
    result: Any = None
    parent: Process | None = None
    given_up: bool = False  # its owner believes that it is dead
    signals: list[Callable[..., None]] = field(default_factory=list)
    on_end: list[Callable[[], None]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        return not (self.dead or self.over)


class World:
    """One seed: its processes, its clock, the faults that happened, and a trace of all events."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, Random(seed)
        self.clock, self.steps = 0.0, 0
        self.rates: dict[str, float] = {}
        self.fired: Counter[str] = Counter()
        self.trace: list[str] = []
        self.failure: BaseException | None = None
        self.out_until = 0.0  # end of a store outage
        self.late: list[tuple[float, int, Callable[[], None]]] = []  # delayed requests that have not arrived
        self._numbers = count(1)
        self.main = Process("main", "main", 0, "host of main", lambda: None)
        self.current = self.main
        self.processes = [self.main]

    # -- processes

    def spawn(self, kind: str, name: str, act: Callable[[], Any], host: str = "") -> Process:
        """A new process, ready to run; its parent is the current process."""
        number = next(self._numbers)
        process = Process(kind, f"{name}#{number}", number, host or self.current.host, act, self.clock)
        process.parent = self.current
        self.processes.append(process)
        return process

    def kill(self, process: Process, why: str) -> None:
        """Like kill -9: the process does nothing more, not even cleanup, and its children notice only later."""
        if process.alive:
            self.note(f"{why}: {process.name}")
            process.dead = True
            process.wake = self.clock

    def wait(self, seconds: float = 0.0, until: Callable[[], bool] | None = None) -> None:
        """Sleep for a time or until a condition is true; with neither, only yield to other processes."""
        me = self.current
        if me.dead:
            raise Died
        me.until = until
        me.wake = self.clock + seconds if seconds or until is None else float("inf")
        self._hand_on()
        me.until, me.wake = None, self.clock

    def step(self, what: str) -> None:
        """One operation of a process: time passes, others may run first, and faults may happen."""
        me = self.current
        if me is self.main:
            return
        if me.dead:
            raise Died
        self.steps += 1
        if self.steps > MOST_STEPS:
            self.fail(AssertionError(f"I11: no end after {self.steps} steps: {self.trace[-12:]}"))
        self.note(f"{me.name} {what}")
        self.clock += 0.001
        self.maybe_fault(me)
        if self.strikes("slow", quiet=True):
            me.wake = self.clock + self.rng.choice((0.1, 1.0, 8.0, 60.0))
        elif self.rng.random() < STAYS and me.alive:
            return
        self._hand_on()

    def maybe_fault(self, process: Process) -> None:
        """Faults that may happen at any step; subclasses override this."""

    def strikes(self, fault: str, *, quiet: bool = False) -> bool:
        """Draw whether a fault happens now. A quiet one is counted by the caller."""
        rate = self.rates.get(fault, 0.0)
        if not rate or self.rng.random() >= rate:
            return False
        if not quiet:
            self.fired[fault] += 1
        return True

    def fail(self, error: BaseException) -> None:
        """An invariant is violated: end the whole world, even if the code in between would catch an error."""
        self.failure = self.failure or error
        raise Died

    def note(self, what: str) -> None:
        self.trace.append(f"{self.clock:.3f} {what}")

    @property
    def hash(self) -> str:
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()

    def post(self, seconds: float, effect: Callable[[], None]) -> None:
        """Schedule an effect that happens even if the current process dies."""
        heapq.heappush(self.late, (self.clock + seconds, next(self._numbers), effect))

    # -- which process runs

    def _hand_on(self) -> None:
        """Give the baton to a drawn process, and return when it is our turn."""
        me, chosen = self.current, self._choose()
        if chosen is not me:
            self._pass(chosen)
            if me.over:
                return
            me.baton.acquire()
        if self.failure is not None and me is self.main:
            raise self.failure
        if me.dead:
            raise Died

    def _pass(self, chosen: Process) -> None:
        self.current = chosen
        if chosen.thread is None and chosen is not self.main:
            chosen.thread = threading.Thread(target=self._live, args=(chosen,), name=chosen.name, daemon=True)
            chosen.thread.start()
        else:
            chosen.baton.release()

    def _live(self, process: Process) -> None:
        try:
            if not process.dead:
                process.result = process.act()
        except Died:
            process.dead = True
        except BaseException as error:  # noqa: BLE001 - any error in a thread fails the seed
            self.failure = self.failure or error
        process.over = True
        self.note(f"{process.name} {'killed' if process.dead else 'ends'}")
        for tell in process.on_end:
            tell()
        try:
            self._hand_on()
        except BaseException as error:  # noqa: BLE001
            self.failure = self.failure or error
            self._pass(self.main)

    def _choose(self) -> Process:
        if self.failure is not None:
            return self.main
        self._arrive()
        while True:
            ready, sleepers = [], []
            for process in self.processes:
                if process.over:
                    continue
                if process.dead or process.wake <= self.clock or (process.until is not None and process.until()):
                    ready.append(process)
                elif process.wake != float("inf"):
                    sleepers.append(process)
            if ready and not (sleepers and self.rng.random() < SLEEPER):
                return ready[0] if len(ready) == 1 else ready[int(self.rng.random() * len(ready))]
            soonest = min([process.wake for process in sleepers] + [due for due, _, _ in self.late[:1]], default=None)
            assert soonest is not None, f"nothing can happen any more: {self.trace[-12:]}"
            self.clock = max(self.clock, soonest)
            self._arrive()

    def _arrive(self) -> None:
        while self.late and self.late[0][0] <= self.clock:
            heapq.heappop(self.late)[2]()

    def end(self) -> None:
        """End every thread of the seed."""
        self.failure = None
        for process in self.processes:
            process.dead = process is not self.main
        self.rates.clear()
        while any(not process.over and process.thread is not None for process in self.processes[1:]):
            living = next(p for p in self.processes[1:] if not p.over and p.thread is not None)
            self.current = living
            living.on_end = [lambda: None]
            self._unwind(living)

    def _unwind(self, process: Process) -> None:
        """Run a process to its end; main continues after it."""
        self._choose = lambda: self.main  # type: ignore[method-assign] # the world is over
        process.baton.release()
        self.main.baton.acquire()
        self.current = self.main


@contextmanager
def patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Replace attributes within this context."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
