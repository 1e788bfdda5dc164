"""The scheduler as a pure state machine: events in, commands out, no Ray, no clock, no store.

    StartWorker ─> WorkerReady ─> Dispatch ─> ShardDone ──────────────────────────> Dispatch the next, or StopWorker
                                     │──────> ShardTrouble (outage) ──────────────> pause; TryAgain ─> one trial shard
                                     │──────> ShardTrouble (store) ───────────────> stop, resumable
                                     │──────> ShardTrouble (internal) ────────────> retry, up to a limit
                                     │──────> ShardTrouble (withdrawn) ───────────> back in the queue
                                     └──────> WorkerDied ─> Check ─> Checked ─────> done after all, or retry elsewhere

A worker may get the next shard before it has finished one, so that it is never idle in between. This does not happen
near the end of a job, where an idle worker can start that shard sooner. If a worker dies with two shards, both are
processed alone from then on, since either may be the cause.

The unit tests cover double dispatch, endless retries and lost shards. `validate()` checks the invariants. A run calls
`check()` after every event, which validates as often as possible while the cost per event does not grow with the job.
`story(shard)` returns the history of one shard.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from p3d.pipeline.dataset.totals import ShardKey, Totals
from p3d.pipeline.errors import Reason, counted
from p3d.pipeline.recipe import SHARD_ATTEMPTS, WORKER_DEATHS, MaxFailures

FIRST_VIDEOS = 200  # of the default hopelessness rule
STORY_EVENTS = 10_000  # newest events that are kept for story()
CHECKED_AT_ONCE = 100  # open shards and workers that `check` examines per event, on average


# ---- events -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerReady:
    worker: int


@dataclass(frozen=True, slots=True)
class WorkerRefused:
    """The worker must not be used: its code differs from the driver's, or its features from the CPU's."""

    worker: int
    detail: str


@dataclass(frozen=True, slots=True)
class WorkerUnready:
    """The worker could not start because a store did not answer. It has been killed."""

    worker: int
    detail: str


@dataclass(frozen=True, slots=True)
class WorkerDied:
    worker: int
    detail: str


@dataclass(frozen=True, slots=True)
class ShardDone:
    """The shard is committed and derived. `failures` are its failed videos by reason."""

    worker: int
    shard: ShardKey
    n_videos: int
    n_clips: int
    failures: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ShardTrouble:
    """The shard is not done, while the worker is still alive.

    Kinds: `outage`, a store error that may be temporary; `store`, one that is not (a full disk), or a GPU that cannot
    be used; `internal`, a bug; `job`, an error that no retry can fix; `withdrawn`, a drain before the shard was
    started.
    """

    worker: int
    shard: ShardKey
    kind: Literal["outage", "store", "internal", "job", "withdrawn"]
    detail: str


@dataclass(frozen=True, slots=True)
class Checked:
    """Whether a shard whose worker died is committed, with its counts if it is."""

    shard: ShardKey
    committed: bool
    n_videos: int = 0
    n_clips: int = 0
    failures: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class CheckFailed:
    """The store failed when it was asked whether the shard is committed."""

    shard: ShardKey
    detail: str


@dataclass(frozen=True, slots=True)
class Counted:
    """The totals of earlier runs, counted while this run has already started."""

    before: Totals


@dataclass(frozen=True, slots=True)
class Reopened:
    """Shards that counted as done, and whose files are lost: a listing has found that while this run goes on."""

    shards: tuple[ShardKey, ...]


@dataclass(frozen=True, slots=True)
class WorkerLimitRaised:
    """Nodes have joined, so `n_workers` can run. There is no event for fewer: workers of lost nodes die."""

    n_workers: int


@dataclass(frozen=True, slots=True)
class TryAgain:
    """It is time to try whether a store that failed answers again."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop the run from outside. With `drain`, shards in progress are finished first."""

    exit_code: int
    sentence: str
    drain: bool = False


Event = (
    WorkerReady
    | WorkerRefused
    | WorkerUnready
    | WorkerDied
    | ShardDone
    | ShardTrouble
    | Checked
    | CheckFailed
    | Counted
    | Reopened
    | WorkerLimitRaised
    | TryAgain
    | Stop
)


# ---- commands ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartWorker:
    worker: int


@dataclass(frozen=True, slots=True)
class Dispatch:
    worker: int
    shard: ShardKey


@dataclass(frozen=True, slots=True)
class Check:
    """Look in the store whether the shard was committed; answer with `Checked`."""

    shard: ShardKey


@dataclass(frozen=True, slots=True)
class Drain:
    """Start no further shard: those that have not started come back as `withdrawn`."""

    worker: int


@dataclass(frozen=True, slots=True)
class StopWorker:
    worker: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The last command. `exit_code` is that of the command line; `sentence` is for people.

    `lost` is true if shards that were committed are no longer in the store.
    """

    exit_code: int
    sentence: str
    lost: bool = False


Command = StartWorker | Dispatch | Check | Drain | StopWorker | Finish


# ---- the machine ------------------------------------------------------------------------------------------------


class Scheduler:
    """Decides; never acts. Feed it every event once and carry out what it returns, in order."""

    def __init__(
        self,
        todo: Iterable[ShardKey],
        *,
        n_workers: int,
        n_videos: int,
        shards_each: int = 1,
        done: Totals | None = None,
        counting: bool = False,
        max_failures: MaxFailures = MaxFailures(),  # noqa: B008 - frozen
        shard_attempts: int = SHARD_ATTEMPTS,
        worker_deaths: int = WORKER_DEATHS,
    ) -> None:
        self.queue: deque[ShardKey] = deque(todo)
        self.open: set[ShardKey] = set(self.queue)
        self.in_flight: dict[int, list[ShardKey]] = {}  # busy worker -> its shards, oldest first
        self.alone: set[ShardKey] = set()  # their worker died while it had another one, too
        self.checking: dict[ShardKey, bool] = {}  # -> true for one shard of each dead worker, so its death counts once
        self.starting: set[int] = set()
        self.idle: set[int] = set()
        self.stuck: dict[ShardKey, str] = {}
        self.attempts: Counter[ShardKey] = Counter()
        self.totals = done or Totals()
        self.n_workers, self.n_videos, self.shards_each = n_workers, n_videos, shards_each
        self.max_failures, self.shard_attempts = max_failures, shard_attempts
        self.worker_deaths = worker_deaths
        self.counting = counting  # true until `Counted` has come; the run does not finish before
        self.outage = ""  # why dispatching is paused; empty while the stores answer
        self.trials = 0  # dispatches that are allowed during an outage, as trials
        self.stopping: Stop | None = None
        self.draining: set[int] = set()  # workers that got a Drain
        self.finished: Finish | None = None
        self._next_worker = 0
        self._last_death = ""
        self._deaths = 0  # in a row, without a commit anywhere
        self._first: Counter[str] = Counter()  # failures among the first videos of this run
        self._first_videos = 0
        self._internal = False
        self._unchecked = 0  # events since the last validate()
        self._story: deque[tuple[Event, tuple[Command, ...]]] = deque(maxlen=STORY_EVENTS)

    def start(self) -> list[Command]:
        """The first commands: start as many workers as there is work for."""
        return self._settle([])

    def handle(self, event: Event) -> list[Command]:
        """Handle one event, and return the commands that follow. Events after the end are ignored."""
        if self.finished is not None:
            return []
        commands: list[Command] = []
        match event:
            case WorkerReady(worker):
                self.starting.discard(worker)
                self.idle.add(worker)
            case WorkerRefused(worker, detail):
                self.starting.discard(worker)
                self._stop(Stop(6, detail))
            case WorkerUnready(worker, detail):
                self.starting.discard(worker)
                self._pause(detail)
            case WorkerDied(worker, detail):
                commands += self._worker_died(worker, detail)
            case ShardDone(worker, shard, n_videos, n_clips, failures):
                self._leave(worker, shard)
                self._count(shard, n_videos, n_clips, failures)
            case ShardTrouble(worker, shard, kind, detail):
                self._leave(worker, shard)
                self._trouble(shard, kind, detail)
            case Checked(shard, committed, n_videos, n_clips, failures):
                counts = self.checking.pop(shard, True)
                if committed:
                    self._count(shard, n_videos, n_clips, failures)
                else:
                    self._again(shard, "its worker died")
                    if counts:
                        self._count_fruitless_death()
            case CheckFailed(shard, detail):
                self.checking.pop(shard, None)
                self.attempts[shard] -= 1  # it is unknown whether it failed
                self.queue.append(shard)  # if it is committed, the next worker finds that
                self._pause(detail)
            case Counted(before):
                self.counting = False
                self.totals.add(before)
                self._stop_if_hopeless()
            case Reopened(shards):
                assert self.open.isdisjoint(shards), "a shard is open already"
                self.queue.extend(shards)
                self.open.update(shards)
            case WorkerLimitRaised(n_workers):
                self.n_workers = max(self.n_workers, n_workers)
            case TryAgain():
                self.trials = int(bool(self.outage) and not self.in_flight)
            case _:
                self._stop(event)
        commands = self._settle(commands)
        self._story.append((event, tuple(commands)))
        return commands

    def story(self, shard: ShardKey) -> list[str]:
        """What happened to one shard, oldest first."""
        return [
            f"{event} -> {', '.join(map(str, commands)) or 'nothing'}"
            for event, commands in self._story
            if any(getattr(thing, "shard", None) == shard for thing in (event, *commands))
        ]

    def validate(self) -> None:
        """Check the invariants that hold after every event. AssertionError if one does not."""
        flying = [shard for shards in self.in_flight.values() for shard in shards]
        states = [*self.queue, *flying, *self.checking, *self.stuck]
        known = set(states)
        assert len(states) == len(known), f"a shard is in two places: {Counter(states).most_common(1)}"
        assert known == self.open, f"shards lost: {self.open ^ known}"
        assert not self.idle & self.in_flight.keys(), "a worker is idle and busy"
        assert all(0 < len(shards) <= self.shards_each for shards in self.in_flight.values()), "a worker has too much"
        assert all(len(shards) == 1 or self.alone.isdisjoint(shards) for shards in self.in_flight.values()), "not alone"
        assert len(self.starting) + len(self.idle) + len(self.in_flight) <= self.n_workers, "too many workers"
        if self.finished is not None and self.finished.exit_code in (0, 3):
            assert not self.open, f"finished with {len(self.open)} open shards"
            assert not self.counting, "finished before all was counted"

    def check(self) -> None:
        """Call `validate` after every event in a small job, else so rarely that the cost per event stays constant.

        At the end everything is validated. Most inconsistencies persist and are found later. `_count` detects at once
        that a shard is counted twice, and the commit protocol prevents a second commit in any case.
        """
        self._unchecked += 1
        if self.finished is not None or CHECKED_AT_ONCE * self._unchecked >= len(self.open) + self.n_workers:
            self._unchecked = 0
            self.validate()

    # -- event handlers

    def _worker_died(self, worker: int, detail: str) -> list[Command]:
        self.starting.discard(worker)
        self.idle.discard(worker)
        self._last_death = detail
        self.draining.discard(worker)
        shards = self.in_flight.pop(worker, [])
        if not shards:
            self._count_fruitless_death()
        if len(shards) > 1:
            self.alone.update(shards)
        for shard in shards:
            self.checking[shard] = shard == shards[0]
        return [Check(shard) for shard in shards]

    def _count_fruitless_death(self) -> None:
        """Count a death without a commit. The count starts again at every commit of any worker."""
        self._deaths += 1
        if self._deaths >= max(self.worker_deaths, 2 * self.n_workers):  # losing a node of many at once is one event
            how = f"{counted(self._deaths, 'worker')} died in a row without finishing a shard"
            self._stop(Stop(6, f"{how}; the last: {self._last_death}"))

    def _trouble(self, shard: ShardKey, kind: str, detail: str) -> None:
        if kind == "internal":
            self._again(shard, detail)
            self._internal = self._internal or shard in self.stuck
        elif kind == "outage":
            if self.outage:
                self.attempts[shard] -= 1  # the shard did not cause it
            self._again(shard, detail)
            self._pause(detail)
        elif kind == "withdrawn":
            self.attempts[shard] -= 1
            self.queue.appendleft(shard)
        else:
            self.queue.appendleft(shard)
            self._stop(Stop(6 if kind == "store" else 2, detail))

    def _again(self, shard: ShardKey, detail: str) -> None:
        if self.attempts[shard] >= self.shard_attempts:
            self.stuck[shard] = detail
        else:
            self.queue.append(shard)

    def _pause(self, detail: str) -> None:
        """Dispatch nothing until a trial shard is done. Shards in progress continue."""
        self.outage, self.trials = detail, 0

    def _leave(self, worker: int, shard: ShardKey) -> None:
        given = self.in_flight[worker]
        assert shard in given, f"worker {worker} answered for {shard}, which it was not given ({given})"
        given.remove(shard)
        if not given:
            del self.in_flight[worker]
            self.idle.add(worker)

    def _count(self, shard: ShardKey, n_videos: int, n_clips: int, failures: tuple[tuple[str, int], ...]) -> None:
        assert shard in self.open, f"shard {shard} is counted twice"
        self.open.discard(shard)
        self.alone.discard(shard)
        self.attempts.pop(shard, None)  # else a long job would keep all of them
        self._deaths, self.outage, self.trials = 0, "", 0
        self.totals.videos += n_videos
        self.totals.clips += n_clips
        self.totals.failures.update(dict(failures))
        if self._first_videos < FIRST_VIDEOS:
            self._first_videos += n_videos
            self._first.update(dict(failures))
        self._stop_if_hopeless()

    def _stop_if_hopeless(self) -> None:
        if sentence := self._hopeless():
            self._stop(Stop(6, sentence))

    def _hopeless(self) -> str | None:
        """A message if the job should stop by the rule of `--max-failures`, else None."""
        rule, failed = self.max_failures, self.totals.failed
        share = 100 * failed / max(self.n_videos, 1)
        if rule.count is not None and failed > rule.count:
            return f"{counted(failed, 'video')} failed, more than --max-failures {rule.count}"
        if rule.percent is not None and share > rule.percent:
            return f"{share:.1f}% of all videos failed, more than --max-failures {rule.percent:g}%"
        reason, count = max(self._first.items(), key=lambda item: item[1], default=("", 0))
        if rule.count is None and rule.percent is None and 2 * count > max(FIRST_VIDEOS, self._first_videos):
            return (
                f"{count} of the first {self._first_videos} videos failed with {reason}, so the job looks hopeless; "
                "see `p3d failures`, and use --max-failures to continue nevertheless"
            )
        return None

    def _stop(self, stop: Stop) -> None:
        """The first stop counts, but a stop without drain overrides one with it."""
        if self.stopping is None or (self.stopping.drain and not stop.drain):
            self.stopping = stop

    # -- commands that follow from the state

    def _settle(self, commands: list[Command]) -> list[Command]:
        if self.stopping is not None and (self.open or self.counting):
            if not self.stopping.drain or not (self.in_flight or self.checking):
                return [*commands, *self._end(self.stopping.exit_code, self.stopping.sentence)]
            busy = sorted(self.in_flight.keys() - self.draining)
            self.draining.update(busy)
            return [*commands, *map(Drain, busy)]
        while (worker := self._free()) is not None:
            shard = self.queue.popleft()
            self.trials -= bool(self.outage)
            self.idle.discard(worker)
            self.in_flight.setdefault(worker, []).append(shard)
            self.attempts[shard] += 1
            commands.append(Dispatch(worker, shard))
        if not self.queue and not self.in_flight and not self.checking and not self.counting:
            return [*commands, *self._end(*self._outcome())]
        states = min(self.n_workers, self.trials) if self.outage else self.n_workers
        wanted = min(states, len(self.queue) + len(self.in_flight))
        while len(self.starting) + len(self.idle) + len(self.in_flight) < wanted:
            self.starting.add(self._next_worker)
            commands.append(StartWorker(self._next_worker))
            self._next_worker += 1
        return commands

    def _free(self) -> int | None:
        """The worker that takes the first shard of the queue now: an idle one, else one that may take another."""
        if not self.queue or (self.outage and not self.trials):
            return None
        if self.idle:
            return min(self.idle)
        plenty = len(self.queue) - (self.n_workers - len(self.in_flight)) >= self.n_workers
        if self.outage or not plenty or self.queue[0] in self.alone:
            return None
        most, alone, in_flight = self.shards_each, self.alone, self.in_flight
        able = [worker for worker, shards in in_flight.items() if len(shards) < most and alone.isdisjoint(shards)]
        return min(able, key=lambda worker: (len(in_flight[worker]), worker), default=None)

    def _outcome(self) -> tuple[int, str]:
        if self.stuck:
            shard, detail = next(iter(self.stuck.items()))
            return (1 if self._internal else 6), (
                f"{counted(len(self.stuck), 'shard')} failed {counted(self.shard_attempts, 'time')} each; the first, "
                f"{shard}: {detail}"
            )
        failed = self.totals.failed
        if defects := self.totals.failures[Reason.INTERNAL]:
            return 1, f"finished, but {counted(defects, 'video')} failed because of a defect of this program"
        if failed:
            return 3, f"finished: {counted(self.totals.videos - failed, 'video')} embedded, {failed} failed"
        return 0, f"finished: {counted(self.totals.videos, 'video')} embedded, none failed"

    def _end(self, exit_code: int, sentence: str) -> list[Command]:
        self.finished = Finish(exit_code, sentence)
        workers = sorted(self.starting | self.idle | self.in_flight.keys())
        return [*[StopWorker(worker) for worker in workers], self.finished]
